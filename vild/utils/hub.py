"""The Hugging Face hub, asked once whether it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@contextmanager
def asked_once(repository: str) -> Iterator[str]:
    """Ask the hub for a repository. If it does not answer, huggingface_hub uses its cache alone in the block, and the
    reason is yielded, else "". (Of itself it retries every file for half a minute, even those in its cache.)"""
    from huggingface_hub import HfApi, constants

    offline, reason = constants.HF_HUB_OFFLINE, ""
    try:
        HfApi().model_info(repository, timeout=10)
    except Exception as error:  # of its own many classes, of its HTTP library, of the system
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    constants.HF_HUB_OFFLINE = offline or bool(reason)
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = offline


def in_cache(repository: str) -> bool:
    """Whether huggingface_hub's cache has weights of this repository."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repository, local_files_only=True)
    except OSError:  # LocalEntryNotFoundError
        return False
    return any(path.suffix in WEIGHTS for path in Path(folder).iterdir())
