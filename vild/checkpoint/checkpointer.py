"""Detectron2's checkpoint plus the vocabulary (with the teacher's fingerprint) and a record of the training data."""

from __future__ import annotations

import hashlib
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

ADAPTERS = ("roi_heads.adapter.", "roi_heads.picture_adapter.")  # no detection depends on them
ONLY_TRAINING = (*ADAPTERS, "roi_heads.others.")  # parameters


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


def _calibration_state(calibration: Calibration | None) -> dict:
    return {} if calibration is None else {"calibration": calibration.state()}


def detector_hash(model: nn.Module) -> str:
    """The first 16 hex digits of the SHA-256 of what a ViLDRCNN has learned, by training and by calibration. Not of its
    config: with the same one, detectors of the same hash detect the same."""
    digest, calibration = hashlib.sha256(), _calibration_state(model.roi_heads.calibration)
    digest.update(json.dumps(calibration, sort_keys=True).encode())
    for key, value in sorted(model.state_dict().items()):
        if not key.startswith(ADAPTERS):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _extra_fingerprints(heads: nn.Module) -> list[dict]:
    return [] if heads.others is None else heads.others.fingerprints


def read_network_record(path: str) -> dict:
    """The network record of a local weights file of any origin."""
    if not Path(path).is_file():
        raise UserError(f"weights: {path} does not exist")
    return network_record(path, path, load_weights(path).get("trained_on"))


class VildCheckpointer(DetectionCheckpointer):
    """Saves a ViLDRCNN's vocabulary, variant and teachers under ``vocabulary``; refuses a checkpoint of another teacher
    or variant, even if only its weights are loaded.

    Args:
        trained_on: the record of a training, saved under ``trained_on`` with that of the weights it starts from.
        beside: plain values to save as well; they are not loaded.
        calibrated: use the checkpoint's calibration, if it has one. Not for training, which would invalidate it.
        trained: refuse weights that leave a part of the detector as it was initialised, such as those of a backbone.
    """

    def __init__(self, model, save_dir: str = "", *, trained_on: dict | None = None, beside: dict | None = None,
                 calibrated: bool = False, trained: bool = False, **kwargs):  # fmt: skip
        super().__init__(model, save_dir, **kwargs)
        self.trained_on, self.beside, self.calibrated, self.trained = trained_on, beside or {}, calibrated, trained
        self._missing: list[str] = []

    def content(self) -> dict:
        """What a checkpoint holds, by key."""
        content = {"model": self.model.state_dict()}
        content |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        if self.trained_on is not None:
            content["trained_on"] = self.trained_on
        if hasattr(self.model, "vocabulary"):
            heads = self.model.roi_heads
            teachers = {"variant": heads.variant, "others": _extra_fingerprints(heads)}
            words = {**self.model.vocabulary.state(), **teachers}
            content["vocabulary"] = words | _calibration_state(heads.calibration)
        return {**content, **self.beside}

    def save(self, name: str, **kwargs) -> None:
        """As Detectron2's, but atomic, and ``last_checkpoint`` is updated afterwards: a kill leaves usable files."""
        if not self.save_dir or not self.save_to_disk:
            return
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        write_checkpoint(path, {**self.content(), **kwargs})
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
            UserError: the weights cannot be read, or do not belong to the model's teacher, variant or backbone, or are
            not trained where they must be.
        """
        if path and "://" in path:
            self._fetch(path)
        elif path and not Path(path).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path} does not exist")
        if self.trained and not path:
            raise UserError("MODEL.WEIGHTS is empty: give trained weights; this would be a random network")
        rest = super().load(path, checkpointables)
        resumes = checkpointables is None and self.trained_on is not None
        if "vocabulary" in rest and hasattr(self.model, "vocabulary"):
            self._load_vocabulary(rest.pop("vocabulary"), f"checkpoint {path}", resumes)
        if self.trained and (missing := [n for n in self._missing if not n.startswith(ONLY_TRAINING)]):
            raise UserError(f"MODEL.WEIGHTS: {path} lacks {len(missing)} of the network's parameters, first "
                            f"{missing[0]}, which would be random: give weights trained with this config")  # fmt: skip
        if path and self.trained_on is not None:
            start = {"data_sets": [], "stores": [], "starts": [self._record_of(path, rest)]}
            self.trained_on = merge(rest["trained_on"] if resumes and "trained_on" in rest else start, self.trained_on)
        return rest

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        parameters = dict(self.model.named_parameters())
        self._missing = [name for name in incompatible.missing_keys if name in parameters]
        return incompatible

    def _load_vocabulary(self, state: dict, where: str, resumes: bool) -> None:
        """Take over the calibration; UserError unless teachers and variant (and names, if a training resumes) are the
        model's."""
        mine, heads = self.model.vocabulary, self.model.roi_heads
        check_same_teacher(state["fingerprint"], where, mine.fingerprint, "the config's vocabulary")
        for theirs, own in zip(state.get("others", []), _extra_fingerprints(heads), strict=False):
            check_same_teacher(theirs, f"{where}, an extra teacher", own, "that of MODEL.VILD.TEACHERS")
        if state.get("variant") not in (None, heads.variant):
            raise UserError(f"{where} is of variant '{state['variant']}', MODEL.VILD.VARIANT is '{heads.variant}'")
        if self.calibrated and "calibration" in state:
            self._load_calibration(state["calibration"], where)
        same = list(state["names"]) == list(mine.names) and state["embeddings"].equal(mine.embeddings.cpu())
        if resumes and not same:
            raise UserError(f"{where} was trained with another vocabulary than MODEL.VILD.VOCABULARY")

    def _load_calibration(self, state: dict, where: str) -> None:
        heads = self.model.roi_heads
        if heads.others is not None and heads.others.projections:
            self.logger.warning("%s was calibrated without its extra teachers, whose scores are fused here: its "
                                "calibration is not used", where)  # fmt: skip
            return
        with refused_as(f"{where}: its calibration"):
            levels = self.model.backbone.output_shape()
            count = 2 * sum(levels[name].channels for name in heads.box_in_features)
            heads.calibration = Calibration.from_state(state, count, heads.classifier.vocabulary.width)
        fitted, now = heads.calibration.temperature, heads.classifier.test_temperature
        if abs(fitted - now) > 1e-9:
            self.logger.warning("%s was calibrated at temperature %s, not %s: its scores are no probabilities; "
                                "run tools/calibrate.py again", where, fitted, now)  # fmt: skip

    def _fetch(self, path: str) -> None:
        """Download a URL into the cache, UserError if that fails. Detectron2 then loads the local copy."""
        if path.startswith("timm://"):
            from vild.checkpoint.timm_weights import check_student  # registers the handler of these paths

            check_student(path, self.model)
        with refused_as(f"MODEL.WEIGHTS: {path}: cannot be downloaded"):
            local = self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
        if not Path(local).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path}: not a URL that Detectron2 supports")

    def _record_of(self, path: str, rest: dict) -> dict:
        return network_record(path, self.path_manager.get_local_path(path), rest.get("trained_on"))

    def load_recorded(self, path: str) -> dict:
        """Load only the weights, and return their network record."""
        return self._record_of(path, self.load(path, checkpointables=[]))
