"""Inference beside a plain Detectron2 Mask R-CNN of the same backbone, RPN, box head and mask head.

Both have class-agnostic boxes and masks, the same weights, images of noise, score threshold (--threshold) and number
of detections per image. Weights are random, and scores are spread as a trained detector's are: batch norm takes the
images' statistics, region embeddings are centred, and the Mask R-CNN's class weights are the text embeddings carried
through our projection. Hence both have about as many (proposal, class) pairs above the threshold (``pairs``): fewer
than MODEL.VILD.PRE_NMS_TOPK, so that both take all of them to NMS. The last row of each vocabulary is at our own
threshold, 0, where all pairs count. Least times.
The aims: ``times_baseline`` at most 1.05 with 1,203 names, 1.3 with 20,000."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import CLASSES, build_detector, least, random_vocabulary, ratio
from vild.config import load_config
from vild.modeling import build_model


def run(args: argparse.Namespace) -> Iterator[dict]:
    ours = build_detector(args.config_file, CLASSES, args.device, ["TEST.DETECTIONS_PER_IMAGE", 300]).eval()
    heads = ours.roi_heads
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, args.size, args.size), generator=generator, dtype=torch.uint8)
    scale = spread_scores(ours, image)
    heads.score_threshold = args.threshold
    plain = build_plain(args.config_file, ours, scale, args)
    for names in args.names:
        vocabulary = random_vocabulary(names)
        for threshold in (args.threshold, 0.0):
            ours.set_vocabulary(vocabulary)
            heads.score_threshold = threshold
            functions = [lambda: detect(plain, image), lambda: detect(ours, image)]
            baseline_s, ours_s = least(functions, args.repeats, args.device)
            found, pairs = [f()[0]["instances"] for f in functions], [count_pairs(*x) for x in (
                (plain, image, args.threshold), (ours, image, threshold))]  # fmt: skip
            memory = [peak_mib(f, args.device) for f in functions]
            yield {
                "what": f"{names} names, {args.size} px, threshold {threshold:g}",
                "baseline": f"Mask R-CNN, {CLASSES} classes, threshold {args.threshold:g}",
                **ratio(baseline_s, ours_s),
                "times_baseline": ours_s / baseline_s, "baseline_MiB": memory[0], "ours_MiB": memory[1],
                "baseline_pairs": pairs[0], "pairs": pairs[1],
                "baseline_detections": len(found[0]), "detections": len(found[1]),
            }  # fmt: skip


def build_plain(config_file: str, ours: nn.Module, scale: float, args: argparse.Namespace) -> nn.Module:
    """The Mask R-CNN with all weights of ours (variants of one head); its class weights are classes times projection
    times ``scale``, so that its logits are ours but for the length of each region's embedding."""
    overrides = [
        "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES", CLASSES, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", args.threshold,
        "TEST.DETECTIONS_PER_IMAGE", 300, "MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "",
    ]  # fmt: skip
    plain = build_model(load_config(str(config_file), overrides)).eval()
    renamed = {"embedding.head.": "box_head.", "roi_heads.bbox_pred": "roi_heads.box_predictor.bbox_pred"}
    state = ours.state_dict()
    for mine, theirs in renamed.items():
        state = {key.replace(mine, theirs): value for key, value in state.items()}
    projection, heads = ours.roi_heads.embedding.projection, ours.roi_heads
    classes = heads.classifier.matrix(heads.classifier.text).detach() * scale / heads.classifier.temperature
    state["roi_heads.box_predictor.cls_score.weight"] = classes @ projection.weight.detach()
    state["roi_heads.box_predictor.cls_score.bias"] = classes @ projection.bias.detach()
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    return plain


def spread_scores(detector: nn.Module, image: Tensor) -> float:
    """Give a detector with random weights the statistics of a trained one, in place: batch norm's of the image,
    region embeddings that point everywhere. Returns one over the mean length of these before normalisation."""
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    detect(detector, image)
    for norm in norms:
        norm.eval()
    projection, seen = detector.roi_heads.embedding.projection, []
    hook = projection.register_forward_hook(lambda module, inputs, output: seen.append(output))
    detect(detector, image)
    hook.remove()
    with torch.no_grad():
        projection.bias -= seen[0].mean(0)
    return 1 / (seen[0] - seen[0].mean(0)).norm(dim=1).mean().item()


@torch.inference_mode()
def count_pairs(detector: nn.Module, image: Tensor, threshold: float) -> int:
    """(Proposal, class) pairs of one image that score above the threshold."""
    seen, heads = [], detector.roi_heads
    last = heads.embedding if hasattr(heads, "embedding") else heads.box_predictor
    hook = last.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    detect(detector, image)
    hook.remove()
    if last is heads.box_predictor:
        return (seen[0].softmax(1)[:, :-1] > threshold).sum().item()
    blocks = heads._score_blocks([seen[0]], heads.classifier.current_classes)
    return sum((scores > threshold).sum().item() for scores in blocks)


@torch.inference_mode()
def detect(detector: nn.Module, image: Tensor) -> list[dict]:
    return detector([{"image": image, "height": image.shape[1], "width": image.shape[2]}])


def peak_mib(function: Callable[[], object], device: str) -> float | None:
    """How far memory rises above its present level during a call: the GPU's, or the process's resident memory (Linux;
    None elsewhere)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        function()
        return (_resident("VmHWM") - before) / 2**10
    except OSError:
        return None


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))
