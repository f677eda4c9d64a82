"""Draw detections on images, and write them as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from vild.apps.inputs import SUFFIXES, ImageFile
from vild.inference.detections import Detections, describe_alternatives, warn_of
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError, printable
from vild.utils.files import write_json
from vild.utils.images import read_image

SHOWN = 20  # detections of an image in a line of text


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
            found = detector(Image.fromarray(read_image(image.path, "RGB")))
        except UserError as error:
            message = str(error)
            broken.append(message if str(image.path) in message else f"{image.path}: {message}")
            continue
        found.save(target)
        write_json(target.with_suffix(".json"), {"file_name": image.name, **found.to_dict()})
        tqdm.write(printable(f"{target}: {describe(found)}"))
    return broken


def describe(found: Detections) -> str:
    """ "mug 0.71 (or cup 0.22), horse 0.66"."""
    words = []
    for name, score, others in zip(found.labels[:SHOWN], found.scores.tolist(), found.alternatives, strict=False):
        also = describe_alternatives(others)
        words.append(f"{name} {score:.2f}" + (f" (or {also})" if also else ""))
    if len(found) > SHOWN:
        words.append(f"and {len(found) - SHOWN} more")
    return "; ".join(filter(None, (", ".join(words) or "nothing", warn_of(found))))
