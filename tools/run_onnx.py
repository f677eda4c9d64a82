#!/usr/bin/env python3
"""Detect the names of a vocabulary in images with an exported detector: onnxruntime (or OpenVINO), numpy and Pillow,
no PyTorch.

    tools/run_onnx.py --weights out/model.onnx --vocabulary V.safetensors --input a.jpg b.jpg --output R.json \\
        [--context out/context.safetensors] [--threshold 0.4] [--top-k 10] [--runtime openvino]

R.json is a list with one record per image: file_name, height, width and detections by falling score (name, split,
score, box as xyxy in pixels, what else the box may be and, if the detector has masks, the mask as COCO's compressed run
lengths). Of two boxes of any names that overlap by more than --across-names only the better one is reported. Images
that cannot be read are listed at the end (exit status 1).

Without --context only the vocabulary's names are in the softmax. With --context (the base names of training) those
names take part too without being reported, and the vocabulary's names are marked base if they are among them, else
novel: what vild does with words and examples. MODEL.json, written by tools/export.py, must lie beside MODEL.onnx.
"""

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageOps

THRESHOLD = 0.4  # as in vild/utils/command_line.py
ACROSS_NAMES = 0.7  # as in vild/inference/display.py
MOST_PIXELS = 89_478_485  # of an image, as in vild/utils/images.py
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
MOST_JSON = 1 << 24  # bytes of a manifest or a vocabulary's header, as in vild/utils/untrusted.py


class Mistake(ValueError):
    """A user's mistake, in one line."""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    text = "a .onnx file of tools/export.py, or the folder of one; a detector's name must be exported first"
    parser.add_argument("--weights", required=True, type=Path, metavar="PATH", help=text)
    parser.add_argument("--vocabulary", required=True, type=Path, metavar="FILE", help="a vocabulary .safetensors")
    parser.add_argument("--input", required=True, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="output file (JSON)")
    parser.add_argument("--context", type=Path, metavar="FILE", help="names that take part but are not reported")
    text = f"minimum score of a detection (default: {THRESHOLD})"
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="SCORE", help=text)
    text = f"largest IoU of two reported boxes of any names; 1: report all (default: {ACROSS_NAMES})"
    parser.add_argument("--across-names", type=float, default=ACROSS_NAMES, metavar="IOU", help=text)
    parser.add_argument("--top-k", type=int, metavar="N", help="report at most this many per image (default: all)")
    text = "what runs the network; openvino: on the CPU, in float32 (default: onnxruntime)"
    parser.add_argument("--runtime", choices=["onnxruntime", "openvino"], default="onnxruntime", help=text)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (see --help)\n")
    args = parser.parse_args()
    for flag, number in ("--threshold", args.threshold), ("--across-names", args.across_names):
        if not 0 <= number <= 1:
            parser.error(f"argument {flag}: {number} is not between 0 and 1")
    if args.top_k is not None and args.top_k < 1:
        parser.error(f"argument --top-k: {args.top_k} is less than 1")
    try:
        sys.exit(run(args))
    except (Mistake, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def run(args) -> int:
    session, manifest = load_model(args.weights, args.runtime)
    words = load_vocabulary(args.vocabulary, manifest)
    if manifest.get("calibration") and not args.context:
        print("note: scores are calibrated beside the base names of training: they are too high unless the vocabulary "
              "has these, or --context context.safetensors is given", file=sys.stderr)
    text, shown = words["embeddings"], len(words["names"])
    if args.context:
        text, words["splits"] = with_context(words, load_vocabulary(args.context, manifest), manifest)
    feed = {"text": text, "shown": np.array(shown)}
    if any(x.name == "base" for x in session.get_inputs()):
        feed["base"] = np.array([s == "base" for s in words["splits"]] + [True] * (len(text) - shown))
    records, broken, start = [], [], time.monotonic()
    for done, file_name in enumerate(args.input):
        if sys.stderr.isatty():
            left = (time.monotonic() - start) / max(done, 1) * (len(args.input) - done)
            print(f"\r{done} of {len(args.input)} images, {left:.0f} s left ", end="", file=sys.stderr)
        try:
            array = read_image(file_name, manifest["picture"]["format"])
            height, width, _ = array.shape
            resized = resize(array, manifest["picture"])
            found = run_network(session, resized, (height, width), feed, file_name)
        except Mistake as mistake:
            if len(args.input) == 1:
                raise
            broken.append(str(mistake))
            continue
        found = detections(found, (height, width), words, args)
        records.append({"file_name": file_name, "height": height, "width": width, "detections": found})
    write_whole(args.output, json.dumps(records, indent=1))
    print(f"images: {len(records)}, detections: {sum(len(r['detections']) for r in records)}; {args.output}")
    if broken:
        print(f"{len(broken)} of {len(args.input)} images cannot be read:", *broken, sep="\n  ", file=sys.stderr)
    return 1 if broken else 0


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically; an error leaves nothing beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with suppress(OSError):  # after another error, which is the one to report
            aside.unlink(missing_ok=True)


def run_network(session, image: np.ndarray, size: tuple[int, int], feed: dict, file_name: str) -> dict[str, np.ndarray]:
    """The outputs by name for an image that was resized, with boxes in pixels of its original ``size``."""
    try:
        found = session.run(None, {**feed, "picture": image})
    except Exception as error:  # onnxruntime's own errors share no other class
        shape = f"{image.shape[1]} x {image.shape[0]} pixels"
        raise Mistake(f"image {file_name} (resized to {shape}): the network fails: {first_line(error)}") from error
    outputs = dict(zip([x.name for x in session.get_outputs()], found, strict=True))
    whole = np.float32([size[1], size[0]] * 2)
    boxes = outputs["boxes"] * (whole / np.float32([image.shape[1], image.shape[0]] * 2))
    return {**outputs, "boxes": boxes.clip(0, whole)}


def detections(found: dict, size: tuple[int, int], words: dict, args) -> list[dict]:
    """What is reported of the outputs of :func:`run_network`; ``size``: height and width of the image."""
    boxes, scores = found["boxes"], found["scores"]
    places = ((boxes[:, 2:] > boxes[:, :2]).all(1) & (scores > args.threshold)).nonzero()[0]
    records = []
    for i in places[apart(boxes[places], args.across_names)][: args.top_k]:
        number = found["classes"][i]
        record = {"name": words["names"][number], "split": words["splits"][number], "score": float(scores[i])}
        record |= {"box": boxes[i].tolist(), "alternatives": []}
        if "other_scores" in found:  # files of earlier versions lack them
            others = zip(found["other_classes"][i], found["other_scores"][i], strict=True)
            record["alternatives"] = [{"name": words["names"][c], "score": float(s)} for c, s in others if s >= 0]
        if "masks" in found:
            counts = run_lengths(paste(found["masks"][i], boxes[i], *size))
            record["mask"] = {"size": list(size), "counts": counts}
        records.append(record)
    return records


def apart(boxes: np.ndarray, limit: float) -> list[int]:
    """Which of the boxes [N, 4], best first, no better one of these overlaps by more than ``limit`` (IoU)."""
    areas, kept = (boxes[:, 2:] - boxes[:, :2]).prod(1), []
    for i, box in enumerate(boxes):
        sides = np.minimum(box[2:], boxes[kept, 2:]) - np.maximum(box[:2], boxes[kept, :2])
        both = sides.clip(0).prod(1)
        if not (both / (areas[i] + areas[kept] - both) > limit).any():
            kept.append(i)
    return kept


def load_model(path: Path, runtime: str) -> tuple:
    """A session of onnxruntime, or what looks like one, and the model's manifest."""
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        if len(found) != 1:
            raise Mistake(f"model: the folder {path} holds {len(found)} .onnx files, not one")
        path = found[0]
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise Mistake(f"model: {file} does not exist; tools/export.py --weights NAME --output FILE.onnx makes it")
    open_session = {"onnxruntime": open_onnxruntime, "openvino": OpenVino}[runtime]
    try:
        manifest = parse_json(np.memmap(beside, np.uint8, "r"))
        manifest["picture"], manifest["teacher"], manifest["width"]
        return open_session(path), manifest
    except ImportError as error:
        raise Mistake(f"{runtime} cannot be imported ({first_line(error)}): pip install {runtime}") from error
    except Exception as error:  # onnxruntime's own errors share no other class
        raise Mistake(f"model {path} cannot be read: {what_it_is(path) or first_line(error)}") from error


def open_onnxruntime(path: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warning that 'shown' can be given and can be left out: it is meant
    providers = [p for p in onnxruntime.get_available_providers() if p.startswith(("CUDA", "CPU"))]
    return onnxruntime.InferenceSession(path, options, providers=providers)


class OpenVino:
    """The methods of an onnxruntime session that are used here."""

    def __init__(self, path: Path):
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        for constant in [x for x in model.get_ops() if x.get_friendly_name() == "shown"]:
            # in ONNX an input that may be left out, of which OpenVINO's reader makes a constant
            given = openvino.opset13.parameter([], np.int64, name="shown")
            given.output(0).get_tensor().set_names({"shown"})
            constant.output(0).replace(given.output(0))
            model.add_parameters([given])
        # CPUs that have bfloat16 would compute in it, and scores differ by as much as 0.3
        self.model = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=x.get_any_name()) for x in self.model.inputs]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=x.get_any_name()) for x in self.model.outputs]

    def run(self, _, feed: dict) -> list[np.ndarray]:
        found = self.model(feed)
        return [found[output] for output in self.model.outputs]


def load_vocabulary(path: Path, manifest: dict) -> dict:
    """A vocabulary file's names, splits, synonyms, made_of and embeddings [C, D]; its teacher must be the model's."""
    if not path.is_file():
        raise Mistake(f"vocabulary: {path} does not exist")
    try:
        content = np.memmap(path, np.uint8, "r")  # only what the header names is read
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = parse_json(content[8:start])
        words, (low, high) = json.loads(header["__metadata__"]["vild"]), header["embeddings"]["data_offsets"]
        rows = np.array(content[start + low : start + high]).view("<f4").reshape(header["embeddings"]["shape"])
        count, width = rows.shape
        words["made_of"] = words.get("made_of") or [""] * count  # files of words lack it
        if not len(words["names"]) == len(words["splits"]) == len(words["made_of"]) == count:
            raise ValueError(f"{count} embeddings of {len(words['names'])} names")
        weights, name = words["fingerprint"].get("weights"), words["fingerprint"].get("name", "unknown")
        words["embeddings"] = rows
    except Exception as error:  # a broken file can fail anywhere
        reason = what_it_is(path) or first_line(error)
        raise Mistake(f"vocabulary: {path} is not a vocabulary file ({reason})") from error
    model = manifest["teacher"]
    if (width, weights) != (manifest["width"], model.get("weights")):
        raise Mistake(
            f"vocabulary {path} is of teacher {name} (width {width}, weights {weights}), but the model is of teacher "
            f"{model.get('name', 'unknown')} (width {manifest['width']}, weights {model.get('weights')})"
        )
    return words


def parse_json(content: np.ndarray) -> dict:
    if len(content) > MOST_JSON:
        raise ValueError(f"more than {MOST_JSON} bytes of JSON")
    return json.loads(content.tobytes())


def with_context(words: dict, context: dict, manifest: dict) -> tuple[np.ndarray, list[str]]:
    """The text matrix with the context's names below, none that is spelled as one asked for or that an example under
    another name is near to; and each asked-for name's split, by whether the context has it, or else the novel names of
    the manifest."""
    asked = [spellings(words, i) for i in range(len(words["names"]))]
    known = [spellings(context, i) for i in range(len(context["names"]))]
    novel = set(manifest.get("novel", ()))
    splits = ["base" if names & set().union(*known) else "novel" if names & novel else "" for names in asked]
    unknown = [i for i, made in enumerate(words["made_of"]) if made and not splits[i]]
    near = ((manifest.get("calibration") or {}).get("examples") or {}).get("near", np.inf)
    same = (context["embeddings"] @ words["embeddings"][unknown].T >= near).any(1)  # as vild/inference/word_encoder.py
    others = [i for i, names in enumerate(known) if not (same[i] or names & set().union(*asked))]
    return np.concatenate([words["embeddings"], context["embeddings"][others]]), splits


def spellings(words: dict, index: int) -> set[str]:
    """The names of a class, cleaned as vild/vocabulary/prompts.py does it."""
    names = [words["names"][index], *(words["synonyms"][index] if words.get("synonyms") else [])]
    return {n.replace("_", " ").replace("/", " or ").lower().strip().removesuffix(".") for n in names}


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """uint8 [H, W, 3], as vild/utils/images.py reads it: upright, first frame, 16 bits to 8, any colour space."""
    try:
        Image.init()  # a build of Pillow may lack some
        with Image.open(file_name, formats=[f for f in FILE_FORMATS if f in Image.OPEN]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Mistake(f"{image.width} x {image.height} pixels, more than the limit of {MOST_PIXELS}")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":
                values = np.asarray(image)
                if not 0 <= values.min() <= values.max() < 2**16:
                    raise Mistake(f"grey values from {values.min()} to {values.max()}; at most 16 bits are read")
                if image.mode == "F" and values.max() <= 1:
                    values = values * 255
                is_16_bit = image.mode.startswith("I;16") or values.max() > 255
                image = Image.fromarray((values / 257 if is_16_bit else values).round().astype(np.uint8))
            array = np.asarray(image.convert("RGB"))
    except Exception as error:  # a broken file can fail anywhere in the decoders
        raise Mistake(f"image {file_name} cannot be read: {what_it_is(file_name) or first_line(error)}") from error
    return array if image_format == "RGB" else np.ascontiguousarray(array[:, :, ::-1])


def resize(array: np.ndarray, rule: dict) -> np.ndarray:
    """By Pillow, so that the shorter side is ``shortest_edge``, or the longer one ``max_size`` where that is less."""
    height, width = array.shape[:2]
    if not rule["shortest_edge"]:
        return array
    sides = np.array([height, width]) * (rule["shortest_edge"] / min(height, width))
    height, width = (sides * min(1, rule["max_size"] / sides.max()) + 0.5).astype(int).clip(1).tolist()
    return np.asarray(Image.fromarray(array).resize((width, height), Image.BILINEAR))


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Probabilities [M, M] within a box to bool [H, W]: bilinear between their centres, falling to 0 outside."""
    weights = []  # of each pixel's row (column) in each of the mask's, [pixels, M]
    places = []
    for low, high, pixels in ((box[1], box[3], height), (box[0], box[2], width)):
        place = np.arange(max(int(low) - 1, 0), min(int(np.ceil(high)) + 1, pixels))
        at = (place.astype(np.float32) + 0.5 - low) / (high - low) * len(mask) - 0.5
        weights.append((1 - np.abs(at[:, None] - np.arange(len(mask), dtype=np.float32))).clip(0))
        places.append(place)
    whole = np.zeros((height, width), bool)
    whole[np.ix_(*places)] = weights[0] @ mask @ weights[1].T >= 0.5
    return whole


def run_lengths(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of a bool [H, W]: down the columns, zeros first; from the fourth on the difference
    to the last but one; six bits a character, of which one says that more follow."""
    flat = mask.T.ravel()
    counts = np.diff(np.concatenate([[0], (flat[1:] != flat[:-1]).nonzero()[0] + 1, [flat.size]])).tolist()
    if flat[0]:
        counts.insert(0, 0)
    text = []
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits, rest = rest & 31, rest >> 5
            more = rest != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)


def what_it_is(path: str | Path) -> str:
    """What a file is that was saved in place of another, as vild/utils/untrusted.py says it; else ""."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "it is a web page (HTML or XML), not the file itself: download it again"
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "it is a HEIC image, which is not supported: convert it to JPEG"
    return ""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
