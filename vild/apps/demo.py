"""Draw detections on images and videos, and write them as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vild.apps.inputs import SUFFIXES, ImageFile
from vild.apps.video import Frames, VideoWriter
from vild.inference.detections import Detections
from vild.inference.drawing import draw
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError, printable
from vild.utils.files import write_image, write_json, written_whole
from vild.utils.images import read_image


def detect_in(detector: OpenVocabularyDetector, image: np.ndarray) -> Detections:
    """Detect in an RGB image, uint8 [H, W, 3], whatever the config's ``INPUT.FORMAT`` is."""
    return detector(image if detector.cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1])


def image_targets(images: Sequence[ImageFile], output: Path, one_file: bool) -> list[Path]:
    """The file of each drawn image: NAME.jpg in the folder ``output``, or ``output`` itself if that is an image name
    and ``one_file`` is drawn. Images that differ only in their suffix keep it in NAME.

    Raises:
        UserError: two results with the same name, or one that would overwrite an input.
    """
    if output.suffix.lower() in SUFFIXES and not output.is_dir():
        if not one_file:
            raise UserError(f"--output {output}: is an image name; give a folder for several images")
        targets = [output]
    else:
        stems = [Path(p.name).with_suffix("") for p in images]
        often = Counter(stems)
        names = [s.as_posix() if often[s] == 1 else p.name for s, p in zip(stems, images, strict=True)]
        targets = [output / f"{name}.jpg" for name in names]
    inputs = {p.path.resolve() for p in images}
    for target, count in Counter(targets).items():
        if count > 1:
            raise UserError(f"--input: two images have the same name; their results would both be {target}")
        if target.resolve() in inputs:
            raise UserError(f"--output {output}: the result {target} would overwrite the input image")
    return targets


def video_target(output: Path, stem: str) -> Path:
    """``output`` if it is an .mp4 name, else ``stem``.mp4 in the folder ``output``."""
    if output.suffix.lower() == ".mp4" and not output.is_dir():
        return output
    if output.suffix and not output.is_dir():
        raise UserError(f"--output {output}: videos are written as .mp4; give such a name, or a folder")
    return output / f"{stem}.mp4"


@contextmanager
def writing(output: Path, folder: Path) -> Iterator[None]:
    """Make ``folder``; report an OSError in the block as an error in ``--output``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from error


def annotate_images(
    detector: OpenVocabularyDetector, images: Sequence[ImageFile], targets: Sequence[Path]
) -> list[str]:
    """Write each drawn image and, next to it, ``NAME.json`` (``Detections.to_dict`` and the file name).

    Returns:
        an error message for each unreadable image.
    """
    broken = []
    for image, target in zip(tqdm(images, desc="images", unit="image"), targets, strict=True):
        try:
            array = read_image(image.path, "RGB")
            found = detect_in(detector, array)
        except UserError as error:
            message = str(error)
            broken.append(message if str(image.path) in message else f"{image.path}: {message}")
            continue
        write_image(target, draw(array, found, found.names), quality=92)
        write_json(target.with_suffix(".json"), {"file_name": image.name, **found.to_dict()})
        tqdm.write(printable(f"{target}: {describe(found)}"))
    return broken


def describe(found: Detections) -> str:
    """ "kite 0.93, kite 0.71, horse 0.66"."""
    words = (f"{name} {score:.2f}" for name, score in zip(found.labels(), found.scores.tolist(), strict=True))
    return ", ".join(words) or "nothing"


def annotate_video(detector: OpenVocabularyDetector, frames: Frames, target: Path, limit: int | None = None) -> int:
    """Write the drawn video with the frames' size, rate and times and, next to it, ``NAME.jsonl`` with a line per
    frame: its number, its time in seconds and ``Detections.to_dict``. Memory does not grow with the length.

    Returns:
        the number of frames, at most ``limit``.
    """
    total = frames.count if limit is None else min(limit, frames.count or limit)
    progress = tqdm(islice(frames.stream, limit), desc="frames", unit="frame", total=total)
    number = -1
    with (
        written_whole(target) as video,
        written_whole(target.with_suffix(".jsonl")) as records,
        open(records, "w") as lines,
        VideoWriter(video, frames) as writer,
    ):
        for number, (ticks, image) in enumerate(progress):
            found = detect_in(detector, image)
            writer.add(ticks, np.asarray(draw(image, found, found.names, min_side=0)))
            lines.write(json.dumps({"frame": number, "seconds": float(ticks * frames.tick), **found.to_dict()}) + "\n")
    return number + 1
