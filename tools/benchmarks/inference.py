"""Inference beside a plain Detectron2 Mask R-CNN of the same backbone, RPN, box head and mask head. Both have
class-agnostic boxes and masks, the same weights, the same images of noise, the same score threshold (--threshold)
and detections an image.

Weights are random, so scores are spread as a trained detector's are: batch norm takes the images' statistics, region
embeddings are centred, and the Mask R-CNN's class weights are the text embeddings carried through our projection.
Hence both have about as many (proposal, class) pairs above the threshold (``pairs`` in the rows): fewer than
MODEL.VILD.PRE_NMS_TOPK, so that both take all of them to NMS. Last, our own threshold, 0, where all pairs count.
The aims: ``times_baseline`` at most 1.05 with 1,203 names, 1.3 with 20,000."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vild.config import load_config
from vild.modeling import build_model
from vild.vocabulary.vocabulary import Vocabulary

CONFIG = "LVIS/vild.yaml"
CLASSES, WIDTH = 1203, 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--names", type=int, nargs="+", default=[CLASSES, 20_000])
    parser.add_argument("--threshold", type=float, default=0.01, help="score threshold of both (0.01)")


def add_common_arguments(parser: argparse.ArgumentParser, repeats: int = 5) -> None:
    parser.add_argument("--config-file", type=Path, default=CONFIG, help="the detector (configs/LVIS/vild.yaml)")
    parser.add_argument("--size", type=int, default=320, help="side of the square images (320)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"the least of so many, interleaved ({repeats})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


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
            baseline_s, ours_s = interleaved(functions, args.repeats, args.device)
            found, pairs = [f()[0]["instances"] for f in functions], [count_pairs(*x) for x in (
                (plain, image, args.threshold), (ours, image, threshold))]  # fmt: skip
            memory = [peak_mib(f, args.device) for f in functions]
            yield {
                "what": f"{names} names, {args.size} px, threshold {threshold:g}",
                "baseline": f"Mask R-CNN, {CLASSES} classes, threshold {args.threshold:g}",
                "baseline_s": baseline_s, "ours_s": ours_s, "ratio": baseline_s / ours_s,
                "times_baseline": ours_s / baseline_s, "baseline_MiB": memory[0], "ours_MiB": memory[1],
                "baseline_pairs": pairs[0], "pairs": pairs[1],
                "baseline_detections": len(found[0]), "detections": len(found[1]),
            }  # fmt: skip


def random_vocabulary(names: int, width: int = WIDTH) -> Vocabulary:
    """Random unit embeddings; of four names, the last is novel."""
    rows = torch.randn(names, width, generator=torch.Generator().manual_seed(0))
    splits = tuple("novel" if n % 4 == 3 else "base" for n in range(names))
    return Vocabulary(tuple(f"name {n}" for n in range(names)), nn.functional.normalize(rows, dim=1), splits)


def build_detector(config_file: Path, names: int, device: str, overrides: Sequence[object] = ()) -> nn.Module:
    """A detector of a config with random weights (seed 0) and names."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.safetensors"
        random_vocabulary(names).save(vocabulary)
        own = ["MODEL.VILD.VOCABULARY", str(vocabulary), "MODEL.DEVICE", device, "MODEL.WEIGHTS", ""]
        torch.manual_seed(0)
        return build_model(load_config(str(config_file), [*own, *overrides]))


def build_plain(config_file: Path, ours: nn.Module, scale: float, args: argparse.Namespace) -> nn.Module:
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


def interleaved(functions: Sequence[Callable[[], object]], repeats: int, device: str = "cpu") -> list[float]:
    """Least seconds of each function, called in turn and warmed up once: what else the machine does only adds to it."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, measured in zip(functions, seconds, strict=True):
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if turn:
                measured.append(time.perf_counter() - start)
    return [min(s) for s in seconds]


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


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
