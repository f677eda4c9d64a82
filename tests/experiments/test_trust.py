"""tools/trust.py: what it runs when a detector is added to a finished folder, and what its tables say."""

import json
import runpy
import sys

import numpy as np
import pytest
from experiments.runner import Runner

from tests.conftest import REPOSITORY
from vild.evaluation.metrics import TABLES
from vild.inference.by_example import COLUMNS as EXAMPLES
from vild.inference.by_example import MADE_OF
from vild.report.absent import COLUMNS
from vild.utils.files import write_json

AP = ["bbox/AP50_novel", "bbox/AP50_base"]
METRICS = [*AP, *TABLES["trust"]]


def value(seed: int, name: str, number: int) -> float:
    return round(seed * 1.7 + len(name) + number / 3, 4)


@pytest.fixture
def trust(tmp_path, monkeypatch):
    """Runs the tool; its stages write made-up results. Gives the stages that ran, and the report."""
    ran = []

    def run_step(run, stages):
        for each in stages:
            if each.name in run.seconds:
                continue
            ran.append((run.folder.name, each.name))
            seed = int(run.folder.name.removeprefix("seed"))
            if each.command[0] == "train_net.py":
                found = {f"glyphs_val/{key}": value(seed, each.name, n) for n, key in enumerate(METRICS)}
                (each.output / "inference").mkdir(parents=True, exist_ok=True)
                write_json(each.output / "inference/vild_metrics.json", found)
            elif each.command[0] == "absent_words.py":
                summary = {key: value(seed, each.name, n) for n, key in enumerate(COLUMNS)}
                write_json(each.output, {"random": summary, "hard": {key: 2 * v for key, v in summary.items()}})
            elif each.command[0] == "by_example.py":  # seed 0: as files of earlier versions
                found = {key: {column: value(seed, key, n) for n, column in enumerate(EXAMPLES)} for key in MADE_OF}
                write_json(each.output, found | ({"of": {"dataset": "glyphs_val"}} if seed else {}))
            write_json(run._marker(each), {"command": each.command, "seconds": 1.0})
            run.seconds[each.name] = 1.0

    monkeypatch.setattr(Runner, "run_step", run_step)

    def run(*arguments):
        ran.clear()
        folder = tmp_path / "trust"
        arguments = ("tools/trust.py", "--output-dir", str(folder), "--seeds", "0", "1", "2", *arguments)
        monkeypatch.setattr(sys, "argv", [*arguments])
        runpy.run_path(str(REPOSITORY / "tools/trust.py"), run_name="__main__")
        return sorted(ran), (folder / "report.md").read_text()

    return run


def test_a_detector_that_is_added_is_all_that_runs(trust, tmp_path):
    trust("--variants", "text", "image", "vild", "ensemble")
    ran, _ = trust()
    mine = ["by_example", *(f"vild_contrast{end}" for end in ("", "_absent", "_calibrated", "_calibration"))]
    assert ran == [(f"seed{n}", name) for n in range(3) for name in mine]
    command = json.loads((tmp_path / "trust/seed1/stages/vild_contrast.json").read_text())["command"]
    assert command[:3] == ["train_net.py", "--config-file", str(REPOSITORY / "configs/Glyphs/vild_contrast.yaml")]
    assert trust()[0] == []
    for stage in ("calibration", "calibrated", "absent"):  # a calibration that is to be made anew
        (tmp_path / f"trust/seed2/stages/ensemble_{stage}.json").unlink()
    assert [name for _, name in trust()[0]] == ["ensemble_absent", "ensemble_calibrated", "ensemble_calibration"]


def test_the_tables_are_means_over_seeds(trust):
    _, report = trust()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("|")]
    rows = [row for row in rows if not row[0].startswith(":")]

    def cells(row: str, columns: list, factor: float = 1, digits: tuple = (1,) * 20) -> list[str]:
        seeds = [[factor * value(seed, row, n) for n in range(len(columns))] for seed in range(3)]
        numbers = zip(np.mean(seeds, 0), np.std(seeds, 0, ddof=1), digits, strict=False)
        return [f"{mean:.{d}f} ± {spread:.{d}f}" for mean, spread, d in numbers]

    names = {row[0] for row in rows if row[0]}
    assert {"ViLD", "ViLD, calibrated", "ViLD-contrast (ours)", "ViLD-contrast (ours), calibrated"} < names
    ours = [row[1:] for row in rows if row[0].startswith("ViLD-contrast")]
    for row, name in (ours[1], "vild_contrast"), (ours[2], "vild_contrast_calibrated"):
        of = dict(zip(METRICS, cells(name, METRICS), strict=True))
        pairs = [f"{of[f'bbox/{k}_novel']} / {of[f'bbox/{k}']}" for k in ("precision", "recall", "calibration_error")]
        assert row == [of[AP[0]], of[AP[1]], *pairs, of["bbox/boxes_per_image"], of["bbox/objects_per_image"]]
    assert ours[0] == [of[m] for m in (*AP, "bbox/precision", "bbox/recall")]
    for kind, factor in (ours[3], 1), (ours[4], 2):
        assert kind == cells("vild_contrast_absent", [*COLUMNS], factor, (3, 3, 1, 1, 1))
    by_example = {row[0]: row[1:] for row in rows if row[0] in MADE_OF.values()}
    assert by_example == {text: cells(key, [*EXAMPLES]) for key, text in MADE_OF.items()}
