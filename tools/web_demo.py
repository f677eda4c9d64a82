#!/usr/bin/env python3
"""A page to find words in images with: http://127.0.0.1:7860 unless told otherwise. Needs the extra web, no network.

    tools/web_demo.py --config-file configs/Glyphs/vild.yaml --opts \\
        MODEL.WEIGHTS output/quickstart/vild/model_final.pth MODEL.VILD.TEACHER.NAME local-dir:output/quickstart/teacher
"""

import argparse
import os
import signal
from pathlib import Path

# before anything imports gradio or huggingface_hub
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vild.config import load_config
from vild.data import datasets
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError, one_line_errors

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MOST_EXAMPLES = 8


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config-file", help="with --opts MODEL.WEIGHTS ...")
    which.add_argument("--model", type=Path, help="a folder of OpenVocabularyDetector.save")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: this one alone)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--examples", type=Path, help=f"folder of images, of which the first {MOST_EXAMPLES} can be picked"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides, KEY VALUE ...")
    args = parser.parse_args()
    try:
        from vild.apps.web_page import serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[web]'") from error

    examples = examples_of(args.examples)
    if args.model:  # strangers' words are not kept on the disk
        detector = OpenVocabularyDetector.from_folder(args.model, disk_cache=False)
    else:
        detector = OpenVocabularyDetector(load_config(args.config_file, args.opts), disk_cache=False)
    detector.teacher  # noqa: B018  a teacher that is missing is told now, not to the first visitor
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended in the same way as by Ctrl-C
    serve(detector, examples, args.host, args.port)


def examples_of(folder: Path | None) -> list[Path]:
    """The first images of a folder; of none, those of the built-in world where it is."""
    world = datasets.root() / "glyphs" / "val"
    if folder is None and not world.is_dir():
        return []
    if folder is not None and not folder.is_dir():
        raise UserError(f"--examples: {folder} is no folder")
    files = sorted(p for p in (folder or world).iterdir() if p.suffix.lower() in SUFFIXES)
    if folder is not None and not files:
        raise UserError(f"--examples: {folder} holds no image ({', '.join(SUFFIXES)})")
    return files[:MOST_EXAMPLES]


if __name__ == "__main__":
    main()
