"""Search by example: regions of images beside words and instead of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.inference.test_predictor import same
from vild.data import datasets
from vild.evaluation.evaluator import ground_truth_boxes
from vild.inference.examples import parse_examples, read_examples
from vild.modeling.calibration import Calibration
from vild.utils.errors import UserError
from vild.vocabulary.regions import Gap
from vild.vocabulary.vocabulary import Vocabulary


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 150, 3), dtype=np.uint8))


@pytest.fixture
def examples(image) -> dict:
    return {"kite": [(image, (10, 20, 60, 70)), (image, (0, 0, 150, 100))], "sun": [(image, (100, 50, 140, 90))]}


def test_examples_alone_and_with_words(detector, teacher, image, examples):
    pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
    boxes = torch.tensor([[10.0, 20, 60, 70], [0, 0, 150, 100], [100, 50, 140, 90]])
    kite, whole, sun = teacher.encode_regions(pixels, boxes)
    alone = detector.with_vocabulary(examples=examples)
    assert alone.names == ("kite", "sun") and alone.vocabulary.splits == ("", detector.trained.splits[
        detector.trained.names.index("sun")])  # fmt: skip
    expected = torch.nn.functional.normalize(torch.stack([kite + whole, sun]), dim=1)
    torch.testing.assert_close(alone.vocabulary.embeddings, expected)
    both = detector.with_vocabulary(["umbrella", "box kite | kite"], examples=examples)
    word = detector.with_vocabulary(["box kite | kite"]).vocabulary.embeddings[0]
    assert both.names == ("umbrella", "box kite", "sun")
    torch.testing.assert_close(both.vocabulary.embeddings[1], torch.nn.functional.normalize(word + expected[0], dim=0))
    assert both.vocabulary.made_of == ("", "word and 2 example regions", "1 example region")
    file = detector.with_vocabulary(detector.trained.take([3]), examples=examples)
    assert file.names == (detector.trained.names[3], "kite", "sun")


def test_permuted_batched_and_as_a_saved_vocabulary(detector, image, examples, tmp_path):
    chosen = detector.with_vocabulary(["umbrella", "cow"], examples=examples)
    found = chosen(image, threshold=0)
    assert len(found) > 10
    turned = {name: regions[::-1] for name, regions in reversed(examples.items())}
    permuted = detector.with_vocabulary(["cow", "umbrella"], examples=turned)
    assert permuted.names == ("cow", "umbrella", "sun", "kite") and same(permuted(image, threshold=0), found)
    small = image.resize((75, 50))
    assert all(same(a, b) for a, b in zip(chosen([image, small], threshold=0),
                                          [found, chosen(small, threshold=0)], strict=True))  # fmt: skip
    chosen.vocabulary.save(tmp_path / "v.safetensors")
    assert same(detector.with_vocabulary(tmp_path / "v.safetensors", context=True)(image, threshold=0), found)


def test_no_examples(detector, image):
    words = detector.with_vocabulary(["umbrella"], examples={})
    assert words.vocabulary.made_of == () and same(words(image, threshold=0), detector(image, ["umbrella"], 0))
    for nothing in (None, {}):
        with pytest.raises(UserError, match="vocabulary: it is empty; give words or examples"):
            detector.with_vocabulary(examples=nothing)


def test_a_moved_region_ranks_its_own_class_first(world, teacher):
    """Even an untrained teacher knows a drawing again whose box is two pixels off."""
    record = max(datasets.load_dicts("glyphs_val"), key=lambda r: len(r["annotations"]))
    boxes, _ = ground_truth_boxes("glyphs_val")[record["image_id"]]
    regions = [(record["file_name"], box) for box in boxes.tolist()]
    names, images, _ = read_examples({f"thing {n}": [region] for n, region in enumerate(regions)})
    made = Vocabulary.from_regions(teacher, names, images, boxes)
    moved = teacher.encode_regions(images[0], (boxes + torch.tensor([2.0, -2, 2, -2])).clamp(0, 128))
    assert len(boxes) > 4 and torch.equal((moved @ made.embeddings.T).argmax(1), torch.arange(len(boxes)))


@pytest.fixture
def calibrated(detector):
    """The detector, and a gap by which an example is its word."""
    width = detector.trained.width
    gap = Gap((0.0,) * width, (0.0,) * width, 1.0, 1 - 1e-5)
    detector._words.gap = gap
    return detector


def test_a_thing_of_training_by_another_name_does_not_compete_with_its_word(calibrated, examples):
    """An example so near to a base name that it is one. What has a known name is what its name says."""
    trained = calibrated.trained
    sun = trained.names.index("sun")
    number = next(i for i, split in enumerate(trained.splits) if split == "base" and i != sun)
    row = calibrated.with_vocabulary(examples=examples).vocabulary.embeddings
    rows = trained.embeddings.clone()
    names = {}
    for near in (row[0], row[1]):
        rows[number] = near
        calibrated._words.trained = replace(trained, embeddings=rows)
        names[near] = calibrated.with_vocabulary(["umbrella"], examples=examples)._offered.names
    unknown, known = names.values()
    base = {name for name, split in zip(trained.names, trained.splits, strict=True) if split == "base"}
    others = base - {"umbrella", "sun"}
    assert set(unknown[3:]) == others - {trained.names[number]} and set(known[3:]) == others


def test_the_gap_of_the_calibration_is_used(detector, make_cfg, examples, tmp_path, caplog):
    from vild.checkpoint.checkpointer import save_weights
    from vild.inference.predictor import OpenVocabularyDetector

    raw = detector.with_vocabulary(examples=examples).vocabulary.embeddings
    assert "was not calibrated" in caplog.text
    gap = Gap(tuple(raw[0].tolist()), tuple(detector.trained.embeddings[0].tolist()), 0.5, 0.9)
    detector.model.roi_heads.calibration = Calibration((1, 0, 0), (1, 0, 0, 0), 0.01, "x", 1, 1, examples=gap)
    save_weights(tmp_path / "model.safetensors", detector.model)
    again = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(tmp_path / "model.safetensors")))
    assert again.model.roi_heads.calibration.examples == gap
    rows = again.with_vocabulary(examples=examples).vocabulary.embeddings
    expected = detector.trained.embeddings[0] + 0.5 * (raw - raw[0])
    torch.testing.assert_close(rows, torch.nn.functional.normalize(expected, dim=1))


MISTAKES = [
    ("a.png", "write IMAGE:X0,Y0,X1,Y1=NAME"),
    ("a.png:1,2,3=kite", "write IMAGE:X0,Y0,X1,Y1=NAME"),
    ("a.png:1,2,3,4", "write IMAGE:X0,Y0,X1,Y1=NAME"),
    ("a.png:1,2,3,x=kite", "example of 'kite' in .*a.png: box 1,2,3,x is not four numbers"),
    ("a.png:1,2,3,nan=kite", "box 1,2,3,nan is not four numbers"),
    ("a.png:1,2,3,4=", "one has no name"),
    ("a.png:1,2,3,4= ", "one has no name"),
    ("a.png:1,2,3,4=a|b", r"'a\|b' is not one name"),
    ("a.png:1,2,3,4=a, b", "'a, b' is not one name"),
    ("none.png:1,2,3,4=kite", "none.png"),
    ("a.png:30,2,10,40=kite", "box 30,2,10,40 has its corners in the wrong order"),
    ("a.png:3,20,10,4=kite", "corners in the wrong order"),
    ("a.png:3,4,3,9=kite", "box 3,4,3,9 has no area"),
    ("a.png:-1,4,3,9=kite", "box -1,4,3,9 is not within the image, which has 150 x 100 pixels"),
    ("a.png:0,0,100,150=kite", "box 0,0,100,150 is not within the image"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_one_line(image, tmp_path, monkeypatch, text, message):
    image.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert parse_examples(["a.png:0,0,150,100=kite", "a.png:1,2,3.5,4=box = kite: red", "a.png:5,5,9,9=kite"]) == {
        "kite": [("a.png", ["0", "0", "150", "100"]), ("a.png", ["5", "5", "9", "9"])],
        "box = kite: red": [("a.png", ["1", "2", "3.5", "4"])],
    }
    with pytest.raises(UserError, match=message):
        parse_examples(["a.png:0,0,150,100=kite", text])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([("a.png", (1, 2, 3, 4))], "is not a dict"),
        ({"kite": []}, "'kite' has no list of regions"),
        ({"kite": "a.png"}, "'kite' has no list of regions"),
        ({"kite": ["a.png"]}, "a region of 'kite' is not"),
        ({"kite": [(np.zeros((9, 9, 3), np.uint8), (1, 2, 3, 4))]}, "an image of 'kite' is an array"),
        ({"kite": [(Image.new("RGB", (9, 9)), None)]}, "example of 'kite': box None is not four numbers"),
        ({3: [(Image.new("RGB", (9, 9)), (1, 2, 3, 4))]}, "one has no name"),
    ],
)
def test_wrong_values_in_python(examples, message):
    with pytest.raises(UserError, match=message):
        read_examples(examples)
