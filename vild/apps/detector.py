"""The detector that a tool's flags ask for."""

from __future__ import annotations

import argparse

from vild.checkpoint.pretrained import config_from_flags
from vild.inference.predictor import OpenVocabularyDetector
from vild.inference.words import parse_thresholds, read_words
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import parse_negatives


def make_detector(args: argparse.Namespace, display: bool = False) -> OpenVocabularyDetector:
    """The detector of the flags of ``command_line.add_detector_flags``, with their words. A word is reported above its
    ``--threshold-of``, or else above ``--threshold``. ``display``: see ``OpenVocabularyDetector.for_display``.

    Raises:
        UserError: words, thresholds, a config or weights that cannot be used.
    """
    words = None if args.vocabulary is None else read_words(args.vocabulary)  # before the seconds that loading takes
    if args.negatives and (words is None or isinstance(words, Vocabulary)):
        raise UserError("--negatives: only with words in --vocabulary; a vocabulary file is used as it is")
    negatives = parse_negatives(args.negatives or (), files=True)
    detector = OpenVocabularyDetector(config_from_flags(args))
    detector = detector.for_display() if display else detector
    words = detector.trained if words is None else words
    own = parse_thresholds(args.threshold_of, words.names)
    for value in (args.threshold, *own.values()):
        if not 0 <= value <= 1:
            raise UserError(f"threshold {value}: scores are between 0 and 1")
    thresholds = {name: own.get(name, args.threshold) for name in words.names}
    if isinstance(words, Vocabulary):
        return detector.with_vocabulary(words, thresholds=thresholds)
    return detector.with_vocabulary(words, negatives=negatives, thresholds=thresholds)
