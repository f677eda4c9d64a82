"""Detectron2's checkpoint, with the vocabulary (and so the teacher's fingerprint) inside, and a record of what the
network was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from vild.checkpoint.timm_weights import TIMM, check_student
from vild.data.provenance import merge, network_record
from vild.utils.errors import UserError
from vild.utils.files import write_tensors, write_text, written_whole
from vild.utils.fingerprint import check_same_teacher
from vild.utils.untrusted import refused_as
from vild.utils.weight_files import load_weights
from vild.vocabulary.vocabulary import Vocabulary


class _VocabularyOf:
    """The model's vocabulary as fvcore's Checkpointer wants it."""

    def __init__(self, model, where: str):
        self.model, self.where, self.going_on = model, where, False

    def state_dict(self) -> dict:
        heads = self.model.roi_heads
        return {**self.model.vocabulary.state(), "variant": heads.variant, "others": self._further_teachers()}

    def _further_teachers(self) -> list[dict]:
        """Their fingerprints."""
        others = self.model.roi_heads.others
        return [] if others is None else others.fingerprints

    def load_state_dict(self, state: dict) -> None:
        check_same_teacher(
            state["fingerprint"], self.where, self.model.vocabulary.fingerprint, "the config's vocabulary"
        )
        for theirs, mine in zip(state.get("others", []), self._further_teachers(), strict=False):
            check_same_teacher(theirs, f"{self.where}, a further teacher", mine, "that of MODEL.VILD.TEACHERS")
        mine, theirs = self.model.roi_heads.variant, state.get("variant")
        if theirs not in (None, mine):
            raise UserError(f"{self.where} is of variant '{theirs}', MODEL.VILD.VARIANT is '{mine}'")
        mine = self.model.vocabulary
        same = list(state["names"]) == list(mine.names) and state["embeddings"].equal(mine.embeddings.cpu())
        if self.going_on and not same:
            raise UserError(f"{self.where} is of a training with another vocabulary than MODEL.VILD.VOCABULARY")


class _TrainedOn:
    """A training record (``vild.data.provenance``) as fvcore's Checkpointer wants it."""

    def __init__(self, record: dict):
        self.record = record

    def state_dict(self) -> dict:
        return self.record

    def load_state_dict(self, state: dict) -> None:
        self.record = merge(state, self.record)


def save_weights(path: str | Path, model: nn.Module, trained_on: dict | None = None) -> None:
    """A ViLDRCNN as one ``.safetensors``, which ``MODEL.WEIGHTS`` takes as it takes a ``.pth``.

    It is a vocabulary file (``Vocabulary.load`` reads it) with the network's tensors beside, under ``model.``; variant
    and training record are in the metadata.
    """
    write_weights(path, model.state_dict(), model.vocabulary, model.roi_heads.variant, trained_on)


def write_weights(
    path: str | Path, state: dict[str, Tensor], vocabulary: Vocabulary, variant: str, trained_on: dict | None = None
) -> None:
    """The file of :func:`save_weights`, of a ViLDRCNN's state dict; or, where ``path`` ends in ``.pth``, Detectron2's
    checkpoint with the same in it. Written whole."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    words = {**vocabulary.state(), "variant": variant}
    rest = {} if trained_on is None else {"trained_on": trained_on}
    if str(path).endswith(".pth"):
        write_checkpoint(path, {"model": state, "vocabulary": words, **rest})
        return
    tensors = {f"model.{key}": value for key, value in state.items()}
    tensors["embeddings"] = words.pop("embeddings").contiguous()
    rest = {key: json.dumps(value) for key, value in rest.items()}
    write_tensors(path, tensors, {"vild": json.dumps(words), **rest})


def write_checkpoint(path: str | Path, content: dict) -> None:
    """Write a ``.pth`` whole.

    Raises:
        UserError: the disk is full, say.
    """
    with written_whole(path) as aside:
        try:
            with open(aside, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # torch's writer may hide what the system said behind what it says then
            reason = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise reason or error  # noqa: B904


def read_network_record(path: str) -> dict:
    """The network record of a local file of weights, of any origin."""
    if not Path(path).is_file():
        raise UserError(f"weights: {path} does not exist")
    return network_record(path, path, load_weights(path).get("trained_on"))


class VildCheckpointer(DetectionCheckpointer):
    """Saves a ViLDRCNN's vocabulary and variant under ``vocabulary``; on loading, refuses a checkpoint of another
    teacher or variant, also where only the weights are wanted.

    Args:
        trained_on: of a training, its record; saved under ``trained_on`` with that of the weights it starts from.
        beside: plain values that are saved too, and loaded by nobody.
    """

    def __init__(self, model, save_dir: str = "", *, trained_on: dict | None = None, beside: dict | None = None,
                 **kwargs):  # fmt: skip
        super().__init__(model, save_dir, **kwargs)
        self.beside = beside or {}
        if trained_on is not None:
            self.add_checkpointable("trained_on", _TrainedOn(trained_on))
        bare = getattr(model, "module", model)  # below DistributedDataParallel
        if hasattr(bare, "vocabulary"):
            self.add_checkpointable("vocabulary", _VocabularyOf(bare, "the checkpoint"))

    def save(self, name: str, **kwargs) -> None:
        """As Detectron2's, whole or not at all, with ``last_checkpoint`` after it: what is there stays usable."""
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
        checkpoint = load_weights(filename)  # not Detectron2's own, which runs what a .pkl says
        if "vocabulary" in checkpoint:
            Vocabulary.from_state(checkpoint["vocabulary"], f"checkpoint {filename}: what it holds")
        if "matching_heuristics=True" in self._parsed_url_during_load.query:
            checkpoint["matching_heuristics"] = True
        return checkpoint

    def load(self, path, checkpointables=None):
        if path and "://" not in path and not Path(path).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path} does not exist")
        if path and path.startswith(TIMM):
            check_student(path, getattr(self.model, "module", self.model))
        if path and "://" in path:
            self._fetch(path)
        if "vocabulary" in self.checkpointables and path:
            self.checkpointables["vocabulary"].where = f"checkpoint {path}"
        resumed = checkpointables is None
        if "vocabulary" in self.checkpointables:
            self.checkpointables["vocabulary"].going_on = resumed and "trained_on" in self.checkpointables
        wanted = self.checkpointables if resumed else {*checkpointables, "vocabulary"}
        rest = super().load(path, [k for k in self.checkpointables if k in wanted and k != "trained_on"])
        if "trained_on" in self.checkpointables and path:
            tracked = self.checkpointables["trained_on"]
            if resumed and "trained_on" in rest:
                tracked.load_state_dict(rest["trained_on"])
            else:
                start = {"data_sets": [], "stores": [], "starts": [self._record_of(path, rest)]}
                tracked.load_state_dict(start)
        return rest

    def _fetch(self, path: str) -> None:
        """Bring the file of an address to this machine; UserError where it cannot be had."""
        with refused_as(f"MODEL.WEIGHTS: {path}: cannot be had"):
            local = self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
        if not Path(local).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path}: is no address that Detectron2 knows")

    def _record_of(self, path: str, rest: dict) -> dict:
        return network_record(path, self.path_manager.get_local_path(path), rest.get("trained_on"))

    def load_recorded(self, path: str) -> dict:
        """Load the weights only; their network record."""
        return self._record_of(path, self.load(path, checkpointables=[]))
