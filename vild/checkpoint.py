"""Detectron2's checkpoint, with the vocabulary (and so the teacher's fingerprint) inside."""

from __future__ import annotations

from pathlib import Path

from detectron2.checkpoint import DetectionCheckpointer

from vild.errors import UserError
from vild.teacher.clip import check_same_teacher


class _VocabularyOf:
    """The model's vocabulary as fvcore's Checkpointer wants it."""

    def __init__(self, model, where: str):
        self.model, self.where = model, where

    def state_dict(self) -> dict:
        return {**self.model.vocabulary.state(), "variant": self.model.roi_heads.variant}

    def load_state_dict(self, state: dict) -> None:
        check_same_teacher(
            state["fingerprint"], self.where, self.model.vocabulary.fingerprint, "the config's vocabulary"
        )
        mine, theirs = self.model.roi_heads.variant, state.get("variant")
        if theirs not in (None, mine):
            raise UserError(f"{self.where} is of variant '{theirs}', MODEL.VILD.VARIANT is '{mine}'")


class VildCheckpointer(DetectionCheckpointer):
    """Saves a ViLDRCNN's vocabulary and variant under ``vocabulary``; on loading, refuses a checkpoint of another
    teacher or variant, also where only the weights are wanted."""

    def __init__(self, model, save_dir: str = "", **kwargs):
        super().__init__(model, save_dir, **kwargs)
        bare = getattr(model, "module", model)  # below DistributedDataParallel
        if hasattr(bare, "vocabulary"):
            self.add_checkpointable("vocabulary", _VocabularyOf(bare, "the checkpoint"))

    def load(self, path, checkpointables=None):
        if path and "://" not in path and not Path(path).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path} does not exist")
        if "vocabulary" in self.checkpointables and path:
            self.checkpointables["vocabulary"].where = f"checkpoint {path}"
            if checkpointables is not None:
                checkpointables = [*checkpointables, "vocabulary"]
        return super().load(path, checkpointables)
