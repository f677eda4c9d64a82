"""The web page in Chromium, which may ask nobody but it, and as a stranger would call it."""

import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from tests.utils.test_images import bad_images

HANGS = 600_000  # ms; a busy machine may take long, and only what hangs is to fail


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
    expect(note).to_contain_text("Upload an image, or pick a sample.", timeout=HANGS)
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


@pytest.mark.parametrize(("width", "how"), [(1280, "drag"), (1280, "click"), (390, "click")])
def test_a_box_drawn_on_the_image_is_an_example(page, tmp_path, width, how):
    """Drawn around what the screen shows red, it is where the file is red."""
    from playwright.sync_api import expect

    page.set_viewport_size({"width": width, "height": 1000})
    pixels = np.full((100, 70, 3), 90, np.uint8)
    pixels[20:60, 14:42] = 255, 0, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    upload(page, tmp_path / "a.png")
    image, note = page.locator("#image img"), page.locator("#note")
    expect(image).to_have_attribute("src", re.compile("image.jpeg"), timeout=HANGS)
    page.wait_for_function("document.querySelector('#image img').complete", timeout=HANGS)
    screen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
    rows, columns = ((screen[:, :, 0] > 200) & (screen[:, :, 1:] < 60).all(2)).nonzero()
    (x0, x1), (y0, y1) = ((int(v.min()), int(v.max()) + 1) for v in (columns, rows))
    assert x1 - x0 > 50  # enlarged
    if how == "drag":
        page.mouse.move(x1, y0)
        page.mouse.down()
        page.mouse.move(x0 + 9, y1 - 9)
        page.mouse.move(x0, y1)
        page.mouse.up()
    else:
        page.mouse.click(x0, y0)
        page.mouse.click(x1, y1)
    drawn = page.evaluate("drawnBox")
    corners = [*sorted(drawn[::2]), *sorted(drawn[1::2])]
    assert corners == pytest.approx([0.2, 0.6, 0.2, 0.6], abs=0.02)
    for change in (-40, 0):  # it keeps to the image
        page.set_viewport_size({"width": width + change, "height": 1000})
        expect(page.locator("#drawn")).to_be_visible()
    page.wait_for_function(
        """([x, y]) => { const box = document.querySelector("#drawn").getBoundingClientRect();
                         return Math.abs(box.left - x) < 3 && Math.abs(box.top - y) < 3 }""",
        arg=[x0, y0], timeout=HANGS)  # fmt: skip
    mark = page.locator("#drawn").bounding_box()
    assert [mark[key] for key in ("width", "height")] == pytest.approx([x1 - x0, y1 - y0], abs=3)

    page.locator("#add").click()
    expect(note).to_have_text("Name what is in the box.", timeout=HANGS)
    page.locator("#name input, #name textarea").fill("<b>mine</b>")
    page.locator("#name input, #name textarea").press("Enter")
    expect(page.locator("#listed")).to_have_text("Added: <b>mine</b> (1)", timeout=HANGS)
    page.locator("#words textarea").fill("")
    threshold(page, 0)
    page.locator("#find").click()
    expect(page.locator("#rows .virtual-row").first).to_be_visible(timeout=HANGS)
    assert set(names(page)) == {"<b>mine</b>"}
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) == 0

    page.locator("#image button[aria-label='Remove Image'], #image button[title='Remove Image']").first.click()
    expect(page.locator("#drawn")).to_have_count(0)
    upload(page, tmp_path / "a.png")  # a box is of one image
    expect(image).to_have_attribute("src", re.compile("image.jpeg"), timeout=HANGS)
    page.wait_for_function("!drawnBox", timeout=HANGS)
    page.locator("#add").click()
    expect(note).to_contain_text("Draw a box on the image first", timeout=HANGS)
    page.locator("#remove").click()
    expect(page.locator("#listed")).to_have_text("", timeout=HANGS)


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
        ([*config, "--port", server, *opts], f"--port {server}: in use; give another port"),
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
