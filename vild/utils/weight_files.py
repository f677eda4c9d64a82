"""Untrusted checkpoint files, loaded without running any code in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vild.utils.untrusted import load_arrays, open_tensors, parse_json, refuse_wrong_file, refused_as


def load_weights(path: str | Path) -> dict:
    """Load a checkpoint in Detectron2's form, {"model": {name: tensor or array}, ...}.

    * ``.safetensors``: as written by ``vild.checkpoint.checkpointer.save_weights``.
    * ``.pkl``: arrays by name (Detectron2's and Caffe2's model zoos), by an unpickler restricted to NumPy.
    * any other (``.pth``): PyTorch's ``weights_only`` loader; compressed files and expanded tensors are rejected.

    Raises:
        UserError: unreadable, would run code, or contains no weights.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        with refused_as(f"checkpoint {path} is not one of vild's"):
            checkpoint = _from_safetensors(path)
    else:
        with refused_as(f"checkpoint {path} cannot be read"):
            refuse_wrong_file(path)
            if suffix == ".pkl":
                checkpoint = _from_model_zoo(load_arrays(path))
            else:
                _refuse_compressed(path)
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                _refuse_expanded(checkpoint)
            if not isinstance(checkpoint, dict):
                raise ValueError(f"contains {type(checkpoint).__name__}, not a dict of weights")
            if "model" not in checkpoint:
                checkpoint = {"model": checkpoint}
    with refused_as(f"checkpoint {path} cannot be read"):
        _check(checkpoint)
    return checkpoint


def _from_safetensors(path: str | Path) -> dict:
    with open_tensors(path) as file:
        metadata = file.metadata()
        state, trained_on = parse_json(metadata["vild"]), metadata.get("trained_on")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state["embeddings"] = tensors.pop("embeddings")
    checkpoint = {"model": {key.removeprefix("model."): value for key, value in tensors.items()}, "vocabulary": state}
    return checkpoint if trained_on is None else {**checkpoint, "trained_on": parse_json(trained_on)}


def _refuse_compressed(path: str | Path) -> None:
    """ValueError for a compressed ``.pth``, which PyTorch never writes: 1 MB of it can expand to a GB of zeros."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("parts of it are compressed")


def _refuse_expanded(content: object) -> None:
    """ValueError for a tensor larger than its storage (a stride of 0): a few bytes can claim any size."""
    if isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            _refuse_expanded(value)
    elif isinstance(content, Tensor) and content.numel() * content.element_size() > content.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(content.shape)} is larger than its storage")


def _from_model_zoo(content: dict) -> dict:
    """As Detectron2's checkpointer does: its own zoo's files have an author; Caffe2's are a dict of blobs."""
    if "model" in content and "__author__" in content:
        return content
    arrays = content.get("blobs", content)
    arrays = {name: value for name, value in arrays.items() if not name.endswith("_momentum")}
    return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}


def _check(checkpoint: dict) -> None:
    """ValueError unless the weights are tensors by name and "trained_on", if present, is a record of vild's."""
    model, record = checkpoint["model"], checkpoint.get("trained_on")
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise ValueError("its weights have no names")
    if not model and checkpoint.get("matching_heuristics"):  # Detectron2 cannot match none
        raise ValueError("it contains no weights")
    for name, value in model.items():
        if not isinstance(value, Tensor | np.ndarray | np.number):
            raise ValueError(f"'{name}' is {type(value).__name__}, not a tensor")
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            raise ValueError(f"'{name}' is an array of objects")
    if record is not None:
        lists = ("data_sets", "stores", "starts")
        if not isinstance(record, dict) or not all(isinstance(record.get(key), list) for key in lists):
            raise ValueError(f"trained_on is not a record with {', '.join(lists)}")
