"""tools/probe.py: a row of the vocabulary as a linear probe."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes

from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import read_network_record
from vild.data import datasets
from vild.data.provenance import LEAK, judge_network
from vild.evaluation.evaluator import ground_truth_boxes
from vild.glyphs.drawing import table
from vild.glyphs.world import write_world
from vild.inference.probe import NEAREST, fit_row, regions_of, regions_of_store, rivals_of, with_row
from vild.store.store import EmbeddingStore
from vild.vocabulary.vocabulary import Vocabulary

NEW = "glyphs_new_train"
N, TAU, RIDGE = 30, 0.2, 0.3


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def loss(row: np.ndarray, x: np.ndarray, positive: np.ndarray, rivals: np.ndarray, start: np.ndarray) -> float:
    """The mean of -log p of the positives, of -log(1 - p) of the others, and the ridge, one by one."""
    p = 1 / (1 + np.exp(-(x @ row / TAU - rivals)))
    return -np.log(p[positive]).mean() - np.log(1 - p[~positive]).mean() + RIDGE * ((row - start) ** 2).sum()


def problem(width: int):
    x, start = unit(N, width), unit(width, seed=1)
    scores = x[:, 0] + 0.5 * x[:, 1]
    return x, scores > scores.sort().values[-9], 3 * torch.rand(N, generator=torch.Generator().manual_seed(2)), start


def test_in_the_plane_it_is_the_best_of_all_directions():
    given = problem(2)
    assert given[1].sum() == 8
    angles = np.linspace(0, 2 * np.pi, 200_001)
    arrays = [t.numpy() for t in given]
    coarse = min(angles[::100], key=lambda a: loss(np.array([np.cos(a), np.sin(a)]), *arrays))
    near = angles[np.abs(angles - coarse) < 0.01]
    best = min(near, key=lambda a: loss(np.array([np.cos(a), np.sin(a)]), *arrays))
    row = fit_row(*given, TAU, RIDGE)
    np.testing.assert_allclose(row.numpy(), [np.cos(best), np.sin(best)], atol=2e-4)


def test_no_direction_from_it_is_downhill():
    given = problem(6)
    arrays = [t.numpy() for t in given]
    row = fit_row(*given, TAU, RIDGE).double().numpy()
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)
    here = loss(row, *arrays)
    assert here < loss(arrays[3], *arrays) - 0.1
    for step in 1e-3 * unit(50, 6, seed=3).numpy():
        there = row + step
        assert loss(there / np.linalg.norm(there), *arrays) > here - 1e-8


def test_a_ridge_holds_it_at_the_word():
    given = problem(6)
    cosines = [float(fit_row(*given, TAU, ridge).double() @ given[3]) for ridge in (0.01, 1, 100, 1e6)]
    assert cosines == sorted(cosines) and cosines[0] < 0.9 and cosines[-1] > 1 - 1e-6


def test_the_order_of_regions_does_not_matter():
    x, positive, rivals, start = problem(6)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    again = fit_row(x[order], positive[order], rivals[order], start, TAU, RIDGE)
    torch.testing.assert_close(again, fit_row(x, positive, rivals, start, TAU, RIDGE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["vild", "image"])
def test_its_probability_is_the_detector_s_score(detector, variant, monkeypatch):
    heads, x, row = detector.model.roi_heads, unit(9, 64).float(), unit(64, seed=5).float()
    monkeypatch.setattr(heads, "variant", variant)
    made = with_row(detector.trained, 43, row, "linear probe of 9 regions")
    temperature = heads.classifier.test_temperature
    mine = (x @ row / temperature - rivals_of(detector, detector.trained, 43, x)).sigmoid()
    (scores,) = heads._score_blocks([x], heads.classifier.class_set([made]))
    torch.testing.assert_close(mine, scores[:, 43].detach(), atol=1e-6, rtol=1e-4)
    assert made.made_of == ("",) * 43 + ("linear probe of 9 regions",) + ("",) * 16
    assert made.splits[43] == "base" and detector.trained.splits[43] == "novel"
    others = [i for i in range(60) if i != 43]
    assert torch.equal(made.embeddings[others], detector.trained.embeddings[others])


@pytest.fixture(scope="module")
def new_scenes(world):
    write_world(world / "glyphs", seed=0, sets=("new_train",), workers=1, fraction=0.1)
    return datasets.get_classes(NEW)


def test_regions_are_the_detector_s_with_the_classes_that_they_overlap(make_cfg, checkpoint_file, new_scenes):
    from vild.inference.predictor import OpenVocabularyDetector

    size = ("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 96)
    detector = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(checkpoint_file), *size))
    embeddings, classes = regions_of(detector, NEW)
    assert len(embeddings) == len(classes) and (classes == -1).any()
    truth, at = ground_truth_boxes(NEW), 0
    for record in datasets.load_dicts(NEW):
        boxes, numbers = truth[record["image_id"]]
        images = detector.model.preprocess_image([detector.model_input(record["file_name"])])
        assert images.image_sizes == [(96, 96)]
        features = detector.model.backbone(images.tensor)
        with torch.no_grad():
            mine = detector.model.roi_heads.region_embeddings(features, [Boxes(boxes * 96 / 128)])
            proposals = detector.model.proposal_generator(images, features, None)[0][0]
        torch.testing.assert_close(embeddings[at : at + len(boxes)], mine, atol=1e-5, rtol=0)
        assert classes[at : at + len(boxes)].tolist() == numbers
        at += len(boxes) + len(proposals)
    assert at == len(classes)


def test_of_a_store_the_regions_nearest_to_the_word(store_folder):
    store, word = EmbeddingStore(store_folder), unit(64, seed=6).float()
    regions, positive = regions_of_store(store, word)
    assert len(regions) == 400 and positive.sum() == NEAREST
    cosines = (regions.numpy() * word.numpy()).sum(1)
    assert cosines[positive].min() >= cosines[~positive].max()


@pytest.fixture
def probe(tool, checkpoint_file, teacher_folder, new_scenes):
    def run(*arguments, config="vild"):
        return tool(
            "probe.py", "--config-file", REPOSITORY / f"configs/Glyphs/{config}.yaml", "--weights", checkpoint_file,
            *arguments, "--opts", "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}",
        )  # fmt: skip

    return run


def test_the_tool_learns_from_boxes_and_says_so(probe, checkpoint_file, vocabulary, new_scenes, tmp_path, capsys):
    assert probe("--dataset", NEW, "--output", tmp_path / "v.safetensors") in (0, None)
    assert probe("--dataset", NEW, "--output", tmp_path / "v.pth") in (0, None)
    said = capsys.readouterr().out
    made = Vocabulary.load(tmp_path / "v.safetensors")
    assert torch.equal(Vocabulary.load(tmp_path / "v.pth").embeddings, made.embeddings)
    annotated = {new_scenes.names[k] for _, numbers in ground_truth_boxes(NEW).values() for k in numbers}
    moved = {n for n, a, b in zip(made.names, made.embeddings, vocabulary.embeddings, strict=True) if not a.equal(b)}
    assert moved == annotated and made.names == vocabulary.names
    assert {n for n in new_scenes.names if f"'{n}': no box" in said} == {*new_scenes.names} - annotated
    trained = torch.load(tmp_path / "v.pth", weights_only=True)["model"]
    old = torch.load(checkpoint_file, weights_only=True)["model"]
    assert trained.keys() == old.keys() and all(torch.equal(trained[key], old[key]) for key in old)
    record, known = read_network_record(str(tmp_path / "v.pth")), [g.name for g in table()]
    assert judge_network(record, sorted(annotated), known)[0] == LEAK
    assert [start["file"] for start in record["trained_on"]["starts"]] == [checkpoint_file.name]


def test_the_tool_learns_without_boxes(probe, store_folder, vocabulary, tmp_path, capsys):
    words = ("--vocabulary", "umbrella, anchor")
    assert probe("--store", store_folder, *words, "--output", tmp_path / "v.safetensors") in (0, None)
    made = Vocabulary.load(tmp_path / "v.safetensors")
    moved = [n for n, a, b in zip(made.names, made.embeddings, vocabulary.embeddings, strict=True) if not a.equal(b)]
    assert moved == ["umbrella", "anchor"] and "100 of 400 regions" in capsys.readouterr().out


def test_mistakes_are_one_line(probe, store_folder, tmp_path, capsys):
    output = ("--output", tmp_path / "v.safetensors")
    for message, *arguments in (
        ("written as .safetensors, a detector as .pth", "--dataset", NEW, "--output", tmp_path / "v.txt"),
        ("either --dataset, or --store and --vocabulary", "--dataset", NEW, "--store", store_folder, *output),
        ("either --dataset, or --store and --vocabulary", "--store", store_folder, *output),
        ("glyphs_train: the detector was trained on all of these names", "--dataset", "glyphs_train", *output),
        (
            "sun: the detector was trained on all of these names",
            "--store",
            store_folder,
            "--vocabulary",
            "sun",
            *output,
        ),
    ):
        assert probe(*arguments) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not [*tmp_path.iterdir()]


def test_no_novel_annotation_is_read(probe, world, tmp_path, capsys):
    """Not even as a region that is of no new name."""
    (tmp_path / "split.json").write_text(json.dumps({"base": ["umbrella"], "novel": ["scissors"]}))
    entry = replace(datasets.get_entry(NEW), split=str(tmp_path / "split.json"))
    for keep in ("all", "base"):
        datasets.add_entry(f"kept_{keep}", replace(entry, keep=keep))
    output = tmp_path / "v.safetensors"
    assert probe("--dataset", "kept_all", "--output", output) == 2
    assert "'kept_all' keeps novel annotations" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()
    assert probe("--dataset", "kept_base", "--output", output) in (0, None)
