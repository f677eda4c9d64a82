"""The Python API: detect any words in an image."""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import nms

from vild.checkpoint.checkpointer import VildCheckpointer, read_network_record, save_weights
from vild.config import load_config
from vild.data import datasets
from vild.data.mapper import resize_at_test
from vild.inference.detections import Detections
from vild.inference.words import read_words
from vild.modeling import build_model
from vild.modeling.classifier import ClassSet
from vild.utils.errors import UserError
from vild.utils.files import cache_folder, write_text
from vild.utils.fingerprint import check_same_teacher
from vild.utils.images import read_image, to_array
from vild.vocabulary.cache import TextCache
from vild.vocabulary.prompts import LearnedPrompts
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import GivenWords, Words, parse_negatives

CONFIG, WEIGHTS, TEACHER = "config.yaml", "model.safetensors", "teacher"  # in a folder of OpenVocabularyDetector.save
if TYPE_CHECKING:  # words in the cache need no teacher
    from vild.teacher.teacher import Teacher

ACROSS_NAMES = 0.7
ImageInput = str | Path | Image.Image | np.ndarray | Tensor


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
        self.resize = resize_at_test(cfg)
        self._offered = self.model.roi_heads.classifier.current_classes
        self._text = _TextEncoder(cfg, self.trained)
        self._cache = TextCache(self.trained.fingerprint, cache_folder() if disk_cache else None)

    @classmethod
    def from_folder(
        cls, folder: str | Path, device: str | None = None, disk_cache: bool = True
    ) -> OpenVocabularyDetector:
        """Load a detector that :meth:`save` or ``tools/export.py`` wrote.

        Raises:
            UserError: the folder does not contain one.
        """
        folder = Path(folder)
        overrides = ["MODEL.WEIGHTS", str(folder / WEIGHTS)] + (["MODEL.DEVICE", device] if device else [])
        if (folder / TEACHER).is_dir():
            overrides += ["MODEL.VILD.TEACHER.NAME", f"local-dir:{folder / TEACHER}"]
        return cls(load_config(str(folder / CONFIG), overrides), disk_cache)

    def save(self, folder: str | Path, teacher: bool = True) -> None:
        """Write a self-contained folder: config, weights with vocabulary and, to encode new words, the teacher."""
        folder = Path(folder)
        if teacher:
            self.teacher.save(folder / TEACHER)
        save_weights(folder / WEIGHTS, self.model, read_network_record(self.cfg.MODEL.WEIGHTS)["trained_on"])
        write_text(folder / CONFIG, self.cfg.dump())  # last: its presence marks a complete folder

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
        beside = self._context(shown, negatives, prompts, context)
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

    def _encode(self, words: Words, prompts: str | LearnedPrompts | None = None) -> Vocabulary:
        prompts = prompts or _prompts_of(self.trained)
        return Vocabulary.from_names(self._text, words, prompts=prompts, cache=self._cache)

    def _context(
        self, shown: Vocabulary, negatives: GivenWords, prompts: str | None, context: bool
    ) -> list[Vocabulary]:
        """Vocabularies that compete in the softmax with ``shown``, without the spellings it has: a class that occurred
        twice would share its score with itself."""
        beside = []
        taken = {spelling for i in range(len(shown)) for spelling in shown.spellings(i)}
        if unwanted := parse_negatives(negatives, files=True):
            words = Words(unwanted, ((),) * len(unwanted))
            beside.append(self._encode(words, prompts).marked_by(self.trained))
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
        across_names: float = ACROSS_NAMES,
    ) -> Detections | list[Detections]:
        """Detect in one image, or in several of different sizes.

        Args:
            images: a file, a PIL image, a uint8 array [H, W, 3] in the config's ``INPUT.FORMAT`` (by default BGR,
                as in Detectron2's predictor), a uint8 RGB tensor [3, H, W]; or a list or tuple of these.
            words: see :meth:`with_vocabulary`; for this call only.
            threshold: report only detections with a higher score.
            across_names: of two boxes of any names whose IoU is higher, report the one with the higher score; its
                ``alternatives`` tell what else it may be. 1: report both. (Evaluation does not do this.)

        Returns:
            a :class:`Detections`, or a list of them.

        Raises:
            UserError: an unreadable image or invalid words.
        """
        if words is not None:
            return self.with_vocabulary(words)(images, None, threshold, across_names)
        if not isinstance(images, list | tuple):
            return self([images], None, threshold, across_names)[0]
        inputs = [self._input(image) for image in images]
        results: list[Detections | None] = [None] * len(inputs)
        # one batch per size: padding would change the features near an image's border
        alike = defaultdict(list)
        for index, x in enumerate(inputs):
            alike[x["image"].shape].append(index)
        for indices in alike.values():
            found, statistics = self.model.detect_and_compare([inputs[i] for i in indices], self._over(threshold))
            calibration = self.model.roi_heads.calibration
            known = None if calibration is None else calibration.images
            distances = [None] * len(indices) if known is None else known.distance(statistics).tolist()
            for i, instances, distance in zip(indices, found, distances, strict=True):
                instances = instances.to("cpu")
                keep = nms(instances.pred_boxes.tensor, instances.scores, across_names).sort().values
                fields = instances[keep].get_fields()
                results[i] = Detections(instances.image_size, self.names, self.vocabulary.splits, distance, **fields)
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
        array = _as_array(image, self.cfg.INPUT.FORMAT)
        resized = self.resize.get_transform(array).apply_image(array)
        resized = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": resized, "height": array.shape[0], "width": array.shape[1]}


class _TextEncoder:
    """The text encoder of a config's teacher, which is loaded when the first text is encoded."""

    def __init__(self, cfg, trained: Vocabulary):
        self.cfg, self.fingerprint = cfg, trained.fingerprint
        self.logit_scale, self.logit_bias = trained.logit_scale, trained.logit_bias
        self._lock, self._teacher = threading.Lock(), None

    @property
    def teacher(self) -> Teacher:
        with self._lock:
            if self._teacher is None:
                spec = self.cfg.MODEL.VILD.TEACHER
                from vild.teacher.teacher import build_teacher

                teacher = build_teacher(spec.NAME, spec.PRETRAINED, self.cfg.MODEL.DEVICE)
                where = f"checkpoint {self.cfg.MODEL.WEIGHTS}"
                check_same_teacher(teacher.fingerprint, f"MODEL.VILD.TEACHER ({spec.NAME})", self.fingerprint, where)
                self._teacher = teacher
        return self._teacher

    def encode_text(self, texts: Sequence[str], prompts: LearnedPrompts | None = None) -> Tensor:
        return self.teacher.encode_text(texts, prompts=prompts)


def _as_array(image: ImageInput, image_format: str) -> np.ndarray:
    """uint8 [H, W, 3] in ``image_format``."""
    if isinstance(image, str | Path):
        return read_image(image, image_format)
    if isinstance(image, Image.Image):
        try:
            return to_array(image, image_format)
        except (OSError, ValueError) as error:  # PIL decodes lazily
            raise UserError(f"image cannot be read: {error}") from error
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3 or 0 in image.shape:
            raise UserError(f"image: a tensor must be uint8 RGB [3, H, W], not {image.dtype} {[*image.shape]}")
        array = image.permute(1, 2, 0).cpu().numpy()
        return array if image_format == "RGB" else array[:, :, ::-1]
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"image: an array must be uint8 [H, W, 3], not {image.dtype} {[*image.shape]}")
        return image
    raise UserError(f"image: {type(image).__name__} is not a path, PIL image, array or tensor")


def vocabulary_of(detector: OpenVocabularyDetector, name: str) -> Vocabulary:
    """Encode a data set's names for a detector trained on another one, with its teacher and prompts; the splits tell
    which names it was trained on."""
    classes = datasets.get_classes(name)
    return detector._encode(Words(classes.names, classes.synonyms)).marked_by(detector.trained)


def _prompts_of(vocabulary: Vocabulary) -> str | LearnedPrompts:
    return "vild" if vocabulary.prompts == "import" else vocabulary.prompts
