"""The report of an evaluated run: its metrics next to published ones, its cost, diagnostics, its classes, and images of
the novel classes with the highest and the lowest AP."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vild.data import datasets, unreadable
from vild.data.annotations import read_json
from vild.engine.run_record import RUN_FILE
from vild.evaluation import cost
from vild.evaluation.evaluator import CLASSES_FILE, IMAGES, METRICS_FILE, RESULTS_FILE, truth_of
from vild.evaluation.metrics import DIAGNOSTICS, TABLES, decimal, rules, title
from vild.evaluation.reliability import judge
from vild.evaluation.results import read_results
from vild.report.images import class_images
from vild.report.page import Block, Heading, Paragraph, Table, Verbatim, metric_table
from vild.report.reliability import reliability_blocks
from vild.utils.errors import UserError, count_of
from vild.utils.untrusted import refused_as

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())


def read_run(run: Path) -> dict[str, dict[str, float | None]]:
    """Metrics {data set: {"<IoU type>/<metric>": value}} of an output folder of tools/train_net.py.

    Raises:
        UserError: the run was not evaluated, or is a proposal network.
    """
    path = run / "inference" / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: evaluate first (tools/train_net.py --eval-only)")
    result: dict[str, dict] = {}
    for key, value in read_json(path).items():
        name, column = key.split("/", 1)
        result.setdefault(name, {})[column] = value
    for name in result:
        if not (classes := inference_folder(run, name, len(result) == 1) / CLASSES_FILE).is_file():
            raise UserError(f"{classes} does not exist: only detectors have a report, not a proposal network")
    return result


def inference_folder(run: Path, name: str, only: bool) -> Path:
    """The folder with a run's detections in a data set; ``only``: the run was evaluated on no other."""
    return run / "inference" if only else run / "inference" / name


def run_blocks(run: Path, name: str, metrics: dict, only: bool, folder: Path, threshold: float) -> list[Block]:
    """Everything about one data set of a run; images go to ``folder``."""
    inference = inference_folder(run, name, only)
    document = json.loads((inference / CLASSES_FILE).read_text())
    column = "segm/AP" if "segm/AP" in metrics else "bbox/AP50"
    counts = ", ".join(f"{key}: {value}" for key, value in document["counts"].items())
    for old, new in (("_", " "), ("a picture", "an image"), ("picture", "image")):  # the keys of files stay
        counts = counts.replace(old, new)
    blocks = [Heading(name), Paragraph(counts), *unreadable_blocks(inference, "Counted as without detections")]
    blocks += beside_published(name, metrics)
    blocks += _reliability(name, inference / RESULTS_FILE, folder)
    ranked = ranked_novel(document["classes"], column)
    tables = class_tables(document["classes"], column)
    if ranked:
        chosen = ranked if len(ranked) <= 6 else ranked[:3] + ranked[-3:]
        blocks.append(Heading("The best and the worst novel classes"))
        blocks += class_images(name, inference / RESULTS_FILE, chosen, folder, threshold)
    return blocks + tables


def _reliability(name: str, results: Path, folder: Path) -> list[Block]:
    truth = truth_of(name)
    found = read_results(results, truth.sizes, {c["id"] for c in truth.document["categories"]}, masks=False)
    return reliability_blocks(name, judge(truth, found), truth.classes.splits, folder)


def beside_published(name: str, metrics: dict[str, float | None]) -> list[Block]:
    """A table of this run and the published results on the same benchmark, and one of all metrics of this run."""
    blocks: list[Block] = []
    if name in PUBLISHED:
        benchmark = PUBLISHED[name]
        rows = [
            [method, *map(decimal, values), f"published, {source}{f' ({note})' if note else ''}"]
            for method, values, source, note in benchmark["rows"]
        ]
        rows.append(["this run", *(decimal(metrics.get(c)) for c in benchmark["columns"]), "measured"])
        headers = ["", *map(title, benchmark["columns"]), "from"]
        blocks += [Paragraph(benchmark["title"] + ":"), Table(headers, rows)]
    by_key: dict[str, dict[str, float | None]] = {}
    for column, value in metrics.items():
        iou_type, key = column.split("/", 1)
        if iou_type != IMAGES:
            by_key.setdefault(key, {})[iou_type] = value
    types = list(dict.fromkeys(iou_type for values in by_key.values() for iou_type in values))
    protocol = datasets.get_entry(name).protocol
    rows = [[key, rules(key, protocol), *(decimal(v.get(t), 2) for t in types)] for key, v in by_key.items()]
    text = "All metrics of this run, in percent, and by whose rules they are:"
    return [*blocks, Paragraph(text), Table(["", "rules", *types], rows)]


def transfer_table(results: dict[str, dict]) -> str:
    """Box AP on several data sets, a row each, followed by the published results on it, with the rules (Markdown)."""
    columns, rows = TABLES["transfer"], []
    for name, metrics in results.items():
        protocol = datasets.get_entry(name).protocol.upper()
        rows.append([name, protocol, *(decimal(metrics["bbox"][c.split("/")[1]]) for c in columns), "measured"])
        benchmark = PUBLISHED.get(name, {"columns": [], "rows": []})
        for method, values, source, _ in benchmark["rows"]:
            known = dict(zip(benchmark["columns"], values, strict=True))
            if known.keys() & set(columns):
                values = (decimal(known.get(c)) for c in columns)
                rows.append([f"{method} on {name}", "", *values, f"published, {source}"])
    return Table(["", "rules", *map(title, columns), "from"], rows).markdown


def read_diagnostics(path: Path) -> list[Block]:
    """:func:`diagnostics_blocks` of a file of tools/diagnostics.py.

    Raises:
        UserError: the file is missing, or is another one.
    """
    document = read_json(path)
    with refused_as(f"--diagnostics {path} is not what tools/diagnostics.py writes"):
        if not document["teacher_top1"]:
            raise ValueError("teacher_top1 is empty")
        return diagnostics_blocks(document)


def diagnostics_blocks(document: dict) -> list[Block]:
    """What explains the metrics: how good the teacher is, how close the student is to it, and the proposals."""
    by_group = {key: document[key] for key in DIAGNOSTICS if key in document}
    groups = list(next(iter(by_group.values()), {}))
    rows = [[key, *(decimal(v[g], DIAGNOSTICS[key]) for g in groups)] for key, v in by_group.items()]
    blocks: list[Block] = [Heading("Diagnostics"), Table(["", *groups], rows)]
    if verdict := document.get("verdict"):
        blocks.append(Paragraph(verdict))
    if recall := document.get("proposals"):
        keys = list(dict.fromkeys(key.rsplit("_", 1)[0] for key in recall))
        rows = [[key, *(decimal(recall[f"{key}_{split}"]) for split in ("base", "novel"))] for key in keys]
        blocks.append(Table(["proposals", "base", "novel"], rows))
    if crops := document.get("clip_on_crops"):
        clip, detector = crops["seconds_a_picture"], crops["detector_seconds_a_picture"]
        columns = [c for c in TABLES["clip_on_crops"] if c.split("/")[1] in crops]
        blocks.append(metric_table({"CLIP on cropped regions": {f"bbox/{k}": v for k, v in crops.items()}}, columns))
        blocks.append(
            Paragraph(
                f"CLIP on cropped regions takes {clip / detector:.3g} times as long as the detector "
                f"({clip:.3g} s and {detector:.3g} s per image, on the same machine in the same run)."
            )
        )
    return blocks


def cost_blocks(run: Path) -> list[Block]:
    """Parameters, FLOPs and latency of the run's network; nothing if it cannot be built any more."""
    if (built := cost.detector_of_run(run)) is None:
        return []
    model, size = built
    counts, operations, seconds = cost.parameters(model), cost.flops(model, size), cost.latency(model, size)
    rows = [
        ["million parameters", *(decimal(v / 1e6, 2) for v in counts.values())],
        ["GFLOP", *(decimal(v / 1e9, 2) for v in operations.values())],
    ]
    threads = f", threads: {torch.get_num_threads()}" if model.device.type == "cpu" else ""
    text = f"An image of {size} x {size} pixels takes {1000 * seconds:.0f} ms (median of 5, {model.device}{threads})."
    return [Heading("Cost"), Table(["", *counts], rows), Paragraph(text)]


def origin_blocks(run: Path) -> list[Block]:
    """Code, machine, data and packages of the evaluation (``vild.engine.run_record``); nothing without a record, which
    earlier versions did not write."""
    path = run / "inference" / RUN_FILE
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    rows = [["code", record["code"]], ["machine", record["machine"]]]
    rows += [[f"annotations of {name}", sha] for name, sha in record["data"].items()]
    rows += [[name, version] for name, version in record["packages"].items()]
    return [Heading("Reproduction"), Table(["", ""], rows), Verbatim("the full config", record["config"])]


def ranked_novel(classes: Iterable[dict], column: str) -> list[dict]:
    """Novel classes with ground truth, by descending AP."""
    novel = [c for c in classes if c["split"] == "novel" and c.get(column) is not None]
    return sorted(novel, key=lambda c: -c[column])


def class_tables(classes: Sequence[dict], column: str, count: int = 10) -> list[Block]:
    """The ``count`` best and worst novel classes, and all classes."""
    metrics = [key for key in classes[0] if "/" in key]
    keys = ("name", "split", "frequency", "pictures", "boxes", "detections")
    headers = ["class", "split", "frequency", "images", "boxes", "detections", *map(title, metrics)]

    def table(some: Iterable[dict], folded: str = "") -> Table:
        rows = [[*(str(c[k]) for k in keys), *(decimal(c[m]) for m in metrics)] for c in some]
        return Table(headers, rows, folded)

    blocks: list[Block] = []
    if ranked := ranked_novel(classes, column):
        blocks += [
            Heading(f"Novel classes, by {title(column)}"),
            table(ranked[:count]),
            Paragraph(f"The last of {len(ranked)} with ground truth:"),
            table(ranked[count:][-count:]),
        ]
    return [*blocks, Heading("All classes"), table(classes, count_of(len(classes), "class"))]


def unreadable_blocks(folder: Path, consequence: str, count: int = 5) -> list[Block]:
    """The images that could not be read in a training or an evaluation, if there were any."""
    if not (reasons := [*unreadable.read_unreadable(folder).values()]):
        return []
    listed = "; ".join(reasons[:count]) + ("; ..." if len(reasons) > count else "")
    return [Paragraph(f"{consequence}: {count_of(len(reasons), 'image')} that could not be read. {listed}")]
