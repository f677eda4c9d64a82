"""timm's published weights as ``MODEL.WEIGHTS``: ``timm://NAME.TAG``, or ``timm://NAME/FILE`` for a local copy of them
(``timm://resnet18//data/resnet18.safetensors`` is an absolute path)."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock

from vild.utils.errors import UserError, first_line
from vild.utils.files import cache_folder, hash_file, written_whole

TIMM = "timm://"


class TimmHandler(PathHandler):
    """Resolves such a path to a checkpoint of a detector's backbone in the cache folder."""

    def _get_supported_prefixes(self):
        return [TIMM]

    def _get_local_path(self, path, force=False, **kwargs):
        name, _, file = path.removeprefix(TIMM).partition("/")
        if not timm.is_model(name):
            raise UserError(f"MODEL.WEIGHTS: {path}: timm has no model '{name}'")
        if file and not Path(file).is_file():
            raise UserError(f"MODEL.WEIGHTS: {path}: {file} does not exist")
        local = cache_folder() / "timm" / (f"{name}-{hash_file(file)}.pth" if file else f"{name}.pth")
        local.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(local)):
            if not local.is_file():
                overlay = {"file": file} if file else None
                try:
                    body = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
                except Exception as error:  # from the network, the hub or the file
                    raise UserError(f"MODEL.WEIGHTS: {path}: {first_line(error)}") from error
                with written_whole(local) as aside:
                    torch.save({f"backbone.bottom_up.body.{k}": v for k, v in body.state_dict().items()}, aside)
        return str(local)


def check_student(path: str, model: torch.nn.Module) -> None:
    """UserError if ``path`` belongs to another network than the model's backbone: nothing of it would be loaded."""
    asked = path.removeprefix(TIMM).partition("/")[0]
    name = getattr(getattr(getattr(model, "backbone", None), "bottom_up", None), "name", "not a model of timm")
    if asked.partition(".")[0] != name.partition(".")[0]:
        raise UserError(f"MODEL.WEIGHTS: {path} has the weights of another network than the backbone ({name})")


PathManager.register_handler(TimmHandler())
