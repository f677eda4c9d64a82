#!/usr/bin/env python3
"""A backend that proposes boxes for the labels of a Label Studio project: its Model URL is http://127.0.0.1:9090.

    tools/label_studio.py --weights output/quickstart/detector --input photos

The labelling config needs RectangleLabels for an Image. --input is the folder of the tasks' images: of Label Studio's
local files (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT), or for uploads the folder media of its data folder. URLs are never
fetched, and nothing is trained.
"""

import signal
from pathlib import Path

from vild.utils.command_line import add_model_flags, add_shared, at_least, make_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="FOLDER", help="images of tasks are below it")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines connect")
    parser.add_argument("--port", type=at_least(1, 65535), default=9090, metavar="N", help="port to listen on")
    add_shared(parser, "--threshold")
    add_model_flags(parser)
    args = parser.parse_args()
    if not args.input.is_dir():
        raise UserError(f"--input {args.input}: is not a folder")

    from vild.apps.label_studio import Backend, make_server
    from vild.checkpoint.pretrained import config_from_flags
    from vild.inference.predictor import OpenVocabularyDetector

    detector = OpenVocabularyDetector(config_from_flags(args))
    detector.teacher  # noqa: B018  report a missing teacher now, not to the first request
    try:
        server = make_server(Backend(detector, args.input, args.threshold), args.host, args.port)
    except OSError as error:
        raise UserError(f"--port {args.port}: {error.strerror}") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    print(f"Model URL: http://{args.host}:{args.port}")
    server.serve_forever()


if __name__ == "__main__":
    main()
