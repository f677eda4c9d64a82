"""Train the built-in world's teacher: a small open_clip model on captioned images of single objects.

It sees captions of all classes and no boxes, as CLIP did. The tokenizer and the loss are open_clip's.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vild.glyphs import drawing
from vild.teacher.clip import save_local
from vild.teacher.crops import crop_batch, normalise
from vild.vocabulary.prompts import PROMPT_SETS, fill

logger = logging.getLogger(__name__)

MODEL_CFG = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 48,
        "timm_model_name": "test_resnet",  # a stock timm network of 0.4 M parameters
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}
BACKGROUND_CAPTIONS = ("a photo of nothing.", "an empty background.", "clutter.", "a blurry background.")
IMAGES_PER_NAME = 150
GROUPS = 3  # per step; each has every class once, so that no caption fits two of its images
BACKGROUND_PER_GROUP = 3
LEARNING_RATE = 6e-3


def build_model(width: int = MODEL_CFG["embed_dim"]) -> torch.nn.Module:
    """The untrained model, from open_clip's factory. ``width``: of its embeddings."""
    open_clip.factory._MODEL_CONFIGS["vild-glyphs"] = {**MODEL_CFG, "embed_dim": width}
    model = open_clip.create_model("vild-glyphs", pretrained=None, force_preprocess_cfg=PREPROCESS_CFG)
    torch.nn.init.constant_(model.logit_scale, float(np.log(20)))
    return model.to(memory_format=torch.channels_last)  # the faster layout on a CPU


def _jitter(box: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A box xyxy [4] as of a proposal: shifted and scaled a little, at 1x or 1.5x."""
    low, high = box[:2], box[2:]
    centre = (low + high) / 2 + rng.uniform(-0.12, 0.12, 2) * (high - low)
    half = (high - low) * rng.choice([1.0, 1.5]) * rng.uniform(0.8, 1.25, 2) / 2
    return np.concatenate([centre - half, centre + half]).astype(np.float32)


def _crops(images: list, rng: np.random.Generator) -> Tensor:
    """Jittered, randomly mirrored crops [N, 3, S, S] of (image, index, box) triples, cut as proposals are."""
    size, mean = (MODEL_CFG["vision_cfg"]["image_size"],) * 2, PREPROCESS_CFG["mean"]
    parts = []
    for image, _, box in images:
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        boxes = torch.from_numpy(_jitter(np.array(box), rng))[None]
        crop = crop_batch([tensor], [boxes], size, mean, scales=(1.0,))[0, 0]
        parts.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    crops = normalise(torch.stack(parts), mean, PREPROCESS_CFG["std"])
    return crops.contiguous(memory_format=torch.channels_last)


def train(folder: Path, steps: int = 400, seed: int = 0, width: int = MODEL_CFG["embed_dim"]) -> None:
    """Train and write an open_clip ``local-dir:`` folder. Deterministic for a seed (on one machine).

    ``width``: of its embeddings; the towers are the same for all.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 11])
    count = len(drawing.table())
    total = IMAGES_PER_NAME * count
    pool = [drawing.captioned(seed, i) for i in tqdm(range(total), desc="captioned images")]
    empty = [drawing.captioned(seed, total + i, background=True) for i in range(total // 12)]

    model = build_model(width).train()
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CFG["text_cfg"]["context_length"])
    templates = PROMPT_SETS["vild"]
    loss_fn = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    progress = tqdm(range(steps), desc="teacher")
    for _ in progress:
        images, texts = [], []
        for _ in range(GROUPS):
            group = [pool[rng.integers(IMAGES_PER_NAME) * count + c] for c in range(count)]
            images += group + [empty[rng.integers(len(empty))] for _ in range(BACKGROUND_PER_GROUP)]
            for glyph in drawing.table():
                word = str(rng.choice([glyph.name, glyph.name, *glyph.synonyms]))
                texts.append(str(rng.choice(fill(templates, word))))
            texts += [str(t) for t in rng.choice(BACKGROUND_CAPTIONS, BACKGROUND_PER_GROUP, replace=False)]
        image_features = F.normalize(model.encode_image(_crops(images, rng)), dim=1)
        text_features = F.normalize(model.encode_text(tokenizer(texts)), dim=1)
        pairs = zip(image_features.chunk(GROUPS), text_features.chunk(GROUPS), strict=True)
        scale = model.logit_scale.exp()
        loss = sum(loss_fn(image, text, scale) for image, text in pairs) / GROUPS
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, float(np.log(100)))
        progress.set_postfix(loss=f"{loss.item():.3f}")
    save_local(model, {**MODEL_CFG, "embed_dim": width}, folder)
    logger.info("teacher: %d steps, loss %.3f, %.0f s", steps, loss.item(), time.monotonic() - started)
