"""The teacher: any open_clip model, frozen, with its own preprocessing and a fingerprint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.teacher.context import encode_in_context
from vild.teacher.crops import crop_batch, fuse_scales, input_windows, normalise
from vild.utils.errors import UserError, first_line
from vild.utils.files import write_json, write_tensors, written_whole
from vild.utils.fingerprint import check_same_teacher
from vild.utils.untrusted import refused_as
from vild.vocabulary.prompts import LearnedPrompts

RANDOM = "random"
CONFIG = "open_clip_config.json"  # of a local-dir: folder
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher:
    """Unit-length image and text embeddings of one width, without gradients.

    Args:
        name: an open_clip model name, or ``local-dir:FOLDER`` (``open_clip_config.json`` and weights).
        pretrained: a tag open_clip knows, a file of weights, or "random" (fixed seed; for trying things).
            Ignored for ``local-dir:``.
        device: where the model lives.
        crop: how a region becomes its input, one of crops.MODES (see ``crops.input_windows``).
        precision: of the image tower's arithmetic (autocast), one of PRECISIONS. Text is always encoded in fp32.
        compile: compile the image tower (minutes at the start; pays over millions of crops on a GPU).

    Raises:
        UserError: unknown name, tag or mode, weights out of reach, or a QuickGELU mismatch (open_clip only warns).
    """

    def __init__(
        self,
        name: str,
        pretrained: str = "",
        device: str | torch.device = "cpu",
        crop: str = "squash",
        precision: str = "fp32",
        compile: bool = False,
    ):
        input_windows(1, 1, (1, 1), crop)  # an unknown mode shall not wait for the weights
        self.name, self.pretrained, self.device = name, pretrained, torch.device(device)
        self.crop, self.precision = crop, precision
        self.model = _create(name, pretrained).to(self.device).eval().requires_grad_(False)
        self._encode_image = torch.compile(self.model.encode_image) if compile else self.model.encode_image
        self.tokenizer = open_clip.get_tokenizer(name)
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = preprocess["size"]
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean, self.std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        self.interpolation = preprocess["interpolation"]
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"teacher '{name}': interpolation '{self.interpolation}' is not supported")
        self.width = self.encode_text(["a"]).shape[1]
        self.fingerprint = {
            "name": name,
            "pretrained": pretrained,
            "weights": hash_weights(self.model),
            "width": self.width,
            "preprocess": {
                "size": list(self.size),
                "mean": list(self.mean),
                "std": list(self.std),
                "interpolation": self.interpolation,
                "crop": crop,
            },
        }

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised float [N, 3, *size] to unit float32 [N, D]."""
        if len(images) == 0:
            return torch.zeros((0, self.width), device=self.device)
        with self._autocast():
            features = self._encode_image(self._laid_out(images))
        return F.normalize(features.float(), dim=1)

    @torch.inference_mode()
    def encode_image_and_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`encode_image`, for N > 0, and the image tower's last feature map, float32 [N, T, h, w]: a ViT's
        patch tokens after the last norm before pooling, a convolutional network's last stage."""
        norm = getattr(self.model.visual, "attn_pool", None) is None  # CoCa's last norm is behind its pooling
        with self._autocast():
            found = self.model.forward_intermediates(
                self._laid_out(images), image_indices=1, normalize=False, normalize_intermediates=norm
            )
        return F.normalize(found["image_features"].float(), dim=1), found["image_intermediates"][-1].float()

    @cached_property
    def map_shape(self) -> tuple[int, int, int]:
        """(T, h, w) of the image tower's last feature map.

        Raises:
            UserError: the tower has none, or gives with it another embedding than without.
        """
        probe = torch.linspace(-1, 1, 3 * self.size[0] * self.size[1]).view(1, 3, *self.size)
        try:
            embedding, maps = self.encode_image_and_maps(probe)
        except Exception as error:  # each tower fails in its own way
            reason = " ".join(str(error).split())
            raise UserError(f"teacher '{self.name}': its image tower gives no feature map ({reason})") from error
        if maps.dim() != 4 or not torch.allclose(embedding, self.encode_image(probe), atol=1e-3):
            raise UserError(f"teacher '{self.name}': its image tower gives no feature map beside its embedding")
        return tuple(maps.shape[1:])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.to(self.device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], batch: int = 256, prompts: LearnedPrompts | None = None) -> Tensor:
        """T texts to unit float32 [T, D]. With ``prompts``, the words that each text begins with give way to the
        context that was learned in their place; UserError if it was for another teacher."""
        encode = self.model.encode_text
        if prompts is not None:
            check_same_teacher(prompts.fingerprint, f"prompt set ({prompts})", self.fingerprint, "the text encoder")
            encode = partial(encode_in_context, self.model, context=prompts.context.to(self.device))
        parts = []
        for start in range(0, len(texts), batch):
            tokens = self.tokenizer(list(texts[start : start + batch])).to(self.device)
            parts.append(F.normalize(encode(tokens).float(), dim=1))
        return torch.cat(parts)

    def save(self, folder: Path) -> None:
        """Write the model as open_clip's ``local-dir:`` folder, each file whole and the config last: the same teacher,
        by its fingerprint."""
        if self.name.startswith(open_clip.factory.LOCAL_DIR_PREFIX):
            source = Path(self.name.removeprefix(open_clip.factory.LOCAL_DIR_PREFIX))
            files = [f.relative_to(source) for f in source.rglob("*") if f.is_file()]
            for file in sorted(files, key=lambda f: (f.name == CONFIG, f)):
                with written_whole(folder / file) as aside:
                    shutil.copyfile(source / file, aside)
        else:
            save_local(self.model, open_clip.get_model_config(self.name), folder)

    def cut(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """The crops of several images' boxes, uint8 [sum of N_i, S, 3, *size] (see ``crop_batch``)."""
        return crop_batch(images, boxes, self.size, self.mean, self.interpolation, mode=self.crop)

    def encode_regions(self, image: Tensor, boxes: Tensor) -> Tensor:
        """The distillation target of each box: 1x + 1.5x crops, fused. uint8 RGB [3, H, W], [N, 4] to [N, D]."""
        if len(boxes) == 0:
            return torch.zeros((0, self.width), device=self.device)
        crops = self.cut([image], [boxes])
        embeddings = self.encode_image(normalise(crops.flatten(0, 1), self.mean, self.std))
        return fuse_scales(embeddings.view(*crops.shape[:2], -1))

    def encode_regions_and_maps(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`encode_regions`, to the last bit, and the feature map of each box's 1x crop, [N, T, h, w].

        Raises:
            UserError: see :attr:`map_shape`.
        """
        if len(boxes) == 0:
            return self.encode_regions(image, boxes), torch.zeros((0, *self.map_shape), device=self.device)
        crops = self.cut([image], [boxes])
        embeddings, maps = self.encode_image_and_maps(normalise(crops.flatten(0, 1), self.mean, self.std))
        return fuse_scales(embeddings.view(*crops.shape[:2], -1)), maps[:: crops.shape[1]]


def _create(name: str, pretrained: str) -> nn.Module:
    """``open_clip.create_model`` with its failures as one line."""
    if name.startswith(open_clip.factory.LOCAL_DIR_PREFIX):
        folder = Path(name.removeprefix(open_clip.factory.LOCAL_DIR_PREFIX))
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"teacher '{name}': {folder}/open_clip_config.json does not exist")
        _refuse_code(name)
        return _or_user_error(name, lambda: open_clip.create_model(name, require_pretrained=True))
    if name.startswith("hf-hub:"):
        _refuse_code(name)
    elif open_clip.get_model_config(name) is None:
        raise UserError(f"teacher '{name}': open_clip has no model of this name (open_clip.list_models())")
    if pretrained == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return open_clip.create_model(name, pretrained=None)
    if not name.startswith("hf-hub:"):
        tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
        if not tag and not Path(pretrained).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise UserError(f"teacher '{name}': '{pretrained}' is neither a file nor one of its tags ({tags})")
        wants_quick_gelu = (tag or {}).get("quick_gelu", False)
        if tag and wants_quick_gelu != open_clip.get_model_config(name).get("quick_gelu", False):
            raise UserError(
                f"teacher '{name}': the weights '{pretrained}' were trained "
                f"{'with' if wants_quick_gelu else 'without'} QuickGELU; "
                f"use '{name}-quickgelu' or other weights"
            )
    return _or_user_error(
        name, lambda: open_clip.create_model(name, pretrained=pretrained or None, require_pretrained=True)
    )


def _refuse_code(name: str) -> None:
    """UserError where a folder's or hub repository's config asks the tokenizer to run its own code."""
    with refused_as(f"teacher '{name}': its open_clip_config.json cannot be read"):
        wants = "trust_remote_code" in json.dumps(open_clip.get_model_config(name))
    if wants:
        raise UserError(f"teacher '{name}': its open_clip_config.json sets trust_remote_code, which would run its code")


def _or_user_error(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    try:
        return create()
    except Exception as error:  # a broken file can fail anywhere in the loaders
        raise UserError(f"teacher '{name}': its weights cannot be loaded: {first_line(error)}") from error


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict (first 16 hex digits)."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_local(model: nn.Module, model_cfg: dict, folder: Path) -> None:
    """Write a model as open_clip's ``local-dir:`` folder, the config last so that it marks a whole folder."""
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_tensors(folder / "open_clip_model.safetensors", state)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    write_json(folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess})
