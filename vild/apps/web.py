"""The functions behind the web page: uploads to images, texts to words, detections to a drawing and a table.

Visitors are untrusted: their input is read within the limits below, or rejected with a sentence. ``web_page.py`` builds
the page.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image
from pycocotools import mask as mask_api
from torch import Tensor

from vild.inference.detections import UNMARKED, Detections, describe_alternatives, warn_of
from vild.inference.drawing import COLOURS, draw
from vild.inference.examples import Examples, read_examples
from vild.inference.predictor import OpenVocabularyDetector
from vild.teacher.crops import SCALES, enlarge, to_pixels
from vild.utils.errors import UserError
from vild.utils.images import TooManyPixels, open_image, to_array
from vild.vocabulary.words import Words, parse_negatives, parse_words

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # none that Pillow passes to another program
MOST_BYTES = 20 * 2**20
MOST_PIXELS = 50_000_000
LONGEST_SIDE = 1600  # pixels; a hundred masks of a larger image would fill the memory
SHORTEST_SIDE = 8
MOST_WORDS = 2_000  # spellings, including those under "Not these"
MOST_EXAMPLES = 5


@dataclass(frozen=True)
class Photo:
    """An image to search: RGB, uint8 [H, W, 3], the longer side at most LONGEST_SIDE, and the size of one of its pixels
    in pixels of the file."""

    array: np.ndarray
    pixels: float


@dataclass(frozen=True)
class Findings:
    """The result of a search, masks as RLE. A session keeps it, so that a new threshold needs no new search."""

    photo: Photo
    found: Detections
    masks: tuple[dict, ...] | None
    encode_seconds: float
    detect_seconds: float

    def above(self, threshold: float) -> Detections:
        """Detections with at least this score, with their masks."""
        keep = (self.found.scores >= threshold).nonzero().flatten()
        some = self.found[keep]
        if self.masks is not None:
            bits = [mask_api.decode(self.masks[i]) for i in keep.tolist()]
            height, width = self.found.image_size
            some.pred_masks = torch.from_numpy(np.array(bits, dtype=bool).reshape(-1, height, width))
        return some


def read_photo(path: str | Path) -> Photo:
    """Read an uploaded file.

    Raises:
        UserError: too many bytes or pixels, too narrow, or not a complete image of FORMATS. Does not reveal the path.
    """
    if Path(path).stat().st_size > MOST_BYTES:
        raise UserError(f"This file is larger than {MOST_BYTES >> 20} MB.")
    try:
        with open_image(path, FORMATS, MOST_PIXELS) as image:
            width, height = image.size
            shrink = min(1.0, LONGEST_SIDE / max(width, height))
            if min(width, height) * shrink < SHORTEST_SIDE:
                raise UserError(f"This image is too small or too narrow: {width:,} x {height:,} pixels.")
            array = to_array(image, "RGB")
    except UserError:
        raise
    except TooManyPixels as error:
        raise UserError(f"This image has {error}.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"This image has more than {MOST_PIXELS // 10**6} million pixels.") from error
    except Exception as error:  # a broken file can fail anywhere in the decoders
        raise UserError("This file is not an image that can be read, or only a part of one.") from error
    if shrink == 1:
        return Photo(array, 1.0)
    image = Image.fromarray(array)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), reducing_gap=3.0)
    return Photo(np.asarray(image), 1 / shrink)


def read_texts(words: str, negatives: str = "", alone: bool = True) -> tuple[Words | None, tuple[str, ...]]:
    """Parse the two text boxes of the page (``vild/vocabulary/words.py``; no file is read).

    Raises:
        UserError: no words though they are ``alone`` (without examples), a duplicate, or more than MOST_WORDS.
    """
    asked, unwanted = None, parse_negatives(negatives)
    spellings = len(unwanted)
    if parse_negatives(words):
        asked = parse_words(words)
        spellings += len(asked.names) + sum(map(len, asked.synonyms))
    elif alone:
        raise UserError("Type what to look for: at least one word.")
    if spellings > MOST_WORDS:
        raise UserError(f"These are {spellings:,} words; at most {MOST_WORDS:,} can be looked for at once.")
    return asked, unwanted


def add_example(photo: Photo | None, box: str, name: str, examples: Examples) -> Examples:
    """The examples and a region of the photo. Of the photo only what the teacher sees is kept.

    Args:
        box: "x0,y0,x1,y1", two opposite corners as fractions of the photo's width and height; "" if none is drawn.

    Raises:
        UserError: no box, no area, no name or not one, or more than MOST_EXAMPLES.
    """
    try:
        x0, y0, x1, y1 = (float(corner) for corner in box.split(","))
    except ValueError:
        photo = None
    if photo is None or not all(0 <= corner <= 1 for corner in (x0, y0, x1, y1)):
        raise UserError("Draw a box on the image first: drag, or click two corners.")
    if not (name := name.strip()):
        raise UserError("Name what is in the box.")
    if sum(map(len, examples.values())) >= MOST_EXAMPLES:
        raise UserError(f"At most {MOST_EXAMPLES} examples can be given.")
    height, width = photo.array.shape[:2]
    xs, ys = sorted((round(x0 * width), round(x1 * width))), sorted((round(y0 * height), round(y1 * height)))
    corners = [xs[0], ys[0], xs[1], ys[1]]
    read_examples({name: [(Image.fromarray(photo.array), corners)]})
    left, top, right, bottom = to_pixels(enlarge(Tensor([corners]), max(SCALES)), height, width)[0].tolist()
    cut = Image.fromarray(photo.array[top:bottom, left:right])
    region = cut, [x - low for x, low in zip(corners, (left, top) * 2, strict=True)]
    return {**examples, name: [*examples.get(name, ()), region]}


def search(
    detector: OpenVocabularyDetector, photo: Photo, words: str, negatives: str = "", examples: Examples | None = None
) -> Findings:
    """Detect these words and what the examples show.

    Raises:
        UserError: invalid words.
    """
    asked, unwanted = read_texts(words, negatives, alone=not examples)
    start = time.perf_counter()
    chosen = detector.with_vocabulary(asked, examples=examples, negatives=unwanted)
    encoded = time.perf_counter()
    found = chosen(photo.array, threshold=0, channels="RGB")
    detected = time.perf_counter()
    masks = None
    if found.has("pred_masks"):
        masks = tuple(mask_api.encode(np.asfortranarray(m, dtype=np.uint8)) for m in found.pred_masks.numpy())
        found.remove("pred_masks")
    return Findings(photo, found, masks, encoded - start, detected - encoded)


def sentence(error: UserError) -> str:
    """The message of a UserError as a sentence."""
    text = str(error).removeprefix("vocabulary: ").removeprefix("negatives: ").removeprefix("examples: ")
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def summary(findings: Findings, threshold: float) -> str:
    """One line: number of detections, and seconds."""
    scores = findings.found.scores
    shown = int((scores >= threshold).sum())
    if shown:
        text = f"{shown} found."
    elif len(scores):
        text = f"Nothing at {threshold:.2f} or more; the best score is {scores.max().item():.2f}."
    else:
        text = "Nothing found."
    text = " ".join(filter(None, (text, warn_of(findings.found))))
    return f"{text} Words encoded in {findings.encode_seconds:.2f} s, detection {findings.detect_seconds:.2f} s."


def drawing(findings: Findings, threshold: float) -> Image.Image:
    """The image with the detections, coloured by base and novel."""
    some = findings.above(threshold)
    return draw(findings.photo.array, some, some.names, some.splits)


def table(findings: Findings, threshold: float) -> list[list[str]]:
    """Rows of the detections: name, score, what else it may be, mark (HTML), box in pixels of the file."""
    some = findings.above(threshold)
    marks = [mark(some.splits[c]) for c in some.pred_classes.tolist()]
    boxes = (some.pred_boxes.tensor * findings.photo.pixels).round().int().tolist()
    boxes = [", ".join(map(str, box)) for box in boxes]
    scores = [f"{score:.2f}" for score in some.scores.tolist()]
    others = map(describe_alternatives, some.alternatives)
    return [list(row) for row in zip(some.labels, scores, others, marks, boxes, strict=True)]


def mark(split: str) -> str:
    """The mark "base", "novel" or "not in training" in the colour of its boxes, as HTML."""
    return f'<span class="mark" style="--mark:{to_hex(COLOURS[split])}">{split or UNMARKED}</span>'


def first_words(detector: OpenVocabularyDetector, each: int = 8) -> str:
    """Some names of the training vocabulary as initial words, novel ones first."""
    trained = list(zip(detector.trained.names, detector.trained.splits, strict=True))
    some = ([name for name, s in trained if s == split][:each] for split in ("novel", "base", ""))
    return ", ".join(itertools.chain(*some))
