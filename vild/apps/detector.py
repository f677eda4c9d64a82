"""The detector that a tool's flags ask for."""

from __future__ import annotations

import argparse
from pathlib import Path

from vild.config import config_from_flags, pick_device
from vild.inference.predictor import OpenVocabularyDetector
from vild.inference.words import parse_thresholds, read_words
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import parse_negatives


def load_detector(args: argparse.Namespace, disk_cache: bool = True) -> OpenVocabularyDetector:
    """The detector of ``--config-file``, ``--weights``, ``--device`` and ``--opts``.

    Raises:
        UserError: a config or weights that cannot be used.
    """
    if args.weights and Path(args.weights).is_dir():
        if args.config_file or args.opts:
            raise UserError(f"--weights {args.weights}: a folder has its own config; give no --config-file or --opts")
        return OpenVocabularyDetector.from_folder(args.weights, pick_device(args.device), disk_cache)
    if not args.config_file:
        raise UserError("give --config-file, or --weights with a folder that tools/export.py wrote")
    return OpenVocabularyDetector(config_from_flags(args), disk_cache)


def make_detector(args: argparse.Namespace) -> OpenVocabularyDetector:
    """The detector of the flags of ``command_line.add_detector_flags``, with their words. A word is reported above its
    ``--threshold-of``, or else above ``--threshold``.

    Raises:
        UserError: words, thresholds, a config or weights that cannot be used.
    """
    words = None if args.vocabulary is None else read_words(args.vocabulary)  # before the seconds that loading takes
    if args.negatives and (words is None or isinstance(words, Vocabulary)):
        raise UserError("--negatives: only with words in --vocabulary; a vocabulary file is used as it is")
    negatives = parse_negatives(args.negatives or (), files=True)
    detector = load_detector(args)
    words = detector.trained if words is None else words
    own = parse_thresholds(args.threshold_of, words.names)
    for value in (args.threshold, *own.values()):
        if not 0 <= value <= 1:
            raise UserError(f"threshold {value}: scores are between 0 and 1")
    thresholds = {name: own.get(name, args.threshold) for name in words.names}
    if isinstance(words, Vocabulary):
        return detector.with_vocabulary(words, thresholds=thresholds)
    return detector.with_vocabulary(words, negatives=negatives, thresholds=thresholds)
