"""tools/label.py: a folder and words to a COCO file, the same bytes whether it was killed or not."""

import json
import os
import shutil
import signal
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from tests.apps.run_tool import error_of, load_tool, runner
from tests.utils.test_images import bad_images
from vild.apps.label import PartialLabels, check_name
from vild.checkpoint.checkpointer import save_weights
from vild.data import datasets
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling.calibration import Calibration
from vild.modeling.familiarity import Familiarity
from vild.utils.errors import UserError

WORDS = "chess knight | horse, umbrella, sun"


@pytest.fixture
def label(world, checkpoint_file, teacher_folder, capsys):
    return runner("label", checkpoint_file, teacher_folder, capsys)


@pytest.fixture
def folder(world, tmp_path):
    """Four images, one of them on its side, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for n, path in enumerate(sorted((world / "glyphs" / "val").glob("*.jpg"))[:3]):
        shutil.copy(path, folder / "deep" / f"{n}.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / "turned.jpg", exif=exif)
    shutil.copy(bad_images(image, tmp_path)["truncated"], folder / "broken.jpg")
    return folder


def test_a_folder_becomes_a_coco_file(label, folder, detector, vocabulary, tmp_path, monkeypatch):
    words, output = vocabulary.take([5, 2, 3]), tmp_path / "new" / "labels.json"
    words.save(tmp_path / "words.safetensors")
    arguments = ["--input", folder, "--vocabulary", tmp_path / "words.safetensors", "--output", output]
    status, stdout, stderr = label(*arguments, "--threshold", 0.01)
    assert status == 1 and "4 images labelled with 3 words" in stdout  # as the demo, for the broken one
    assert "1 of 5 images cannot be read:" in stderr and "broken.jpg" in stderr.strip().splitlines()[-1]
    assert [p.name for p in output.parent.iterdir()] == ["labels.json"]
    with redirect_stdout(StringIO()):
        coco = COCO(str(output))
    assert tuple(c["name"] for c in coco.loadCats([1, 2, 3])) == words.names
    images = coco.loadImgs([1, 2, 3, 4])
    assert [i["file_name"] for i in images] == ["deep/0.jpg", "deep/1.jpg", "deep/2.jpg", "turned.jpg"]
    assert (images[3]["height"], images[3]["width"]) == (120, 90)
    assert [b["file_name"] for b in coco.dataset["info"]["broken"]] == ["broken.jpg"]
    looking = detector.with_vocabulary(words)
    for image in images:
        found = looking(folder / image["file_name"], threshold=0.01)[:10]
        annotations = coco.loadAnns(coco.getAnnIds([image["id"]]))
        assert len(annotations) == len(found) > 0
        boxes, scores, classes = found.pred_boxes.tensor.tolist(), found.scores.tolist(), found.pred_classes.tolist()
        for a, box, score, k, mask in zip(annotations, boxes, scores, classes, found.pred_masks.numpy(), strict=True):
            x, y, w, h = a["bbox"]
            assert [x, y, x + w, y + h] == pytest.approx(box, abs=1e-4) and a["score"] == score
            assert a["category_id"] == k + 1 and a["area"] == mask.sum() and a["iscrowd"] == 0
            assert np.array_equal(mask_api.decode(a["segmentation"]), mask)
    # vild takes the file as a data set
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["add_dataset.py", "--name", "labelled", "--json", "new/labels.json",
                                     "--images", "photos", "--split", "everything"])  # fmt: skip
    load_tool("add_dataset")()
    records = datasets.load_dicts("labelled")
    assert len(records) == 4 and records[3]["file_name"] == str(folder / "turned.jpg")
    assert sum(len(r["annotations"]) for r in records) == len(coco.anns)
    assert f"{output}: already exists" in error_of(label(*arguments))


def test_a_folder_in_other_layouts(label, folder, vocabulary, tmp_path, monkeypatch, tool):
    """The boxes of the COCO file, through tools/add_dataset.py; also after a run that was killed."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    vocabulary.take([5, 2, 3]).save(tmp_path / "words.safetensors")
    arguments = ["--input", folder, "--vocabulary", tmp_path / "words.safetensors", "--threshold", 0.01]
    assert label(*arguments, "--output", tmp_path / "labels.json")[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr("vild.data.yolo.shutil.copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        status, *_ = label(*arguments, "--format", "yolo", "--output-dir", tmp_path / "yolo")
        assert status == 128 + signal.SIGINT and not (tmp_path / "yolo").exists()
        assert not (tmp_path / "yolo.tmp").exists() and (tmp_path / "yolo.partial").exists()
    assert not tool("add_dataset.py", "--name", "coco", "--split", "everything", "--json", "labels.json",
                    "--images", "photos")  # fmt: skip
    expected = datasets.load_dicts("coco")
    for form, arrived, images, off in (
        ("yolo", ["yolo/data.yaml", "--subset", "train"], "images", 1e-3), ("voc", ["voc"], "JPEGImages", 0.501)
    ):  # fmt: skip
        status, stdout, stderr = label(*arguments, "--format", form, "--output-dir", tmp_path / form)
        assert status == 1 and "4 images labelled" in stdout and "broken.jpg" in stderr
        assert not (tmp_path / f"{form}.partial").exists() and not (tmp_path / f"{form}.tmp").exists()
        assert not tool("add_dataset.py", "--name", form, "--split", "everything", "--json", *arrived)
        names, coco = datasets.get_classes(form).names, datasets.get_classes("coco").names
        records = datasets.load_dicts(form)
        for mine, theirs in zip(records, expected, strict=True):
            name = os.path.relpath(theirs["file_name"], folder)
            assert mine["file_name"] == str(tmp_path / form / images / name)
            assert mine["height"] == theirs["height"] and mine["width"] == theirs["width"]
            for a, b in zip(mine["annotations"], theirs["annotations"], strict=True):
                assert names[a["category_id"]] == coco[b["category_id"]]
                (x, y, w, h), (x1, y1, w1, h1) = a["bbox"], b["bbox"]
                corners = np.array([x, y, x + w, y + h]), np.array([x1, y1, x1 + w1, y1 + h1])
                assert np.abs(np.subtract(*corners)).max() <= off
        assert sum(len(r["annotations"]) for r in records) >= 4
        assert f"{tmp_path / form}: already exists" in error_of(
            label(*arguments, "--format", form, "--output-dir", tmp_path / form)
        )


def test_images_unlike_the_known_ones_are_named(label, folder, detector, tmp_path, monkeypatch, caplog):
    """At the end and in the file; a detector of the built-in world says which words it cannot know."""
    names = ["deep/0.jpg", "deep/1.jpg", "deep/2.jpg", "turned.jpg"]
    inputs = [detector.model_input(folder / name) for name in names]
    rows = [detector.model.detect_and_compare([x], detector._offered)[1] for x in inputs]
    size = rows[0].shape[1]
    away = [Familiarity((0.0,) * size, (1.0,) * size, 1.0).distance(row).item() for row in rows]
    images = Familiarity((0.0,) * size, (1.0,) * size, sum(sorted(away)[1:3]) / 2)
    unlike = [name for name, d in zip(names, away, strict=True) if d > images.limit]
    calibration = Calibration((1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), 0.01, "x", 1, 1, images)
    monkeypatch.setattr(detector.model.roi_heads, "calibration", calibration)
    save_weights(tmp_path / "m.safetensors", detector.model)
    arguments = ["--input", folder, "--vocabulary", "sun, flux capacitor", "--output", tmp_path / "labels.json"]
    status, _, stderr = label(*arguments, opts=["MODEL.WEIGHTS", tmp_path / "m.safetensors"])
    assert status == 1 and json.loads((tmp_path / "labels.json").read_text())["info"]["unlike"] == unlike
    assert "unlike the images that the detector was calibrated on: 2 of 5; do not rely on their scores" in stderr
    assert ", ".join(unlike) in stderr
    assert "drawings of the built-in world only. Not in training: flux capacitor\n" in caplog.text


def test_names_that_no_data_set_may_have_are_broken(label, world, tmp_path):
    """A data set of these labels could not be read."""
    (tmp_path / "photos").mkdir()
    image = next((world / "glyphs" / "val").glob("*.jpg"))
    for name in (b"\xff.jpg", b"1:2.jpg", b"good.jpg"):
        shutil.copy(image, os.fsdecode(bytes(tmp_path / "photos") + b"/" + name))
    output = tmp_path / "labels.json"
    status, _, stderr = label("--input", tmp_path / "photos", "--vocabulary", "sun", "--output", output)
    assert status == 1 and "image 1:2.jpg: its name is not allowed in a COCO file" in stderr and "\\udcff.jpg" in stderr
    document = json.loads(output.read_bytes())
    assert [i["file_name"] for i in document["images"]] == ["good.jpg"]
    assert [b["file_name"] for b in document["info"]["broken"]] == ["1:2.jpg", "\\udcff.jpg"]
    check_name("a\u202fb é.jpg", "voc")
    check_name("a\x01.jpg", "yolo")
    for name in ("a\x01.jpg", "a\n.jpg"):
        with pytest.raises(UserError, match="its name has a control character, not allowed in VOC's XML"):
            check_name(name, "voc")


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_killed_run_ends_in_the_same_bytes(label, folder, tmp_path, monkeypatch, images):
    arguments = ["--input", folder, "--vocabulary", WORDS, "--threshold", 0.01]
    assert label(*arguments, "--output", tmp_path / "whole.json")[0] == 1  # one of them is broken
    read, seen = OpenVocabularyDetector.model_input, []

    def killed(self, image, *rest):
        if len(seen) == images:
            raise KeyboardInterrupt
        seen.append(image)
        return read(self, image, *rest)

    output, aside = tmp_path / "killed.json", tmp_path / "killed.json.partial"
    with monkeypatch.context() as patch:
        patch.setattr(OpenVocabularyDetector, "model_input", killed)
        assert label(*arguments, "--output", output)[0] == 128 + signal.SIGINT
    assert not output.exists() and len(aside.read_text().splitlines()) == 1 + images
    with open(aside, "a") as file:
        file.write('{"file_name": "turned.jpg", "hei')  # a line that was being written
    monkeypatch.setattr(
        OpenVocabularyDetector, "model_input", lambda self, p, *rest: (seen.append(p), read(self, p, *rest))[1]
    )
    assert label(*arguments, "--output", output)[0] == 1
    assert len(seen) == len(set(seen)) == 5  # none was looked at twice
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes() and not aside.exists()


def test_another_plan_is_refused(label, folder, world, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    photo = next((world / "glyphs" / "val").glob("*.jpg"))
    given = {"--input": folder, "--vocabulary": WORDS, "--output": tmp_path / "labels.json"}
    flat = lambda flags: [x for pair in flags.items() for x in pair]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(OpenVocabularyDetector, "__call__", killed)
        assert label(*flat(given))[0] == 128 + signal.SIGINT
    before = (tmp_path / "labels.json.partial").read_bytes()
    for change, opts, key in [
        ({"--threshold": 0.3}, [], "threshold (0.4, now 0.3)"),
        ({"--threshold-of": "sun=0.2"}, [], "threshold-of"),
        ({"--vocabulary": "sun, umbrella"}, [], "vocabulary"),
        ({"--vocabulary": "chess knight, umbrella, sun"}, [], "synonyms"),
        ({"--negatives": "cow"}, [], "negatives"),
        ({"--example": f"{photo}:0,0,9,9=sun"}, [], "example"),
        ({"--input": folder / "deep"}, [], "folder"),
        ({}, ["INPUT.MIN_SIZE_TEST", 64], "config"),
    ]:
        line = error_of(label(*flat(given | change), opts=opts))
        assert f"labels.json.partial: started with another {key}" in line
    assert (tmp_path / "labels.json.partial").read_bytes() == before
    assert label(*flat(given), opts=["OUTPUT_DIR", "elsewhere"])[0] == 1  # on which nothing depends


def test_many_words_in_line_and_what_is_left_out(label, world, tmp_path):
    """More characters of words than a file's name may have; and files that are no images."""
    (tmp_path / "photos").mkdir()
    shutil.copy(next((world / "glyphs" / "val").glob("*.jpg")), tmp_path / "photos" / "a.jpg")
    for name in ("b.HEIC", "c.heic", "d.dng", "notes"):
        (tmp_path / "photos" / name).write_bytes(b"x")
    Image.new("RGB", (3, 3000)).save(tmp_path / "photos" / "thin.png")
    words = ", ".join(f"a thing of the kind {n}" for n in range(30))
    status, stdout, stderr = label("--input", tmp_path / "photos", "--vocabulary", words, "--negatives", "x; " * 150,
                                   "--output", tmp_path / "labels.json")  # fmt: skip
    assert status == 0 and "2 images labelled with 30 words" in stdout, stderr
    assert f"--input {tmp_path / 'photos'}: left out 4 files: 2 .heic, 1 .dng, 1 without suffix" in stderr


def test_mistakes_are_one_line(label, folder, tmp_path):
    for flags, reason in [
        ({"--input": tmp_path / "nowhere"}, "is not a folder"),
        ({"--input": folder / "turned.jpg"}, "is not a folder"),
        ({"--vocabulary": ","}, "vocabulary: it is empty"),
        ({"--output": folder / "turned.jpg" / "labels.json"}, "cannot be written"),
    ]:
        given = {"--input": folder, "--vocabulary": "sun", "--output": tmp_path / "labels.json"} | flags
        assert reason in error_of(label(*(x for pair in given.items() for x in pair)))
    assert not (tmp_path / "labels.json").exists()
    given = ["--input", folder, "--vocabulary", "sun"]
    shutil.copy(folder / "turned.jpg", folder / "turned.png")
    for flags, reason in [
        (["--output", "x.json", "--format", "yolo"], "--format yolo: give --output-dir FOLDER"),
        (["--output-dir", "x"], "--format coco: give --output FILE"),
        (["--output-dir", folder / "x", "--format", "yolo"], f"{folder / 'x'}: is inside --input {folder}: its copies"),
        (["--output-dir", tmp_path / "x", "--format", "voc"], "turned.jpg and turned.png would share one label file"),
    ]:
        assert reason in error_of(label(*given, *flags))
    assert not (tmp_path / "x.partial").exists()


def test_nothing_found_and_nothing_readable(detector, tmp_path):
    image = Image.new("RGB", (30, 20))
    with PartialLabels(tmp_path / "labels.json", {"plan": 1}) as labels:
        labels.add("a.jpg", detector(image)[:0])
        labels.add_broken("b.jpg", "why")
        assert labels.finish(["b.jpg", "a.jpg"], ["sun"], {}) == (["why"], [])
    document = json.loads((tmp_path / "labels.json").read_text())
    assert document["images"] == [{"id": 1, "file_name": "a.jpg", "height": 20, "width": 30}]
    assert document["annotations"] == [] and document["categories"] == [{"id": 1, "name": "sun"}]
    (tmp_path / "x.json.partial").write_text("no header\n")
    with PartialLabels(tmp_path / "x.json", {"plan": 1}) as labels:  # begins anew
        assert labels.done == set()
    with pytest.raises(UserError, match=r"another plan \(1, now 2\)"):
        PartialLabels(tmp_path / "x.json", {"plan": 2})
