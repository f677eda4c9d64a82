"""Novel names by example: what the tool measures, with a detector and a teacher that know everything."""

import json

import pytest
import torch

from vild.checkpoint.checkpointer import detector_hash
from vild.data import datasets
from vild.evaluation.evaluator import ground_truth_boxes
from vild.inference import by_example as module
from vild.utils.errors import UserError


@pytest.fixture
def knowing(detector, monkeypatch):
    """Regions are the objects, with the embedding of their word; to the teacher a region is its word, too."""
    heads, words, asked = detector.model.roi_heads, detector.trained.embeddings, []
    by_file = {r["file_name"]: ground_truth_boxes(name)[r["image_id"]]
               for name in ("glyphs_val", "glyphs_train_all") for r in datasets.load_dicts(name)}  # fmt: skip
    read = detector.model_input
    monkeypatch.setattr(detector, "model_input", lambda file: asked.append(file) or read(file))

    def regions(features, proposals):
        boxes, numbers = by_file[asked[-1]]
        height, width = proposals[0].image_size
        yield (height, width), boxes * torch.tensor([width, height] * 2) / 128, [words[numbers]]

    def read_examples(examples):
        drawn.append(examples)
        return [name for name, some in examples.items() for _ in some], [], torch.zeros(0, 4)

    def from_regions(teacher, names, *_):
        known = detector.trained
        kinds = dict.fromkeys(names)
        return known.take([known.names.index(name) for name in kinds])

    drawn: list[dict] = []
    monkeypatch.setattr(heads, "embed_proposals", regions)
    monkeypatch.setattr(module, "fit_gap", lambda *_: None)
    monkeypatch.setattr(module, "read_examples", read_examples)
    monkeypatch.setattr(module.Vocabulary, "from_regions", from_regions)
    monkeypatch.setattr(module, "with_examples", lambda words, _: words)
    return detector, drawn


def test_an_example_that_is_the_word_scores_as_the_word(knowing):
    detector, drawn = knowing
    found = module.by_example(detector, "glyphs_val", "glyphs_train_all")
    assert list(found) == list(module.MADE_OF)
    assert found["words"]["AP50_novel"] == pytest.approx(100) == found["words"]["AP50_base"]
    for key, scores in found.items():
        if key.startswith("shuffled"):  # each novel name stands for another one
            assert scores["AP50_novel"] < 5 and scores["AP50_base"] == pytest.approx(100)
        else:
            assert scores == pytest.approx(found["words"])
    novel = {name for name, s in zip(detector.trained.names, detector.trained.splits, strict=True) if s == "novel"}
    assert len(drawn) == len(module.COUNTS) * module.DRAWS and all(set(each) == novel for each in drawn)


def test_what_is_drawn(world):
    classes, boxes = datasets.get_classes("glyphs_train_all"), ground_truth_boxes("glyphs_train_all")
    files = {r["file_name"]: boxes[r["image_id"]] for r in datasets.load_dicts("glyphs_train_all")}
    counts = [sum(numbers.count(k) for _, numbers in files.values()) for k in range(60)]
    val = [sum(numbers.count(k) for _, numbers in ground_truth_boxes("glyphs_val").values()) for k in range(60)]
    some = [k for k, count in enumerate(counts) if count]
    one, again, other = (module.draw_examples("glyphs_train_all", some, 2, seed) for seed in (0, 0, 1))
    assert one == again != other
    for number, regions in one.items():
        assert len(regions) == min(2, counts[number])
        for file, box in regions:
            there, numbers = files[file]
            assert numbers[there.tolist().index(box)] == number
    (lacking,) = [k for k in range(60) if not val[k]][:1]
    with pytest.raises(UserError, match=f"examples from glyphs_val: it has no '{classes.names[lacking]}'"):
        module.draw_examples("glyphs_val", [lacking], 1, 0)


def test_the_tool(tool, knowing, monkeypatch, checkpoint_file, make_cfg, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(make_cfg("vild").dump())
    monkeypatch.setattr("vild.inference.predictor.OpenVocabularyDetector", lambda _: knowing[0])
    arguments = ("--config-file", tmp_path / "config.yaml", "--weights", checkpoint_file, "--dataset", "glyphs_val",
                 "--output", tmp_path / "found.json", "--examples-from")  # fmt: skip
    assert not tool("by_example.py", *arguments, "glyphs_train_all")
    assert "| word and 5 examples | 100.0" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["shuffled1"]["AP50_novel"] < 5
    assert found["of"] == {"dataset": "glyphs_val", "examples_from": "glyphs_train_all", "seed": 0,
                           "weights": str(checkpoint_file), "detector": detector_hash(knowing[0].model)}  # fmt: skip
    assert tool("by_example.py", *arguments, "glyphs_val") == 2
    assert "--examples-from glyphs_val: its objects" in capsys.readouterr().err
    datasets.add_entry("again", datasets.get_entry("glyphs_val"))  # under another name, as glyphs_lvis_val has them
    assert tool("by_example.py", *arguments, "again") == 2
    assert "of its images are in glyphs_val, too" in capsys.readouterr().err
