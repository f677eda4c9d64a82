"""How far distillation has come, on constructed embeddings."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import REPOSITORY
from vild.data import datasets
from vild.evaluation.evaluator import ground_truth_boxes
from vild.evaluation.metrics import DIAGNOSTICS
from vild.report.diagnostics import distillation_progress, jitter, teacher_agreement, top1, verdict


def test_progress_is_0_at_an_unrelated_box_and_1_at_the_teachers_own_agreement():
    jittered, unrelated = {"base": 0.9, "novel": 0.8}, {"base": 0.5, "novel": 0.6}
    assert distillation_progress({"base": 0.7, "novel": 0.8}, jittered, unrelated) == pytest.approx(
        {"base": 0.5, "novel": 1.0}
    )
    assert distillation_progress(unrelated, jittered, unrelated) == {"base": 0.0, "novel": 0.0}
    nothing = {"base": 0.7, "novel": None}
    assert distillation_progress(nothing, jittered | {"novel": None}, unrelated | {"novel": None})["novel"] is None


def test_jittered_boxes_stay_within_a_tenth_and_the_image():
    boxes = torch.tensor([[10.0, 10, 50, 30], [0, 0, 100, 80]]).repeat(200, 1)
    moved = jitter(boxes, 80, 100, torch.Generator().manual_seed(0))
    sides = torch.tensor([[40.0, 20, 40, 20], [100, 80, 100, 80]]).repeat(200, 1)
    assert ((moved - boxes).abs() <= 0.1 * sides + 1e-4).all() and (moved[::2] != boxes[::2]).any(1).all()
    assert (moved >= 0).all() and (moved <= torch.tensor([100, 80, 100, 80])).all()
    assert (moved[:, 2:] > moved[:, :2]).all()


def test_the_verdict_compares_student_and_teacher_on_novel_names_if_there_are_any():
    teacher, behind, level = ({"base": 98.0, "novel": n} for n in (50.0, 20.0, 46.0))
    assert verdict(behind, teacher).startswith("Distillation has not converged: of novel objects")
    assert "names 20.0 % right, its teacher 50.0 %" in verdict(behind, teacher)
    assert verdict(level, teacher).startswith("Distillation has converged")
    base = {"base": 50.0, "novel": None}
    assert "of base objects" in verdict({"base": 49.0, "novel": None}, base)


def test_top1_is_the_share_of_boxes_whose_nearest_name_is_right(world, vocabulary):
    truth, classes = ground_truth_boxes("glyphs_val"), datasets.get_classes("glyphs_val")
    words = vocabulary
    right = {i: words.embeddings[torch.tensor(found, dtype=torch.long)] for i, (_, found) in truth.items()}
    assert set(top1(right, words, "glyphs_val").values()) == {100.0}
    first = words.splits.index("base")
    one = {i: words.embeddings[[first]].expand(len(rows), -1) for i, rows in right.items()}
    labels = [c for _, found in truth.values() for c in found]
    among = [c for c in labels if classes.splits[c] == "base"]
    expected = pytest.approx(100 * sum(c == first for c in among) / len(among))
    found = top1(one, words, "glyphs_val")
    assert found["base"] == expected and found["novel"] == 0.0


class Width:
    """A teacher whose embedding is the direction of a box's (width, height)."""

    def encode_regions(self, image, boxes):
        return F.normalize((boxes[:, 2:] - boxes[:, :2]).float(), dim=1)


def test_the_teacher_is_compared_with_itself_and_with_all_other_boxes(world):
    truth = ground_truth_boxes("glyphs_val")
    embeddings = {i: Width().encode_regions(None, boxes) for i, (boxes, _) in truth.items()}
    jittered, unrelated = teacher_agreement(Width(), embeddings, "glyphs_val")
    rows = torch.cat(list(embeddings.values())).double()
    base = [datasets.get_classes("glyphs_val").splits[c] == "base" for _, classes in truth.values() for c in classes]
    pairs = (rows @ rows.T).mean(1)  # each box's mean cosine to all of them
    assert unrelated["base"] == pytest.approx(pairs[torch.tensor(base)].mean().item(), abs=1e-5)
    assert unrelated["base"] < jittered["base"] < 1


def test_reports_know_all_that_the_tool_writes(world, tool, checkpoint_file, teacher_folder, tmp_path):
    done = tool("diagnostics.py", "--config-file", REPOSITORY / "configs/Glyphs/vild.yaml", "--dataset", "glyphs_val",
                "--weights", checkpoint_file, "--output", tmp_path / "d.json",
                "--opts", "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}")  # fmt: skip
    assert done == 0
    found = json.loads((tmp_path / "d.json").read_text())
    assert "has converged" in found.pop("verdict")
    assert found.keys() <= DIAGNOSTICS.keys() and all(values.keys() >= {"base", "novel"} for values in found.values())
    assert found["distillation_progress"]["base"] < 1  # of a detector that was hardly trained
