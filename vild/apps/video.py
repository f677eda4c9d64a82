"""Draw detections on videos, read from a file (PyAV, ``pip install -e '.[video]'``) or a camera (OpenCV)."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TextIO

import av
import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from vild.inference.drawing import draw
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError, count_of
from vild.utils.files import written_whole
from vild.utils.untrusted import what_it_is

logger = logging.getLogger(__name__)

BT709 = 1  # FFmpeg's number of the colour matrix
DEFAULT_RATE = Fraction(25)  # frames per second of a source that does not say


@dataclass(frozen=True)
class Frames:
    """A stream of frames.

    Attributes:
        stream: yields (time, image): ticks since the first frame, increasing; upright RGB, uint8 [H, W, 3].
        tick: seconds per tick.
        rate: nominal frames per second.
        count: approximate number of frames (None: unknown).
        bt709: the source declares BT.709 colours (FFmpeg assumes BT.601 otherwise).
    """

    stream: Iterator[tuple[int, np.ndarray]]
    tick: Fraction
    rate: Fraction
    count: int | None = None
    bt709: bool = False


@contextmanager
def open_video(path: str | Path) -> Iterator[Frames]:
    """Read a video file. Packets that cannot be decoded are skipped and counted in the log.

    Raises:
        UserError: not a video, no video stream, or no decoder for its codec.
    """
    if not Path(path).is_file():
        raise UserError(f"--video-input {path}: does not exist")
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        with open(path, "rb") as file:
            reason = what_it_is(file.read(512)) or error.strerror
        raise UserError(f"--video-input {path}: cannot be read as a video ({reason})") from error
    with container:
        cover = av.stream.Disposition.attached_pic  # cover art of an audio file
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams or container.format.name == "tty":  # FFmpeg reads some text files as terminal recordings
            raise UserError(f"--video-input {path}: it has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise UserError(f"--video-input {path}: no decoder for its codec")
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
        count = stream.frames or (round(container.duration / av.time_base * rate) if container.duration else None)
        bt709 = stream.codec_context.colorspace == BT709
        yield Frames(_decode(container, stream, rate, path), stream.time_base, rate, count, bt709)


def _decode(container, stream, rate: Fraction, path: str | Path) -> Iterator[tuple[int, np.ndarray]]:
    step, first, last, broken = max(1, round(1 / (rate * stream.time_base))), None, None, 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet else []
        except av.FFmpegError:  # a broken packet, or the end of a truncated file
            broken, frames = broken + 1, []
            continue
        if packet is None:
            break
        for frame in frames:
            if last is None:
                first = last = frame.pts or 0
            else:
                last = max(last + 1, last + step if frame.pts is None else frame.pts)
            yield last - first, np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    if last is None:
        raise UserError(f"--video-input {path}: none of its frames can be decoded")
    if broken:
        logger.warning("video %s: skipped %s that could not be decoded", path, count_of(broken, "packet"))


@contextmanager
def open_camera(index: int, stop: threading.Event) -> Iterator[Frames]:
    """Read a camera until ``stop`` is set. The time of a frame is when it was captured.

    Raises:
        UserError: the camera does not exist or is in use.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # errors are reported in one line below
    camera = cv2.VideoCapture(index)
    try:
        good, image = camera.read()
        if not good:
            raise UserError(f"--webcam {index}: there is no such camera, or another program uses it")
        rate = Fraction(camera.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE).limit_denominator(1001)
        yield Frames(_capture(camera, image, stop), Fraction(1, 1000), rate)
    finally:
        camera.release()


def _capture(camera, image: np.ndarray, stop: threading.Event) -> Iterator[tuple[int, np.ndarray]]:
    start, last, good = time.monotonic(), -1, True
    while good and not stop.is_set():
        last = max(last + 1, round(1000 * (time.monotonic() - start)))
        yield last, image[:, :, ::-1]
        good, image = camera.read()


def write_video(path: str | Path, frames: Frames) -> int:
    """Write an H.264 video (yuv420p, .mp4) that players and browsers can play.

    The first frame determines the size. yuv420p needs even sides: an odd one is padded by repeating the last pixel.

    Returns:
        the number of frames.
    """
    count = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=frames.rate, options={"crf": "20", "preset": "veryfast"})
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", frames.tick
        if frames.bt709:
            stream.codec_context.colorspace = BT709
        for count, (ticks, image) in enumerate(frames.stream, 1):
            height, width = image.shape[:2]
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if count == 1:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if frames.bt709:
                frame = frame.reformat(format="yuv420p", dst_colorspace=BT709)
            frame.pts, frame.time_base = ticks, frames.tick
            container.mux(stream.encode(frame))
        if count:
            container.mux(stream.encode())
    return count


def video_target(output: Path, stem: str) -> Path:
    """``output`` if it is an .mp4 name, else ``stem``.mp4 in the folder ``output``."""
    if output.suffix.lower() == ".mp4" and not output.is_dir():
        return output
    if output.suffix and not output.is_dir():
        raise UserError(f"--output {output}: videos are written as .mp4; give such a name, or a folder")
    return output / f"{stem}.mp4"


def annotate_video(detector: OpenVocabularyDetector, frames: Frames, target: Path, limit: int | None = None) -> int:
    """Write the drawn video with the frames' size, rate and times and, next to it, ``NAME.jsonl`` with a line per
    frame: its number, its time in seconds and ``Detections.to_dict``. Memory does not grow with the length.

    Returns:
        the number of frames, at most ``limit``.
    """
    total = frames.count if limit is None else min(limit, frames.count or limit)
    stream = tqdm(islice(frames.stream, limit), desc="frames", unit="frame", total=total)
    frames = replace(frames, stream=stream)
    with (
        written_whole(target) as video,
        written_whole(target.with_suffix(".jsonl")) as records,
        open(records, "w") as lines,
    ):
        return write_video(video, replace(frames, stream=_drawn(detector, frames, lines)))


def _drawn(detector: OpenVocabularyDetector, frames: Frames, lines: TextIO) -> Iterator[tuple[int, np.ndarray]]:
    for number, (ticks, image) in enumerate(frames.stream):
        found = detector(Image.fromarray(image))
        lines.write(json.dumps({"frame": number, "seconds": float(ticks * frames.tick), **found.to_dict()}) + "\n")
        yield ticks, np.asarray(draw(image, found, found.names, min_side=0))
