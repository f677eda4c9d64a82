"""The flags that tools share in which a user asks a detector for words."""

from __future__ import annotations

import argparse

from vild.config import load_config
from vild.inference.predictor import OpenVocabularyDetector
from vild.inference.words import parse_thresholds, parse_words, read_words
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """Which detector, and which words; :func:`make_detector` reads them."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", help="a config; the checkpoint by --opts MODEL.WEIGHTS FILE")
    model.add_argument("--model", metavar="FOLDER", help="or a folder that OpenVocabularyDetector.save wrote")
    parser.add_argument(
        "--vocabulary",
        help='words, "umbrella, chess knight | horse"; a file with a word a line; a vocabulary .safetensors; or the '
        "names of a data set (default: as trained)",
    )
    parser.add_argument("--negatives", metavar="WORDS", help='"not these": they take part and are never reported')
    parser.add_argument(
        "--threshold-of",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=SCORE",
        help="thresholds of single words",
    )
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """``--opts``, the last flag: it takes all that follows."""
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides, KEY VALUE ...")


def make_detector(args: argparse.Namespace, threshold: float) -> OpenVocabularyDetector:
    """The detector of these flags; a word is reported above its own threshold, or else above ``threshold``.

    Raises:
        UserError: words, thresholds, a config or a checkpoint that cannot be used.
    """
    words = None if args.vocabulary is None else read_words(args.vocabulary)  # before the seconds that loading takes
    if args.negatives and (words is None or isinstance(words, Vocabulary)):
        raise UserError("--negatives: give words by --vocabulary too; a vocabulary file is taken as it is")
    if args.model and args.opts:
        raise UserError("--opts: they go with --config-file; what lies in a folder of --model is taken as it is")
    if args.model:
        detector = OpenVocabularyDetector.from_folder(args.model, "cpu" if args.cpu else None)
    else:
        overrides = [*args.opts, *(["MODEL.DEVICE", "cpu"] if args.cpu else [])]
        detector = OpenVocabularyDetector(load_config(args.config_file, overrides))
    words = detector.trained if words is None else words
    own = parse_thresholds(args.threshold_of, words.names)
    for value in (threshold, *own.values()):
        if not 0 <= value <= 1:
            raise UserError(f"threshold {value}: scores are between 0 and 1")
    thresholds = {name: own.get(name, threshold) for name in words.names}
    if isinstance(words, Vocabulary):
        return detector.with_vocabulary(words, thresholds=thresholds)
    negatives = parse_words(args.negatives.split(",")).names if args.negatives else ()
    return detector.with_vocabulary(words.names, synonyms=words.synonyms, negatives=negatives, thresholds=thresholds)
