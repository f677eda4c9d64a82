"""Videos and a camera in, a video and its detections out; every mistake one line."""

import json
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.apps.run_tool import error_of
from vild.apps import video
from vild.apps.video import Frames, annotate_video, open_video, write_video
from vild.inference.detections import Detections


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
