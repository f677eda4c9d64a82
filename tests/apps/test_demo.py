"""tools/demo.py on images and folders: drawn, and as JSON; every mistake one line."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from tests.apps.run_tool import error_of, load_tool
from tests.utils.test_images import bad_images
from vild.apps.demo import annotate_images, image_targets
from vild.apps.inputs import ImageFile, find_images
from vild.utils.errors import UserError


def test_images_and_folders(demo, images, tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(images[0], folder / "deep" / "b.JPG")
    Image.open(images[1]).convert("CMYK").save(folder / "a.jpg")
    (folder / "._a.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("not an image")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    output = folder / "out"  # a second run does not take the first one's results for images
    for _ in range(2):
        status, stdout, stderr = demo(
            "--input", tmp_path / "turned.jpg", folder, "--vocabulary", "umbrella, chess knight", "--output", output,
            "--confidence-threshold", 0,
        )  # fmt: skip
        assert status == 0, stderr
        assert len(stdout.splitlines()) == 3 and "chess knight 0." in stdout
    names = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert names == {f"{n}.{suffix}" for n in ("turned", "a", "deep/b") for suffix in ("jpg", "json")}
    assert Image.open(output / "a.jpg").size == (640, 640) and Image.open(output / "turned.jpg").size == (640, 960)
    document = json.loads((output / "deep" / "b.json").read_text())
    assert document["file_name"] == "deep/b.JPG" and (document["height"], document["width"]) == (128, 128)
    assert {d["name"] for d in document["detections"]} <= {"umbrella", "chess knight"}
    assert mask_api.decode(document["detections"][0]["mask"]).shape == (128, 128)


def test_a_name_that_is_no_text_is_escaped(detector, images, tmp_path, capsys):
    path = Path(os.fsdecode(bytes(tmp_path / "photo") + b"\xff.jpg"))
    shutil.copy(images[0], path)
    (target,) = image_targets([ImageFile(path, path.name)], tmp_path / "out", one_file=False)
    assert annotate_images(detector, [ImageFile(path, path.name)], [target]) == []
    assert "photo\\udcff.jpg: " in capsys.readouterr().out
    assert json.loads(target.with_suffix(".json").read_text())["file_name"] == path.name


def test_one_image_to_one_file(demo, detector, images, tmp_path):
    detector.save(tmp_path / "folder")
    out = tmp_path / "new" / "drawn.png"
    main = load_tool("demo")
    model = ["--weights", str(tmp_path / "folder"), "--device", "cpu", "--input", str(images[0]), "--output", str(out)]
    assert main([*model, "--confidence-threshold", "0"]) == 0
    found = json.loads(out.with_suffix(".json").read_text())["detections"]
    expected = detector(images[0], threshold=0.0).to_dict()["detections"]
    assert Image.open(out).format == "PNG" and found == expected and found
    # a word is reported above its own threshold, the others above the common one
    name, limit = found[0]["name"], found[0]["score"]
    assert main([*model, "--confidence-threshold", "1", "--threshold-of", f"{name}={limit - 1e-4}"]) == 0
    assert {d["name"] for d in json.loads(out.with_suffix(".json").read_text())["detections"]} == {name}
    with pytest.raises(SystemExit):
        main([*model, "--opts", "MODEL.WEIGHTS", "x"])


def test_examples_on_the_command_line(demo, detector, images, tmp_path):
    """Two of a name, one of a word; the boxes of the Python API."""
    regions = {"kite": [(images[0], (10, 20, 60, 70)), (images[1], (0, 0, 127.5, 100))],
               "sun": [(images[1], (5, 5, 9, 9))]}  # fmt: skip
    flags = [x for name, some in regions.items() for path, box in some
             for x in ("--example", f"{path}:{','.join(map(str, box))}={name}")]  # fmt: skip
    for words in ([], ["--vocabulary", "cow, kite"]):
        status, _, stderr = demo("--input", images[2], "--output", tmp_path / "out.jpg", *flags, *words,
                                 "--confidence-threshold", 0)  # fmt: skip
        assert status == 0, stderr
        chosen = detector.with_vocabulary("cow, kite" if words else None, examples=regions)
        expected = chosen(images[2], threshold=0).to_dict()["detections"][:10]
        found = json.loads((tmp_path / "out.json").read_text())["detections"]
        assert len(found) > 3 and [d["name"] for d in found] == [d["name"] for d in expected[: len(found)]]
        assert [d["score"] for d in found] == pytest.approx([d["score"] for d in expected[: len(found)]], abs=1e-5)


def test_of_several_images_the_broken_ones_come_last(demo, images, tmp_path):
    broken = bad_images(np.zeros((40, 60, 3), np.uint8), tmp_path)
    Image.new("RGB", (5000, 1)).save(tmp_path / "thin.png")
    Image.new("RGB", (2, 40)).save(tmp_path / "narrow.png")
    files = [broken["text"], images[0], broken["huge"], tmp_path / "thin.png", tmp_path / "narrow.png"]
    status, stdout, stderr = demo("--input", *files, "--output", tmp_path / "out")
    assert status == 1 and len(stdout.splitlines()) == 3 and "Traceback" not in stderr
    tail = stderr.strip().splitlines()[-3:]
    assert tail[0] == "2 of 5 images cannot be read:" and "text.jpg" in tail[1] and "huge.jpg" in tail[2]
    assert len(list((tmp_path / "out").iterdir())) == 6
    assert json.loads((tmp_path / "out" / "thin.json").read_text())["width"] == 5000
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for place in ("in/a.jpg", "in/deep/b.jpg"):
        (tmp_path / place).write_bytes(Path(broken["text"]).read_bytes())
    line = error_of(demo("--input", tmp_path / "in", "--output", tmp_path / "new" / "out"))
    assert re.search(r"no image can be read: image .*a\.jpg cannot be read: .*; \.\.\.$", line)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("which", ["text", "empty", "truncated", "huge"])
def test_a_broken_image_is_one_line(demo, tmp_path, which):
    path = bad_images(np.zeros((40, 60, 3), np.uint8), tmp_path)[which]
    assert f"image {path} cannot be read" in error_of(demo("--input", path, "--output", tmp_path / "out" / "new"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--vocabulary": " , "}, "vocabulary: it is empty"),
        ({"--vocabulary": "x" * 10_000}, "has 10,000 characters"),
        ({"--vocabulary": "kite", "--negatives": "Kite"}, "'Kite' is also asked for"),
        ({"--negatives": "kite"}, "--negatives: only with words in --vocabulary"),
        ({"--threshold-of": "kite"}, "threshold 'kite': write NAME=SCORE"),
        ({"--vocabulary": "Kite, kite"}, "duplicate class name 'kite'"),
        ({"--vocabulary": "FOLDER/words.txt"}, "words.txt does not exist"),
        ({"--vocabulary": "kite", "--negatives": "words.txt"}, "negatives: words.txt does not exist"),
        ({"--example": "FOLDER/file.txt:0,0,9,9=kite"}, "image .*file.txt cannot be read"),
        ({"--example": "FOLDER/none.jpg:0,0,9,9=kite"}, "none.jpg"),
        ({"--example": "IMAGE:0,0,999,9=kite"}, "example of 'kite' in .*jpg: box 0,0,999,9 is not within the image"),
        ({"--example": "IMAGE:0,0,9,9=kite|box"}, "is not one name"),
        ({"--example": "IMAGE:0,0,9,9=kite", "--threshold-of": "sun=0.5"}, "'sun' is not in the vocabulary"),
        ({"--threshold-of": "sun=2"}, "thresholds: 'sun' has 2.0: must be a number between 0 and 1"),
        ({"--input": "nowhere"}, "--input nowhere: does not exist"),
        ({"--input": "FOLDER"}, "the folder contains no image"),
        ({"--output": "FOLDER/file.txt/out"}, "cannot be written"),
        ({"teacher": "ViT-B-33"}, "teacher 'ViT-B-33': open_clip has no model of this name"),
        ({"teacher": "RN50-quickgelu"}, "is of teacher RN50-quickgelu random .*width 1024.* is of teacher .*width 64"),
        ({"weights": "none.pth"}, "none.pth does not exist"),
    ],
)
def test_a_mistake_is_one_line(demo, images, tmp_path, arguments, message):
    (tmp_path / "file.txt").write_text("no folder")
    opts = []
    for key, name in (("teacher", "MODEL.VILD.TEACHER.NAME"), ("weights", "MODEL.WEIGHTS")):
        opts += [name, arguments[key]] if key in arguments else []
    given = {"--input": images[0], "--output": tmp_path / "out"}
    given |= {"--vocabulary": f"in no cache {len(message)}"} if opts else {}
    flags = {k: v for k, v in arguments.items() if k.startswith("--")}
    given |= {k: v.replace("FOLDER", str(tmp_path)).replace("IMAGE", str(images[0])) for k, v in flags.items()}
    line = error_of(demo(*(x for pair in given.items() for x in pair), opts=opts))
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_results_never_meet_each_other_or_an_input(tmp_path):
    def names(*files, output="out", one=False):
        return [t.as_posix() for t in image_targets([ImageFile(tmp_path / f, f) for f in files],
                                                      tmp_path / output, one)]  # fmt: skip

    out = (tmp_path / "out").as_posix()
    assert names("a.png", "b/a.jpg") == [f"{out}/a.jpg", f"{out}/b/a.jpg"]
    assert names("a.png", "a.jpg") == [f"{out}/a.png.jpg", f"{out}/a.jpg.jpg"]
    assert names("a.png", output="x.webp", one=True) == [(tmp_path / "x.webp").as_posix()]
    for files, output, reason in [
        (("a.jpg", "a.jpg"), "out", "same name"),
        (("a.jpg",), ".", "would overwrite"),
        (("a.jpg", "b.jpg"), "x.jpg", "give a folder"),
    ]:
        with pytest.raises(UserError, match=reason):
            names(*files, output=output)


def test_folders_are_walked_in_order(tmp_path):
    for name in ("b/2.jpg", "b/10.PNG", "a.webp", "b/.hidden/3.jpg", "out/4.jpg", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path, tmp_path / "c.txt"], leave_out=tmp_path / "out")
    assert [p.name for p in found] == ["a.webp", "b/10.PNG", "b/2.jpg", "c.txt"]
    assert all(p.path.is_file() for p in found)
