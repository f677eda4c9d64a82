#!/usr/bin/env python3
"""A web page that detects words in uploaded images, at http://127.0.0.1:7860. Needs the extra web; network only to
fetch --weights by name. The authors' detectors show what their notebook does (vild/inference/display.py).

    tools/web_demo.py --weights output/quickstart/detector
"""

import os
import signal
import sys
from pathlib import Path

from vild.utils.command_line import add_model_flags, at_least, make_parser
from vild.utils.errors import NotAvailable, UserError, one_line_errors

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MOST_EXAMPLES = 8


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines connect")
    parser.add_argument("--port", type=at_least(1, 65535), default=7860, metavar="N", help="port to listen on")
    text = f"offer its first {MOST_EXAMPLES} images (default: some that the detector may know)"
    parser.add_argument("--examples", type=Path, metavar="FOLDER", help=text)
    add_model_flags(parser)
    args = parser.parse_args()

    # before anything imports gradio or huggingface_hub
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    if args.weights is None or Path(args.weights).exists():  # no other may need the network
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vild.checkpoint.pretrained import config_from_flags
    from vild.inference.predictor import OpenVocabularyDetector

    try:
        from vild.apps.web_page import serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[web]'") from error

    examples = examples_of(args.examples) if args.examples else None
    detector = OpenVocabularyDetector(config_from_flags(args), disk_cache=False)  # visitors' words are not stored
    detector = detector.for_display()
    try:
        detector.teacher  # noqa: B018  report a missing teacher now, not to the first visitor
    except NotAvailable as error:
        if detector.trained.prompts != "import":  # whose own names need none
            raise
        print(f"warning: {error}. Until then only its own {len(detector.trained):,} names are found", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    serve(detector, examples, args.host, args.port)


def examples_of(folder: Path) -> list[Path]:
    """The first images of a folder."""
    if not folder.is_dir():
        raise UserError(f"--examples: {folder} is not a folder")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"--examples: {folder} contains no image ({', '.join(SUFFIXES)})")
    return files[:MOST_EXAMPLES]


if __name__ == "__main__":
    main()
