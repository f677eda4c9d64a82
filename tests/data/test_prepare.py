"""The derived files: what they keep, that they are checked, and that a wrong file is refused."""

import contextlib
import io
import json
from dataclasses import replace

import pytest

from tests.data import official
from vild.data import datasets, prepare
from vild.data.classes import SPLIT_DIR, read_split
from vild.data.voc import NAMES, read_voc
from vild.utils.errors import UserError

BASE, NOVEL, OTHER = 1, 5, 13  # person, airplane, stop sign
RARE, FREQUENT = (next(i for i, f in official.LVIS_FREQUENCIES.items() if f == mark) for mark in "rf")
LVIS_TRAIN = {1: [FREQUENT, RARE], 2: [RARE], 3: []}
LVIS_VAL = {4: [FREQUENT], 5: [RARE, FREQUENT], 6: []}
COCO = {21: [BASE], 22: [NOVEL], 23: [OTHER], 24: [OTHER, NOVEL, BASE], 25: [], 26: [BASE]}  # the last is a crowd


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Small official-form sources; their sizes are the "published" ones."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    official.write(tmp_path / "lvis/lvis_v1_train.json", official.lvis_document(LVIS_TRAIN))
    official.write(tmp_path / "lvis/lvis_v1_val.json", official.lvis_document(LVIS_VAL, val2017=(5, 6)))
    for part in ("train", "val"):
        path = tmp_path / f"coco/annotations/instances_{part}2017.json"
        official.write(path, official.coco_document(COCO, part))
    sizes = {"lvis/lvis_v1_train.json": (3, 3, 1203), "lvis/lvis_v1_val.json": (3, 3, 1203)}
    sizes |= {f"coco/annotations/instances_{part}2017.json": (6, 7, 80) for part in ("train", "val")}
    monkeypatch.setattr(prepare, "OFFICIAL", sizes)
    return tmp_path


def small(derived, images=None, annotations=None):
    """The recipe with the sizes that the small sources give."""
    return replace(derived, published=(images, annotations, derived.published[2]))


LVIS = (small(prepare.LVIS[0], 3, 1), small(prepare.LVIS[1], 2, 2))
COCO_FILES = tuple(small(d) for d in prepare.COCO)


def run(root, derived, official=True):
    split = "coco_48_17" if derived[0].path.startswith("coco") else "lvis_v1" if official else "lvis"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        prepare.prepare(derived, root, split, official)
    return printed.getvalue().splitlines()


def contents(root, path):
    document = json.loads((root / path).read_text())
    return (
        [i["id"] for i in document["images"]],
        [(a["image_id"], a["category_id"]) for a in document["annotations"]],
        len(document["categories"]),
    )


def test_lvis_files(root):
    run(root, LVIS)
    # images stay even if nothing on them does; all 1,203 categories stay
    assert contents(root, "lvis/lvis_v1_train_norare.json") == ([1, 2, 3], [(1, FREQUENT)], 1203)
    assert contents(root, "lvis/lvis_v1_minival.json") == ([5, 6], [(5, RARE), (5, FREQUENT)], 1203)
    source = json.loads((root / "lvis/lvis_v1_train.json").read_text())
    made = json.loads((root / "lvis/lvis_v1_train_norare.json").read_text())
    assert made["images"] == source["images"] and made["annotations"] == source["annotations"][:1]
    assert made["info"] == source["info"] and made["categories"] == source["categories"]


def test_coco_files(root):
    """As OVR-CNN's notebook makes them: crowds stay, images without a kept annotation go."""
    run(root, COCO_FILES)
    both = [21, 22, 24, 26], [(21, BASE), (22, NOVEL), (24, NOVEL), (24, BASE), (26, BASE)]
    for path, expected in {
        "train2017_seen_2": ([21, 24, 26], [(21, BASE), (24, BASE), (26, BASE)], 48),
        "train2017_seen_2_oriorder": ([21, 24, 26], [(21, BASE), (24, BASE), (26, BASE)], 80),
        "val2017_seen_2": ([21, 24, 26], [(21, BASE), (24, BASE), (26, BASE)], 48),
        "val2017_unseen_2": ([22, 24], [(22, NOVEL), (24, NOVEL)], 17),
        "val2017_all_2": (*both, 65),
        "val2017_all_2_oriorder": (*both, 80),
    }.items():
        assert contents(root, f"coco/zero-shot/instances_{path}.json") == expected, path
    for name in datasets.BUILTIN:  # and every built-in name reads them
        if "zeroshot" in name:
            datasets.load_dicts(name)


def test_a_second_run_checks_and_writes_nothing(root):
    run(root, LVIS)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.glob("lvis/*")}
    lines = run(root, LVIS)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.glob("lvis/*")} == before
    assert sum("already exists, same content" in line for line in lines) == 2
    assert not list(root.glob("lvis/*.tmp"))


def test_an_existing_file_is_checked_and_kept(root):
    """The same data in another order, with keys of its own and another layout, passes."""
    run(root, COCO_FILES)
    path = root / "coco/zero-shot/instances_train2017_seen_2.json"
    document = json.loads(path.read_text())
    document["annotations"].reverse()
    for category in document["categories"]:
        category.update(split="seen", embedding={"GloVE": [0.5]})
    official.write(path, document)
    before = path.read_bytes()
    assert any("seen_2.json: already exists" in line for line in run(root, COCO_FILES))
    assert path.read_bytes() == before

    document["annotations"][0]["bbox"] = [4.0, 6.5, 20.0, 10.0]
    official.write(path, document)
    with pytest.raises(UserError, match=r"seen_2\.json: its 3 annotations differ from the 3 derived from .*train2017"):
        run(root, COCO_FILES)
    del document["images"][1]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 24]
    official.write(path, document)
    with pytest.raises(UserError, match=r"seen_2\.json: its 2 images differ from the 3 derived"):
        run(root, COCO_FILES)


def test_a_remaining_novel_annotation_is_an_error(root):
    run(root, LVIS)
    path = root / "lvis/lvis_v1_train_norare.json"
    document = json.loads(path.read_text())
    document["annotations"].append(official.annotation(9, 2, RARE))
    official.write(path, document)
    name = official.LVIS_NAMES[RARE]
    with pytest.raises(UserError, match=rf"norare\.json: annotations\[1\] \(id 9\) is of '{name}'.* base names"):
        run(root, [small(LVIS[0])])


def test_existing_files_are_checked_without_their_source(root):
    run(root, LVIS)
    (root / "lvis/lvis_v1_train.json").unlink()
    lines = run(root, LVIS[:1])
    assert any("checked against the published sizes only" in line for line in lines)
    (root / "lvis/lvis_v1_train_norare.json").unlink()
    with pytest.raises(UserError, match=r"lvis_v1_train\.json does not exist; lvis/lvis_v1_train_norare\.json is"):
        run(root, LVIS[:1])


def test_what_can_be_made_of_the_sources_there_are_is_made(root):
    """LVIS's minival needs val alone."""
    train = root / "lvis/lvis_v1_train.json"
    train.unlink()
    lines = run(root, LVIS)
    assert f"lvis/lvis_v1_train_norare.json: not made, {train} does not exist" in lines
    assert contents(root, "lvis/lvis_v1_minival.json")[0] == [5, 6]
    assert not (root / "lvis/lvis_v1_train_norare.json").exists()
    lines = run(root, LVIS)
    assert any("minival.json: already exists, same content" in line for line in lines)
    (root / "lvis/lvis_v1_val.json").unlink()
    with pytest.raises(UserError, match=r"lvis_v1_train\.json does not exist; lvis/lvis_v1_train_norare\.json is"):
        run(root, LVIS)


def test_sizes_must_be_the_published_ones(root, monkeypatch):
    monkeypatch.setitem(prepare.OFFICIAL, "lvis/lvis_v1_val.json", (19_809, None, 1203))
    with pytest.raises(UserError, match=r"lvis_v1_val\.json: 3 images, but the published file has 19,809"):
        run(root, LVIS)
    assert not (root / "lvis/lvis_v1_minival.json").exists()
    lines = run(root, LVIS, official=False)
    assert "lvis/lvis_v1_minival.json: written" in lines
    with pytest.raises(UserError, match=r"minival\.json: 2 images, but the published file has 4,809"):
        run(root, prepare.LVIS[1:])


def test_a_source_of_other_categories_is_refused(root):
    path = root / "coco/annotations/instances_val2017.json"
    document = json.loads(path.read_text())
    next(c for c in document["categories"] if c["id"] == NOVEL)["name"] = "aeroplane"
    official.write(path, document)
    with pytest.raises(UserError, match="not the official file: its .* lack 1 name of split coco_48_17, .* 'airplane'"):
        run(root, COCO_FILES)


def test_published_sizes_are_the_papers():
    lvis, (minival,) = prepare.OFFICIAL, [d for d in prepare.LVIS if "minival" in d.path]
    assert lvis["lvis/lvis_v1_train.json"] == (100_170, 1_270_141, 1203)
    assert lvis["lvis/lvis_v1_val.json"][0] == 19_809 and minival.published[0] == 4_809
    by_path = {d.path.split("instances_")[1]: d.published for d in prepare.COCO}
    assert by_path["train2017_seen_2.json"] == (107_761, 665_387, 48)
    assert by_path["val2017_all_2.json"] == (4_836, None, 65)


def test_every_file_of_a_builtin_set_that_is_derived_has_a_recipe():
    made = {d.path: d for d in (*prepare.LVIS, *prepare.COCO)}
    for name, entry in datasets.BUILTIN.items():
        if "zero-shot/" in entry.json or entry.json.endswith(("norare.json", "minival.json")):
            recipe = made.pop(entry.json)
            assert entry.keep == "all" or recipe.marks == ("base",), name
            assert all(read_split(entry.split, SPLIT_DIR).names(m) for m in recipe.marks), name
    assert not made


@pytest.fixture
def script(tool, capsys):
    """Run a script of datasets/ in this process; exit status, stdout and stderr."""

    def run(name, *arguments):
        return tool(f"../datasets/{name}", *arguments), *capsys.readouterr()

    return run


def test_the_scripts(root, script):
    for name, count in (("prepare_lvis.py", 2), ("prepare_coco.py", 6)):
        status, out, err = script(name, "--unofficial")
        assert not status, err
        assert out.count(": written") == count
        status, _, err = script(name)  # these are not the official files
        assert status == 2 and "but the published file has" in err.splitlines()[-1]


VOC = """<annotation><size><width>80</width><height>60</height><depth>3</depth></size>
<object><name>diningtable</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>80</xmax>
<ymax>60</ymax></bndbox><part><name>leg</name><bndbox><xmin>3</xmin></bndbox></part></object>
<object><name>cat</name><difficult>1</difficult><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>25</ymax>
</bndbox></object></annotation>"""


def test_voc(root, script):
    folder = root / "VOC2007"
    for path, text in (("ImageSets/Main/test.txt", "000001\n"), ("Annotations/000001.xml", VOC)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    status, _, err = script("prepare_voc.py")
    assert status == 2 and "not the published test set" in err
    assert not (folder / "voc_2007_test.json").exists()
    status, out, _ = script("prepare_voc.py", "--unofficial")
    assert not status and "found 1 images and 1 objects, published 4,952 and 12,032" in out
    classes, (record,) = datasets.get_classes("voc_2007_test"), datasets.load_dicts("voc_2007_test")
    assert len(classes.names) == 20 and set(classes.splits) == {"base"} and "dining table" in classes.names
    assert record["file_name"] == str(folder / "JPEGImages/000001.jpg") and record["width"] == 80
    found = [(classes.names[a["category_id"]], a["bbox"], a["iscrowd"]) for a in record["annotations"]]
    assert found == [("dining table", [0, 0, 80, 60], 0), ("cat", [10, 20, 20, 5], 1)]
    for wrong in (VOC[:200], VOC.replace("cat", "unicorn"), VOC.replace("<ymax>60</ymax>", "")):
        (folder / "Annotations/000001.xml").write_text(wrong)
        with pytest.raises(UserError, match=r"000001\.xml is not a VOC annotation"):
            read_voc(folder, "test", NAMES)
    (folder / "Annotations/000001.xml").unlink()
    with pytest.raises(UserError, match=r"000001\.xml cannot be read"):
        read_voc(folder, "test", NAMES)
