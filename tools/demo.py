#!/usr/bin/env python3
"""Detect words in images, a video or a camera: drawn, and as JSON.

    tools/demo.py --weights output/quickstart/detector --input a.jpg photos/ --output out/ \\
        --vocabulary "umbrella, chess knight"
    tools/demo.py --weights vild-r50-ensemble --input in.mp4 --output out.mp4 --vocabulary "kite, horse | pony" \\
        --negatives "flag" --threshold-of kite=0.3

Each result has its detections beside it: NAME.json for an image, NAME.jsonl for a video, one line per frame. A camera
is recorded until Ctrl-C; no window is shown. Images that cannot be read are listed at the end (exit status 1). The
authors' detectors show what their notebook does: at most 25 boxes, of probable objects (vild/inference/display.py).
"""

import signal
import sys
import threading
from pathlib import Path

from vild.utils.command_line import SHARED, add_detector_flags, at_least, make_parser
from vild.utils.errors import UserError, count_of, one_line_errors

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


def parse(argv):
    parser = make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images and folders of images, or one video")
    source.add_argument("--video-input", metavar="FILE", help="a video, whatever its suffix")
    source.add_argument("--webcam", nargs="?", type=at_least(0), const=0, metavar="INDEX", help="a camera (the first)")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", required=True, help="output folder; or a file, for one image or video"
    )
    parser.add_argument("--frames", type=at_least(1), metavar="N", help="stop after this many frames")
    parser.add_argument("--threshold", "--confidence-threshold", **SHARED["--threshold"])
    add_detector_flags(parser)
    args = parser.parse_args(argv)
    videos = [path for path in args.input or () if path.lower().endswith(VIDEOS)]
    if videos and len(args.input) > 1:
        raise UserError(f"--input {videos[0]}: is a video; give it alone")
    if videos:
        args.input, args.video_input = None, videos[0]
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return on_images(args) if args.input else on_frames(args)


def on_images(args) -> int:
    from vild.apps.demo import annotate_images, image_targets
    from vild.apps.detector import make_detector
    from vild.apps.inputs import find_images
    from vild.utils.files import new_folder

    images = find_images(args.input, leave_out=args.output)
    one_file = len(args.input) == 1 and not Path(args.input[0]).is_dir()
    targets = image_targets(images, args.output, one_file)
    with new_folder(targets[0].parent if one_file else args.output):  # before the seconds that loading takes
        broken = annotate_images(make_detector(args, display=True), images, targets)
        if len(broken) == len(images):
            raise UserError(broken[0] if len(images) == 1 else f"no image can be read: {broken[0]}; ...")
    if broken:
        print(f"{len(broken)} of {len(images)} images cannot be read:", *broken, sep="\n  ", file=sys.stderr)
    return 1 if broken else 0


def on_frames(args) -> int:
    from vild.apps.detector import make_detector
    from vild.utils.files import new_folder

    try:
        from vild.apps.video import annotate_video, open_camera, open_video, video_target
    except ModuleNotFoundError as error:
        raise UserError(f"videos need the package {error.name}: pip install -e '.[video]'") from error

    if args.video_input:
        target, source = video_target(args.output, Path(args.video_input).stem), open_video(args.video_input)
        if target.resolve() == Path(args.video_input).resolve():
            raise UserError(f"--output {args.output}: would overwrite the input video")
    else:
        stop = threading.Event()
        target, source = video_target(args.output, "webcam"), open_camera(args.webcam, stop)
    with source as frames, new_folder(target.parent):
        detector = make_detector(args, display=True)
        if args.video_input is None:  # from here on Ctrl-C ends the recording, and the file is complete
            signal.signal(signal.SIGINT, lambda *_: stop.set())
        count = annotate_video(detector, frames, target, args.frames)
    print(f"{target}: {count_of(count, 'frame')}; detections of each frame: {target.with_suffix('.jsonl')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
