"""A picture and a list of words in, Detectron2 ``Instances`` out."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances

import vild.modeling  # noqa: F401  (registers the detector)
from vild.checkpoint import VildCheckpointer
from vild.data import datasets
from vild.errors import UserError
from vild.teacher.clip import Teacher, check_same_teacher
from vild.vocabulary import Vocabulary


class OpenVocabularyDetector:
    """The detector of a config and its checkpoint (``MODEL.WEIGHTS``), for any words.

    Args:
        cfg: a frozen config (``vild.engine.load_config``). The vocabulary comes out of the checkpoint; the
            teacher (``MODEL.VILD.TEACHER``) is loaded once words are asked for.
    """

    def __init__(self, cfg):
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: give a trained checkpoint")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.VILD.VOCABULARY = cfg.MODEL.WEIGHTS
        self.cfg = cfg
        self.model = build_model(cfg).eval()
        VildCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.trained: Vocabulary = self.model.vocabulary
        self.names: tuple[str, ...] = self.trained.names
        self.resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST)
        self._teacher: Teacher | None = None

    @property
    def teacher(self) -> Teacher:
        """The text encoder; UserError if it is not the one the detector was trained with."""
        if self._teacher is None:
            spec = self.cfg.MODEL.VILD.TEACHER
            teacher = Teacher(spec.NAME, spec.PRETRAINED, self.cfg.MODEL.DEVICE)
            check_same_teacher(
                teacher.fingerprint,
                f"MODEL.VILD.TEACHER ({spec.NAME})",
                self.trained.fingerprint,
                f"checkpoint {self.cfg.MODEL.WEIGHTS}",
            )
            self._teacher = teacher
        return self._teacher

    def set_words(self, words: list[str]) -> None:
        """Look for these words from now on.

        The base names stay in the softmax beside them, unseen, so that a thing which is none of the words has
        somewhere better to go; they are not detected.
        """
        asked = Vocabulary.from_names(self.teacher, words, prompts=_prompts_of(self.trained)).marked_by(self.trained)
        # the same thing under two names would share its score with itself
        wanted = {spelling for i in range(len(asked)) for spelling in asked.spellings(i)}
        context = self.trained.take(
            [
                i
                for i, split in enumerate(self.trained.splits)
                if split == "base" and not self.trained.spellings(i) & wanted
            ]
        )
        self.model.set_vocabulary(
            Vocabulary(
                asked.names + context.names,
                torch.cat([asked.embeddings, context.embeddings]),
                asked.splits + context.splits,
                prompts=asked.prompts,
                fingerprint=asked.fingerprint,
            ),
            shown=len(asked),
        )
        self.names = asked.names

    @torch.inference_mode()
    def __call__(self, picture: np.ndarray) -> Instances:
        """Detect in one picture.

        Args:
            picture: uint8 [H, W, 3] in the config's ``INPUT.FORMAT`` (BGR unless changed).

        Returns:
            on the CPU, by falling score: ``pred_boxes``, ``scores``, ``pred_classes`` (indices into ``names``),
            ``pred_masks`` bool [N, H, W] where the detector has masks.
        """
        height, width = picture.shape[:2]
        image = self.resize.get_transform(picture).apply_image(picture)
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        (output,) = self.model([{"image": image, "height": height, "width": width}])
        return output["instances"].to("cpu")


def vocabulary_of(detector: OpenVocabularyDetector, name: str) -> Vocabulary:
    """A data set's names for a detector that was trained on others, encoded by its teacher with its prompts, marked
    by what it has met."""
    classes = datasets.get_classes(name)
    words = Vocabulary.from_names(
        detector.teacher, classes.names, prompts=_prompts_of(detector.trained), synonyms=classes.synonyms
    )
    return words.marked_by(detector.trained)


def _prompts_of(vocabulary: Vocabulary) -> str:
    return "vild" if vocabulary.prompts == "import" else vocabulary.prompts
