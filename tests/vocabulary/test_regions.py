"""Classes by example: regions to rows of the text matrix, and the gap between image and text embeddings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vild.utils.errors import UserError
from vild.vocabulary.grow import with_examples
from vild.vocabulary.regions import Gap
from vild.vocabulary.vocabulary import Vocabulary

NAMES = ["kite", "sun", "Kite"]
BOXES = torch.tensor([[10.0, 20, 40, 60], [5, 5, 33, 21], [0, 0, 30, 30]])


@pytest.fixture
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in [(100, 80), (40, 64), (60, 60)]]


def tensors(pictures):
    return [torch.from_numpy(p.transpose(2, 0, 1).copy()) for p in pictures]


@pytest.fixture
def regions(teacher, pictures) -> Vocabulary:
    return Vocabulary.from_regions(teacher, NAMES, tensors(pictures), BOXES)


def test_a_class_is_the_mean_of_its_regions(teacher, pictures, regions):
    """Beside Pillow's crops: the window and one of 1.5 times its sides, clipped, resized, summed."""
    rows = []
    for picture, (x0, y0, x1, y1) in zip(pictures, BOXES.tolist(), strict=True):
        crops = []
        for scale in (1, 1.5):
            x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * scale / 2, (y1 - y0) * scale / 2
            window = [max(0, np.floor(x - w)), max(0, np.floor(y - h)), np.ceil(x + w), np.ceil(y + h)]
            window = np.minimum(window, [*picture.shape[1::-1]] * 2).astype(int).tolist()
            crop = Image.fromarray(picture).crop(window).resize(teacher.size[::-1], Image.Resampling.BICUBIC)
            pixels = (np.asarray(crop, np.float32) / 255 - np.float32(teacher.mean)) / np.float32(teacher.std)
            crops.append(teacher.encode_image(torch.from_numpy(pixels.transpose(2, 0, 1)[None]))[0])
        rows.append(F.normalize(sum(crops), dim=0))
    expected = torch.stack([F.normalize(rows[0] + rows[2], dim=0), rows[1]])
    torch.testing.assert_close(regions.embeddings, expected, atol=2e-4, rtol=0)
    assert regions.names == ("kite", "sun") and regions.splits == ("", "")
    assert regions.made_of == ("2 example regions", "1 example region")
    assert regions.fingerprint == teacher.fingerprint


def test_neither_order_nor_batch_matters(teacher, pictures, regions):
    order = [2, 1, 0]
    other = Vocabulary.from_regions(
        teacher, [NAMES[i] for i in order], [tensors(pictures)[i] for i in order], BOXES[order]
    )
    assert other.names == ("Kite", "sun")
    torch.testing.assert_close(other.embeddings, regions.embeddings)
    alone = Vocabulary.from_regions(teacher, NAMES[1:2], tensors(pictures)[1:2], BOXES[1:2])
    torch.testing.assert_close(alone.embeddings, regions.embeddings[1:])


def test_a_mirrored_example_is_the_same_region(teacher, monkeypatch):
    """To a teacher that does not tell left from right."""
    encode = teacher.encode_image
    blind = lambda x: F.normalize(encode(x) + encode(x.flip(3)), dim=1)  # noqa: E731
    monkeypatch.setattr(teacher, "encode_image", blind)
    rows, columns = np.mgrid[0:60, 0:90]
    image = torch.from_numpy(np.stack([rows * 4, columns * 2, (columns > 30) * 200]).astype(np.uint8))
    box = torch.tensor([[12.0, 10, 40, 44]])
    mirrored = torch.stack([90 - box[:, 2], box[:, 1], 90 - box[:, 0], box[:, 3]], 1)
    rows = [Vocabulary.from_regions(teacher, ["a"], [i], b).embeddings
            for i, b in ((image, box), (image.flip(2), mirrored), (image.flip(2), box))]  # fmt: skip
    torch.testing.assert_close(rows[1], rows[0], atol=1e-3, rtol=0)
    assert (rows[2] - rows[0]).abs().max() > 1e-2


def pairs(seed=0, count=300, width=16):
    """Regions and their words, with a gap between them."""
    random = torch.Generator().manual_seed(seed)
    words = torch.randn(20, width, generator=random)
    numbers = torch.randint(20, (count,), generator=random)
    apart = torch.zeros(width)
    apart[0] = 8
    regions = words[numbers] + 0.5 * torch.randn(count, width, generator=random)
    return F.normalize(regions + apart, dim=1), F.normalize(words - apart, dim=1)[numbers], numbers


def test_the_gap_is_a_least_squares_fit():
    regions, words, _ = pairs()
    gap = Gap.fit(regions, words)
    x, y = regions.double().numpy(), words.double().numpy()
    count, width = x.shape
    matrix = np.column_stack([x.ravel(), np.tile(np.eye(width), (count, 1))])  # a slope for all, a constant for each
    (slope, *constants), *_ = np.linalg.lstsq(matrix, y.ravel(), rcond=None)
    assert gap.slope == pytest.approx(slope, rel=1e-6)
    expected = slope * x + constants
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(gap.as_words(regions).numpy(), expected, atol=1e-6)
    assert gap.near == pytest.approx(np.quantile((expected * y).sum(1), 0.05), abs=1e-6)
    assert Gap.fit(regions, 2 * words.mean(0) - words) is None  # regions that are far from their words


def test_beside_words_an_example_takes_no_more_than_its_own():
    """As it is, an example is nearer to any region than that region's own word."""
    regions, words, numbers = pairs()
    distinct = torch.stack([words[numbers == n][0] for n in range(20)])
    probes, _, wanted = pairs()
    raw = torch.stack([regions[numbers == n][0] for n in range(10)])
    for rows, right in ((raw, False), (Gap.fit(regions, words).as_words(raw), True)):
        matrix = torch.cat([rows, distinct[10:]])  # ten names by example, ten words
        best = (probes @ matrix.T).argmax(1)
        of_words = best[wanted >= 10]
        assert ((of_words >= 10).float().mean() > 0.8) == right
        assert right or (best < 10).all()


@pytest.mark.parametrize(
    "change",
    [{"slope": 0.0}, {"slope": float("nan")}, {"near": float("inf")}, {"image": [1.0] * 3}, {"word": []}, {"image": 3}],
)
def test_a_broken_gap_is_refused(change):
    state = Gap.fit(*pairs()[:2]).state()
    assert Gap.from_state(state, 16) == Gap.fit(*pairs()[:2])
    with pytest.raises((ValueError, TypeError)):
        Gap.from_state({**state, **change}, 16)
    with pytest.raises(ValueError, match="width 16, the detector 64"):
        Gap.from_state(state, 64)


def test_a_word_with_examples_is_the_mean_of_both(vocabulary, regions, tmp_path):
    words = replace(vocabulary.take([5, 2]), names=("cow", "box kite"), synonyms=((), ("kite",)))
    both = with_examples(words, regions)
    assert both.names == ("cow", "box kite", "sun") and both.synonyms == ((), ("kite",), ())
    assert both.splits == (*words.splits, "")
    mean = words.embeddings[1] + regions.embeddings[0]
    expected = torch.stack([words.embeddings[0], mean / mean.norm(), regions.embeddings[1]])
    torch.testing.assert_close(both.embeddings, expected)
    assert torch.equal(both.embeddings[0], words.embeddings[0])
    assert both.made_of == ("", "word and 2 example regions", "1 example region")
    assert with_examples(words, regions.take([0])).made_of == ("", "word and 2 example regions")
    both.save(tmp_path / "v.safetensors")
    again = Vocabulary.load(tmp_path / "v.safetensors")
    assert torch.equal(again.embeddings, both.embeddings) and again.made_of == both.made_of
    assert again.take([2, 1]).made_of == ("1 example region", "word and 2 example regions")
    assert "made_of" not in words.state() and Vocabulary.from_state(words.state()).made_of == ()
    for wrong in (["x"], "abc", [1, 2, 3]):
        with pytest.raises(UserError, match="vocabulary is not a vocabulary"):
            Vocabulary.from_state({**both.state(), "made_of": wrong})
    other = replace(words, fingerprint={**words.fingerprint, "weights": "others"})
    with pytest.raises(UserError, match="examples: their embedding is of teacher"):
        with_examples(other, regions)
    with pytest.raises(UserError, match="examples: 'xxx"):
        Vocabulary.from_regions(None, ["x" * 201], [], BOXES)
