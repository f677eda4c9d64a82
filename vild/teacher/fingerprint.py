"""A teacher's fingerprint as it comes back from a file: the form that :class:`vild.teacher.clip.Teacher` gives it."""

from __future__ import annotations


def check_fingerprint(fingerprint: object, width: int | None = None) -> None:
    """ValueError unless it is {} (unknown) or one of a teacher's; ``width``: of the embeddings it stands beside."""
    if not isinstance(fingerprint, dict):
        raise ValueError(f"the fingerprint is {type(fingerprint).__name__}, not an object")
    if not fingerprint:
        return
    for key in ("name", "pretrained", "weights"):
        if not isinstance(fingerprint.get(key), str):
            raise ValueError(f"the fingerprint's {key} is no text")
    if type(fingerprint.get("width")) is not int or width not in (None, fingerprint["width"]):
        raise ValueError(f"the fingerprint's width is {str(fingerprint.get('width'))[:40]}, the embeddings' {width}")
    preprocess = fingerprint.get("preprocess", {})
    if not isinstance(preprocess, dict) or not isinstance(preprocess.get("crop", ""), str):
        raise ValueError("the fingerprint's preprocess is not a teacher's")
