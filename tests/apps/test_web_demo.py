"""The web page: its functions without a browser, then the page itself in Chromium, which may ask nobody but it."""

import dataclasses
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import REPOSITORY
from tests.utils.test_images import bad_images
from vild.apps import web
from vild.inference.drawing import draw
from vild.utils.errors import UserError

HANGS = 600_000  # ms; a busy machine may take long, and only what hangs is to fail
SENTENCES = {"text": "not an image", "empty": "not an image", "truncated": "not an image", "huge": "million pixels"}


@pytest.fixture
def ramp() -> np.ndarray:
    rows, columns = np.mgrid[0:90, 0:120]
    return np.stack([rows * 2, columns * 2, np.full_like(rows, 90)], 2).astype(np.uint8)


@pytest.fixture
def photo(ramp) -> web.Photo:
    return web.Photo(ramp, 1.0)


@pytest.mark.parametrize("which", SENTENCES)
def test_bad_uploads_are_a_sentence_without_a_path(ramp, tmp_path, which):
    path = bad_images(ramp, tmp_path)[which]
    with pytest.raises(UserError, match=SENTENCES[which]) as caught:
        web.read_photo(path)
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)


def test_limits_of_an_upload(ramp, tmp_path, monkeypatch):
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(web.read_photo(tmp_path / "a.png").array, ramp)
    with monkeypatch.context() as patch:
        patch.setattr(web, "MOST_PIXELS", 90 * 120 - 1)
        with pytest.raises(UserError, match=r"120 x 90 pixels"):
            web.read_photo(tmp_path / "a.png")
    monkeypatch.setattr(web, "MOST_BYTES", (tmp_path / "a.png").stat().st_size - 1)
    with pytest.raises(UserError, match="larger than"):
        web.read_photo(tmp_path / "a.png")
    monkeypatch.undo()
    Image.new("RGB", (9000, 20)).save(tmp_path / "narrow.png")
    with pytest.raises(UserError, match="too narrow"):
        web.read_photo(tmp_path / "narrow.png")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n")
    with pytest.raises(UserError, match="not an image"):  # Pillow would start Ghostscript
        web.read_photo(tmp_path / "a.eps")


def test_large_images_are_searched_smaller(tmp_path):
    Image.new("RGB", (3200, 2000)).save(tmp_path / "a.png")
    photo = web.read_photo(tmp_path / "a.png")
    assert photo.array.shape == (1000, 1600, 3) and photo.pixels == 2


def test_texts_to_words():
    words, negatives = web.read_texts("kite, sofa | couch\n chess\x00knight ,,", "chair | stool, chair")
    assert words.names == ("kite", "sofa", "chess knight") and words.synonyms == ((), ("couch",), ())
    assert negatives == ("chair", "stool")
    assert web.read_texts("a\ud800b")[0].names == ("a b",)
    for text in ("", " , \n", "|", "| , |"):
        with pytest.raises(UserError, match="at least one word"):
            web.read_texts(text)
    with pytest.raises(UserError, match=r"2,001 words"):
        web.read_texts(",".join(map(str, range(1999))), "a|b")
    with pytest.raises(UserError, match="duplicate class name 'kite'") as caught:
        web.read_texts("kite, kite")
    assert web.sentence(caught.value) == "Duplicate class name 'kite'."


def test_a_search_and_its_thresholds(detector, photo):
    findings = web.search(detector, photo, "umbrella, sun | star", "cow")
    scores = findings.found.scores
    assert findings.masks is not None and len(findings.masks) == len(scores) > 3
    expected = detector.with_vocabulary(["umbrella", "sun | star"], negatives=["cow"])
    expected = expected(photo.array, threshold=0, channels="RGB")
    everything = findings.above(0.0)
    assert torch.equal(everything.pred_masks, expected.pred_masks) and torch.equal(everything.scores, expected.scores)
    middle = scores[len(scores) // 2].item()
    assert len(findings.above(middle)) == (scores >= middle).sum() < len(scores)
    assert findings.above(1.0).pred_masks.shape == (0, 90, 120)
    assert len(web.table(findings, middle)) == len(findings.above(middle))
    assert web.table(findings, 1.0) == [] and "Nothing at 1.00 or more" in web.summary(findings, 1.0)
    assert web.drawing(findings, 0.0).size == web.drawing(findings, 1.0).size
    for words, reason in (("x" * 201, "201 characters"), ("kite", "also asked for")):
        with pytest.raises(UserError, match=reason):
            web.search(detector, photo, words, "Kite")


def test_boxes_of_the_table_are_in_pixels_of_the_file(detector, photo):
    findings = web.search(detector, photo, "umbrella")
    twice = dataclasses.replace(findings, photo=web.Photo(photo.array, 2.0))
    box = (2 * findings.found.pred_boxes.tensor[0]).round().int().tolist()
    assert web.table(twice, 0.0)[0][-1] == ", ".join(map(str, box))


def test_names_are_text_on_the_page_and_in_the_image(detector, photo):
    findings = web.search(detector, photo, r"<b>a</b>, a $\frac{$ b")
    assert {row[0] for row in web.table(findings, 0.0)} == {"<b>a</b>", r"a $\frac{$ b"}
    found = findings.above(0.0)[:3]
    assert draw(photo.array, found, [r"a $\frac{$ b"] * 2).size == (853, 640)  # matplotlib reads no formula in it


def test_only_uploads_are_read(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from vild.apps.web_page import uploaded

    folder, other = tmp_path / "uploads", tmp_path / "uploads-not"
    for place in (folder, other):
        place.mkdir()
        (place / "a.png").write_bytes(b"")
    (folder / "link.png").symlink_to(other / "a.png")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    assert uploaded({"path": str(folder / "a.png")}) == folder / "a.png"
    wrong = [str(other / "a.png"), f"{folder}/../uploads-not/a.png", str(folder / "link.png"), "/etc/passwd", "a\0", 3]
    for payload in [None, "text", {}, {"path": str(folder)}, *({"path": path} for path in wrong)]:
        with pytest.raises(UserError) as caught:
            uploaded(payload)
        assert str(tmp_path) not in str(caught.value)


# ---- the page in a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        reason = "no Chromium on this machine (apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("VILD_REQUIRE_CHROMIUM") else pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def server(world, checkpoint_file, teacher_folder, tmp_path_factory):
    """tools/web_demo.py in a process of its own; its port."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("web") / "log.txt"
    command = [sys.executable, REPOSITORY / "tools/web_demo.py", "--port", port,
               "--config-file", REPOSITORY / "configs/Glyphs/vild.yaml", "--opts", "MODEL.WEIGHTS", checkpoint_file,
               "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}"]  # fmt: skip
    outside = socket.create_server(("127.0.0.1", 0))  # who asks for anything elsewhere knocks here
    outside.setblocking(False)
    proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
    variables = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": "127.0.0.1,localhost"}
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env={**os.environ, **variables})
    try:
        while "the page: http" not in log.read_text() and process.poll() is None:
            time.sleep(0.1)
        assert f"the page: http://127.0.0.1:{port}/" in log.read_text(), log.read_text()
        yield port
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in log.read_text()
    with outside, pytest.raises(BlockingIOError):
        outside.accept()


@pytest.fixture
def page(chromium, server):
    """The page in a headless browser, which is asked at the end whom it asked."""
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page()
        hosts, failed, errors = set(), [], []
        page.on("request", lambda r: hosts.add(urlsplit(r.url).hostname) if r.url.startswith(("http", "ws")) else None)
        page.on("response", lambda r: failed.append((r.status, r.url)) if r.status >= 400 else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if "Content Security Policy" in m.text else None)
        page.goto(f"http://127.0.0.1:{server}/", timeout=HANGS)
        page.wait_for_selector("#find", timeout=HANGS)
        yield page
        browser.close()
        assert hosts == {"127.0.0.1"} and not failed and not errors


def names(page) -> list[str]:
    return page.locator("#rows [role=gridcell][data-col='0']").all_inner_texts()


def result(page) -> str:
    return page.locator("#result img").get_attribute("src")


def upload(page, path) -> None:
    page.locator("#image input[type=file]").set_input_files(path)


def threshold(page, value: float) -> None:
    field = page.locator("#threshold input[type=number]")
    field.fill(str(value))
    field.press("Enter")
    field.blur()


def test_upload_words_threshold_and_a_broken_file(page, ramp, tmp_path):
    from playwright.sync_api import expect

    note, rows = page.locator("#note"), page.locator("#rows .virtual-row")
    page.locator("#find").click()
    expect(note).to_contain_text("Upload an image, or pick an example.", timeout=HANGS)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    upload(page, tmp_path / "a.png")
    expect(page.locator("#image img")).to_be_visible(timeout=HANGS)
    expect(note).to_have_text("", timeout=HANGS)
    page.locator("#words textarea").fill("umbrella")
    threshold(page, 0)
    page.locator("#find").click()
    expect(rows.first).to_be_visible(timeout=HANGS)
    assert set(names(page)) == {"umbrella"}
    expect(note).to_contain_text("Words encoded in")
    before = result(page)

    page.locator("#words textarea").fill("{{value}} ${1+1}, <b>kite</b>")
    page.locator("#words textarea").press("Enter")
    expect(page.locator("#rows")).to_contain_text("kite", timeout=HANGS)
    assert set(names(page)) <= {"{{value}} ${1+1}", "<b>kite</b>"} and result(page) != before
    assert page.locator("#rows b").count() == 0

    threshold(page, 0.99)
    expect(rows).to_have_count(0, timeout=HANGS)
    expect(note).to_contain_text("Nothing at 0.99 or more")
    threshold(page, 0)
    expect(rows.first).to_be_visible(timeout=HANGS)

    page.locator("#words textarea").fill("kite, kite")
    page.locator("#find").click()
    expect(note).to_have_text("Duplicate class name 'kite'.", timeout=HANGS)
    upload(page, bad_images(ramp, tmp_path)["text"])
    expect(note).to_contain_text("not an image that can be read", timeout=HANGS)
    expect(rows).to_have_count(0)


def test_on_a_phone_results_and_errors_come_into_view(page, ramp, tmp_path):
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 390, "height": 700})
    Image.fromarray(ramp).save(tmp_path / "a.png")
    upload(page, tmp_path / "a.png")
    expect(page.locator("#image img")).to_be_visible(timeout=HANGS)
    page.locator("#words textarea").fill("kite, Kite")
    page.locator("#find").click()
    expect(page.locator("#note .wrong")).to_be_in_viewport(timeout=HANGS)
    page.locator("#words textarea").fill("umbrella")
    page.locator("#find").scroll_into_view_if_needed()
    page.locator("#find").click()
    expect(page.locator("#result img")).to_be_in_viewport(ratio=0.9, timeout=HANGS)
    page.evaluate("window.scrollTo(0, 0)")
    upload(page, bad_images(ramp, tmp_path)["text"])
    expect(page.locator("#note .wrong")).to_be_in_viewport(timeout=HANGS)


def test_examples_without_a_flag(detector):
    """Drawings for the built-in world's detector; else the photographs of gradio."""
    pytest.importorskip("gradio")
    from types import SimpleNamespace

    from vild.apps.web_page import default_examples

    drawn = default_examples(detector)
    assert len(drawn) == 8 and len({photo.array.tobytes() for photo in drawn}) == 8
    photos = default_examples(SimpleNamespace(world=""))
    assert photos and all(min(photo.array.shape[:2]) > 200 for photo in photos)


def test_an_example_is_searched_at_once(page):
    from playwright.sync_api import expect

    threshold(page, 0)
    page.locator("#examples button.gallery-item").first.click()
    expect(page.locator("#rows .virtual-row").first).to_be_visible(timeout=HANGS)
    expect(page.locator("#image img")).to_be_visible()


# ---- the page without a browser, as a stranger would call it


def test_a_mistake_on_the_command_line_is_one_line(server, tmp_path, world, checkpoint_file, teacher_folder):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    opts = ["--opts", "MODEL.WEIGHTS", checkpoint_file, "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}"]
    config = ["--config-file", REPOSITORY / "configs/Glyphs/vild.yaml"]
    for arguments, reason in [
        ([*config, "--examples", tmp_path, *opts], "a.jpg: This file is not an image"),
        ([*config, "--port", server, *opts], f"--port {server}"),
    ]:
        command = [sys.executable, REPOSITORY / "tools/web_demo.py", *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=HANGS / 1000)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and reason in done.stderr


def call(port: int, method: str, path: str, body: bytes = b"", **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANGS / 1000)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def test_strangers_get_the_page_and_nothing_else(server, world, checkpoint_file):
    status, text = call(server, "GET", "/")
    assert status == 200
    for path in (str(world), str(checkpoint_file), str(REPOSITORY)):
        assert path not in text
    for path in (f"/gradio_api/file={checkpoint_file}", "/gradio_api/file=/etc/passwd", "/monitoring/summary",
                 "/gradio_api/file=https://example.org/a.png", "/gradio_api/proxy=https://example.org/", "/docs",
                 "/gradio_api/runs", f"/static/../../../../..{checkpoint_file}"):  # fmt: skip
        status, text = call(server, "GET", path)
        assert status in (403, 404) and len(text) < 200, path
    for path in ("/gradio_api/run/find", "/gradio_api/call/find", "/gradio_api/process_recording"):
        assert call(server, "POST", path, b"{}")[0] == 404
    assert call(server, "POST", "/gradio_api/upload", b"", **{"Content-Length": str(10**9)})[0] == 413
    assert call(server, "POST", "/gradio_api/queue/join", b"", **{"Content-Length": str(10**7)})[0] == 413
    assert call(server, "POST", "/gradio_api/queue/join", b"", **{"Transfer-Encoding": "chunked"})[0] == 411
    address = {"path": "https://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [address], "fn_index": 0, "session_hash": "x"}).encode()
    assert call(server, "POST", "/gradio_api/queue/join", body, **{"Content-Type": "application/json"})[0] == 403
