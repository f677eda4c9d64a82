"""The Python API: detect any words in an image."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vild.checkpoint.checkpointer import VildCheckpointer, read_network_record, save_weights
from vild.checkpoint.pretrained import detector_config
from vild.checkpoint.released_archives import CONFIG, TEACHER, WEIGHTS
from vild.data.mapper import resize_at_test
from vild.inference.detections import Detections
from vild.inference.display import NOTEBOOK, DisplayRules
from vild.inference.examples import Examples
from vild.inference.image_input import ImageInput, as_array, stamp_of, to_input
from vild.inference.model_card import model_card
from vild.inference.text_encoder import TextEncoder
from vild.inference.thresholds import above, fraction, of_single_words
from vild.inference.word_encoder import WordEncoder
from vild.inference.words import read_words
from vild.modeling import build_model
from vild.utils.errors import UserError
from vild.utils.files import write_text
from vild.vocabulary.prompts import LearnedPrompts
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import GivenWords, Words, parse_negatives

if TYPE_CHECKING:  # words in the cache need no teacher
    from vild.teacher.teacher import Teacher


class OpenVocabularyDetector:
    """A trained detector that detects any words::

        detector = OpenVocabularyDetector.from_pretrained("vild-r50-ensemble")
        found = detector("photo.jpg", "umbrella | parasol, chess knight")  # a Detections: print it, found.save("a.jpg")

    ``detector(image)`` detects the names it was trained with; ``detector.with_vocabulary("kite")`` is a detector of
    other words. A detector is immutable: several threads can call it, each with its own vocabulary.

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
        self._own: Tensor | None = None  # thresholds of single words, [C]; -1: none
        self._text = TextEncoder(cfg, self.trained)
        calibration = self.model.roi_heads.calibration
        self._words = WordEncoder(self._text, self.trained, disk_cache, calibration and calibration.examples)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, config_file: str | Path | None = None, device: str | None = None, disk_cache: bool = True
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
            teacher: without it the folder's config names the teacher as this detector's does, be it a file.
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
        # no path of this machine
        cfg.MODEL.WEIGHTS = cfg.MODEL.VILD.VOCABULARY = WEIGHTS
        cfg.MODEL.VILD.STORE = cfg.MODEL.VILD.TEST_VOCABULARY = cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS = ""
        cfg.OUTPUT_DIR = "./output"
        if teacher:
            cfg.MODEL.VILD.TEACHER.NAME, cfg.MODEL.VILD.TEACHER.PRETRAINED = f"local-dir:{TEACHER}", ""
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
        words: GivenWords | Words | Vocabulary | None = None,
        *,
        examples: Examples | None = None,
        prompts: str | LearnedPrompts | None = None,
        negatives: GivenWords = (),
        thresholds: Mapping[str, float] | None = None,
        context: bool | None = None,
    ) -> OpenVocabularyDetector:
        """A detector for these words that shares this one's weights.

        Args:
            words: a list of words, "umbrella | parasol" being one with a synonym (the embeddings are averaged); a
                string, which is read as ``--vocabulary`` of the tools (``read_words``: words separated by commas, or a
                file); or a vocabulary, which is used unchanged. None: the examples alone.
            examples: of each name regions that stand for it, with its word if ``words`` has it (their mean) or instead:
                ``{"kite": [("photo.jpg", (x0, y0, x1, y1))]}``, with corners in pixels; the image may also be a PIL
                image or an RGB tensor. Needs the teacher, also if the words are in the cache.
            prompts: name or file of a prompt set (default: the one used in training).
            negatives: words that compete in the softmax but are never reported ("not these").
            thresholds: score thresholds of single words, by name; they hold in calls with a lower ``threshold`` too.
            context: keep the base names of training in the softmax, so that an object which is none of the words can
                be classified as something else. They are never reported. Default: with words; with a
                vocabulary if the detector is calibrated, because its scores are probabilities beside these names only.

        Raises:
            UserError: no words, a duplicate, a wrong threshold or one of an unknown word, another teacher than in
                training, or an example that cannot be read or whose box is not within its image.
        """
        words = None if words is None else read_words(words)
        if context is None:
            context = not isinstance(words, Vocabulary) or self.model.roi_heads.calibration is not None
        shown = self._words.shown(words, examples, prompts)
        unwanted = parse_negatives(negatives or (), files=True)
        beside = self._words.competitors(shown, unwanted, self.rules.beside, prompts, context)
        other = copy.copy(self)
        other.vocabulary = shown
        other._offered = self.model.roi_heads.classifier.class_set([shown, *beside])
        return other.with_thresholds(thresholds)

    def with_thresholds(self, thresholds: Mapping[str, float] | None) -> OpenVocabularyDetector:
        """This detector with other score thresholds of single words, see :meth:`with_vocabulary`."""
        other = copy.copy(self)
        other._own = of_single_words(thresholds, self.names)
        return other

    def for_display(self) -> OpenVocabularyDetector:
        """For a person who looks at the detections: the authors' detectors as in their notebook (``NOTEBOOK`` in
        ``display.py``), any other unchanged. With the words it was trained on; give others to the result."""
        other = copy.copy(self)
        other.rules = NOTEBOOK if self.cfg.MODEL.META_ARCHITECTURE == "ReleasedRCNN" else self.rules
        return other.with_vocabulary(self.trained)

    @torch.inference_mode()
    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        words: GivenWords | Words | Vocabulary | None = None,
        threshold: float | None = None,
        across_names: float | None = None,
        *,
        channels: str | None = None,
    ) -> Detections | list[Detections]:
        """Detect in one image, or in several of different sizes.

        Args:
            images: a file, a PIL image, a uint8 RGB tensor [3, H, W], or a uint8 array [H, W, 3], which needs
                ``channels``; or a list or tuple of these.
            words: see :meth:`with_vocabulary`; for this call only.
            threshold: report only detections with a higher score. Default: each word's own threshold
                (:meth:`with_vocabulary`), or 0.4, the default of the tools. 0: report all, but those of a word with its
                own threshold only above that: of the two the higher one holds.
            across_names: of two boxes of any names whose IoU is higher, report the one with the higher score; its
                ``alternatives`` tell what else it may be. 1: report both. (Evaluation does not do this.) Default: 0.7,
                or as :meth:`for_display` says.
            channels: "RGB", or "BGR" as ``cv2.imread`` returns; of arrays and tensors.

        Returns:
            a :class:`Detections`, or a list of them.

        Raises:
            UserError: an unreadable image, an array without ``channels``, invalid words, or a number that is
                not within 0 and 1.
        """
        if words is not None:
            return self.with_vocabulary(words)(images, None, threshold, across_names, channels=channels)
        if not isinstance(images, list | tuple):
            return self([images], None, threshold, across_names, channels=channels)[0]
        rules = self.rules
        if across_names is not None:
            rules = replace(rules, across_names=fraction(across_names, "across_names"))
        classes = above(self._offered, threshold, self._own, self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST)
        stamps = [stamp_of(image) for image in images]  # first: a file that changes while it is read has another
        inputs = [self.model_input(image, channels) for image in images]
        results: list[Detections | None] = [None] * len(inputs)
        # one batch per size: padding would change the features near an image's border
        alike = defaultdict(list)
        for index, x in enumerate(inputs):
            alike[x["image"].shape].append(index)
        calibration = self.model.roi_heads.calibration
        known = None if calibration is None else calibration.images
        for indices in alike.values():
            batch, distances = [inputs[i] for i in indices], [None] * len(indices)
            if known is None:
                found = self.model.detect(batch, classes, objectness=rules.objectness)
            else:
                found, statistics = self.model.detect_and_compare(batch, classes, objectness=rules.objectness)
                distances = known.distance(statistics).tolist()
            for i, instances, distance in zip(indices, found, distances, strict=True):
                instances = rules.select(instances.to("cpu"))
                source = (images[i], channels)
                results[i] = Detections(
                    instances.image_size, self.names, self.vocabulary.splits, distance, source, stamps[i],
                    **instances.get_fields(),
                )  # fmt: skip
        return results

    def model_input(self, image: ImageInput, channels: str | None = None) -> dict:
        """The input of Detectron2's meta-architectures: ``image``, uint8 [3, h, w] resized and in the channels of
        ``INPUT.FORMAT``, and the image's own ``height`` and ``width``. Arguments and errors as of a call."""
        return to_input(as_array(image, self.cfg.INPUT.FORMAT, channels), self.resize)
