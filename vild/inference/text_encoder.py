"""The text encoder of a detector."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.fingerprint import check_same_teacher, describe, is_named
from vild.vocabulary.prompts import LearnedPrompts
from vild.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vild.teacher.teacher import Teacher


class TextEncoder:
    """The text encoder of a config's teacher, which is loaded when the first text is encoded.

    Args:
        trained: the detector's vocabulary, which must be of this teacher. One that does not name its teacher (a
            converted checkpoint's) is compared by the embeddings of some of its names.
    """

    def __init__(self, cfg, trained: Vocabulary):
        self.cfg, self.trained, self.fingerprint = cfg, trained, trained.fingerprint
        self.logit_scale, self.logit_bias = trained.logit_scale, trained.logit_bias
        self._lock, self._teacher = threading.Lock(), None

    @property
    def teacher(self) -> Teacher:
        """NotAvailable if its weights cannot be had; UserError if it is not the one the detector was trained with."""
        with self._lock:
            if self._teacher is None:
                from vild.teacher.teacher import build_teacher  # words in the cache need no teacher

                spec = self.cfg.MODEL.VILD.TEACHER
                try:
                    teacher = build_teacher(spec.NAME, spec.PRETRAINED, self.cfg.MODEL.DEVICE)
                except UserError as error:
                    if not is_named(self.fingerprint, spec.NAME, spec.PRETRAINED):
                        own = f"the detector's is {describe(self.fingerprint)}"
                        raise type(error)(f"MODEL.VILD.TEACHER.NAME {spec.NAME}, while {own}: {error}") from error
                    raise
                where = f"checkpoint {self.cfg.MODEL.WEIGHTS}"
                if self.fingerprint:
                    what = f"MODEL.VILD.TEACHER ({spec.NAME})"
                    check_same_teacher(teacher.fingerprint, what, self.fingerprint, where)
                else:
                    from vild.checkpoint.released import with_teacher

                    with_teacher(self.trained, teacher)
                self._teacher = teacher
        return self._teacher

    def encode_text(self, texts: Sequence[str], prompts: LearnedPrompts | None = None) -> Tensor:
        return self.teacher.encode_text(texts, prompts=prompts)
