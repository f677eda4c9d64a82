"""Teacher fingerprints as stored in files: their form (see :class:`vild.teacher.teacher.Teacher`) and their
comparison."""

from __future__ import annotations

from vild.utils.errors import UserError


def check_fingerprint(fingerprint: object, width: int | None = None) -> None:
    """ValueError unless it is {} (unknown) or a teacher's fingerprint; ``width``: of the embeddings it belongs to."""
    if not isinstance(fingerprint, dict):
        raise ValueError(f"the fingerprint is {type(fingerprint).__name__}, not an object")
    if not fingerprint:
        return
    for key in ("name", "pretrained", "weights"):
        if not isinstance(fingerprint.get(key), str):
            raise ValueError(f"the fingerprint's {key} is not a string")
    if type(fingerprint.get("width")) is not int or width not in (None, fingerprint["width"]):
        raise ValueError(f"the fingerprint's width is {str(fingerprint.get('width'))[:40]}, the embeddings' {width}")
    preprocess = fingerprint.get("preprocess", {})
    if not isinstance(preprocess, dict) or not isinstance(preprocess.get("crop", ""), str):
        raise ValueError("the fingerprint's preprocess is not a teacher's")


def same_teacher(a: dict, b: dict) -> bool:
    """Do two fingerprints have the same embedding space? The location of the weights does not matter, nor does the crop
    mode: text embeddings do not depend on it, so one vocabulary serves all modes."""
    return _without_crop(a) == _without_crop(b)


def same_regions(a: dict, b: dict) -> bool:
    """Do two fingerprints give a region the same embedding? :func:`same_teacher` and the same crop mode."""
    return same_teacher(a, b) and crop_of(a) == crop_of(b)


def _without_crop(fingerprint: dict) -> tuple:
    preprocess = {k: v for k, v in fingerprint.get("preprocess", {}).items() if k != "crop"}
    return fingerprint.get("weights"), fingerprint.get("width"), preprocess


def crop_of(fingerprint: dict) -> str:
    """The crop mode of a fingerprint (see ``crops.input_windows``)."""
    return fingerprint.get("preprocess", {}).get("crop", "squash")


def check_same_teacher(a: dict, where_a: str, b: dict, where_b: str) -> None:
    """UserError naming both sides unless the fingerprints agree (two unknown ones do)."""
    if not same_teacher(a, b):
        raise UserError(f"{where_a} is of teacher {describe(a)}, but {where_b} is of teacher {describe(b)}")


def is_named(fingerprint: dict, name: str, pretrained: str) -> bool:
    """May ``name`` and ``pretrained`` be the teacher of a fingerprint? A folder may hold any teacher, and an imported
    vocabulary does not name its own: then yes."""
    own = fingerprint.get("name", name), fingerprint.get("pretrained", pretrained)
    return own == (name, pretrained) or name.startswith("local-dir:")


def describe(fingerprint: dict) -> str:
    """A fingerprint in a few words."""
    if not fingerprint:
        return "unknown (imported)"
    name = " ".join(filter(None, (fingerprint["name"], fingerprint["pretrained"])))
    crop = "" if crop_of(fingerprint) == "squash" else f", {crop_of(fingerprint)} crops"
    return f"{name} (width {fingerprint['width']}, weights {fingerprint['weights']}{crop})"
