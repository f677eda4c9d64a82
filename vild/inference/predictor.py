"""An image and a list of words in, Detectron2 ``Instances`` out."""

from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image
from torch import Tensor

from vild.checkpoint.checkpointer import VildCheckpointer, read_network_record, save_weights
from vild.config import load_config
from vild.data import datasets
from vild.inference.detections import Detections
from vild.modeling import build_model
from vild.modeling.classifier import ClassSet
from vild.teacher.teacher import Teacher, build_teacher
from vild.utils.errors import UserError
from vild.utils.files import cache_folder, write_text
from vild.utils.fingerprint import check_same_teacher
from vild.utils.images import read_image, to_array
from vild.vocabulary.cache import TextCache
from vild.vocabulary.prompts import LearnedPrompts
from vild.vocabulary.vocabulary import Vocabulary

CONFIG, WEIGHTS, TEACHER = "config.yaml", "model.safetensors", "teacher"  # in a folder of OpenVocabularyDetector.save
ImageInput = str | Path | Image.Image | np.ndarray | Tensor


class OpenVocabularyDetector:
    """The detector of a config and its checkpoint (``MODEL.WEIGHTS``), for any words.

    ``detector(image)`` looks for the names it was trained with, ``detector(image, ["kite"])`` or
    ``detector.with_vocabulary(["kite"])(image)`` for others. Nothing of a detector changes once it is made: it can be
    called from several threads, with a vocabulary each.

    Args:
        cfg: a frozen config (``vild.config.load_config``). The vocabulary comes out of the checkpoint; the
            teacher (``MODEL.VILD.TEACHER``) is loaded once words are asked for that no cache has.
        disk_cache: keep the words' embeddings for the next process (vild/vocabulary/cache.py says where).
    """

    def __init__(self, cfg, disk_cache: bool = True):
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: give a trained checkpoint")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.VILD.VOCABULARY = cfg.MODEL.WEIGHTS
        # what only training needs, or knows the classes of training only
        cfg.MODEL.VILD.OBJECTIVES, cfg.MODEL.VILD.TEACHERS = [], []
        self.cfg = cfg
        self.model = build_model(cfg).eval()
        VildCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.trained: Vocabulary = self.model.vocabulary
        self.vocabulary: Vocabulary = self.trained
        self.resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST)
        self._offered = self.model.roi_heads.classifier.current_classes
        self._text = _TextEncoder(cfg, self.trained.fingerprint)
        self._cache = TextCache(self.trained.fingerprint, cache_folder() if disk_cache else None)

    @classmethod
    def from_folder(
        cls, folder: str | Path, device: str | None = None, disk_cache: bool = True
    ) -> OpenVocabularyDetector:
        """A detector that :meth:`save` wrote, or ``tools/export.py``.

        Raises:
            UserError: the folder does not hold one.
        """
        folder = Path(folder)
        overrides = ["MODEL.WEIGHTS", str(folder / WEIGHTS)] + (["MODEL.DEVICE", device] if device else [])
        if (folder / TEACHER).is_dir():
            overrides += ["MODEL.VILD.TEACHER.NAME", f"local-dir:{folder / TEACHER}"]
        return cls(load_config(str(folder / CONFIG), overrides), disk_cache)

    def save(self, folder: str | Path, teacher: bool = True) -> None:
        """Write a folder that needs nothing else: config, weights and vocabulary, and the teacher, for new words."""
        folder = Path(folder)
        if teacher:
            self.teacher.save(folder / TEACHER)
        save_weights(folder / WEIGHTS, self.model, read_network_record(self.cfg.MODEL.WEIGHTS)["trained_on"])
        write_text(folder / CONFIG, self.cfg.dump())  # the last: it marks a whole folder

    @property
    def names(self) -> tuple[str, ...]:
        """What is looked for; ``pred_classes`` are indices into it."""
        return self.vocabulary.names

    @property
    def teacher(self) -> Teacher:
        """The text encoder; UserError if it is not the one the detector was trained with."""
        return self._text.teacher

    def with_vocabulary(
        self,
        words: Sequence[str] | Vocabulary,
        *,
        synonyms: Sequence[Sequence[str]] | None = None,
        prompts: str | LearnedPrompts | None = None,
        negatives: Sequence[str] = (),
        thresholds: Mapping[str, float] | None = None,
        context: bool = True,
    ) -> OpenVocabularyDetector:
        """A detector that looks for these words, with the same weights (not a copy). No weight changes.

        Args:
            words: names; or a vocabulary, which is taken as it is, alone in the softmax.
            synonyms: of each word, further spellings; their embeddings are averaged.
            prompts: a prompt set's name or file (None: what the detector was trained with).
            negatives: "not these": words that take part in the softmax and are never reported.
            thresholds: by word, the score above which it is reported (others: SCORE_THRESH_TEST).
            context: keep the base names of training in the softmax, so that a thing which is none of the words has
                somewhere better to go. They are never reported.

        Raises:
            UserError: no words, one twice, a threshold of an unknown word, or a teacher that is not the detector's.
        """
        if isinstance(words, Vocabulary):
            shown, beside = words, []
        else:
            shown = self._encode(words, synonyms, prompts).marked_by(self.trained)
            beside = self._context(shown, negatives, prompts, context)
        for name in thresholds or {}:
            if name not in shown.names:
                raise UserError(f"thresholds: '{name}' is not in the vocabulary")
        default = self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        least = [thresholds.get(name, default) for name in shown.names] if thresholds else None
        other = copy.copy(self)
        other.vocabulary = shown
        other._offered = self.model.roi_heads.classifier.class_set([shown, *beside], least)
        return other

    def _encode(
        self,
        words: Sequence[str],
        synonyms: Sequence[Sequence[str]] | None = None,
        prompts: str | LearnedPrompts | None = None,
    ) -> Vocabulary:
        prompts = prompts or _prompts_of(self.trained)
        return Vocabulary.from_names(self._text, words, prompts=prompts, synonyms=synonyms, cache=self._cache)

    def _context(
        self, shown: Vocabulary, negatives: Sequence[str], prompts: str | None, context: bool
    ) -> list[Vocabulary]:
        """What takes part in the softmax beside ``shown``. The same thing under two names would share its score with
        itself, so each spelling is there once."""
        beside = []
        taken = {spelling for i in range(len(shown)) for spelling in shown.spellings(i)}
        if negatives:
            beside.append(self._encode(negatives, prompts=prompts).marked_by(self.trained))
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
        words: Sequence[str] | Vocabulary | None = None,
        threshold: float | None = None,
    ) -> Detections | list[Detections]:
        """Detect in one image, or in several of any sizes.

        Args:
            images: a file, a PIL image, a uint8 array [H, W, 3] in the config's ``INPUT.FORMAT`` (BGR unless
                changed, as Detectron2's predictor takes it), a uint8 RGB tensor [3, H, W]; or a list or tuple of these.
            words: as :meth:`with_vocabulary`, for this call.
            threshold: report only scores above it.

        Returns:
            a :class:`Detections` (on the CPU, by falling score), or a list of them.

        Raises:
            UserError: an image that cannot be read, or words that cannot be looked for.
        """
        if words is not None:
            return self.with_vocabulary(words)(images, threshold=threshold)
        if not isinstance(images, list | tuple):
            return self([images], threshold=threshold)[0]
        inputs = [self._input(image) for image in images]
        results: list[Detections | None] = [None] * len(inputs)
        # images of other sizes would be padded, and what lies beside an image reaches into it: they go by themselves
        alike = defaultdict(list)
        for index, x in enumerate(inputs):
            alike[x["image"].shape].append(index)
        for indices in alike.values():
            found = self.model.detect([inputs[i] for i in indices], self._over(threshold))
            for i, instances in zip(indices, found, strict=True):
                fields = instances.to("cpu").get_fields()
                results[i] = Detections(instances.image_size, self.names, self.vocabulary.splits, **fields)
        return results

    def _over(self, threshold: float | None) -> ClassSet:
        """The classes, none of them reported at ``threshold`` or less."""
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
        """What Detectron2's meta-architectures take."""
        array = _as_array(image, self.cfg.INPUT.FORMAT)
        resize = self.resize.get_transform(array)
        if 0 in (getattr(resize, "new_h", 1), getattr(resize, "new_w", 1)):
            size = f"{array.shape[1]} x {array.shape[0]}"
            raise UserError(f"image: {size} is too thin, at INPUT.MAX_SIZE_TEST {self.cfg.INPUT.MAX_SIZE_TEST}")
        resized = resize.apply_image(array)
        resized = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": resized, "height": array.shape[0], "width": array.shape[1]}


class _TextEncoder:
    """The teacher of a config, loaded when the first text is to be encoded; stands in for it in ``Vocabulary``."""

    def __init__(self, cfg, fingerprint: dict):
        self.cfg, self.fingerprint = cfg, fingerprint
        self._lock, self._teacher = threading.Lock(), None

    @property
    def teacher(self) -> Teacher:
        with self._lock:
            if self._teacher is None:
                spec = self.cfg.MODEL.VILD.TEACHER
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
        except (OSError, ValueError) as error:  # PIL opens lazily
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
    raise UserError(f"image: {type(image).__name__} is no path, PIL image, array or tensor")


def vocabulary_of(detector: OpenVocabularyDetector, name: str) -> Vocabulary:
    """A data set's names for a detector that was trained on others, encoded by its teacher with its prompts, marked
    by what it has met."""
    classes = datasets.get_classes(name)
    return detector._encode(classes.names, classes.synonyms).marked_by(detector.trained)


def _prompts_of(vocabulary: Vocabulary) -> str | LearnedPrompts:
    return "vild" if vocabulary.prompts == "import" else vocabulary.prompts
