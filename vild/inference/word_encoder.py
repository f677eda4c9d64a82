"""Words to vocabularies: those that are asked for, and those that compete with them in the softmax."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vild.inference.examples import Examples, read_examples
from vild.inference.text_encoder import TextEncoder
from vild.utils.errors import UserError
from vild.utils.files import cache_folder
from vild.vocabulary.cache import TextCache
from vild.vocabulary.grow import with_examples
from vild.vocabulary.prompts import LearnedPrompts, clean_name, find_prompts
from vild.vocabulary.regions import Gap
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import Words

logger = logging.getLogger(__name__)


class WordEncoder:
    """Encodes words as a detector's own names were, by default with the same prompts.

    Args:
        text: the text encoder, which is asked for what is not in the cache.
        trained: the detector's vocabulary.
        disk_cache: cache embeddings of words on disk too.
        gap: of the detector's calibration, if it has one.
    """

    def __init__(self, text: TextEncoder, trained: Vocabulary, disk_cache: bool, gap: Gap | None = None):
        self.text, self.trained, self.gap = text, trained, gap
        self.prompts = "vild" if trained.prompts == "import" else trained.prompts
        self.cache = TextCache(trained.fingerprint, cache_folder() if disk_cache else None)
        if trained.prompts == "import":  # embeddings that no encoder gives again
            self.cache.keep(trained.names, find_prompts(self.prompts), trained.embeddings)

    def encode(self, words: Words, prompts: str | LearnedPrompts | None = None) -> Vocabulary:
        """A vocabulary, with the splits of the detector's names."""
        made = Vocabulary.from_names(self.text, words, prompts=prompts or self.prompts, cache=self.cache)
        return made.marked_by(self.trained)

    def shown(
        self, words: Words | Vocabulary | None, examples: Examples | None, prompts: str | LearnedPrompts | None
    ) -> Vocabulary:
        """The vocabulary of words, examples or both; a word that has examples is their mean."""
        if words is None and not examples:
            raise UserError("vocabulary: it is empty; give words or examples")
        made = self.encode(words, prompts) if isinstance(words, Words) else words
        if not examples:
            return made
        names, images, boxes = read_examples(examples)
        if self.gap is None:
            logger.warning("examples: the checkpoint was not calibrated with its teacher at hand: examples and words "
                           "may score differently (tools/calibrate.py)")  # fmt: skip
        regions = Vocabulary.from_regions(self.text.teacher, names, images, boxes, self.gap).marked_by(self.trained)
        return regions if made is None else with_examples(made, regions)

    def competitors(
        self,
        shown: Vocabulary,
        negatives: Sequence[str],
        rules: Sequence[str],
        prompts: str | LearnedPrompts | None,
        context: bool,
    ) -> list[Vocabulary]:
        """Vocabularies that compete with ``shown``, without the spellings it has: a class that occurred twice would
        share its score with itself.

        Args:
            negatives: words that are not meant; UserError if ``shown`` has one of them.
            rules: words of the display rules; left out with a warning if they cannot be encoded.
            context: with the base names of training, but not those that a region under another name is an example of.
        """
        taken, result = _spellings(shown), []
        unwanted = (*negatives, *self._encodable(rules, {*taken, *map(clean_name, negatives)}, prompts))
        if unwanted:
            made = self.encode(_alone(unwanted), prompts)
            both = next((name for i, name in enumerate(made.names) if made.spellings(i) & taken), None)
            if both is not None:
                raise UserError(f"negatives: '{both}' is also asked for")
            taken |= _spellings(made)
            result.append(made)
        if context:
            splits = self.trained.splits
            same = self._same_things(shown)
            keep = [i for i, split in enumerate(splits)
                    if split == "base" and not (same[i] or self.trained.spellings(i) & taken)]  # fmt: skip
            if keep:
                result.append(self.trained.take(keep))
        return result

    def _same_things(self, shown: Vocabulary) -> list[bool]:
        """Which of the detector's names a class by example is so near to that it would share its score with it. A name
        that the detector knows says itself what it is."""
        unknown = [i for i, made in enumerate(shown.made_of) if made and not shown.splits[i]]
        if self.gap is None or not unknown:
            return [False] * len(self.trained)
        return (self.trained.embeddings @ shown.embeddings[unknown].T).amax(1).ge(self.gap.near).tolist()

    def _encodable(self, words: Sequence[str], taken: set[str], prompts) -> tuple[str, ...]:
        """The words that are not ``taken``; without a text encoder none, with a warning."""
        words = tuple(word for word in words if word not in taken)
        try:
            return self.encode(_alone(words), prompts).names if words else ()
        except UserError as error:
            logger.warning("%s. Detecting without it", error)
            return ()


def _spellings(vocabulary: Vocabulary) -> set[str]:
    return {spelling for i in range(len(vocabulary)) for spelling in vocabulary.spellings(i)}


def _alone(names: Sequence[str]) -> Words:
    """Words without synonyms."""
    return Words(tuple(names), ((),) * len(names))
