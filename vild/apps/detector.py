"""The detector that a tool's flags ask for."""

from __future__ import annotations

import argparse
import logging

from vild.checkpoint.pretrained import config_from_flags
from vild.inference.examples import parse_examples
from vild.inference.predictor import OpenVocabularyDetector
from vild.inference.thresholds import parse_thresholds
from vild.inference.words import read_words
from vild.utils.errors import UserError, printable
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import parse_negatives

logger = logging.getLogger(__name__)


def make_detector(args: argparse.Namespace, display: bool = False) -> OpenVocabularyDetector:
    """The detector of the flags of ``command_line.add_detector_flags``, with their words. A word is reported above its
    ``--threshold-of``, or else above ``--threshold``. ``display``: see ``OpenVocabularyDetector.for_display``. Asked
    for words, a detector of the built-in world warns that it knows no others.

    Raises:
        UserError: words, examples, thresholds, a config or weights that cannot be used.
    """
    # mistakes come before the seconds that loading takes
    words, examples = None if args.vocabulary is None else read_words(args.vocabulary), parse_examples(args.example)
    if args.negatives and ((words is None and not examples) or isinstance(words, Vocabulary)):
        raise UserError("--negatives: only with words in --vocabulary; a vocabulary file is used as it is")
    negatives = parse_negatives(args.negatives or (), files=True)
    detector = OpenVocabularyDetector(config_from_flags(args))
    detector = detector.for_display() if display else detector
    words = detector.trained if words is None and not examples else words
    detector = detector.with_vocabulary(words, examples=examples, negatives=negatives)
    if detector.world and (args.vocabulary or examples):
        unknown = [name for name, split in zip(detector.names, detector.vocabulary.splits, strict=True) if not split]
        more = f" Not in training: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}" if unknown else ""
        logger.warning("%s%s", detector.world, printable(more))
    own = parse_thresholds(args.threshold_of, detector.names)
    return detector.with_thresholds({name: own.get(name, args.threshold) for name in detector.names})
