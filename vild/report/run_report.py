"""The report of an evaluated run: its numbers beside the published ones, what explains them, its classes, images
of the novel classes it does best and worst."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api
from tabulate import tabulate
from torchvision.ops import box_convert, box_iou

from vild.data import datasets, unreadable
from vild.data.annotations import read_json
from vild.engine.run_record import RUN_FILE
from vild.evaluation import cost
from vild.evaluation.evaluator import CLASSES_FILE, IMAGES, METRICS_FILE, RESULTS_FILE
from vild.evaluation.results import iterate_records
from vild.inference.drawing import draw, side_by_side
from vild.report.page import Block, Heading, Image, Paragraph, Table, Verbatim
from vild.report.quickstart import ground_truth
from vild.utils.errors import BadImage, UserError
from vild.utils.files import write_image
from vild.utils.images import read_image
from vild.utils.untrusted import refused_as

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
_SHORT = {"bbox/": "box ", "segm/": "mask "}


def _title(metric: str) -> str:
    for key, word in _SHORT.items():
        metric = metric.replace(key, word)
    return metric


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def read_run(run: Path) -> dict[str, dict[str, float | None]]:
    """{data set: {"<kind>/<metric>": value}} of an output folder of tools/train_net.py.

    Raises:
        UserError: the run was not evaluated, or not on classes (a proposal network).
    """
    path = run / "inference" / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: evaluate first (tools/train_net.py --eval-only)")
    result: dict[str, dict] = {}
    for key, value in read_json(path).items():
        name, metric = key.split("/", 1)
        result.setdefault(name, {})[metric] = value
    for name in result:
        if not (classes := inference_of(run, name, len(result) == 1) / CLASSES_FILE).is_file():
            raise UserError(f"{classes} does not exist: a report is of detections; a proposal network has none")
    return result


def inference_of(run: Path, name: str, alone: bool) -> Path:
    """Where what was found in a data set lies; ``alone``: the run was evaluated on no other."""
    return run / "inference" if alone else run / "inference" / name


def beside_published(name: str, metrics: dict[str, float | None]) -> list[Block]:
    """This run in one table with the published rows of the same benchmark; all its metrics in a second."""
    blocks: list[Block] = []
    if name in PUBLISHED:
        benchmark = PUBLISHED[name]
        rows = [
            [method, *(_number(v) for v in values), f"published, {source}{' (' + note + ')' if note else ''}"]
            for method, values, source, note in benchmark["rows"]
        ]
        rows.append(["this run", *(_number(metrics.get(c)) for c in benchmark["columns"]), "measured"])
        blocks += [
            Paragraph(benchmark["title"] + ":"),
            Table(["", *map(_title, benchmark["columns"]), "from"], rows),
        ]
    metrics = {key: value for key, value in metrics.items() if not key.startswith(f"{IMAGES}/")}
    kinds = list(dict.fromkeys(key.split("/")[0] for key in metrics))
    names = list(dict.fromkeys(key.split("/", 1)[1] for key in metrics))
    rows = [[n, *(_number(metrics.get(f"{kind}/{n}"), 2) for kind in kinds)] for n in names]
    return [*blocks, Paragraph("Every metric of this run, in percent:"), Table(["", *kinds], rows)]


def diagnostics(gauges: dict) -> list[Block]:
    """What tools/gauges.py measured: where a bad number comes from."""
    by_group = {k: gauges[k] for k in ("teacher_top1", "student_teacher_cosine") if k in gauges}
    groups = list(next(iter(by_group.values()), {}))
    rows = [[n, *(_number(v[g], 3 if "cosine" in n else 1) for g in groups)] for n, v in by_group.items()]
    blocks: list[Block] = [Heading("What explains it"), Table(["", *groups], rows)]
    if proposals := gauges.get("proposals"):
        found = list(dict.fromkeys(key.rsplit("_", 1)[0] for key in proposals))
        rows = [[n, *(_number(proposals[f"{n}_{mark}"]) for mark in ("base", "novel"))] for n in found]
        blocks.append(Table(["proposals", "base", "novel"], rows))
    if crops := gauges.get("clip_on_crops"):
        mine, detector = crops["seconds_a_picture"], crops["detector_seconds_a_picture"]
        shown = [k for k in ("AP", "AP50_novel", "AP50_base", "APr", "APc", "APf") if k in crops]
        blocks.append(Table(["", *shown], [["CLIP on cropped regions, box", *(_number(crops[k]) for k in shown)]]))
        blocks.append(
            Paragraph(
                f"CLIP on cropped regions takes {mine / detector:.3g} times as long as the detector ({mine:.3g} s "
                f"against {detector:.3g} s an image, same machine, same run)."
            )
        )
    return blocks


def gauge_blocks(path: Path) -> list[Block]:
    """:func:`diagnostics` of a file.

    Raises:
        UserError: it is missing, or another file.
    """
    gauges = read_json(path)
    with refused_as(f"--gauges {path} is not what tools/gauges.py writes"):
        if not gauges["teacher_top1"]:
            raise ValueError("teacher_top1 is empty")
        return diagnostics(gauges)


def cost_blocks(run: Path) -> list[Block]:
    """What the run's network costs, beside what it achieves; nothing where it cannot be built any more."""
    if (built := cost.detector_of_run(run)) is None:
        return []
    model, size = built
    counts, operations = cost.parameters(model), cost.flops(model, size)
    headers = ["", *counts]
    rows = [["million parameters", *(_number(v / 1e6, 2) for v in counts.values())],
            ["GFLOP", *(_number(v / 1e9, 2) for v in operations.values())]]  # fmt: skip
    seconds = cost.latency(model, size)
    threads = f", threads: {torch.get_num_threads()}" if model.device.type == "cpu" else ""
    text = f"An image of {size} x {size} pixels takes {1000 * seconds:.0f} ms (median of 5, {model.device}{threads})."
    return [Heading("What it costs"), Table(headers, rows), Paragraph(text)]


def origin_blocks(run: Path) -> list[Block]:
    """What the run was evaluated with (``vild.engine.run_record``); nothing where an earlier version did it."""
    path = run / "inference" / RUN_FILE
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    rows = [["code", record["code"]], ["machine", record["machine"]]]
    rows += [[f"annotations of {name}", sha] for name, sha in record["data"].items()]
    rows += [[name, version] for name, version in record["packages"].items()]
    return [Heading("What it was made with"), Table(["", ""], rows), Verbatim("the whole config", record["config"])]


def ranked_novel(classes: Iterable[dict], metric: str) -> list[dict]:
    """Novel classes with ground truth, the best first."""
    novel = [c for c in classes if c["split"] == "novel" and c.get(metric) is not None]
    return sorted(novel, key=lambda c: -c[metric])


def class_tables(classes: Sequence[dict], metric: str, count: int = 10) -> list[Block]:
    """The novel classes that do best and worst, and all classes."""
    metrics = [k for k in classes[0] if "/" in k]
    columns = ("name", "split", "frequency", "pictures", "boxes", "detections")  # keys of per_class.json
    headers = ["class", "split", "frequency", "images", "boxes", "detections", *map(_title, metrics)]

    def rows(some: Iterable[dict]) -> list[list[str]]:
        return [[*(str(c[k]) for k in columns), *(_number(c[k]) for k in metrics)] for c in some]

    ranked = ranked_novel(classes, metric)
    blocks: list[Block] = []
    if ranked:
        blocks += [
            Heading(f"Novel classes, by {_title(metric)}"),
            Table(headers, rows(ranked[:count])),
            Paragraph(f"... and the last of {len(ranked)} with ground truth:"),
            Table(headers, rows(ranked[count:][-count:])),
        ]
    return [*blocks, Heading("All classes"), Table(headers, rows(classes), folded=f"{len(classes)} classes")]


def class_images(name: str, results: Path, chosen: Sequence[dict], folder: Path, threshold: float) -> list[Block]:
    """For each class, the first image of the data set that holds it: its ground truth beside the detections above
    ``threshold`` that are of this class or lie on one of its objects."""
    classes = datasets.get_classes(name)
    index = {i: k for k, i in enumerate(classes.ids)}
    records: dict[int, dict] = {}
    for record in datasets.load_dicts(name):
        for a in record["annotations"]:
            records.setdefault(a["category_id"], record)
    wanted = {records[index[c["id"]]]["image_id"] for c in chosen}
    found: dict[int, list[dict]] = {}
    for r in iterate_records(results):
        if r["image_id"] in wanted and r["score"] >= threshold:
            found.setdefault(r["image_id"], []).append(r)
    blocks: list[Block] = []
    for c in chosen:
        record, number = records[index[c["id"]]], index[c["id"]]
        if not Path(record["file_name"]).is_file():
            blocks.append(Paragraph(f"{c['name']}: its image {record['file_name']} is not here."))
            continue
        try:
            image = read_image(record["file_name"], "RGB")
        except BadImage as error:
            blocks.append(Paragraph(f"{c['name']}: {error}"))
            continue
        things = {**record, "annotations": [a for a in record["annotations"] if a["category_id"] == number]}
        truth = ground_truth(things)
        instances = _explaining(found.get(record["image_id"], []), index, number, truth)
        pair = [draw(image, i, classes.names, classes.splits, 400) for i in (truth, instances)]
        file = f"class_{c['id']}.jpg"
        drawn = side_by_side([pair], [f"ground truth: {c['name']}", "found"])
        write_image(folder / file, drawn.convert("RGB"))
        blocks.append(Image(file, f"{c['name']}: first image of the data set that holds it"))
    return blocks


def _explaining(rows: list[dict], index: dict[int, int], number: int, truth: Instances) -> Instances:
    """Detections of class ``number``, and others on one of its objects (IoU 0.5)."""
    boxes = box_convert(torch.tensor([r["bbox"] for r in rows], dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")
    classes = torch.tensor([index[r["category_id"]] for r in rows], dtype=torch.int64)
    near = box_iou(boxes, truth.pred_boxes.tensor).max(1).values >= 0.5 if len(truth) else torch.zeros(len(boxes)) > 0
    keep = ((classes == number) | near).nonzero()[:, 0].tolist()
    result = Instances(truth.image_size)
    result.pred_boxes, result.pred_classes = Boxes(boxes[keep]), classes[keep]
    result.scores = torch.tensor([rows[i]["score"] for i in keep])
    if keep and all("segmentation" in rows[i] for i in keep):
        result.pred_masks = torch.from_numpy(np.stack([mask_api.decode(rows[i]["segmentation"]) for i in keep])).bool()
    return result


def unreadable_blocks(folder: Path, what: str, count: int = 5) -> list[Block]:
    """That, and which, images could not be read in a training or an evaluation; nothing where all could."""
    if not (reasons := [*unreadable.of_run(folder).values()]):
        return []
    listed = "; ".join(reasons[:count]) + ("; ..." if len(reasons) > count else "")
    return [Paragraph(f"{len(reasons)} images could not be read and {what}: {listed}")]


def run_blocks(run: Path, name: str, metrics: dict, alone: bool, folder: Path, threshold: float) -> list[Block]:
    """Everything about one data set of a run."""
    inference = inference_of(run, name, alone)
    detail = json.loads((inference / CLASSES_FILE).read_text())
    metric = "segm/AP" if "segm/AP" in metrics else "bbox/AP50"
    counts = ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in detail["counts"].items())
    blocks = [Heading(name), Paragraph(counts), *unreadable_blocks(inference, "count as images without detections")]
    blocks += beside_published(name, metrics)
    ranked = ranked_novel(detail["classes"], metric)
    chosen = ranked if len(ranked) <= 6 else ranked[:3] + ranked[-3:]
    tables = class_tables(detail["classes"], metric)
    if chosen:
        blocks.append(Heading("The best and the worst novel classes"))
        blocks += class_images(name, inference / RESULTS_FILE, chosen, folder, threshold)
    return blocks + tables


def transfer_table(results: dict[str, dict]) -> str:
    """Box AP of several data sets, a row each (Markdown), the published row under those that have one."""
    columns = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    rows = []
    for name, kinds in results.items():
        rows.append([name, *("-" if np.isnan(v := kinds["bbox"][c]) else f"{v:.1f}" for c in columns), "measured"])
        benchmark = PUBLISHED.get(name, {"columns": [], "rows": []})
        for method, values, source, _ in benchmark["rows"]:
            known = dict(zip(benchmark["columns"], values, strict=True))
            if any(f"bbox/{c}" in known for c in columns):
                cells = (_number(known.get(f"bbox/{c}")) for c in columns)
                rows.append([f"{method} on {name}", *cells, f"published, {source}"])
    return tabulate(rows, ["box", *columns, "from"], "pipe", disable_numparse=True)
