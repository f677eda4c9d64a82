"""The detectors that the authors of ViLD published: downloaded, converted, and kept as detector folders.

The first start makes ``NAME`` in ``cache_folder()/detectors``; ``NAME.json`` beside it says what the archive was.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vild.config import load_config
from vild.utils.errors import UserError
from vild.utils.files import cache_folder, cannot_write, sha256, write_json, write_text
from vild.utils.lock import only_writer
from vild.utils.untrusted import parse_json, read_bytes, refused_as

if TYPE_CHECKING:
    from vild.checkpoint.released import Released

CONFIG, WEIGHTS, TEACHER = "config.yaml", "model.safetensors", "teacher"  # in a detector folder
# Where the archives are; the environment variable VILD_RELEASED_URL names a mirror
URL = "https://storage.googleapis.com/cloud-tpu-checkpoints/detection/projects/vild"
CHECKPOINT = re.compile(r"model\.ckpt-\d+\.(index|data-\d{5}-of-\d{5})")  # the files of an archive that are read
TEXT_ENCODER = ("ViT-B-32-quickgelu", "openai")  # in whose space the detectors live (paper, section 4)

logger = logging.getLogger(__name__)
one_thread = threading.Lock()  # a process's threads share its record locks


@dataclass(frozen=True)
class Archive:
    """``file`` below URL, the built-in config it belongs to, and the most bytes that it may have: with an optimizer's
    state some three times the weights, 0.2 to 0.5 GB."""

    file: str
    config: str
    most: int


RELEASED = {
    "vild-r50": Archive("pretrained_ckpts/resnet50_vild.tar.gz", "LVIS/released/vild_R50.yaml", 2 << 30),
    "vild-r50-ensemble": Archive(
        "pretrained_ckpts/resnet50_vild_ensemble.tar.gz", "LVIS/released/ensemble_R50.yaml", 2 << 30
    ),
    "vild-r152": Archive("pretrained_ckpts/resnet152_vild.tar.gz", "LVIS/released/vild_R152.yaml", 3 << 30),
    "vild-r152-ensemble": Archive(
        "pretrained_ckpts/resnet152_vild_ensemble.tar.gz", "LVIS/released/ensemble_R152.yaml", 3 << 30
    ),
}


def released_folder(name: str) -> Path:
    """The folder of a detector of RELEASED, made at the first start, by one process while others wait.

    Raises:
        NotAvailable: the archive cannot be downloaded.
        UserError: it is not what it was when first seen, cannot be unpacked or converted; or the disk refuses.
    """
    folder = cache_folder() / "detectors" / name
    if not folder.is_dir():
        with one_thread, only_writer(folder, wait=True):
            if not folder.is_dir():
                _make_released(name, folder)
    record, weights = _read_record(folder), folder / WEIGHTS
    found = weights.stat().st_size if weights.is_file() else 0
    if record and found != record["weights"]:
        written = f"not the {record['weights']:,} it was written with"
        raise UserError(f"{weights}: has {found:,} bytes, {written}; remove {folder} to make it anew")
    return folder


def _make_released(name: str, folder: Path) -> None:
    """Download, unpack and convert an archive. What is unfinished lies beside the folder, which appears at the end."""
    from vild.checkpoint.released import convert  # and the reader of TensorFlow's files
    from vild.utils.archives import unpack
    from vild.utils.download import download

    archive, file, aside = RELEASED[name], folder.with_name(f"{name}.tar.gz"), folder.with_name(f"{name}.tmp")
    url = f"{(os.environ.get('VILD_RELEASED_URL') or URL).rstrip('/')}/{archive.file}"
    if not file.is_file():
        download(url, file, archive.most)
    seen = {"url": url, "size": file.stat().st_size, "sha256": sha256(file)}
    record = _read_record(folder)
    if record and any(record[key] != seen[key] for key in ("size", "sha256")):
        file.unlink()
        raise UserError(
            f"{url}: has changed since it was first seen: {seen['size']:,} bytes, hash {seen['sha256'][:16]}..., not "
            f"{record['size']:,}, {record['sha256'][:16]}...; to take it all the same, remove {_record(folder)}"
        )
    try:
        _remove(aside)
        unpack(file, aside, CHECKPOINT, 2 * archive.most)
        found = convert(aside, archive.config)
        for part in aside.iterdir():
            part.unlink()  # the converted weights need its place
        weights = _write_folder(aside, folder, _with_text_encoder(found))
        write_json(_record(folder), {**seen, "weights": weights})
        with cannot_write(folder):
            os.replace(aside, folder)
    except BaseException as error:
        _remove(aside)
        if isinstance(error, UserError) and getattr(error.__cause__, "errno", None) is None:
            file.unlink()  # not the disk's fault: it would fail again
        raise
    file.unlink()


def _write_folder(aside: Path, folder: Path, found: Released) -> int:
    """Write in ``aside`` what ``folder`` will hold; the bytes of its weights."""
    found.write(aside / WEIGHTS)
    weights = str(folder / WEIGHTS)
    cfg = load_config(found.config, ["MODEL.WEIGHTS", weights, "MODEL.VILD.VOCABULARY", weights]).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda"  # where there is one
    write_text(aside / CONFIG, cfg.dump())
    return (aside / WEIGHTS).stat().st_size


def _with_text_encoder(found: Released) -> Released:
    """With the fingerprint of the text encoder in the vocabulary, which caching new words needs; unchanged, with a
    warning, if the encoder cannot be had."""
    from vild.checkpoint.released import with_teacher
    from vild.teacher.teacher import build_teacher

    try:
        return replace(found, vocabulary=with_teacher(found.vocabulary, build_teacher(*TEXT_ENCODER, "cpu")))
    except UserError as error:
        logger.warning("%s. Until then the detector's own %d names can be detected", error, len(found.vocabulary))
        return found


def _record(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _read_record(folder: Path) -> dict | None:
    """ "size" and "sha256" of the archive when first seen, and the bytes of the "weights"; None if it was not."""
    path = _record(folder)
    if not path.is_file():
        return None
    with refused_as(f"{path}: is not a record of a download; remove it"):
        record = parse_json(read_bytes(path))
        return {"size": int(record["size"]), "sha256": str(record["sha256"]), "weights": int(record["weights"])}


def _remove(folder: Path) -> None:
    if folder.exists():
        with cannot_write(folder):
            shutil.rmtree(folder)
