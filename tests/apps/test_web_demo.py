"""What the web page calls, without a browser."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.test_images import bad_images
from vild.apps import web
from vild.inference.drawing import draw
from vild.utils.errors import UserError

SENTENCES = {"text": "not an image", "empty": "not an image", "truncated": "not an image", "huge": "million pixels"}


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
    assert web.read_texts(" ,", "cow", alone=False) == (None, ("cow",))
    for words, negatives in ((",".join(map(str, range(1999))), "a|b"), ("", ",".join(map(str, range(2001))))):
        with pytest.raises(UserError, match=r"2,001 words"):
            web.read_texts(words, negatives, alone=False)
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


def test_an_example_is_the_region_that_was_drawn(detector, photo):
    """The corners in any order; alone, and beside a word: bit for bit what the predictor finds with the whole image."""
    examples = web.add_example(photo, "0.4,0.25,0.1,0.75", " mine ", {})
    examples = web.add_example(photo, "0,0,1,1", "mine", web.add_example(photo, "0.5,0.9,0.8,1", "sun", examples))
    image = Image.fromarray(photo.array)
    regions = {"mine": [(12, 22, 48, 68), (0, 0, 120, 90)], "sun": [(60, 81, 96, 90)]}
    regions = {name: [(image, box) for box in boxes] for name, boxes in regions.items()}
    for words in ("", "umbrella, mine"):
        findings = web.search(detector, photo, words, "cow", examples)
        expected = detector.with_vocabulary(words or None, examples=regions, negatives=["cow"])
        assert torch.equal(findings.found.scores, expected(photo.array, threshold=0, channels="RGB").scores)
        assert findings.found.names == (("umbrella", "mine", "sun") if words else ("mine", "sun"))
    assert examples["sun"][0][0].size == (54, 12)  # no more is kept than the teacher sees


@pytest.mark.parametrize(
    ("box", "name", "count", "message"),
    [
        ("", "mine", 0, "Draw a box on the image first"),
        ("0,0,1", "mine", 0, "Draw a box"),
        ("0,0,1,1.1", "mine", 0, "Draw a box"),
        ("0,nan,1,1", "mine", 0, "Draw a box"),
        ("0.1,0.1,0.1,0.9", "mine", 0, "Example of 'mine': box 12,9,12,81 has no area."),
        ("0,0,1,1", " ", 0, "Name what is in the box."),
        ("0,0,1,1", "a|b", 0, "'a|b' is not one name"),
        ("0,0,1,1", "x" * 201, 0, "201 characters"),
        ("0,0,1,1", "mine", 5, "At most 5 examples"),
    ],
)
def test_a_wrong_example_is_a_sentence(photo, box, name, count, message):
    with pytest.raises(UserError) as caught:
        web.add_example(photo, box, name, {"other": [None] * count})
    assert message in web.sentence(caught.value)
    with pytest.raises(UserError, match="Draw a box"):
        web.add_example(None, "0,0,1,1", "mine", {})


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


def test_examples_without_a_flag(detector):
    """Drawings for the built-in world's detector; else the photographs of gradio."""
    pytest.importorskip("gradio")
    from types import SimpleNamespace

    from vild.apps.web_page import default_examples

    drawn = default_examples(detector)
    assert len(drawn) == 8 and len({photo.array.tobytes() for photo in drawn}) == 8
    photos = default_examples(SimpleNamespace(world=""))
    assert photos and all(min(photo.array.shape[:2]) > 200 for photo in photos)
