"""Detectron2's checkpoint plus the vocabulary (with the teacher's fingerprint) and a record of the training data."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from vild.data.provenance import merge, network_record
from vild.modeling.calibration import Calibration
from vild.utils.errors import UserError
from vild.utils.files import write_tensors, write_text, written_whole
from vild.utils.fingerprint import check_same_teacher
from vild.utils.untrusted import refused_as
from vild.utils.weight_files import load_weights
from vild.vocabulary.vocabulary import Vocabulary


class _VocabularyState:
    """Vocabulary, variant and teachers as a checkpointable of fvcore's Checkpointer. Loading only compares them."""

    def __init__(self, model, where: str):
        self.model, self.where, self.resumes, self.calibrated = model, where, False, False

    def state_dict(self) -> dict:
        variant = self.model.roi_heads.variant
        state = {**self.model.vocabulary.state(), "variant": variant, "others": self._extra_fingerprints()}
        return state | _calibration_state(self.model.roi_heads.calibration)

    def _extra_fingerprints(self) -> list[dict]:
        extra_teachers = self.model.roi_heads.others
        return [] if extra_teachers is None else extra_teachers.fingerprints

    def load_state_dict(self, state: dict) -> None:
        mine = self.model.vocabulary
        check_same_teacher(state["fingerprint"], self.where, mine.fingerprint, "the config's vocabulary")
        for theirs, own in zip(state.get("others", []), self._extra_fingerprints(), strict=False):
            check_same_teacher(theirs, f"{self.where}, an extra teacher", own, "that of MODEL.VILD.TEACHERS")
        variant = self.model.roi_heads.variant
        if state.get("variant") not in (None, variant):
            raise UserError(f"{self.where} is of variant '{state['variant']}', MODEL.VILD.VARIANT is '{variant}'")
        if self.calibrated and "calibration" in state:
            with refused_as(f"{self.where}: its calibration"):
                self.model.roi_heads.calibration = Calibration.from_state(state["calibration"])
        same = list(state["names"]) == list(mine.names) and state["embeddings"].equal(mine.embeddings.cpu())
        if self.resumes and not same:
            raise UserError(f"{self.where} was trained with another vocabulary than MODEL.VILD.VOCABULARY")


def _calibration_state(calibration: Calibration | None) -> dict:
    return {} if calibration is None else {"calibration": calibration.state()}


class _TrainingRecord:
    """A training record (``vild.data.provenance``) as a checkpointable of fvcore's Checkpointer."""

    def __init__(self, record: dict):
        self.record = record

    def state_dict(self) -> dict:
        return self.record

    def load_state_dict(self, state: dict) -> None:
        self.record = merge(state, self.record)


def save_weights(path: str | Path, model: nn.Module, trained_on: dict | None = None) -> None:
    """Write a ViLDRCNN as one ``.safetensors``, which ``MODEL.WEIGHTS`` accepts like a ``.pth``.

    It is a vocabulary file (``Vocabulary.load`` reads it) with the network's tensors added under ``model.``; variant
    and training record are in its metadata.
    """
    heads = model.roi_heads
    write_weights(path, model.state_dict(), model.vocabulary, heads.variant, trained_on, heads.calibration)


def write_weights(
    path: str | Path,
    state: dict[str, Tensor],
    vocabulary: Vocabulary,
    variant: str,
    trained_on: dict | None = None,
    calibration: Calibration | None = None,
) -> None:
    """As :func:`save_weights`, from a ViLDRCNN's state dict. If ``path`` ends in ``.pth``, a checkpoint of Detectron2
    with the same content."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    words = {**vocabulary.state(), "variant": variant, **_calibration_state(calibration)}
    rest = {} if trained_on is None else {"trained_on": trained_on}
    if str(path).endswith(".pth"):
        write_checkpoint(path, {"model": state, "vocabulary": words, **rest})
        return
    tensors = {f"model.{key}": value for key, value in state.items()}
    tensors["embeddings"] = words.pop("embeddings").contiguous()
    rest = {key: json.dumps(value) for key, value in rest.items()}
    write_tensors(path, tensors, {"vild": json.dumps(words), **rest})


def write_checkpoint(path: str | Path, content: dict) -> None:
    """Write a ``.pth`` atomically.

    Raises:
        OSError: it cannot be written, because the disk is full for example.
    """
    with written_whole(path) as aside:
        try:
            with open(aside, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # torch's writer can hide the system's error behind its own
            reason = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise reason or error  # noqa: B904


def read_network_record(path: str) -> dict:
    """The network record of a local weights file of any origin."""
    if not Path(path).is_file():
        raise UserError(f"weights: {path} does not exist")
    return network_record(path, path, load_weights(path).get("trained_on"))


class VildCheckpointer(DetectionCheckpointer):
    """Saves a ViLDRCNN's vocabulary and variant under ``vocabulary``; refuses a checkpoint of another teacher or
    variant, even if only its weights are loaded.

    Args:
        trained_on: the record of a training, saved under ``trained_on`` with that of the weights it starts from.
        beside: plain values to save as well; they are not loaded.
        calibrated: use the checkpoint's calibration, if it has one. Not for training, which would invalidate it.
    """

    def __init__(self, model, save_dir: str = "", *, trained_on: dict | None = None, beside: dict | None = None,
                 calibrated: bool = False, **kwargs):  # fmt: skip
        super().__init__(model, save_dir, **kwargs)
        self.beside = beside or {}
        if trained_on is not None:
            self.add_checkpointable("trained_on", _TrainingRecord(trained_on))
        bare = getattr(model, "module", model)  # below DistributedDataParallel
        if hasattr(bare, "vocabulary"):
            self.add_checkpointable("vocabulary", words := _VocabularyState(bare, "the checkpoint"))
            words.calibrated = calibrated

    def save(self, name: str, **kwargs) -> None:
        """As Detectron2's, but atomic, and ``last_checkpoint`` is updated afterwards: a kill leaves usable files."""
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        write_checkpoint(path, {"model": self.model.state_dict(), **parts, **self.beside, **kwargs})
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _load_file(self, filename):
        checkpoint = load_weights(filename)  # Detectron2's own would unpickle code
        if "vocabulary" in checkpoint:
            Vocabulary.from_state(checkpoint["vocabulary"], f"checkpoint {filename}: its vocabulary")
        if "matching_heuristics=True" in self._parsed_url_during_load.query:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def load(self, path, checkpointables=None):
        """As Detectron2's; ``checkpointables=None`` resumes a training.

        Raises:
            UserError: the weights cannot be read, or do not belong to the model's teacher, variant or backbone.
        """
        if path and "://" in path:
            self._fetch(path)
        elif path and not Path(path).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path} does not exist")
        resumes = checkpointables is None
        if vocabulary := self.checkpointables.get("vocabulary"):
            vocabulary.where = f"checkpoint {path}" if path else vocabulary.where
            vocabulary.resumes = resumes and "trained_on" in self.checkpointables
        wanted = self.checkpointables if resumes else {*checkpointables, "vocabulary"}
        rest = super().load(path, [k for k in self.checkpointables if k in wanted and k != "trained_on"])
        if path and (tracked := self.checkpointables.get("trained_on")):
            start = {"data_sets": [], "stores": [], "starts": [self._record_of(path, rest)]}
            tracked.load_state_dict(rest["trained_on"] if resumes and "trained_on" in rest else start)
        return rest

    def _fetch(self, path: str) -> None:
        """Download a URL into the cache, UserError if that fails. Detectron2 then loads the local copy."""
        if path.startswith("timm://"):
            from vild.checkpoint.timm_weights import check_student  # registers the handler of these paths

            check_student(path, getattr(self.model, "module", self.model))
        with refused_as(f"MODEL.WEIGHTS: {path}: cannot be downloaded"):
            local = self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
        if not Path(local).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path}: not a URL that Detectron2 supports")

    def _record_of(self, path: str, rest: dict) -> dict:
        return network_record(path, self.path_manager.get_local_path(path), rest.get("trained_on"))

    def load_recorded(self, path: str) -> dict:
        """Load only the weights, and return their network record."""
        return self._record_of(path, self.load(path, checkpointables=[]))
