"""Detectors by name: a folder, a file, the authors' four, a Hugging Face repository, an address.

A detector folder holds ``config.yaml``, ``model.safetensors`` (weights and vocabulary) and, where the text encoder is
none that open_clip can download, ``teacher/``.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from vild.checkpoint.released_archives import CONFIG, RELEASED, TEACHER, WEIGHTS, one_thread, released_folder
from vild.config import check_weights, load_config, pick_device
from vild.utils.errors import NotAvailable, UserError
from vild.utils.files import cache_folder, cannot_write, sha256
from vild.utils.lock import only_writer
from vild.utils.untrusted import refused_as

HUB = "hf-hub:"
LARGEST_FILE = 1 << 34  # bytes of a checkpoint at an address
# Config keys that take a name as they take a file; other addresses (timm://, detectron2://) are the checkpointer's
KEYS = ("MODEL.WEIGHTS", "MODEL.VILD.VOCABULARY", "MODEL.VILD.OLD_STUDENT.WEIGHTS")


def find_weights(name: str | Path) -> Path:
    """The local folder or file of a detector, downloaded if it has to be.

    Args:
        name: a folder or file; a name of RELEASED; ``hf-hub:OWNER/NAME`` or ``hf-hub:OWNER/NAME@REVISION``; or an http
            or https address followed by ``#sha256=`` and the file's SHA-256.

    Raises:
        NotAvailable: it is not on this machine and cannot be downloaded.
        UserError: none of these; another file than the one expected or seen before; or the disk refuses.
    """
    text = str(name)
    if Path(name).exists():
        return Path(name)
    if text in RELEASED:
        return released_folder(text)
    if text.startswith(HUB):
        return _hub_folder(text)
    if text.startswith(("http://", "https://")):
        return _addressed_file(text)
    known = f"{', '.join(RELEASED)}, {HUB}OWNER/NAME, or an address with #sha256="
    near = get_close_matches(text, RELEASED, 1)
    hint = f"; did you mean '{near[0]}'?" if near else f", and is not one of {known}"
    raise UserError(f"weights: {text} does not exist{hint}")


def weights_file(name: str | Path) -> str:
    """The local file of weights and vocabulary of the detector that :func:`find_weights` finds."""
    path = find_weights(name)
    return str(path / WEIGHTS if path.is_dir() else path)


def detector_config(
    name: str | Path, config_file: str | Path | None = None, device: str | None = None, overrides: Sequence[object] = ()
):
    """The config of the detector that :func:`find_weights` finds, with its weights; frozen.

    Args:
        config_file: of weights that are a file; a folder has its own.
        device: default: that of ``config_file``; for a folder the best there is.
        overrides: KEY, VALUE, ...

    Raises:
        UserError: as :func:`find_weights` and :func:`vild.config.load_config`; a file without ``config_file``, or a
            folder with one.
    """
    path = find_weights(name)
    if path.is_dir():
        if config_file:
            raise UserError(f"weights {name}: a detector folder has its own config; give no other")
        return folder_config(path, pick_device(device), overrides)
    if not config_file:
        raise UserError(f"weights {name}: a file of weights has no config; give it, too (--config-file, config_file)")
    own = ["MODEL.DEVICE", pick_device(device)] if device else []
    return _with_files(load_config(config_file, [*overrides, "MODEL.WEIGHTS", str(path), *own]))


def folder_config(folder: str | Path, device: str | None = None, overrides: Sequence[object] = ()):
    """The config of a detector folder, with the paths of this machine; frozen. ``device``: default: the config's."""
    folder = Path(folder)
    own = [x for key in ("MODEL.WEIGHTS", "MODEL.VILD.VOCABULARY") for x in (key, str(folder / WEIGHTS))]
    own += ["OUTPUT_DIR", "./output"]  # the folder may be a stranger's
    if (folder / TEACHER).is_dir():
        own += ["MODEL.VILD.TEACHER.NAME", f"local-dir:{folder / TEACHER}"]
    return load_config(str(folder / CONFIG), [*own, *(["MODEL.DEVICE", device] if device else []), *overrides])


def config_from_flags(args: Namespace):
    """The config of ``--config-file``, ``--weights``, ``--device`` and ``--opts``
    (``command_line.add_model_flags``); frozen.

    Raises:
        UserError: as :func:`detector_config`, neither a config file nor weights that bring one, or a device that this
            machine does not have.
    """
    if args.weights and not re.match(r"(?!https?:)\w+://", args.weights):  # timm:// and detectron2:// are for training
        cfg = detector_config(args.weights, args.config_file, args.device, args.opts)
        pick_device(cfg.MODEL.DEVICE, "MODEL.DEVICE")
        return cfg
    if not args.config_file:
        raise UserError("give --config-file, or --weights with the name or folder of a detector")
    flags = (("MODEL.WEIGHTS", args.weights), ("MODEL.DEVICE", args.device and pick_device(args.device)))
    cfg = _with_files(load_config(args.config_file, [*args.opts, *(x for pair in flags if pair[1] for x in pair)]))
    check_weights(cfg)
    pick_device(cfg.MODEL.DEVICE, "MODEL.DEVICE")
    return cfg


def config_of_launch(args: Namespace, evaluates: bool):
    """The config of Detectron2's flags (``command_line.training_parser``); frozen. Files of the config (KEYS) may be
    names. An evaluation needs no config file if ``MODEL.WEIGHTS`` names a detector that has its own.

    Raises:
        UserError: as :func:`find_weights` and :func:`vild.config.load_config`.
    """
    if args.config_file or not evaluates:
        return _with_files(load_config(args.config_file, args.opts))
    given = dict(zip(args.opts[::2], args.opts[1::2], strict=False)).get("MODEL.WEIGHTS")
    if given is None:
        raise UserError("give --config-file, or MODEL.WEIGHTS with the name or folder of a detector")
    return detector_config(given, overrides=[*args.opts, "MODEL.WEIGHTS", weights_file(given)])


def _with_files(cfg):
    """The config with a local file where one of KEYS names a detector."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in KEYS:
        node = reduce(getattr, key.split(".")[:-1], cfg)
        text = node[key.split(".")[-1]]
        if text in RELEASED or text.startswith(HUB) or "#sha256=" in text or (text and Path(text).is_dir()):
            node[key.split(".")[-1]] = weights_file(text)
    cfg.freeze()
    return cfg


def _addressed_file(text: str) -> Path:
    """The local copy of ``https://...#sha256=...``, in the cache under its hash."""
    from vild.utils.download import download  # of no use to a file that is there

    with refused_as(f"weights {text}: is not an address"):
        url, fragment = urldefrag(text)
    digest = fragment.removeprefix("sha256=").lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise UserError(f"weights {text}: put the SHA-256 of the file behind the address: {url}#sha256=...")
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-100:]
    path = cache_folder() / "files" / digest[:16] / (name or "weights")
    if not path.is_file():
        with one_thread, only_writer(path, wait=True):
            if not path.is_file():
                fetched = path.with_name(f"{path.name}.new")
                download(url, fetched, LARGEST_FILE)
                if (found := sha256(fetched)) != digest:
                    fetched.unlink()
                    raise UserError(f"{url}: has the SHA-256 {found}, not {digest}")
                with cannot_write(path):
                    os.replace(fetched, path)
    return path


def _hub_folder(text: str) -> Path:
    """The local copy of a Hugging Face repository, in that library's cache; the newest revision if it can be asked."""
    from huggingface_hub import snapshot_download

    repository, _, revision = text.removeprefix(HUB).partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[CONFIG, WEIGHTS, f"{TEACHER}/*"],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except Exception as error:  # of the library, of the network, of the disk
        raise NotAvailable(f"weights {text}: cannot be downloaded ({' '.join(str(error).split())[:300]})") from error
    return Path(folder)
