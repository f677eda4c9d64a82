"""tools/forgetting.py: what its stages are, and what its table says. They run for real in its tools' own tests."""

import json
import re
import runpy
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from experiments.runner import Runner

from tests.conftest import REPOSITORY
from vild.data.classes import SPLIT_DIR
from vild.glyphs.drawing import table
from vild.utils.files import write_json
from vild.vocabulary.vocabulary import Vocabulary

NEW = json.loads((SPLIT_DIR / "glyphs_new.json").read_text())["base"]


def ap(seed: int, stage: str, number: int) -> float:
    return float((7 * number + 13 * seed + 5 * len(stage)) % 89)


@pytest.fixture
def forgetting(tmp_path, monkeypatch):
    """Runs the tool; its stages write made-up results. Gives the commands by seed and stage, and the report."""
    ran = {}

    def run_step(run, stages):
        for each in stages:
            if each.name in run.seconds:
                continue
            seed, name = int(run.folder.name.removeprefix("seed")), each.name
            ran[seed, name] = each.command
            run.seconds[name] = 1.0
            if each.command[0] == "absent_words.py":
                write_json(each.output, {"random": {"false_boxes": seed / 8, "recall": 80.0 + len(name)}})
            elif "--eval-only" in each.command:
                classes = [{"name": g.name, "split": "novel" if g.frequency == "r" else "base",
                            "bbox/AP50": ap(seed, name, n)} for n, g in enumerate(table())]  # fmt: skip
                classes[0]["bbox/AP50"] = None  # no ground truth
                (each.output / "inference").mkdir(parents=True)
                write_json(each.output / "inference/per_class.json", {"classes": classes})
            elif name.endswith(("_plain", "_finetuned")):
                each.output.mkdir()
                names = [g.name for g in table()] if name.endswith("_finetuned") else NEW
                words = Vocabulary(tuple(names), F.normalize(torch.randn(len(names), 4), dim=1), ("base",) * len(names))
                words.save(each.output / "vocabulary.safetensors")
                content = {"model": {"w": torch.ones(2)}, "vocabulary": {**words.state(), "variant": "vild"}}
                torch.save(content, each.output / "model_final.pth")

    monkeypatch.setattr(Runner, "run_step", run_step)

    def run(*arguments):
        folder = tmp_path / "trust"
        arguments = ("tools/forgetting.py", "--output-dir", str(folder), "--seeds", "0", "2", *arguments)
        monkeypatch.setattr(sys, "argv", [*arguments])
        runpy.run_path(str(REPOSITORY / "tools/forgetting.py"), run_name="__main__")
        return ran, {path.parent.name: path.read_text() for path in folder.glob("*/report.md")}

    return run


def test_the_table_has_the_means_of_the_groups(forgetting):
    _, pages = forgetting("--dataset", "glyphs_dev")
    page = pages["forgetting_glyphs_dev"]
    rows = {cells[0]: cells[1:] for line in page.splitlines() if line.startswith("|")
            and (cells := [cell.strip() for cell in line.strip("|").split("|")])}  # fmt: skip
    for title, stage in (("before", "before"), ("plain fine-tuning", "plain"), ("tools/finetune.py", "finetuned"),
                         ("tools/probe.py", "probe")):  # fmt: skip
        place = f"vild_contrast_{stage}_glyphs_dev"
        groups = {"base": [], "old novel": [], "new": []}
        for number, glyph in enumerate(table()):
            if number > 0:
                group = "base" if glyph.frequency != "r" else "new" if glyph.name in NEW else "old novel"
                groups[group].append([ap(seed, place, number) for seed in (0, 2)])
        means = [np.mean(values, 0) for values in groups.values()]
        expected = [f"{m.mean():.1f} ± {m.std(ddof=1):.1f}" for m in means]
        recall = 80 + len(f"{place}_absent")
        assert rows[title] == [*expected, f"{0.125:.3f} ± {np.std([0, 0.25], ddof=1):.3f}", f"{recall:.1f} ± 0.0"]


def test_a_report_says_what_it_is_of_and_overwrites_no_other(forgetting):
    """The default's is where tools/figures.yaml takes it."""
    _, first = forgetting()
    assert [*first] == ["forgetting"] and "(vild_contrast, glyphs_val)" in first["forgetting"]
    forgetting("--variant", "text")
    _, pages = forgetting("--variant", "vild", "--dataset", "glyphs_dev")
    assert sorted(pages) == ["forgetting", "forgetting_text", "forgetting_vild_glyphs_dev"]
    assert pages["forgetting"] == first["forgetting"]
    said = "The detector is vild of configs/Glyphs, taught by glyphs_new_train and scored on glyphs_dev; seeds 0, 2."
    assert said in pages["forgetting_vild_glyphs_dev"]


def test_plain_fine_tuning_has_the_same_schedule_and_keeps_nothing(forgetting, tmp_path):
    ran, _ = forgetting()
    command = ran[2, "vild_contrast_plain"]
    keys = dict(pairwise(command))
    tuned = tmp_path / "trust/seed2/vild_contrast_finetuned"
    assert keys["--config-file"] == str(tuned / "config.yaml") and keys["MODEL.VILD.OLD_STUDENT.WEIGHTS"] == ""
    assert keys["MODEL.VILD.OLD_STUDENT.HEAD_ONLY"] == "False" and "loss_box_reg" in keys["MODEL.VILD.LOSS_WEIGHTS"]
    offered = torch.load(tmp_path / "trust/seed2/vild_contrast_plain/all_names.pth", weights_only=True)
    assert Vocabulary.from_state(offered["vocabulary"]).names == tuple(g.name for g in table())
    assert offered["vocabulary"]["variant"] == "vild" and offered["model"].keys() == {"w"}
    assert ran[2, "vild_contrast_plain_glyphs_val"].count(str(tuned.with_name("vild_contrast_plain") / "all_names.pth"))
    assert "2" in ran[2, "world_new"] and ran[2, "vild_contrast_probe"][0] == "probe.py"


def test_its_stages_use_flags_that_the_tools_have(forgetting):
    ran, _ = forgetting()
    for command in ran.values():
        source = (REPOSITORY / "tools" / command[0]).read_text()
        flags = {word for word in command if word.startswith("--")}
        if command[0] != "train_net.py":
            shared = {"--config-file", "--weights", "--opts"} if "add_model_flags(parser)" in source else set()
            assert flags <= {*re.findall(r'"(--[a-z-]+)"', source)} | shared, command
