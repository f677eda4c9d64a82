#!/usr/bin/env python3
"""Find words in images, a video or a camera: what was found, drawn and as JSON.

    tools/demo.py --config-file configs/Glyphs/vild.yaml --input a.jpg photos/ --output out/ \\
        --vocabulary "umbrella, chess knight" --opts MODEL.WEIGHTS output/quickstart/vild/model_final.pth
    tools/demo.py --model detector/ --video-input in.mp4 --output out.mp4 --vocabulary "kite, horse | pony" \\
        --negatives "flag" --threshold-of kite=0.3

Beside each image lies NAME.json, beside a video NAME.jsonl with a line a frame. A camera's video is written until
Ctrl-C; no window is shown. Of several images those that cannot be read are listed at the end (exit status 1).
"""

import argparse
import signal
import sys
import threading
from pathlib import Path

from vild.apps.command_line import add_detector_arguments, add_overrides, make_detector
from vild.apps.demo import annotate_images, annotate_video, image_targets, video_target, writing
from vild.apps.inputs import find_images
from vild.apps.video import open_camera, open_video
from vild.utils.errors import UserError, one_line_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_detector_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="images, and folders of them")
    source.add_argument("--video-input", metavar="FILE")
    source.add_argument("--webcam", nargs="?", type=int, const=0, metavar="INDEX", help="a camera (the first)")
    parser.add_argument(
        "--output", type=Path, required=True, help="a folder; or a file, of one image or a video (.mp4)"
    )
    parser.add_argument("--frames", type=int, help="of a video or a camera, at most so many")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, metavar="SCORE")
    add_overrides(parser)
    return parser.parse_args(argv)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.frames is not None and args.frames < 1:
        raise UserError(f"--frames {args.frames}: give at least 1")
    return on_images(args) if args.input else on_frames(args)


def on_images(args: argparse.Namespace) -> int:
    images = find_images(args.input, leave_out=args.output)
    one_file = len(args.input) == 1 and not Path(args.input[0]).is_dir()
    targets = image_targets(images, args.output, one_file)
    with writing(args.output, targets[0].parent):
        broken = annotate_images(make_detector(args, args.confidence_threshold), images, targets)
    if broken and len(images) == 1:
        raise UserError(broken[0])
    if broken:
        print(f"{len(broken)} of {len(images)} images cannot be read:", *broken, sep="\n  ", file=sys.stderr)
    return 1 if broken else 0


def on_frames(args: argparse.Namespace) -> int:
    if args.video_input:
        target, source = video_target(args.output, Path(args.video_input).stem), open_video(args.video_input)
        if target.resolve() == Path(args.video_input).resolve():
            raise UserError(f"--output {args.output}: the result would take the place of the video")
    else:
        stop = threading.Event()
        target, source = video_target(args.output, "webcam"), open_camera(args.webcam, stop)
    with source as frames, writing(args.output, target.parent):
        detector = make_detector(args, args.confidence_threshold)
        if args.video_input is None:  # from here on Ctrl-C ends the video, which is whole then
            signal.signal(signal.SIGINT, lambda *_: stop.set())
        count = annotate_video(detector, frames, target, args.frames)
    print(f"{target}: {count} frames; what was found in each: {target.with_suffix('.jsonl')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
