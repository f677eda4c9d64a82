"""The argument parser of the tools, and the flags that several of them share.

Needs the standard library only: ``--help`` and a mistyped flag are answered before torch and Detectron2 are imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Default score threshold wherever a person looks at detections. Of calibrated detections scored 0.4 to 0.5 about every
# second one is right; on the built-in world's dev scenes the F1 of base names is flat between 0.35 and 0.55
THRESHOLD = 0.4
NUM_WORKERS = min(16, os.cpu_count() or 1)


def between_0_and_1(text: str) -> float:
    """The ``type`` of a flag that takes a score or a fraction."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


between_0_and_1.__name__ = "float"  # argparse's message has it


def at_least(low: int, high: float = float("inf")) -> Callable[[str], int]:
    """The ``type`` of a flag that takes a whole number from ``low`` to ``high``."""

    def read(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is {'less' if int(text) < low else 'more'} than "
                                             f"{low if int(text) < low else high}")  # fmt: skip
        return int(text)

    read.__name__ = "int"  # argparse's message has it
    return read


# Each shared flag has one meaning, default and help text in all tools; a tool may add a note (see add_shared)
SHARED = {
    "--config-file": {"metavar": "FILE", "help": 'a config file, or the name of a built-in one ("LVIS/vild.yaml")'},
    "--weights": {
        "metavar": "NAME",
        "help": "a checkpoint file, with --config-file; or alone a detector: vild-r50, vild-r50-ensemble, vild-r152 or "
        "vild-r152-ensemble of the authors, hf-hub:OWNER/NAME, or a folder written by export.py",
    },
    "--opts": {"nargs": argparse.REMAINDER, "default": [], "help": "config overrides, KEY VALUE ...; must come last"},
    "--device": {"help": '"cpu", "cuda", "cuda:1", ... (default: a GPU if there is one, else the CPU)'},
    "--vocabulary": {
        "metavar": "WORDS",
        "help": 'what to detect: words ("umbrella, chess knight | horse", with synonyms after "|"), a file of words '
        "(with commas or line ends, a JSON list, a data.yaml), a vocabulary .safetensors, or the name of a data set",
    },
    "--threshold": {
        "type": between_0_and_1, "default": THRESHOLD, "metavar": "SCORE", "help": "minimum score of a detection",
    },
    "--dataset": {"metavar": "NAME", "help": "a registered data set"},
    "--teacher": {
        "metavar": "NAME",
        "help": "the teacher: an open_clip model name, local-dir:FOLDER, or KIND:... (vild/teacher/KIND.py)",
    },
    "--pretrained": {
        "default": "", "metavar": "TAG",
        "help": 'its weights: an open_clip tag, a file, or "random" (not for local-dir:)',
    },
    "--num-workers": {
        "type": at_least(0), "default": NUM_WORKERS, "metavar": "N", "help": "workers that read and decode images",
    },
    "--batch-size": {"type": at_least(1), "metavar": "N", "help": "batch size"},
    "--prompts": {"default": "vild", "metavar": "SET", "help": "vild (63 templates), photo, name, or a learned file"},
    "--seed": {"type": at_least(0), "default": 0, "metavar": "N", "help": "random seed"},
    "--output": {"type": Path, "metavar": "FILE", "help": "output file"},
    "--output-dir": {"type": Path, "metavar": "FOLDER", "help": "output folder"},
}  # fmt: skip


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, unless it is empty or the help text names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help
        if not action.option_strings or default is None or default is False or default in ("", [], argparse.SUPPRESS):
            return text
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        return text if "(default:" in text else f"{text} (default: {default})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the tool's docstring as its description. Flags cannot be abbreviated; a mistake is one line."""
    return _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def add_shared(parser, *flags: str, note: str = "", **settings) -> None:
    """Add flags of :data:`SHARED` to a parser or a group.

    Args:
        note: appended to the help text.
        settings: further arguments of ``add_argument``, such as ``required``.
    """
    for flag in flags:
        shared = {**SHARED[flag], **settings}
        parser.add_argument(flag, **{**shared, "help": f"{shared['help']}; {note}" if note else shared["help"]})


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model: ``vild.checkpoint.pretrained.config_from_flags`` reads them. Call it last: ``--opts`` takes all that
    follows."""
    add_shared(parser, "--config-file", note="not where --weights brings its own")
    add_shared(parser, "--weights", "--device", "--opts")


def add_detector_flags(parser: argparse.ArgumentParser) -> None:
    """Which detector, and which words: ``vild.apps.detector.make_detector`` reads them, with ``--threshold``."""
    add_shared(parser, "--vocabulary", note="default: the --example names, or else its own names, base and novel")
    parser.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="IMAGE:X0,Y0,X1,Y1=NAME",
        help="a region of an image, in pixels, that stands for NAME, with its word if --vocabulary has it or instead; "
        "repeat the flag for more regions or names",
    )
    parser.add_argument("--negatives", metavar="WORDS", help="words that compete for each region but are not reported")
    parser.add_argument(
        "--threshold-of",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=SCORE",
        help="minimum scores of single words, instead of --threshold",
    )
    add_model_flags(parser)


def add_launch_flags(parser: argparse.ArgumentParser, dist_url: str = "auto") -> None:
    """Detectron2's flags for several processes; ``vild.engine.launch.launch`` reads them."""
    parser.add_argument("--num-gpus", type=int, default=1, help="number of gpus *per machine*")
    parser.add_argument("--num-machines", type=int, default=1, help="total number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="the rank of this machine (unique per machine)")
    parser.add_argument("--dist-url", default=dist_url, help="where the processes meet (torch.distributed)")


def training_parser(description: str) -> argparse.ArgumentParser:
    """``detectron2.engine.default_argument_parser``, without importing Detectron2: the same flags and defaults."""
    parser = make_parser(description)
    parser.add_argument("--config-file", default="", metavar="FILE", help=SHARED["--config-file"]["help"])
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="perform evaluation only")
    # Detectron2's own port per user
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    add_launch_flags(parser, f"tcp://127.0.0.1:{port}")
    help_text = "config overrides at the end of the command, KEY VALUE ..."
    parser.add_argument("opts", nargs=argparse.REMAINDER, default=None, help=help_text)
    return parser
