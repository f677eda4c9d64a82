"""Files of weights, of any origin, read without running anything in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vild.utils.untrusted import load_arrays, open_tensors, parse_json, refused_as


def load_weights(path: str | Path) -> dict:
    """A checkpoint in the form of Detectron2's: {"model": {name: tensor or array}, ...}.

    * ``.safetensors``: one of ``vild.checkpoint.checkpointer.save_weights``.
    * ``.pkl``: arrays by name, as in Detectron2's and Caffe2's model zoos; read by an unpickler that knows NumPy alone.
    * any other (``.pth``): PyTorch's, tensors and plain values alone (``weights_only``), as many bytes as it says.

    Raises:
        UserError: it cannot be read, would run code, or holds no weights.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        with refused_as(f"checkpoint {path} is not one of vild's"):
            checkpoint = _of_safetensors(path)
    else:
        with refused_as(f"checkpoint {path} cannot be read"):
            if suffix == ".pkl":
                checkpoint = _of_model_zoo(load_arrays(path))
            else:
                _refuse_compressed(path)
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                _refuse_repeated(checkpoint)
            if not isinstance(checkpoint, dict):
                raise ValueError(f"holds {type(checkpoint).__name__}, not weights by name")
            if "model" not in checkpoint:
                checkpoint = {"model": checkpoint}
    with refused_as(f"checkpoint {path} cannot be read"):
        _check(checkpoint)
    return checkpoint


def _of_safetensors(path: str | Path) -> dict:
    with open_tensors(path) as file:
        metadata = file.metadata()
        state, rest = parse_json(metadata["vild"]), metadata.get("trained_on")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state["embeddings"] = tensors.pop("embeddings")
    checkpoint = {"model": {key.removeprefix("model."): value for key, value in tensors.items()}, "vocabulary": state}
    return checkpoint if rest is None else {**checkpoint, "trained_on": parse_json(rest)}


def _refuse_compressed(path: str | Path) -> None:
    """ValueError for a ``.pth`` with compressed parts, which PyTorch never writes: 1 MB of zeros can become a GB."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("parts of it are compressed")


def _refuse_repeated(content: object) -> None:
    """ValueError for a tensor that says more numbers than it holds (strides of 0): a few bytes can say any size."""
    if isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            _refuse_repeated(value)
    elif isinstance(content, Tensor) and content.numel() * content.element_size() > content.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(content.shape)} holds fewer numbers than that")


def _of_model_zoo(content: dict) -> dict:
    """As Detectron2's checkpointer understands it: its own zoo's files say who made them; Caffe2's are names alone."""
    if "model" in content and "__author__" in content:
        return content
    arrays = content.get("blobs", content)
    arrays = {name: value for name, value in arrays.items() if not name.endswith("_momentum")}
    return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}


def _check(checkpoint: dict) -> None:
    """ValueError unless the weights are tensors by name, and what tools write beside them is of their form."""
    model, record = checkpoint["model"], checkpoint.get("trained_on")
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise ValueError("its weights have no names")
    for name, value in model.items():
        if not isinstance(value, Tensor | np.ndarray | np.number):
            raise ValueError(f"'{name}' is {type(value).__name__}, not a tensor")
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            raise ValueError(f"'{name}' is an array of objects")
    if record is not None:
        lists = ("data_sets", "stores", "starts")
        if not isinstance(record, dict) or not all(isinstance(record.get(key), list) for key in lists):
            raise ValueError(f"trained_on is not a record with {', '.join(lists)}")
