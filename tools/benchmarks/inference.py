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
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import CLASSES, build_detector, random_vocabulary, row, timed
from benchmarks.train_step import MASK_RCNN
from vild.config import load_config
from vild.modeling import build_model

PER_IMAGE = 300  # detections


def run(args: argparse.Namespace) -> Iterator[dict]:
    ours = build_detector(args.config_file, CLASSES, args.device, "TEST.DETECTIONS_PER_IMAGE", PER_IMAGE).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, args.size, args.size), generator=generator, dtype=torch.uint8)
    plain = build_plain(ours, spread_scores(ours, image), args)
    functions = [partial(detect, plain, image), partial(detect, ours, image)]
    baseline = f"Mask R-CNN, {CLASSES} classes, threshold {args.threshold:g}"
    for names in args.names:
        for threshold in (args.threshold, 0.0):
            ours.set_vocabulary(random_vocabulary(names))
            ours.roi_heads.score_threshold = threshold
            baseline_s, ours_s = timed(functions, args.repeats)
            measures = {"times_baseline": ours_s / baseline_s}
            measures["baseline_MiB"], measures["ours_MiB"] = (peak_mib(f, args.device) for f in functions)
            measures["baseline_pairs"] = count_plain_pairs(plain, image, args.threshold)
            measures["pairs"] = count_pairs(ours, image, threshold)
            found = [len(f()[0]["instances"]) for f in functions]
            measures["baseline_detections"], measures["detections"] = found
            what = f"{names} names, {args.size} px, threshold {threshold:g}"
            yield row(what, baseline, baseline_s, ours_s, **measures)


def build_plain(ours: nn.Module, scale: float, args: argparse.Namespace) -> nn.Module:
    """The Mask R-CNN with all weights of ours (variants of one head); its class weights are classes times projection
    times ``scale``, so that its logits are ours but for the length of each region's embedding."""
    overrides = [
        *MASK_RCNN, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", args.threshold, "TEST.DETECTIONS_PER_IMAGE", PER_IMAGE,
        "MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "",
    ]  # fmt: skip
    plain = build_model(load_config(args.config_file, overrides)).eval()
    renamed = {"embedding.head.": "box_head.", "roi_heads.bbox_pred": "roi_heads.box_predictor.bbox_pred"}
    state = ours.state_dict()
    for mine, theirs in renamed.items():
        state = {key.replace(mine, theirs): value for key, value in state.items()}
    heads = ours.roi_heads
    projection, classifier = heads.embedding.projection, heads.classifier
    classes = classifier.matrix(classifier.text).detach() * scale / classifier.temperature
    state["roi_heads.box_predictor.cls_score.weight"] = classes @ projection.weight.detach()
    state["roi_heads.box_predictor.cls_score.bias"] = classes @ projection.bias.detach()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    return plain


def spread_scores(detector: nn.Module, image: Tensor) -> float:
    """Give a detector with random weights the statistics of a trained one, in place: batch norm's of the image,
    region embeddings that point everywhere. Returns one over the mean length of these before normalisation."""
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    detect(detector, image)
    detector.eval()
    projection = detector.roi_heads.embedding.projection
    embeddings = output_of(projection, detector, image)
    centre = embeddings.mean(0)
    with torch.no_grad():
        projection.bias -= centre
    return 1 / (embeddings - centre).norm(dim=1).mean().item()


@torch.inference_mode()
def count_pairs(detector: nn.Module, image: Tensor, threshold: float) -> int:
    """(Proposal, class) pairs of one image that score above the threshold."""
    heads = detector.roi_heads
    embeddings, *_ = output_of(heads.embedding, detector, image)
    blocks = heads._score_blocks([embeddings], heads.classifier.current_classes)
    return sum((scores > threshold).sum().item() for scores in blocks)


def count_plain_pairs(plain: nn.Module, image: Tensor, threshold: float) -> int:
    logits, _ = output_of(plain.roi_heads.box_predictor, plain, image)
    return (logits.softmax(1)[:, :-1] > threshold).sum().item()


def output_of(module: nn.Module, detector: nn.Module, image: Tensor) -> object:
    """What a part of a detector returns for an image."""
    seen = []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    detect(detector, image)
    hook.remove()
    return seen[0]


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
    except OSError:
        return None
    before = _resident_mib("VmRSS")
    function()
    return _resident_mib("VmHWM") - before


def _resident_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10
