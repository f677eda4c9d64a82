"""Data sets by name: splits by name and id, the built-in names over official-form files, a user's own set."""

import json
from collections import Counter

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from tests.data import official
from vild.config import add_vild_config
from vild.data import datasets
from vild.data.classes import SPLIT_DIR, read_split
from vild.data.loader import build_test_loader, training_records
from vild.utils.errors import UserError

BASE, NOVEL, OFFERED = 1, 5, 13  # person, airplane, stop sign


@pytest.fixture
def lvis(root):
    rare, frequent = (next(i for i, f in official.LVIS_FREQUENCIES.items() if f == mark) for mark in "rf")
    images = {11: [frequent, rare], 12: [rare], 13: [frequent]}
    for name in ("train", "train_norare", "val", "minival"):
        document = official.lvis_document(images, val2017=(12,))
        if name == "train_norare":
            document["annotations"] = [a for a in document["annotations"] if a["category_id"] == frequent]
        official.write(root / f"lvis/lvis_v1_{name}.json", document)
    return frequent, rare


def test_lvis_split_is_866_and_337_by_name_and_id():
    split = read_split("lvis_v1", SPLIT_DIR)
    base, novel = split.names("base"), split.names("novel")
    assert (len(set(base)), len(set(novel)), split.names("offered")) == (866, 337, ())
    assert split.ids == {name: i for i, name in official.LVIS_NAMES.items()} and len(split.ids) == 1203
    frequency = {official.LVIS_NAMES[i]: f for i, f in official.LVIS_FREQUENCIES.items()}
    assert Counter(frequency[n] for n in base) == {"f": 405, "c": 461}
    assert Counter(frequency[n] for n in novel) == {"r": 337}


def test_coco_splits_are_48_17_and_15_by_name_and_id():
    split, whole = read_split("coco_48_17", SPLIT_DIR), read_split("coco_48_17_80way", SPLIT_DIR)
    ids = {name: i for i, name in official.COCO_NAMES.items()}
    # the ids as OVR-CNN's files have them
    assert sorted(split.ids[n] for n in split.names("novel")) == [
        5, 6, 17, 18, 21, 22, 28, 32, 36, 41, 47, 49, 61, 63, 76, 81, 87,
    ]  # fmt: skip
    assert len(set(split.names("base"))) == 48 and not set(split.names("base")) & set(split.names("novel"))
    assert split.ids == {n: ids[n] for n in (*split.names("base"), *split.names("novel"))} and len(split.ids) == 65
    assert whole.ids == ids and len(ids) == 80
    assert (whole.names("base"), whole.names("novel")) == (split.names("base"), split.names("novel"))
    assert set(whole.names("offered")) == set(ids) - set(split.ids) and len(whole.names("offered")) == 15


def test_a_missing_file_says_where_it_comes_from(root):
    for name, hint in (
        ("lvis_v1_val", "datasets/README.md"), ("lvis_v1_minival", "datasets/prepare_lvis.py"),
        ("coco_zeroshot_train", "datasets/prepare_coco.py"), ("voc_2007_test", "datasets/prepare_voc.py"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"data set '{name}': .* does not exist .*{hint}"):
            datasets.get_classes(name)


def test_lvis_by_name(root, lvis):
    frequent, rare = lvis
    classes = datasets.get_classes("lvis_v1_val")
    assert Counter(classes.splits) == {"base": 866, "novel": 337}
    assert classes.ids == tuple(range(1, 1204)) and classes.names[0] == "aerosol_can"
    assert classes.synonyms[0] == ("spray_can",)
    for name in ("lvis_v1_train_norare", "lvis_v1_minival"):
        assert datasets.get_classes(name) == classes  # one vocabulary serves them all
    assert datasets.get_entry("lvis_v1_val").protocol == "lvis"
    records = datasets.load_dicts("lvis_v1_val")
    assert [r["file_name"] for r in records] == [
        str(root / "coco" / place)
        for place in ("train2017/000000000011.jpg", "val2017/000000000012.jpg", "train2017/000000000013.jpg")
    ]
    assert [a["category_id"] for a in records[0]["annotations"]] == [frequent - 1, rare - 1]
    seen = {a["category_id"] for r in training_records(("lvis_v1_train_norare",), True) for a in r["annotations"]}
    assert seen == {frequent - 1}
    assert set(datasets.get_classes("lvis_v1_train").splits) == {"base"}  # the oracle's


def test_images_with_a_file_name_inserted_are_found(root, lvis):
    """A minival file that goes round names the files without their folder."""
    path = root / "lvis/lvis_v1_minival.json"
    document = json.loads(path.read_text())
    for image in document["images"]:
        image["file_name"] = image["coco_url"].split("/")[-1]
    official.write(path, document)
    assert datasets.load_dicts("lvis_v1_minival") == datasets.load_dicts("lvis_v1_val")


def coco_files(root):
    """Official-form zero-shot files: a base, a novel image and one with both and a name of neither kind."""
    whole = official.coco_document({21: [BASE], 22: [NOVEL], 23: [BASE, NOVEL, OFFERED, BASE]}, "val")
    split = read_split("coco_48_17", SPLIT_DIR)
    sets = {"seen_2": ("base",), "unseen_2": ("novel",), "all_2": ("base", "novel")}
    for kind, keys in sets.items():
        ids = {split.ids[n] for key in keys for n in split.names(key)}
        annotations = [a for a in whole["annotations"] if a["category_id"] in ids]
        categories = [c for c in whole["categories"] if c["id"] in ids]
        for suffix, listed in (("", categories), ("_oriorder", whole["categories"])):
            document = {**whole, "annotations": annotations, "categories": listed}
            for part in ("train", "val"):
                official.write(root / f"coco/zero-shot/instances_{part}2017_{kind}{suffix}.json", document)


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("coco_zeroshot_train", {"base": 48, "novel": 17}),
        ("coco_generalized_zeroshot_val", {"base": 48, "novel": 17}),
        ("coco_zeroshot_val", {"novel": 17}),
        ("coco_not_zeroshot_val", {"base": 48}),
        ("coco_zeroshot_train_oriorder", {"base": 48, "novel": 17, "": 15}),
        ("coco_generalized_zeroshot_val_oriorder", {"base": 48, "novel": 17, "": 15}),
    ],
)
def test_coco_by_name(root, name, marks):
    coco_files(root)
    classes = datasets.get_classes(name)
    assert Counter(classes.splits) == marks and list(classes.ids) == sorted(classes.ids)
    assert all(official.COCO_NAMES[i] == n for i, n in zip(classes.ids, classes.names, strict=True))
    records = datasets.load_dicts(name)
    held = {classes.splits[a["category_id"]] for r in records for a in r["annotations"]}
    assert held == ({"base"} if datasets.get_entry(name).keep == "base" else set(marks) - {""})
    part = "train" if "train" in name else "val"
    assert records[0]["file_name"] == str(root / f"coco/{part}2017/000000000021.jpg")


def test_one_vocabulary_serves_training_and_evaluation(root):
    """seen_2 lists 48 categories; the classes of training are the 65 of evaluation all the same."""
    coco_files(root)
    train, val = (datasets.get_classes(f"coco_{n}") for n in ("zeroshot_train", "generalized_zeroshot_val"))
    assert (train.names, train.splits, train.ids) == (val.names, val.splits, val.ids)


def test_an_annotation_of_an_offered_name_is_not_read(root):
    coco_files(root)
    path = root / "coco/zero-shot/instances_val2017_all_2_oriorder.json"
    document = json.loads(path.read_text())
    before = datasets.load_dicts("coco_generalized_zeroshot_val_oriorder")
    document["annotations"].append(official.annotation(99, 21, OFFERED))
    official.write(path, document)
    assert datasets.load_dicts("coco_generalized_zeroshot_val_oriorder") == before


def test_a_file_that_is_not_the_official_one_is_refused(root, lvis):
    path = root / "lvis/lvis_v1_val.json"
    document = json.loads(path.read_text())
    document["categories"][0]["name"] = "aerosol"
    official.write(path, document)
    with pytest.raises(UserError, match=r"val\.json: not the official.* lack 1 name of split lvis_v1, .*'aerosol_can'"):
        datasets.get_classes("lvis_v1_val")
    document["categories"][0]["name"] = "aerosol_can"
    document["categories"][-1]["id"] = 2000
    official.write(path, document)
    with pytest.raises(UserError, match="category 'zucchini' has id 2000, not 1203 as in split lvis_v1"):
        datasets.get_classes("lvis_v1_val")
    coco_files(root)
    seen, whole = (root / f"coco/zero-shot/instances_val2017_{kind}_2.json" for kind in ("seen", "all"))
    whole.write_bytes(seen.read_bytes())  # a wrong file under the right name: novel AP would be NaN
    with pytest.raises(UserError, match="its categories lack 17 names of split coco_48_17"):
        datasets.get_classes("coco_generalized_zeroshot_val")


def test_everything_takes_any_category(root):
    document = official.coco_document({1: [BASE, OFFERED]}, "val")
    official.write(root / "coco/annotations/instances_val2017.json", document)
    classes = datasets.get_classes("coco_2017_val")
    assert classes.splits == ("base",) * 80 and len(datasets.load_dicts("coco_2017_val")[0]["annotations"]) == 2


def test_ours_take_the_place_of_detectron2s(root, lvis):
    """The catalog, the training loader and the test loader read one and the same set."""
    from detectron2.config import get_cfg

    datasets.register_all()
    datasets.register_all()
    for name in datasets.BUILTIN:
        assert MetadataCatalog.get(name).evaluator_type == "vild", name
    ours = datasets.load_dicts("lvis_v1_val")
    assert DatasetCatalog.get("lvis_v1_val") == ours and "segmentation" in ours[0]["annotations"][0]
    assert training_records(("lvis_v1_train",), False) == datasets.load_dicts("lvis_v1_train")
    cfg = get_cfg()
    add_vild_config(cfg)
    loader = build_test_loader(cfg, "lvis_v1_val")
    files = [r["file_name"] for r in loader.dataset._dataset]
    assert files == [r["file_name"] for r in ours]


def test_a_users_lvis_style_set_is_added_by_one_command(root, tool, capsys):
    """251 categories with frequency marks: classes, marks and protocol are read from the file."""
    marks = ["r" if n % 5 == 0 else "c" if n % 2 else "f" for n in range(251)]
    document = {
        "images": [
            {"id": i, "height": 60, "width": 80, "file_name": f"{i}.jpg", "neg_category_ids": [],
             "not_exhaustive_category_ids": []}
            for i in range(1, 252)
        ],
        "categories": [{"id": n + 1, "name": f"thing_{n}", "frequency": m} for n, m in enumerate(marks)],
        "annotations": [official.annotation(n + 1, n + 1, n + 1) for n in range(251)],
    }  # fmt: skip
    official.write(root / "mine/train.json", document)
    arguments = ["--name", "mine", "--json", "mine/train.json", "--images", "mine", "--split", "lvis", "--keep", "base"]
    assert not tool("add_dataset.py", *arguments)
    out = capsys.readouterr().out
    assert "evaluated by LVIS's rules" in out and "missing: 251 of 251 images ('" in out
    assert "200 base and 51 novel names" in out
    assert datasets.get_entry("mine").protocol == "lvis"
    classes = datasets.get_classes("mine")
    assert classes.frequencies == tuple(marks) and len(classes.names) == 251
    assert classes.splits == tuple("novel" if m == "r" else "base" for m in marks)
    records = training_records(("mine",), filter_empty=False)
    assert len(records) == 251
    assert Counter(classes.splits[a["category_id"]] for r in records for a in r["annotations"]) == {"base": 200}
    assert not tool("add_dataset.py", *arguments, "--protocol", "coco")
    assert datasets.get_entry("mine").protocol == "coco"


def test_a_users_set_may_lack_names_of_a_split(root, tool, capsys):
    document = official.coco_document({1: [BASE], 2: [NOVEL]}, "val")
    document["categories"] = [c for c in document["categories"] if c["id"] in (BASE, NOVEL)]
    official.write(root / "mine.json", document)
    arguments = ["--name", "mine", "--json", "mine.json", "--images", "mine", "--split", "coco_48_17"]
    assert tool("add_dataset.py", *arguments) == 2
    assert capsys.readouterr().err.strip().endswith(f"error: --images: {root / 'mine'} is not a folder")
    assert "mine" not in datasets.entries()
    (root / "mine").mkdir()
    assert not tool("add_dataset.py", *arguments)
    out = capsys.readouterr().out
    assert "warning: mine.json lacks 63 names of split coco_48_17" in out
    assert "evaluated by COCO's rules" in out and "missing: 2 of 2 images" in out and "left out" not in out
    (root / "mine" / document["images"][0]["file_name"]).write_bytes(b"")
    assert not tool("add_dataset.py", *arguments)
    lost = root / "mine" / document["images"][1]["file_name"]
    assert f"warning: missing: 1 of 2 images ('{lost}')" in capsys.readouterr().out
    (root / "coco").mkdir()
    assert not tool("add_dataset.py", *arguments[:5], "coco", *arguments[6:])
    assert "missing" not in capsys.readouterr().out  # their URLs say in which folder they are
    document["categories"][1]["name"] = "aeroplane"
    official.write(root / "mine.json", document)
    (root / "split.json").write_text('{"base": ["person", "airplane"], "novel": []}')
    assert not tool("add_dataset.py", *arguments[:-1], "split.json")
    out = capsys.readouterr().out
    assert "warning: left out, as not in split split.json: 1 name ('aeroplane')" in out
    assert "warning: mine.json lacks 1 name of split split.json ('airplane')" in out
    document["categories"][1]["name"] = "airplane"
    official.write(root / "mine.json", document)
    assert not tool("add_dataset.py", *arguments)
    assert datasets.get_classes("mine").names == ("person", "airplane")
    assert tool("add_dataset.py", *arguments[2:], "--name", "lvis_v1_val") == 2
    assert "'lvis_v1_val' is a built-in data set" in capsys.readouterr().err


def test_a_users_list_is_checked(root):
    (root / datasets.USER_FILE).write_text('{"mine": {"json": "a", "images": "b", "split": "lvis", "keep": "some"}}')
    with pytest.raises(UserError, match="keep is 'some', not base or all"):
        datasets.entries()
    (root / datasets.USER_FILE).write_text('{"mine": ')
    with pytest.raises(UserError, match="not JSON, or truncated"):
        datasets.entries()


def test_an_unknown_name_says_where_ones_own_are_looked_for(root):
    with pytest.raises(
        UserError, match=rf"'mine' is not known.*; .*: no {root}/vild_datasets.json \(DETECTRON2_DATASETS"
    ):
        datasets.get_entry("mine")
    datasets.add_entry("own", datasets.Entry("a.json", "b", "lvis"))
    with pytest.raises(UserError, match=rf"'mine' is not known.*; your own are those of {root}/vild_datasets.json"):
        datasets.get_entry("mine")
