"""Nothing about novel classes reaches the detector except through the teacher's embeddings of label-free regions."""

import json

import torch

from vild.data import datasets
from vild.data.loader import training_records
from vild.data.mapper import ViLDMapper
from vild.engine.sources import open_store


def seen_by_the_detector(cfg, name):
    """Everything that training reads of a data set: the records, and what the mapper makes of them."""
    records = training_records((name,), filter_empty=True)
    mapper = ViLDMapper.from_config(cfg, open_store(cfg))
    mapped = []
    for record in records[:10]:
        torch.manual_seed(0)
        x = mapper(record)
        mapped.append((x["instances"].gt_classes, x["instances"].gt_boxes.tensor, x["distill"].embeddings))
    return json.dumps(records), mapped


def test_changing_every_novel_annotation_changes_nothing(world, make_cfg, monkeypatch):
    """The training file is swapped for ones whose novel annotations are right, wrong and absent."""
    cfg = make_cfg("vild", "INPUT.RANDOM_FLIP", "none")
    folder = world / "glyphs" / "annotations"
    document = json.loads((folder / "lvis_train_all.json").read_text())
    rare = {c["id"] for c in document["categories"] if c["frequency"] == "r"}
    novel = [a for a in document["annotations"] if a["category_id"] in rare]
    assert len(novel) >= 10

    scrambled = json.loads(json.dumps(document))
    for a in scrambled["annotations"]:
        if a["category_id"] in rare:
            a.update(bbox=[1.0, 2.0, 30.0, 40.0], category_id=max(rare), segmentation=[[1, 2, 30, 2, 30, 40]], area=1.0)
    for image in scrambled["images"]:
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = sorted(rare), sorted(rare)
    absent = json.loads(json.dumps(document))
    absent["annotations"] = [a for a in absent["annotations"] if a["category_id"] not in rare]

    seen = []
    for variant, content in (("right", document), ("wrong", scrambled), ("absent", absent)):
        (folder / f"leak_{variant}.json").write_text(json.dumps(content))
        entry = datasets.Entry(f"glyphs/annotations/leak_{variant}.json", "glyphs/train", "lvis", keep="base")
        monkeypatch.setitem(datasets.BUILTIN, f"leak_{variant}", entry)
        seen.append(seen_by_the_detector(cfg, f"leak_{variant}"))
    for records, mapped in seen[1:]:
        assert records == seen[0][0]
        for mine, first in zip(mapped, seen[0][1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))

    # the test can fail: a base annotation that changes is seen
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] in rare or a["id"] % 2]
    (folder / "leak_base.json").write_text(json.dumps(document))
    entry = datasets.Entry("glyphs/annotations/leak_base.json", "glyphs/train", "lvis", keep="base")
    monkeypatch.setitem(datasets.BUILTIN, "leak_base", entry)
    assert seen_by_the_detector(cfg, "leak_base")[0] != seen[0][0]


def test_every_training_set_for_the_detector_drops_novel_annotations():
    for name, entry in datasets.BUILTIN.items():
        if "train" in name and entry.split != "everything":
            assert entry.keep == "base", name
