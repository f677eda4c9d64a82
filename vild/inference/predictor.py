"""The Python API: detect any words in an image."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vild.checkpoint.checkpointer import VildCheckpointer, read_network_record, save_weights
from vild.checkpoint.pretrained import detector_config, folder_config
from vild.checkpoint.released_archives import CONFIG, TEACHER, WEIGHTS
from vild.data import datasets
from vild.data.mapper import resize_at_test
from vild.inference.detections import Detections
from vild.inference.display import NOTEBOOK, DisplayRules
from vild.inference.image_input import ImageInput, as_array
from vild.inference.model_card import model_card
from vild.inference.text_encoder import TextEncoder
from vild.inference.words import read_words
from vild.modeling import build_model
from vild.modeling.classifier import ClassSet
from vild.utils.errors import UserError
from vild.utils.files import cache_folder, write_text
from vild.vocabulary.cache import TextCache
from vild.vocabulary.prompts import LearnedPrompts, clean_name, find_prompts
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import GivenWords, Words, parse_negatives

if TYPE_CHECKING:  # words in the cache need no teacher
    from vild.teacher.teacher import Teacher

logger = logging.getLogger(__name__)


class OpenVocabularyDetector:
    """A trained detector that detects any words.

    ``detector(image)`` detects the names it was trained with, ``detector(image, ["kite"])`` and
    ``detector.with_vocabulary(["kite"])(image)`` others. A detector is immutable: several threads can call it, each
    with its own vocabulary.

    Args:
        cfg: a frozen config (``vild.config.load_config``) with a checkpoint (``MODEL.WEIGHTS``), which holds the
            vocabulary. The teacher (``MODEL.VILD.TEACHER``) is loaded when a word is not in the cache.
        disk_cache: cache embeddings of words on disk, for other processes (see vild/vocabulary/cache.py).
    """

    def __init__(self, cfg, disk_cache: bool = True):
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: give a trained checkpoint")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.VILD.VOCABULARY = cfg.MODEL.WEIGHTS
        # needed in training only, or fixed to the classes of training
        cfg.MODEL.VILD.OBJECTIVES, cfg.MODEL.VILD.TEACHERS = [], []
        self.cfg = cfg
        self.model = build_model(cfg).eval()
        checkpointer = VildCheckpointer(self.model, calibrated=cfg.MODEL.VILD.CALIBRATION, trained=True)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        self.trained: Vocabulary = self.model.vocabulary
        self.vocabulary: Vocabulary = self.trained
        self.rules = DisplayRules()
        self.resize = resize_at_test(cfg)
        self._offered = self.model.roi_heads.classifier.current_classes
        self._text = TextEncoder(cfg, self.trained)
        self._cache = TextCache(self.trained.fingerprint, cache_folder() if disk_cache else None)
        if self.trained.prompts == "import":  # embeddings that no encoder gives again
            self._cache.keep(self.trained.names, find_prompts(_prompts_of(self.trained)), self.trained.embeddings)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        config_file: str | Path | None = None,
        device: str | None = None,
        disk_cache: bool = True,
    ) -> OpenVocabularyDetector:
        """Load a detector by name, downloaded if it is not on this machine.

        Args:
            name: "vild-r50", "vild-r50-ensemble", "vild-r152" or "vild-r152-ensemble", which the authors of ViLD
                published; "hf-hub:OWNER/NAME" of a Hugging Face repository; a folder that :meth:`save` or
                ``tools/export.py`` wrote; a file of weights, or its address as "https://...#sha256=...".
            config_file: of a file of weights; the others have their own.
            device: default: the best there is.

        Raises:
            NotAvailable: it is not here and cannot be downloaded.
            UserError: no such detector, or one that cannot be read.
        """
        return cls(detector_config(name, config_file, device), disk_cache)

    @classmethod
    def from_folder(
        cls, folder: str | Path, device: str | None = None, disk_cache: bool = True
    ) -> OpenVocabularyDetector:
        """Load a detector that :meth:`save` or ``tools/export.py`` wrote. ``device``: default: that of its config,
        a GPU where there is one.

        Raises:
            UserError: the folder does not contain one.
        """
        return cls(folder_config(folder, device), disk_cache)

    def save(
        self,
        folder: str | Path,
        teacher: bool = True,
        licence: str | None = None,
        run: str | Path | None = None,
        repository: str | None = None,
    ) -> None:
        """Write a self-contained folder: config, weights with vocabulary and, to encode new words, the teacher.

        Args:
            licence: also write a model card under this licence, for sharing the folder (see :func:`model_card`).
            run: output folder of the training or evaluation whose metrics the card quotes.
            repository: the OWNER/NAME under which the card tells how to load it.
        """
        folder = Path(folder)
        if licence is not None:
            repository = repository or f"OWNER/{folder.resolve().name}"
            write_text(folder / "README.md", model_card(self.cfg, self.model, repository, licence, run))
        if teacher:
            self.teacher.save(folder / TEACHER)
        save_weights(folder / WEIGHTS, self.model, read_network_record(self.cfg.MODEL.WEIGHTS)["trained_on"])
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cuda"  # where there is one
        write_text(folder / CONFIG, cfg.dump())  # last: its presence marks a complete folder

    @property
    def names(self) -> tuple[str, ...]:
        """Names that are detected; ``pred_classes`` are indices into it."""
        return self.vocabulary.names

    @property
    def world(self) -> str:
        """A sentence if the detector, and so its teacher, knows only the drawings of the built-in world, else ""."""
        from vild.glyphs.drawing import table

        if set(self.trained.names) != {glyph.name for glyph in table()}:
            return ""
        return f"This detector and its teacher know the {len(self.trained)} drawings of the built-in world only."

    @property
    def teacher(self) -> Teacher:
        """The text encoder. Raises UserError if it is not the one the detector was trained with."""
        return self._text.teacher

    def with_vocabulary(
        self,
        words: GivenWords | Words | Vocabulary,
        *,
        synonyms: Sequence[Sequence[str]] | None = None,
        prompts: str | LearnedPrompts | None = None,
        negatives: GivenWords = (),
        thresholds: Mapping[str, float] | None = None,
        context: bool | None = None,
    ) -> OpenVocabularyDetector:
        """A detector for these words that shares this one's weights.

        Args:
            words: a list of names ("umbrella | parasol" has a synonym); a string, which is read as ``--vocabulary`` of
                the tools (``read_words``: it may name a file); or a vocabulary, which is used unchanged.
            synonyms: for each word, more spellings; the embeddings are averaged.
            prompts: name or file of a prompt set (default: the one used in training).
            negatives: words that compete in the softmax but are never reported ("not these").
            thresholds: score thresholds of single words (default: SCORE_THRESH_TEST).
            context: keep the base names of training in the softmax, so that an object which is none of the words can
                be classified as something else. They are never reported. Default: with words, not with a vocabulary.

        Raises:
            UserError: no words, a duplicate, a threshold of an unknown word, or another teacher than in training.
        """
        words = read_words(words, synonyms)
        if isinstance(words, Vocabulary):
            shown, context = words, bool(context)
        else:
            shown, context = self._encode(words, prompts).marked_by(self.trained), context is not False
        unwanted = parse_negatives(negatives or (), files=True)
        spelled = {spelling for i in range(len(shown)) for spelling in shown.spellings(i)}
        unwanted = (*unwanted, *self._beside((*spelled, *unwanted), prompts))
        beside = self._context(shown, unwanted, prompts, context)
        for name, score in (thresholds or {}).items():
            if name not in shown.names:
                raise UserError(f"thresholds: '{name}' is not in the vocabulary")
            if not 0 <= score <= 1:
                raise UserError(f"thresholds: '{name}' has {score}: scores are between 0 and 1")
        default = self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        least = [thresholds.get(name, default) for name in shown.names] if thresholds else None
        other = copy.copy(self)
        other.vocabulary = shown
        other._offered = self.model.roi_heads.classifier.class_set([shown, *beside], least)
        return other

    def for_display(self) -> OpenVocabularyDetector:
        """For a person who looks at the detections: the authors' detectors as in their notebook (``NOTEBOOK`` in
        ``display.py``), any other unchanged. With the words it was trained on; give others to the result."""
        other = copy.copy(self)
        other.rules = NOTEBOOK if self.cfg.MODEL.META_ARCHITECTURE == "ReleasedRCNN" else self.rules
        return other.with_vocabulary(self.trained)

    def _encode(self, words: Words, prompts: str | LearnedPrompts | None = None) -> Vocabulary:
        prompts = prompts or _prompts_of(self.trained)
        return Vocabulary.from_names(self._text, words, prompts=prompts, cache=self._cache)

    def _beside(self, taken: Collection[str], prompts: str | LearnedPrompts | None) -> tuple[str, ...]:
        """Words of the display rules that are not ``taken``; without a text encoder none, with a warning."""
        taken = {clean_name(word) for word in taken}
        words = tuple(word for word in self.rules.beside if word not in taken)
        try:
            return self._encode(_alone(words), prompts).names if words else ()
        except UserError as error:
            logger.warning("%s. Detecting without it", error)
            return ()

    def _context(
        self, shown: Vocabulary, unwanted: tuple[str, ...], prompts: str | None, context: bool
    ) -> list[Vocabulary]:
        """Vocabularies that compete in the softmax with ``shown``, without the spellings it has: a class that occurred
        twice would share its score with itself."""
        beside = []
        taken = {spelling for i in range(len(shown)) for spelling in shown.spellings(i)}
        if unwanted:
            beside.append(self._encode(_alone(unwanted), prompts).marked_by(self.trained))
            both = next((n for i, n in enumerate(beside[0].names) if beside[0].spellings(i) & taken), None)
            if both is not None:
                raise UserError(f"negatives: '{both}' is also asked for")
            taken |= {spelling for i in range(len(beside[0])) for spelling in beside[0].spellings(i)}
        if context:
            splits = self.trained.splits
            keep = [i for i in range(len(splits)) if splits[i] == "base" and not self.trained.spellings(i) & taken]
            if keep:
                beside.append(self.trained.take(keep))
        return beside

    @torch.inference_mode()
    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        words: GivenWords | Words | Vocabulary | None = None,
        threshold: float | None = None,
        across_names: float | None = None,
    ) -> Detections | list[Detections]:
        """Detect in one image, or in several of different sizes.

        Args:
            images: a file, a PIL image, a uint8 array [H, W, 3] in the config's ``INPUT.FORMAT`` (by default BGR,
                as in Detectron2's predictor), a uint8 RGB tensor [3, H, W]; or a list or tuple of these.
            words: see :meth:`with_vocabulary`; for this call only.
            threshold: report only detections with a higher score.
            across_names: of two boxes of any names whose IoU is higher, report the one with the higher score; its
                ``alternatives`` tell what else it may be. 1: report both. (Evaluation does not do this.) Default: 0.7,
                or as :meth:`for_display` says.

        Returns:
            a :class:`Detections`, or a list of them.

        Raises:
            UserError: an unreadable image or invalid words.
        """
        if words is not None:
            return self.with_vocabulary(words)(images, None, threshold, across_names)
        if not isinstance(images, list | tuple):
            return self([images], None, threshold, across_names)[0]
        rules = self.rules if across_names is None else replace(self.rules, across_names=across_names)
        inputs = [self._input(image) for image in images]
        results: list[Detections | None] = [None] * len(inputs)
        # one batch per size: padding would change the features near an image's border
        alike = defaultdict(list)
        for index, x in enumerate(inputs):
            alike[x["image"].shape].append(index)
        for indices in alike.values():
            found, statistics = self.model.detect_and_compare(
                [inputs[i] for i in indices], self._over(threshold), objectness=rules.objectness
            )
            calibration = self.model.roi_heads.calibration
            known = None if calibration is None else calibration.images
            distances = [None] * len(indices) if known is None else known.distance(statistics).tolist()
            for i, instances, distance in zip(indices, found, distances, strict=True):
                instances = rules.select(instances.to("cpu"))
                results[i] = Detections(
                    instances.image_size, self.names, self.vocabulary.splits, distance, **instances.get_fields()
                )
        return results

    def _over(self, threshold: float | None) -> ClassSet:
        """The offered classes with score thresholds of at least ``threshold``."""
        offered = self._offered
        if threshold is None:
            return offered
        if offered.thresholds is None:
            default = self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
            thresholds = offered.text.new_full((offered.shown,), default)
        else:
            thresholds = offered.thresholds
        thresholds = thresholds.clamp(min=threshold)
        return replace(offered, thresholds=thresholds, least=thresholds.min().item())

    def _input(self, image: ImageInput) -> dict:
        """The input of Detectron2's meta-architectures."""
        array = as_array(image, self.cfg.INPUT.FORMAT)
        resized = self.resize.get_transform(array).apply_image(array)
        resized = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": resized, "height": array.shape[0], "width": array.shape[1]}


def vocabulary_of(detector: OpenVocabularyDetector, name: str) -> Vocabulary:
    """Encode a data set's names for a detector trained on another one, with its teacher and prompts; the splits tell
    which names it was trained on."""
    classes = datasets.get_classes(name)
    return detector._encode(Words(classes.names, classes.synonyms)).marked_by(detector.trained)


def _alone(names: tuple[str, ...]) -> Words:
    """Words without synonyms."""
    return Words(names, ((),) * len(names))


def _prompts_of(vocabulary: Vocabulary) -> str | LearnedPrompts:
    return "vild" if vocabulary.prompts == "import" else vocabulary.prompts
