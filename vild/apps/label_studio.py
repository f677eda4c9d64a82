"""A machine-learning backend for Label Studio: boxes for the labels of a project, by its HTTP protocol.

Requests are untrusted: images are read below one folder or from a data: URI, within the limits of the page, and no URL
is ever fetched.
"""

from __future__ import annotations

import base64
import json
import logging
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from PIL import Image

from vild.apps.web import MOST_BYTES, read_photo, read_texts, sentence
from vild.data.annotations import stays_below
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError
from vild.utils.files import hash_file
from vild.utils.images import upright_size
from vild.utils.untrusted import parse_json, refused_as
from vild.vocabulary.words import Words

logger = logging.getLogger("vild")

MOST_REQUEST = 2 * MOST_BYTES  # bytes; an image in base64 has a third more than its file
LONGEST_NUMBER = 18  # digits of a Content-Length
SECONDS = 60  # to send a request


@dataclass(frozen=True)
class Labels:
    """What a labelling config asks for: the names of its tags for rectangles and images, the key of a task's data, and
    the labels."""

    rectangles: str
    image: str
    key: str
    names: tuple[str, ...]
    words: Words


def read_config(request: dict, key: str) -> Labels:
    """Read the labelling config (XML) under ``key``: the first RectangleLabels, and the Image that it is for.

    Raises:
        UserError: it is missing, no XML, or has no such tags.
    """
    if not isinstance(request.get(key), str):
        raise UserError(f"{key} is missing" if request.get(key) is None else f"{key}: is not text")
    with refused_as(f"{key}: is not XML"):
        tree = ElementTree.fromstring(request[key])
    images = {tag.get("name"): tag.get("value", "") for tag in tree.iter("Image")}
    for tag in tree.iter("RectangleLabels"):
        names = tuple(label.get("alias") or label.get("value", "") for label in tag.iter("Label"))
        image = tag.get("toName")
        if names and tag.get("name") and images.get(image, "").startswith("$"):
            words, _ = read_texts(json.dumps(names))
            if len(words.names) != len(names):
                raise UserError(f"{key}: a Label has no value")
            return Labels(tag.get("name"), image, images[image][1:], names, words)
    raise UserError(f"{key}: it has no RectangleLabels with Labels for an Image of a task's $value")


class Backend:
    """Answers the requests of Label Studio.

    Args:
        folder: the images of tasks must be below it.
        threshold: minimum score of a box.
    """

    def __init__(self, detector: OpenVocabularyDetector, folder: Path, threshold: float):
        self.detector, self.folder, self.threshold = detector, folder.resolve(), threshold
        self.version = f"vild-{hash_file(detector.cfg.MODEL.WEIGHTS)}"
        self._one_at_a_time = threading.Lock()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        """HTTP status and JSON of the answer to a request."""
        try:
            path = urlsplit(path).path.rstrip("/")
        except ValueError:
            return 400, {"error": "This is not an address."}
        if method == "GET" and path in ("", "/health"):
            return 200, {"status": "UP", "model_class": "OpenVocabularyDetector"}
        if method != "POST" or path not in ("/setup", "/predict", "/webhook"):
            return 404, {"error": "There is no such page."}
        try:
            with refused_as("the request is not JSON"):
                request = parse_json(body)
            if not isinstance(request, dict):
                raise UserError("the request is not an object of JSON")
            if path == "/webhook":  # annotations were made; nothing is trained here
                return 200, {}
            if path == "/setup":
                read_config(request, "schema")
                return 200, {"model_version": self.version}
            return 200, {"results": self.predict(request.get("tasks"), read_config(request, "label_config"))}
        except UserError as error:
            logger.warning("%s: %s", path, error)
            return 400, {"error": sentence(error)}

    def predict(self, tasks: object, labels: Labels) -> list[dict]:
        """A prediction of each task. UserError if the image of one cannot be read."""
        if not isinstance(tasks, list):
            raise UserError("tasks is not a list")
        with self._one_at_a_time:
            detector = self.detector.with_vocabulary(labels.words)
            return [self._predict(detector, task, labels) for task in tasks]

    def _predict(self, detector: OpenVocabularyDetector, task: object, labels: Labels) -> dict:
        task = task if isinstance(task, dict) else {}
        data = task.get("data")
        address = data.get(labels.key) if isinstance(data, dict) else None
        try:
            with self._file(address) as path:
                photo = read_photo(path)
                width, height = upright_size(path)
        except UserError as error:
            raise UserError(f"task {task.get('id')}: data.{labels.key} is {str(address)[:100]!r}: {error}") from error
        found = detector(Image.fromarray(photo.array), threshold=self.threshold)
        whole = found.pred_boxes.tensor.new_tensor([photo.array.shape[1], photo.array.shape[0]] * 2) / 100
        scores, regions = found.scores.tolist(), []
        for n, (x0, y0, x1, y1) in enumerate((found.pred_boxes.tensor / whole).tolist()):
            box = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "rotation": 0}  # percent of the image
            regions.append(
                {
                    "id": f"vild{n}",
                    "from_name": labels.rectangles,
                    "to_name": labels.image,
                    "type": "rectanglelabels",
                    "original_width": width,
                    "original_height": height,
                    "image_rotation": 0,
                    "score": scores[n],
                    "value": {**box, "rectanglelabels": [labels.names[int(found.pred_classes[n])]]},
                }
            )
        mean = sum(scores) / len(scores) if scores else 0.0
        return {"result": regions, "score": mean, "model_version": self.version}

    @contextmanager
    def _file(self, address: object) -> Iterator[Path]:
        """The file of an image: Label Studio's local file (``/data/local-files/?d=a/b.jpg``) or upload
        (``/data/upload/1/b.jpg``), a path below the folder, or a data: URI."""
        if not isinstance(address, str):
            raise UserError("not the address of an image")
        if address.startswith("data:"):
            with tempfile.NamedTemporaryFile() as file, refused_as("not an image in base64"):
                file.write(base64.b64decode(address.partition(";base64,")[2], validate=True))
                file.flush()
                yield Path(file.name)
            return
        try:
            parts = urlsplit(address)
        except ValueError:
            raise UserError("not the address of an image") from None
        if parts.scheme or parts.netloc:
            raise UserError("URLs are not fetched; give local files, or uploads")
        name = unquote(parts.path).removeprefix("/data/")
        if name.rstrip("/") == "local-files":
            name = parse_qs(parts.query).get("d", [""])[0]
        with refused_as("no file below the folder of --input"):  # the system refuses a name that is too long
            path = (self.folder / name).resolve() if stays_below(name) else None
            if path is None or not path.is_relative_to(self.folder) or not path.is_file():
                raise UserError("no file below the folder of --input")
        yield path


def make_server(backend: Backend, host: str, port: int) -> ThreadingHTTPServer:
    """An HTTP server of the backend; its ``serve_forever`` runs it."""

    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS

        def handle(self):
            try:
                super().handle()
            except ConnectionError:
                logger.warning("%s left before the answer", self.client_address[0])

        def do_GET(self):
            self.respond(*backend.answer("GET", self.path, b""))

        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if not length:
                self.respond(411, {"error": "The request needs a Content-Length."})
            elif not (length.isascii() and length.isdigit()):
                self.respond(400, {"error": "The Content-Length is not a number."})
            elif len(length) > LONGEST_NUMBER or int(length) > MOST_REQUEST:
                self.close_connection = True
                self.respond(413, {"error": "This is too large."})
            else:
                self.respond(*backend.answer("POST", self.path, self.rfile.read(int(length))))

        def respond(self, status: int, answer: dict):
            content = json.dumps(answer).encode()
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, form, *values):
            logger.info(form, *values)

    return ThreadingHTTPServer((host, port), Handler)
