"""CLIP teachers: any open_clip model, with its own preprocessing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.teacher.teacher import Teacher
from vild.utils.errors import NotAvailable, UserError, first_line
from vild.utils.files import write_json, write_tensors, written_whole
from vild.utils.fingerprint import check_same_teacher
from vild.utils.hub import asked_once, in_cache
from vild.utils.untrusted import refused_as, what_it_is
from vild.vocabulary.prompts import LearnedPrompts

RANDOM = "random"
HUB = "hf-hub:"
CONFIG = "open_clip_config.json"  # of a local-dir: folder
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ClipTeacher(Teacher, kind="clip"):
    """Any model that open_clip can create.

    Args:
        name: an open_clip model name, ``hf-hub:REPOSITORY`` or ``local-dir:FOLDER`` (``open_clip_config.json`` and
            weights).
        pretrained: a tag that open_clip knows, a file of weights, or "random" (fixed seed; for trying things).
            Ignored for ``local-dir:``.
        device, crop, precision, compile: see :func:`~vild.teacher.teacher.build_teacher`. Text is always encoded in
            fp32.

    Raises:
        UserError: unknown name or tag, weights that cannot be loaded, or a QuickGELU mismatch (open_clip only warns).
    """

    def __init__(
        self, name: str, pretrained: str, device: str | torch.device, crop: str, precision: str, compile: bool
    ):
        with _reachable(name, pretrained):
            self.model = _create(name, pretrained).to(device).eval().requires_grad_(False)
            with refused_as(f"teacher '{name}': its tokenizer cannot be loaded"):
                self.tokenizer = open_clip.get_tokenizer(name)
        self.precision = precision
        self._encode_image = torch.compile(self.model.encode_image) if compile else self.model.encode_image
        preprocess = open_clip.get_model_preprocess_cfg(self.model)
        size = preprocess["size"]
        super().__init__(
            name,
            pretrained,
            device,
            crop,
            weights=hash_weights(self.model),
            width=self.model.encode_text(self.tokenizer(["a"]).to(device)).shape[1],
            size=(size, size) if isinstance(size, int) else size,
            mean=preprocess["mean"],
            std=preprocess["std"],
            interpolation=preprocess["interpolation"],
            **learned_logits(self.model),
        )
        if precision != "fp32" and self.device.type != "cpu":
            round_weights(self.model.visual, PRECISIONS[precision])  # after the fingerprint is taken

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        """See :meth:`Teacher.encode_image`."""
        if len(images) == 0:
            return torch.zeros((0, self.width), device=self.device)
        with self._autocast():
            features = self._encode_image(self._channels_last(images))
        return F.normalize(features.float(), dim=1)

    @torch.inference_mode()
    def encode_image_and_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Teacher.encode_image_and_maps`. The map holds a ViT's patch tokens after the last norm before
        pooling, or a convolutional network's last stage."""
        norm = getattr(self.model.visual, "attn_pool", None) is None  # CoCa's last norm comes after its pooling
        with self._autocast():
            found = self.model.forward_intermediates(
                self._channels_last(images), image_indices=1, normalize=False, normalize_intermediates=norm
            )
        return F.normalize(found["image_features"].float(), dim=1), found["image_intermediates"][-1].float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    def _channels_last(self, images: Tensor) -> Tensor:
        return images.to(self.device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], *, batch: int = 256, prompts: LearnedPrompts | None = None) -> Tensor:
        """See :meth:`Teacher.encode_text`; ``batch`` texts at a time."""
        encode = self.model.encode_text
        if prompts is not None:
            from vild.teacher.context import encode_in_context

            check_same_teacher(prompts.fingerprint, f"prompt set ({prompts})", self.fingerprint, "the text encoder")
            encode = partial(encode_in_context, self.model, context=prompts.context.to(self.device))
        parts = []
        for start in range(0, len(texts), batch):
            tokens = self.tokenizer(list(texts[start : start + batch])).to(self.device)
            parts.append(F.normalize(encode(tokens).float(), dim=1))
        return torch.cat(parts)

    def save(self, folder: Path) -> None:
        """See :meth:`Teacher.save`. Files are written atomically, the config last. A named model must be in fp32."""
        if source := _local_folder(self.name):
            files = [f.relative_to(source) for f in source.rglob("*") if f.is_file()]
            for file in sorted(files, key=lambda f: (f.name == CONFIG, f)):
                with written_whole(folder / file) as aside:
                    shutil.copyfile(source / file, aside)
        else:
            assert self.precision == "fp32", "the image tower's weights are rounded"
            if hasattr(self.tokenizer, "save_pretrained"):  # Hugging Face's: open_clip looks for it in the folder
                self.tokenizer.save_pretrained(folder)
            save_local(self.model, open_clip.get_model_config(self.name), folder)


def _local_folder(name: str) -> Path | None:
    prefix = open_clip.factory.LOCAL_DIR_PREFIX
    return Path(name.removeprefix(prefix)) if name.startswith(prefix) else None


@contextmanager
def _reachable(name: str, pretrained: str) -> Iterator[None]:
    """NotAvailable, at once, if weights of the Hugging Face hub are neither in the cache nor to be had."""
    hub = name.startswith(HUB)
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained and not hub else {}
    repository = name.removeprefix(HUB) if hub else tag.get("hf_hub", "").rpartition("/")[0]
    if not repository or pretrained == RANDOM:
        yield
        return
    with asked_once(repository) as reason:
        if reason and not in_cache(repository):
            if not hub:
                _check_weights(name, pretrained)  # what is wrong anyway is said first
            call = f"open_clip.create_model({', '.join(map(repr, filter(None, (name, pretrained))))})"
            raise NotAvailable(
                f"teacher '{name}': its weights are not on this machine, and the Hugging Face hub cannot be asked for "
                f'{repository} ({reason}); with network, run: python -c "import open_clip; {call}"'
            )
        yield


def _create(name: str, pretrained: str) -> nn.Module:
    """``open_clip.create_model``, with UserErrors."""
    folder, hub = _local_folder(name), name.startswith(HUB)
    if folder and not (folder / CONFIG).is_file():
        raise UserError(f"teacher '{name}': {folder / CONFIG} does not exist")
    if folder or hub:
        _refuse_code(name)
    elif open_clip.get_model_config(name) is None:
        raise UserError(f"teacher '{name}': open_clip has no model of this name (open_clip.list_models())")
    _check_transformers(name)
    if pretrained == RANDOM and not folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return open_clip.create_model(name, pretrained=None)
    if not folder and not hub:
        _check_weights(name, pretrained)
    try:
        return open_clip.create_model(name, None if folder else pretrained or None, require_pretrained=True)
    except Exception as error:  # a broken file can fail anywhere in the loaders
        reason = first_line(error)
        for file in [*folder.iterdir()] if folder else [Path(pretrained)]:
            if file.is_file():
                with open(file, "rb") as start:
                    reason = f"{file}: {what}" if (what := what_it_is(start.read(512))) else reason
        raise UserError(f"teacher '{name}': its weights cannot be loaded: {reason}") from error


def _check_transformers(name: str) -> None:
    """UserError if the text tower or the tokenizer is one of Hugging Face's and their package is not installed."""
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    needed = next((key for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)), None)
    if needed and importlib.util.find_spec("transformers") is None:
        raise UserError(f"teacher '{name}': its {needed.split('_')[1]} {text[needed]} is read by the package "
                        "transformers, which is not installed: pip install transformers")  # fmt: skip


def _refuse_code(name: str) -> None:
    """UserError if the config of a folder or hub repository asks for code of its own (a tokenizer's)."""
    with refused_as(f"teacher '{name}': its open_clip_config.json cannot be read"):
        wants = "trust_remote_code" in json.dumps(open_clip.get_model_config(name))
    if wants:
        raise UserError(f"teacher '{name}': its open_clip_config.json sets trust_remote_code, which would run its code")


def _check_weights(name: str, pretrained: str) -> None:
    """UserError unless ``pretrained`` is a file, or a tag of this model that was trained with its activation."""
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    if not tag and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"teacher '{name}': '{pretrained}' is neither a file nor one of its tags ({tags})")
    quick_gelu = (tag or {}).get("quick_gelu", False)
    if tag and quick_gelu != open_clip.get_model_config(name).get("quick_gelu", False):
        raise UserError(
            f"teacher '{name}': the weights '{pretrained}' were trained {'with' if quick_gelu else 'without'} "
            f"QuickGELU; use '{name}-quickgelu' or other weights"
        )


def round_weights(tower: nn.Module, dtype: torch.dtype) -> None:
    """Convert, in place, the weights that autocast would convert anew in every batch; what it computes stays the same.

    Those of linear layers, attention and plain convolutions. (Other convolutions may standardise theirs first.)
    """
    for module in tower.modules():
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)) or type(module) is nn.Conv2d:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict (first 16 hex digits)."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def learned_logits(model: nn.Module) -> dict[str, float]:
    """``logit_scale`` and ``logit_bias`` of an open_clip model, to six digits: CLIP's 100 is e^4.60517 in float32."""
    bias = getattr(model, "logit_bias", None)
    learned = {"logit_scale": model.logit_scale.exp().item(), "logit_bias": 0.0 if bias is None else bias.item()}
    return {name: float(f"{value:.6g}") for name, value in learned.items()}


def save_local(model: nn.Module, model_cfg: dict, folder: Path) -> None:
    """Write a model as open_clip's ``local-dir:`` folder, the config last: a folder that has it is complete."""
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    write_tensors(folder / "open_clip_model.safetensors", state)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    write_json(folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess})
