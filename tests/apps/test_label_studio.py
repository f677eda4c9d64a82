"""The backend of Label Studio over HTTP on loopback: its protocol, the boxes, and what it refuses."""

import base64
import http.client
import json
import os
import socket
import struct
import threading
import time
from contextlib import contextmanager
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes
from PIL import Image

from vild.apps.label_studio import MOST_REQUEST, Backend, make_server
from vild.inference.detections import Detections

CONFIG = """<View><Header value="What is there?"/><Image name="img" value="$photo"/>
<RectangleLabels name="box" toName="img">
<Label value="Kite" alias="kite"/><Label value="box kite | kites"/><Label value="dog" background="red"/>
</RectangleLabels></View>"""


class FakeDetector:
    """Finds the second word in the right half and the third in a corner, with the third's score below 0.5."""

    def __init__(self, file):
        self.cfg = SimpleNamespace(MODEL=SimpleNamespace(WEIGHTS=str(file)))

    def with_vocabulary(self, words):
        self.words = words
        return self

    def __call__(self, image, threshold):
        self.size = image.size
        width, height = image.size
        boxes = torch.tensor([[width / 2, 0, width, height], [0, 0, width / 8, height / 4]])
        fields = {"scores": torch.tensor([0.75, 0.25]), "pred_classes": torch.tensor([1, 2])}
        fields["pred_boxes"] = Boxes(boxes)
        found = Detections((height, width), self.words.names, [""] * len(self.words.names), **fields)
        return found[found.scores > threshold]


@contextmanager
def served(detector, folder, threshold=0.4):
    """A function that sends a request and returns status and JSON."""
    server = make_server(Backend(detector, folder, threshold), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(method, path, document=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
        body = json.dumps(document) if isinstance(document, dict | list) else document
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "application/json"
        status, content = answer.status, json.loads(answer.read())
        connection.close()
        return status, content

    try:
        yield ask
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def root(tmp_path):
    """Images; one is larger than what a page shows, one is turned, and one lies outside."""
    folder = tmp_path / "media"
    (folder / "upload" / "1").mkdir(parents=True)
    Image.new("RGB", (80, 40)).save(folder / "upload" / "1" / "a b.jpg")
    Image.new("RGB", (3200, 800)).save(folder / "large.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(folder / "turned.jpg", exif=exif)
    (tmp_path / "secret.jpg").write_bytes((folder / "turned.jpg").read_bytes())
    os.symlink(tmp_path / "secret.jpg", folder / "link.jpg")
    (folder / "text.jpg").write_text("no image")
    (tmp_path / "weights").write_text("weights")
    return folder


@pytest.fixture
def fake(root):
    return FakeDetector(root.parent / "weights")


def predict(*photos, config=CONFIG):
    tasks = [{"id": n, "data": {"photo": photo}} for n, photo in enumerate(photos, 7)]
    return "POST", "/predict", {"tasks": tasks, "project": "1.1700000000", "label_config": config, "params": {}}


def test_the_protocol(root, fake):
    uri = BytesIO()
    Image.new("RGB", (20, 10)).save(uri, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(uri.getvalue()).decode()}"
    photos = ("/data/upload/1/a%20b.jpg", "/data/local-files/?d=large.png", "turned.jpg", uri)
    with served(fake, root) as ask:
        for path in ("/", "/health"):
            assert ask("GET", path) == (200, {"status": "UP", "model_class": "OpenVocabularyDetector"})
        project = {"project": "1.17", "schema": CONFIG, "hostname": "", "access_token": ""}
        status, version = ask("POST", "/setup", project)
        assert status == 200 and version["model_version"].startswith("vild-")
        assert ask("POST", "/webhook", {"action": "ANNOTATION_CREATED"}) == (200, {})
        status, answer = ask(*predict(*photos))
    assert status == 200 and fake.words.names == ("kite", "box kite", "dog")
    assert fake.words.synonyms == ((), ("kites",), ())
    sizes = [(80, 40), (3200, 800), (40, 80), (20, 10)]
    for prediction, (width, height) in zip(answer["results"], sizes, strict=True):
        assert prediction["score"] == 0.75 and prediction["model_version"] == version["model_version"]
        (region,) = prediction["result"]
        assert region["value"] == {"x": 50, "y": 0, "width": 50, "height": 100, "rotation": 0,
                                   "rectanglelabels": ["box kite | kites"]}  # fmt: skip
        assert (region["from_name"], region["to_name"], region["type"]) == ("box", "img", "rectanglelabels")
        assert (region["original_width"], region["original_height"]) == (width, height)
        assert region["score"] == 0.75 and region["image_rotation"] == 0 and region["id"]
    with served(fake, root, 0.1) as ask:
        first, second = ask(*predict("turned.jpg"))[1]["results"][0]["result"]
    assert second["value"]["rectanglelabels"] == ["dog"] and second["value"]["width"] == 12.5
    assert first["id"] != second["id"]
    with served(fake, root, 0.9) as ask:
        assert ask(*predict("turned.jpg"))[1]["results"][0] == {"result": [], "score": 0.0, **version}


def test_what_is_refused(root, fake):
    huge = f"data:image/png;base64,{'A' * 100}"
    cases = {
        "http://127.0.0.1:1/a.jpg": "URLs are not fetched",
        "s3://bucket/a.jpg": "URLs are not fetched",
        "//host/a.jpg": "URLs are not fetched",
        "file:///etc/passwd": "URLs are not fetched",
        "http://[": "not the address of an image",
        "//[a": "not the address of an image",
        "x" * 5000: "no file below",
        "/data/local-files/?d=" + "x" * 300: "no file below",
        "/etc/passwd": "no file below",
        "../secret.jpg": "no file below",
        "/data/local-files/?d=..%2Fsecret.jpg": "no file below",
        "/data/local-files/?d=/etc/passwd": "no file below",
        "/data/local-files/": "no file below",
        "link.jpg": "no file below",
        "upload": "no file below",
        "a\0b": "no file below",
        "text.jpg": "not an image",
        huge: "not an image",
        "data:image/png;base64,!": "not an image in base64",
        5: "not the address of an image",
        None: "not the address of an image",
    }
    with served(fake, root) as ask:
        for photo, why in cases.items():
            status, answer = ask(*predict("turned.jpg", photo))
            assert status == 400 and answer["error"].startswith("Task 8: data.photo is ") and why in answer["error"]
            assert len(answer["error"]) < 300 and "\n" not in answer["error"]
        configs = {
            "": "is not XML",
            "<View>": "is not XML",
            "<View/>": "has no RectangleLabels",
            CONFIG.replace("$photo", "photo"): "has no RectangleLabels",
            CONFIG.replace('toName="img"', 'toName="text"'): "has no RectangleLabels",
            CONFIG.replace('value="dog"', ""): "a Label has no value",
            CONFIG.replace("dog", "KITE"): "uplicate class name",
        }
        for config, why in configs.items():
            for request in (predict("turned.jpg", config=config), ("POST", "/setup", {"schema": config})):
                status, answer = ask(*request)
                assert status == 400 and why in answer["error"], (config, answer)
        for request, status in [
            (("POST", "/predict", b"{"), 400), (("POST", "/predict", b"[]"), 400), (("POST", "/setup", {}), 400),
            (("POST", "/predict", {"label_config": CONFIG}), 400), (("GET", "/predict"), 404),
            (("POST", "/train", {}), 404),
            (("POST", "/predict", {"label_config": CONFIG, "tasks": [5]}), 400),
        ]:  # fmt: skip
            assert ask(*request)[0] == status
        for given in (predict("turned.jpg", config=None), ("POST", "/predict", {"tasks": []})):
            assert ask(*given) == (400, {"error": "Label_config is missing."})
        assert ask("POST", "/setup", {}) == (400, {"error": "Schema is missing."})
        assert ask("POST", "/setup", {"schema": 5}) == (400, {"error": "Schema: is not text."})
        assert ask("GET", "//[a")[0] in (400, 404)
        for length, status in (("\u00b2", 400), ("-1", 400), ("1e3", 400), ("9" * 5000, 413)):
            assert ask("POST", "/predict", b"{}", **{"Content-Length": length})[0] == status
        assert ask("POST", "/predict", b"{}", **{"Content-Length": str(MOST_REQUEST + 1)})[0] == 413
        assert ask("POST", "/predict", iter([b"{}"]), **{"Transfer-Encoding": "chunked"})[0] == 411


def test_a_client_that_leaves_is_one_log_line(root, caplog, capsys):
    left = threading.Event()

    class Slow(FakeDetector):
        def __call__(self, image, threshold):
            left.wait(60)
            return super().__call__(image, threshold)

    server = make_server(Backend(Slow(root.parent / "weights"), root, 0.4), "127.0.0.1", 0)
    server.daemon_threads = False  # so that server_close waits for the answer
    threading.Thread(target=server.serve_forever, daemon=True).start()
    body = json.dumps(predict("turned.jpg")[2]).encode()
    with caplog.at_level("WARNING", "vild"):
        client = socket.create_connection(server.server_address)
        client.sendall(b"POST /predict HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        time.sleep(0.5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it resets the connection
        client.close()
        left.set()
        time.sleep(0.2)
        server.shutdown()
        server.server_close()
    assert [r.getMessage() for r in caplog.records] == ["127.0.0.1 left before the answer"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_detector_behind_it(detector, root, world):
    """Boxes in percent are the detector's own in pixels."""
    path = min((world / "glyphs" / "val").glob("*.jpg"))
    (root / "scene.jpg").write_bytes(path.read_bytes())
    width, height = Image.open(path).size
    expected = detector(path, ["kite | box kite", "dog", "sun"], threshold=0.01)
    config = CONFIG.replace("Kite", "K").replace('alias="kite"', 'alias="kite | box kite"')
    config = config.replace("box kite | kites", "dog").replace('value="dog" background', 'value="sun" background')
    with served(SimpleNamespace(cfg=SimpleNamespace(MODEL=SimpleNamespace(WEIGHTS=str(path))),
                                with_vocabulary=detector.with_vocabulary), root, 0.01) as ask:  # fmt: skip
        status, answer = ask(*predict("scene.jpg", config=config))
    assert status == 200
    regions = answer["results"][0]["result"]
    boxes = [[r["value"][k] for k in ("x", "y", "width", "height")] for r in regions]
    mine = [[x * width / 100, y * height / 100, (x + w) * width / 100, (y + h) * height / 100] for x, y, w, h in boxes]
    assert mine == [pytest.approx(box, abs=1e-3) for box in expected.pred_boxes.tensor.tolist()] and len(mine) > 0
    labels = ["kite | box kite", "dog", "sun"]
    assert [r["value"]["rectanglelabels"] for r in regions] == [[labels[c]] for c in expected.pred_classes.tolist()]
    assert [r["score"] for r in regions] == expected.scores.tolist()
