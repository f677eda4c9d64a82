"""The web page in gradio; its functions are in ``vild/apps/web.py``."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from vild.apps import web
from vild.apps.web_box import DRAW
from vild.apps.web_guard import RequestFilter, is_upload
from vild.glyphs import drawing
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.command_line import THRESHOLD
from vild.utils.errors import UserError

WAITING = 16  # queued calls; more are rejected
SESSIONS = 64  # with their images and examples, up to 8 MB each
STORED_SECONDS = 600

INTRO = """<h1>Find anything</h1>
<p>Type what to look for, in any words. {base} names had boxes in training; {novel} ones were held out, so the detector
knows them from its teacher alone; and it met no {unmarked} word.</p>{world}"""
CSS = """
.gradio-container { max-width: 1240px !important; }
footer { display: none !important; }
#intro h1 { font-size: 1.8rem; font-weight: 700; margin: 0 0 .2rem; }
#intro p { margin: 0; line-height: 1.7; color: var(--body-text-color-subdued); }
#intro, #note { padding: 0; }
#note .html-container { padding: 0 .2rem; }
#note { min-height: 1.5rem; color: var(--body-text-color-subdued); }
#note .wrong { color: #dc2626; font-weight: 700; }
.mark { display: inline-block; padding: 0 .6em; border-radius: 1em; font-size: .85em; line-height: 1.5;
  border: 1px solid var(--mark); background: color-mix(in srgb, var(--mark) 18%, transparent); }
#image img, #result img { width: 100%; height: 100%; object-fit: contain; }
@media (max-width: 640px) { #result { height: 92vw !important; } }
#image img { cursor: crosshair; }
#drawn { position: absolute; border: 2px solid #dc2626; box-shadow: 0 0 0 1px white; pointer-events: none; }
#examples .gallery { gap: .4rem; }
#examples .gallery-item, #examples .gallery-item .container { width: 3.6rem; height: 3.6rem; }
#examples .gallery-item img { width: 100%; height: 100%; object-fit: cover; }
"""
PHOTOS = ("cheetah.jpg", "lion.jpg", "tower.jpg")  # which come with gradio
# On a phone the results are below the words, out of sight: an error, or else (with {found}) the image, comes into view
SHOW = """() => {{ setTimeout(() => {{
  const wrong = document.querySelector("#note .wrong"), shown = wrong ? wrong : {found};
  if (!shown) return;
  const box = shown.getBoundingClientRect();
  if (box.top < 0 || box.top + Math.min(box.height, 0.7 * window.innerHeight) > window.innerHeight)
    shown.scrollIntoView({{block: wrong ? "center" : "start"}});
}}, 150); return []; }}"""

HOW = """Draw a box on the image around one thing: drag, or click two opposite corners. Name it and add it.
<b>Find</b> then looks for its like, also in your next images: beside the words, or alone if there are none."""


def build_page(detector: OpenVocabularyDetector, examples: Sequence[Path] | None = None) -> gr.Blocks:
    """Build the page. ``examples`` are the only files of this machine that it shows; None: :func:`default_examples`."""
    photos = default_examples(detector) if examples is None else [_example(path) for path in examples]
    world = f"<p><b>{html.escape(detector.world)}</b></p>" if detector.world else ""
    intro = INTRO.format(base=web.mark("base"), novel=web.mark("novel"), unmarked=web.mark(""), world=world)

    def wrong(error: UserError) -> str:
        return f'<span class="wrong">{html.escape(web.sentence(error))}</span>'

    def upload(payload):
        """Read an uploaded image; ``payload`` is gradio's raw description of a file."""
        try:
            photo = web.read_photo(uploaded(payload))
        except UserError as error:
            return None, None, None, None, [], wrong(error)
        return photo.array, photo, None, None, [], ""

    def pick(index):
        return photos[index].array, photos[index], None, None, [], ""

    def add(photo, name, given, box):
        try:
            given = web.add_example(photo, box or "", name or "", given)
        except UserError as error:
            return given, gr.skip(), wrong(error)
        listed = ", ".join(f"{name} ({len(regions)})" for name, regions in given.items())
        return given, f"Added: {html.escape(listed)}", ""

    def find(photo, words, negatives, threshold, given):
        try:
            if photo is None:
                raise UserError("Upload an image, or pick a sample.")
            findings = web.search(detector, photo, words, negatives, given)
        except UserError as error:
            return None, None, [], wrong(error)
        return findings, *show(findings, threshold)

    def show(findings, threshold):
        if findings is None:
            return gr.skip()
        summary = html.escape(web.summary(findings, threshold))
        return web.drawing(findings, threshold), web.table(findings, threshold), summary

    with gr.Blocks(title="vild", analytics_enabled=False, delete_cache=(60, STORED_SECONDS)) as page:
        photo, findings, given = gr.State(None), gr.State(None), gr.State({})
        gr.HTML(intro, elem_id="intro")
        with gr.Row():
            with gr.Column(scale=5):
                image = gr.Image(label="Image", sources=["upload", "clipboard"], height=300, buttons=[],
                                   elem_id="image", format="jpeg")  # fmt: skip
                samples = None
                if photos:
                    samples = gr.Dataset(components=[gr.Image(visible=False, format="jpeg")], type="index",
                                         samples=[[p.array] for p in photos], label="Samples",
                                         samples_per_page=24, elem_id="examples")  # fmt: skip
                words = gr.Textbox(web.first_words(detector), label="Words", lines=1, max_lines=6, elem_id="words",
                                   info="Separated by commas, or a line each; synonyms with a bar: sofa | couch",
                                   placeholder="umbrella, chess knight")  # fmt: skip
                negatives = gr.Textbox(label="Not these", lines=1, max_lines=4, elem_id="negatives",
                                       info="What could be taken for one of them, and is not to be shown")  # fmt: skip
                with gr.Accordion("Search by example", open=False, elem_id="by-example"):
                    gr.HTML(HOW, elem_id="how")
                    name, box = gr.Textbox(label="Name", max_lines=1, elem_id="name"), gr.Textbox(visible=False)
                    with gr.Row():
                        more = gr.Button("Add example", elem_id="add", min_width=120)
                        fewer = gr.Button("Remove all", elem_id="remove", min_width=120)
                    listed = gr.HTML(elem_id="listed")
                button = gr.Button("Find", variant="primary", elem_id="find")
            with gr.Column(scale=6):
                result = gr.Image(label="Found", interactive=False, height=500, buttons=["download", "fullscreen"],
                                  elem_id="result", format="jpeg")  # fmt: skip
                threshold = gr.Slider(0, 1, THRESHOLD, step=0.01, label="Score threshold", elem_id="threshold")
                note = gr.HTML(elem_id="note")
                rows = gr.Dataframe(headers=["name", "score", "or", "split", "box (x1, y1, x2, y2)"], interactive=False,
                                    datatype=["str", "str", "str", "html", "str"], column_count=5, max_height=420,
                                    buttons=["copy"], show_label=False, elem_id="rows")  # fmt: skip

        shown = [result, rows, note]
        private = {"api_visibility": "private"}
        light = {"concurrency_id": "light", "concurrency_limit": 2, "show_progress": "hidden", **private}
        search = {
            "fn": find, "inputs": [photo, words, negatives, threshold, given], "outputs": [findings, *shown],
            "concurrency_id": "search", "concurrency_limit": 1, "show_progress_on": [result], **private,
        }  # fmt: skip
        emptied = [image, photo, findings, *shown]
        # raw, because gradio's error for a broken file would reveal its path
        error, result_or_error = SHOW.format(found="null"), SHOW.format(found='document.querySelector("#result")')
        image.upload(upload, image, emptied, preprocess=False, **light).then(js=error)
        image.clear(lambda: (None, None, None, [], ""), None, emptied[1:], **light)
        boxed = "(photo, name, given) => [photo, name, given, (window.drawnBox || []).join()]"
        added = {"fn": add, "inputs": [photo, name, given, box], "outputs": [given, listed, note], "js": boxed, **light}
        gr.on([more.click, name.submit], **added).then(js=error)
        fewer.click(lambda: ({}, ""), None, [given, listed], **light)
        page.load(js=DRAW)
        gr.on([button.click, words.submit, negatives.submit], **search).then(js=result_or_error)
        threshold.change(show, [findings, threshold], shown, trigger_mode="always_last", **light)
        if samples is not None:
            samples.click(pick, samples, emptied, **light).success(**search).then(js=result_or_error)
    return page.queue(api_open=False, max_size=WAITING)


def default_examples(detector: OpenVocabularyDetector) -> list[web.Photo]:
    """Drawings for a detector of the built-in world, else photographs."""
    if detector.world:
        return [web.Photo(drawing.scene(7, index)[0], 1.0) for index in range(8)]
    folder = Path(gr.__file__).parent / "media_assets" / "images"
    return [web.read_photo(folder / name) for name in PHOTOS if (folder / name).is_file()]


def _example(path: Path) -> web.Photo:
    try:
        return web.read_photo(path)
    except UserError as error:
        raise UserError(f"example {path}: {error}") from error


def uploaded(payload: object) -> Path:
    """The file of an upload. Raises UserError for a path outside gradio's upload folder."""
    path = payload.get("path") if isinstance(payload, dict) else None
    if not is_upload(path, gr.utils.get_upload_folder()):
        raise UserError("This is not an uploaded image.")
    if not Path(path).is_file():
        raise UserError("This image is no longer here: upload it again.")
    return Path(path)


def serve(detector: OpenVocabularyDetector, examples: Sequence[Path] | None, host: str, port: int) -> None:
    """Serve the page until interrupted. Uploads and drawings are kept in a temporary folder.

    Raises:
        UserError: the port is in use, the host is not this machine's, or an example is not an image.
    """
    with tempfile.TemporaryDirectory(prefix="vild-web-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(detector, examples)
        guard = Middleware(RequestFilter, folder=Path(folder), most_bytes=web.MOST_BYTES)
        try:
            page.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
                max_file_size=web.MOST_BYTES, state_session_capacity=SESSIONS, run_history=False, mcp_server=False,
                enable_monitoring=False, ssr_mode=False, pwa=False, footer_links=[], max_threads=8,
                app_kwargs={"middleware": [guard]}, css=CSS, theme=theme(),
            )  # fmt: skip
        except OSError as error:
            used = "Cannot find empty port" in str(error)  # gradio's advice is of its own variables
            raise UserError(f"--host {host} --port {port}: {'in use; give another port' if used else error}") from error
        print(f"the page: {page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def theme() -> gr.themes.Base:
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))  # comes with gradio; its weight 600 lacks letters
    fonts = (font, "system-ui", "sans-serif")
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", radius_size="lg", font=fonts, font_mono=fonts)
