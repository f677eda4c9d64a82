"""tools/demo.py: images, folders, videos and a camera in; drawn, and as JSON, out; every mistake one line."""

import importlib.util
import json
import os
import re
import shutil
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from tests.conftest import REPOSITORY
from tests.utils.test_images import bad_images
from vild.apps import video
from vild.apps.demo import annotate_images, image_targets
from vild.apps.inputs import ImageFile, find_images
from vild.apps.video import Frames, annotate_video, open_video, write_video
from vild.inference.detections import Detections
from vild.inference.drawing import draw
from vild.utils.errors import UserError, one_line_errors


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def runner(name, checkpoint_file, teacher_folder, capsys):
    """A tool: what follows the detector's flags to (exit status, stdout, stderr)."""
    main = load_tool(name)

    def run(*arguments, opts=()):
        config = ["--config-file", REPOSITORY / "configs/Glyphs/vild.yaml"]
        opts = ["--opts", "MODEL.WEIGHTS", checkpoint_file, "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}",
                "MODEL.VILD.TEACHER.PRETRAINED", "random", "TEST.DETECTIONS_PER_IMAGE", 10, *opts]  # fmt: skip
        try:
            status = main([str(a) for a in (*config, *arguments, *opts)]) or 0
        except SystemExit as stopped:
            status = stopped.code
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


@pytest.fixture
def demo(world, checkpoint_file, teacher_folder, capsys):
    return runner("demo", checkpoint_file, teacher_folder, capsys)


@pytest.fixture
def images(world):
    return sorted((world / "glyphs" / "val").glob("*.jpg"))


def error_of(told) -> str:
    """The one line of a mistake."""
    status, _, stderr = told
    assert status == 2 and "Traceback" not in stderr, told
    line = stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and len(line) < 500
    return line


def make_video(path, count=300, height=96, width=128, rate=Fraction(30000, 1001), codec="libx264") -> None:
    """A square that moves to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for n in range(count):
            image = np.full((height, width, 3), 90, np.uint8)
            image[30:60, n % 90 : n % 90 + 30] = (250, 200, 20)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def turn_quarter(path) -> None:
    """Have players turn a video clockwise: the display matrix of its track."""
    matrix = "00010000 00000000 00000000 00000000 00010000 00000000 00000000 00000000 40000000"
    turned = "00000000 00010000 00000000 ffff0000 00000000 00000000 00600000 00000000 40000000"
    before, _, after = path.read_bytes().rpartition(bytes.fromhex(matrix))
    path.write_bytes(before + bytes.fromhex(turned) + after)


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
    assert Image.open(output / "a.jpg").size == (480, 480) and Image.open(output / "turned.jpg").size == (480, 720)
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


def test_what_a_tool_prints_is_escaped_too(capsys):
    one_line_errors(print)("\udcff")
    assert capsys.readouterr().out == "\\udcff\n"


@pytest.mark.parametrize(("size", "drawn"), [((100, 200), (480, 960)), ((3, 3000), (3, 3000)), ((3, 300), (19, 1920))])
def test_small_images_are_enlarged_within_bounds(detector, size, drawn):
    nothing = detector(np.zeros((100, 100, 3), np.uint8))[:0]
    assert draw(np.zeros((*size, 3), np.uint8), nothing, ["sun"]).size == drawn[::-1]


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


@pytest.mark.parametrize("which", ["text", "empty", "truncated", "huge"])
def test_a_broken_image_is_one_line(demo, tmp_path, which):
    path = bad_images(np.zeros((40, 60, 3), np.uint8), tmp_path)[which]
    assert f"image {path} cannot be read" in error_of(demo("--input", path, "--output", tmp_path / "out"))


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
        ({"--threshold-of": "sun=2"}, "threshold 2.0: scores are between 0 and 1"),
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
    given |= {k: v.replace("FOLDER", str(tmp_path)) for k, v in arguments.items() if k.startswith("--")}
    line = error_of(demo(*(x for pair in given.items() for x in pair), opts=opts))
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


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


@pytest.fixture
def one_thread():
    """So small a network is slowed down by a second one, wherever other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_video_of_300_frames(demo, one_thread, tmp_path, monkeypatch):
    make_video(tmp_path / "in.mp4")
    monkeypatch.setattr("vild.apps.video.draw", cheap_draw)
    status, stdout, stderr = demo(
        "--video-input", tmp_path / "in.mp4", "--output", tmp_path / "out.mp4", "--confidence-threshold", 0.02,
        opts=["INPUT.MIN_SIZE_TEST", 32, "MODEL.RPN.POST_NMS_TOPK_TEST", 4, "MODEL.MASK_ON", False],  # a quick one
    )  # fmt: skip
    assert status == 0 and "300 frames" in stdout, stderr
    assert {p.name for p in tmp_path.iterdir()} == {"in.mp4", "out.mp4", "out.jsonl"}
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate) == (128, 96, Fraction(30000, 1001))
        times = [frame.time for frame in container.decode(stream)]
    assert len(times) == 300 and times == pytest.approx([n * 1001 / 30000 for n in range(300)], abs=1e-3)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["frame"] for r in records] == list(range(300)) and records[-1]["seconds"] == pytest.approx(
        299 * 0.0333667
    )
    assert all(r["height"] == 96 and r["width"] == 128 for r in records)


def cheap_draw(image, found, names, min_side):
    """What ``draw`` gives, without the time that drawing takes."""
    assert isinstance(found, Detections) and min_side == 0
    return Image.fromarray(np.ascontiguousarray(image))


def test_frames_are_drawn_at_their_own_size(detector, tmp_path):
    make_video(tmp_path / "in.mp4", 4)
    detector = detector.with_vocabulary(["sun", "kite"], thresholds={"sun": 0.0, "kite": 0.0})
    with open_video(tmp_path / "in.mp4") as frames:
        assert frames.count == 4 and annotate_video(detector, frames, tmp_path / "out.mp4", limit=3) == 3
    with open_video(tmp_path / "in.mp4") as plain, open_video(tmp_path / "out.mp4") as drawn:
        before, after = [p for _, p in plain.stream], [p for _, p in drawn.stream]
    assert len(after) == 3 and after[0].shape == (96, 128, 3)
    assert (np.abs(before[0].astype(int) - after[0]) > 60).any()  # there is something on it


def pass_through(source, target) -> list[np.ndarray]:
    with open_video(source) as frames:
        write_video(target, frames)
    with open_video(target) as frames:
        return [image for _, image in frames.stream]


def test_odd_sizes_other_codecs_and_turned_videos(tmp_path):
    make_video(tmp_path / "odd.avi", 5, 95, 127, Fraction(12), "mpeg4")  # an .avi's frames carry no times
    after = pass_through(tmp_path / "odd.avi", tmp_path / "even.mp4")
    assert len(after) == 5 and after[0].shape == (96, 128, 3)
    assert np.abs(after[0][95].astype(int) - after[0][94]).mean() < 10
    make_video(tmp_path / "turned.mp4", 5)
    turn_quarter(tmp_path / "turned.mp4")
    after = pass_through(tmp_path / "turned.mp4", tmp_path / "upright.mp4")
    assert len(after) == 5 and after[0].shape == (128, 96, 3)
    assert np.abs(after[0][10, 50].astype(int) - (250, 200, 20)).max() < 40  # what was on the left is above
    assert np.abs(after[0][110, 50].astype(int) - 90).max() < 20


def test_a_video_that_is_cut_off_is_read_to_there(tmp_path):
    make_video(tmp_path / "in.mkv", 40, codec="mpeg4")
    content = bytearray((tmp_path / "in.mkv").read_bytes())
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 2 // 3])
    with open_video(tmp_path / "cut.mkv") as frames:
        assert 10 < len(list(frames.stream)) < 40


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("text.txt", "cannot be read as a video"),
        ("coloured.txt", "no video stream"),
        ("empty.mp4", "cannot be read as a video"),
        ("cut.mp4", "cannot be read as a video"),
        ("sound.mp4", "no video stream"),
        ("codec.mp4", "no decoder"),
        ("none.mp4", "does not exist"),
    ],
)
def test_no_video(demo, tmp_path, which, reason):
    make_video(tmp_path / "in.mp4", 10)
    content = (tmp_path / "in.mp4").read_bytes()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="flt", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (tmp_path / "text.txt").write_text("not a video\n" * 20)
    (tmp_path / "coloured.txt").write_text("\x1b[2J\x1b[31mnot a video\x1b[0m\n" * 40)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "codec.mp4").write_bytes(content.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    line = error_of(demo("--video-input", tmp_path / which, "--output", tmp_path / "out.mp4"))
    assert which in line and reason in line
    assert not list(tmp_path.glob("out*"))


def test_where_a_video_cannot_go(demo, tmp_path):
    make_video(tmp_path / "in.mp4", 2)
    (tmp_path / "file.txt").touch()
    for output, reason in [
        ("in.mp4", "overwrite the input"),
        ("out.avi", "written as .mp4"),
        ("file.txt/out.mp4", "cannot be written"),
    ]:
        line = error_of(demo("--video-input", tmp_path / "in.mp4", "--output", tmp_path / output))
        assert reason in line


def test_videos_alone_need_a_package_that_is_named(demo, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "vild.apps.video")
    assert demo("--input", images[0], "--output", tmp_path / "out")[0] == 0
    line = error_of(demo("--video-input", tmp_path / "in.mp4", "--output", tmp_path / "out"))
    assert "pip install -e '.[video]'" in line


class Camera:
    """Six frames, as OpenCV gives them."""

    def __init__(self, index):
        self.left = 6 if index == 0 else 0

    def read(self):
        self.left -= 1
        return self.left >= 0, np.full((96, 128, 3), 90, np.uint8)

    def get(self, _):
        return 0.0  # of a camera that does not know its rate

    def release(self):
        pass


def test_a_camera(demo, detector, tmp_path, monkeypatch):
    assert "--webcam 99: there is no such camera" in error_of(demo("--webcam", 99, "--output", tmp_path))
    monkeypatch.setattr(video.cv2, "VideoCapture", Camera)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    status, stdout, stderr = demo("--webcam", "--frames", 4, "--output", tmp_path / "out")
    assert status == 0 and "4 frames" in stdout, stderr
    with open_video(tmp_path / "out" / "webcam.mp4") as frames:
        assert len(list(frames.stream)) == 4
    assert len((tmp_path / "out" / "webcam.jsonl").read_text().splitlines()) == 4


def test_a_stopped_camera_leaves_a_whole_video(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(video.cv2, "VideoCapture", Camera)
    stop = threading.Event()

    def until_the_third(frames):
        for n, frame in enumerate(frames):
            if n == 2:
                stop.set()
            yield frame

    with video.open_camera(0, stop) as frames:
        frames = Frames(until_the_third(frames.stream), frames.tick, frames.rate)
        assert annotate_video(detector, frames, tmp_path / "out.mp4") == 3
    with open_video(tmp_path / "out.mp4") as frames:
        times = [t for t, _ in frames.stream]
    assert len(times) == 3 and times == sorted(set(times))


def test_a_video_that_fails_in_the_middle_leaves_nothing(detector, tmp_path):
    def broken():
        yield 0, np.zeros((96, 128, 3), np.uint8)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        annotate_video(detector, Frames(broken(), Fraction(1, 25), Fraction(25)), tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())
