"""An image that cannot be read ends a run with its name, or is left out and counted; it is never silent."""

import itertools
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from vild.data import datasets, unreadable
from vild.data.loader import SeededStream, build_test_loader, build_train_loader
from vild.engine.sources import open_store
from vild.evaluation.evaluator import METRICS_FILE, OpenVocabularyEvaluator, write_metrics
from vild.evaluation.recall import ProposalRecallEvaluator
from vild.report.run_report import beside_published, unreadable_blocks
from vild.store.store import EmbeddingStore
from vild.utils.errors import BadImage, UserError, count_of

SKIP = ("INPUT.UNREADABLE", "skip")


@pytest.fixture
def broken(world, tmp_path, monkeypatch):
    """A copy of the world in which some images of training and evaluation are no images: [names]."""
    copy = tmp_path / "datasets"
    shutil.copytree(world, copy)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(copy))
    datasets.forget()
    spoilt = []
    for name in ("glyphs_train", "glyphs_val"):
        records = datasets.load_dicts(name)
        for record in records[1 : len(records) : 3]:
            with open(record["file_name"], "wb") as file:
                file.write(b"no image")
            spoilt.append(record["file_name"])
    yield spoilt
    datasets.forget()


def batches(cfg, start, count):
    return list(itertools.islice(build_train_loader(cfg, open_store(cfg), start), count))


def test_refused_by_default(broken, make_cfg):
    with pytest.raises(BadImage, match="cannot be read"):
        batches(make_cfg(), 0, 6)
    with pytest.raises(BadImage, match="cannot be read"):
        list(build_test_loader(make_cfg(), "glyphs_val"))
    with pytest.raises(UserError, match="INPUT.UNREADABLE: 'ignore' is not one of refuse, skip"):
        build_test_loader(make_cfg("vild", "INPUT.UNREADABLE", "ignore"), "glyphs_val")


def test_training_goes_on_with_another_and_counts(broken, make_cfg, caplog):
    """Started anywhere, with workers or without, the batches are the same, and so is the count."""
    cfg = make_cfg("vild", *SKIP)
    folder = cfg.OUTPUT_DIR
    with EventStorage() as storage, caplog.at_level(logging.WARNING, logger="vild"):
        whole = batches(cfg, 0, 8)
    found = unreadable.read_unreadable(Path(folder))
    assert found and set(found) <= set(broken) and all("cannot be read" in why for why in found.values())
    assert storage.latest()["unreadable_pictures"][0] == len(found)
    assert caplog.text.count("left out of the training") == len(found)
    used = [r["file_name"] for batch in whole for r in batch]
    assert len(used) == 16 and not set(used) & set(broken)
    assert not any(unreadable.REASON in r for batch in whole for r in batch)
    resumed = batches(make_cfg("vild", *SKIP, "DATALOADER.NUM_WORKERS", 2), 3, 5)
    for a, b in zip(whole[3:], resumed, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x["image_id"] == y["image_id"] and torch.equal(x["image"], y["image"])
    assert json.loads((Path(folder) / unreadable.FILE).read_text()) == found
    assert f"x: {count_of(len(found), 'image')} that could not be read" in unreadable_blocks(Path(folder), "x")[0].text
    batches(make_cfg("vild", *SKIP), 0, 1)  # a new run does not go on with the old list
    assert len(unreadable.read_unreadable(Path(folder))) <= 2


def test_a_folder_that_has_gone_is_no_reason_to_go_on():
    def mapper(record):
        raise BadImage(f"image {record['file_name']} cannot be read")

    with pytest.raises(UserError, match="100 unusable images in a row.* cannot be read"):
        SeededStream([{"file_name": "a"}, {"file_name": "b"}], mapper, 0, skip=True)[0, 0]


def test_evaluation_counts_what_it_could_not_see(broken, make_cfg, caplog, tmp_path):
    cfg = make_cfg("vild", *SKIP)
    records = {r["image_id"]: r for r in datasets.load_dicts("glyphs_val")}
    evaluators = (
        OpenVocabularyEvaluator("glyphs_val", str(tmp_path / "out"), False),
        ProposalRecallEvaluator("glyphs_val", 10),
    )
    for inputs in build_test_loader(cfg, "glyphs_val"):
        found = Instances((64, 64))  # whatever the detector says of a grey image
        found.pred_boxes = found.proposal_boxes = Boxes(torch.tensor([[1.0, 2.0, 30.0, 40.0]]))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([3])
        for evaluator in evaluators:
            evaluator.process(inputs, [{"instances": found, "proposals": found}])
    with caplog.at_level(logging.WARNING, logger="vild"):
        metrics, recall = (evaluator.evaluate() for evaluator in evaluators)
    lost = {i for i, r in records.items() if r["file_name"] in broken}
    assert metrics["pictures"] == recall["pictures"] == {"unreadable": len(lost)} and lost
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {r["image_id"] for r in results} == set(records) - lost
    assert set(unreadable.read_unreadable(tmp_path / "out")) <= set(broken)
    assert f"{count_of(len(lost), 'image')} that CANNOT BE READ" in caplog.text
    flat = json.loads(write_metrics(tmp_path, {"glyphs_val": metrics}).read_text())
    assert flat["glyphs_val/pictures/unreadable"] == len(lost)
    values = {key.split("/", 1)[1]: value for key, value in flat.items()}
    assert all("unreadable" not in str(block) for block in beside_published("glyphs_val", values))
    assert METRICS_FILE in str(write_metrics(tmp_path, {"glyphs_val": metrics}))


def test_a_scan_finds_all(broken, tool, tmp_path, capsys):
    records = datasets.load_dicts("glyphs_train")
    faults = [fault for fault in unreadable.scan(records, 3) if fault]
    assert [fault.file_name for fault in faults] == [r["file_name"] for r in records if r["file_name"] in broken]
    whole = next(r for r in records if r["file_name"] not in broken)
    Image.new("RGB", (9, 7)).save(whole["file_name"])
    fault = unreadable.check_image(whole)
    assert fault.kind == "another size" and "is 9x7, the annotation file says" in fault.reason
    report = tmp_path / "r.json"
    assert tool("check_dataset.py", "--dataset", "glyphs_train", "--num-workers", "2", "--output", report) == 1
    document, printed = json.loads(report.read_text()), capsys.readouterr()
    assert (document["unreadable"], document["another_size"]) == (len(faults), 1)
    assert len(document["faults"]) == len(faults) + 1 and document["pictures"] == len(records)
    assert f"{len(faults)} unreadable, 1 of another size" in printed.out and "images: 100%" in printed.err
    assert tool("check_dataset.py", "--dataset", "glyphs_train_nothing") == 2
    assert tool("check_dataset.py", "--dataset", "glyphs_train", "--num-workers", "0") == 2


def test_a_clean_set_passes(world, tool, capsys):
    assert tool("check_dataset.py", "--dataset", "glyphs_val") == 0
    assert "0 unreadable, 0 of another size" in capsys.readouterr().out


def test_a_store_lists_what_it_could_not_read(broken, tool, teacher_folder, proposals_file, tmp_path, capsys):
    def build(folder, *flags):
        return tool(
            *("build_teacher_store.py", "--dataset", "glyphs_train", "--proposals", proposals_file),
            *("--teacher", f"local-dir:{teacher_folder}", "--output-dir", folder, "--num-workers", "0"),
            *("--max-per-image", "2", "--shard-images", "30", *flags),
        )

    assert build(tmp_path / "refused") == 2
    assert build(tmp_path / "store", "--unreadable", "skip") == 0
    lost = sorted(r["image_id"] for r in datasets.load_dicts("glyphs_train") if r["file_name"] in broken)
    assert f"WARNING: {count_of(len(lost), 'image')} that CANNOT BE READ" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["unreadable"] == lost and "unreadable" not in manifest["plan"]
    store = EmbeddingStore(tmp_path / "store")
    assert all((len(store[i].boxes) == 0) == (i in lost) for i in store.image_ids.tolist())
    assert tool("inspect_store.py", tmp_path / "store", "--verify") == 0
    assert f"{len(lost)} images without regions" in capsys.readouterr().out


def test_a_config_without_loader_is_an_error():
    with pytest.raises(UserError, match="INPUT.UNREADABLE"):
        unreadable.skips(SimpleNamespace(INPUT=SimpleNamespace(UNREADABLE="")))
