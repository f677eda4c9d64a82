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
        return self.model.vocabulary.state()

    def load_state_dict(self, state: dict) -> None:
        mine, theirs = self.model.vocabulary, state
        check_same_teacher(theirs["fingerprint"], self.where, mine.fingerprint, "the config's vocabulary")


class VildCheckpointer(DetectionCheckpointer):
    """Saves a ViLDRCNN's vocabulary under ``vocabulary``; on loading, refuses one of another teacher."""

    def __init__(self, model, save_dir: str = "", **kwargs):
        super().__init__(model, save_dir, **kwargs)
        bare = getattr(model, "module", model)  # below DistributedDataParallel
        if hasattr(bare, "vocabulary"):
            self.add_checkpointable("vocabulary", _VocabularyOf(bare, "the checkpoint"))

    def load(self, path, *args, **kwargs):
        if path and "://" not in path and not Path(path).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path} does not exist")
        if "vocabulary" in self.checkpointables and path:
            self.checkpointables["vocabulary"].where = f"checkpoint {path}"
        return super().load(path, *args, **kwargs)
