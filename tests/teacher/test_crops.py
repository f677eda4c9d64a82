import numpy as np
import pytest
import torch
from PIL import Image

from vild.teacher.crops import MODES, crop_batch, enlarge, fuse_scales, normalise, to_pixels
from vild.utils.errors import UserError

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
BOXES = torch.tensor(
    [[10.2, 20.7, 60.1, 50.3], [0.0, 0.0, 160.0, 120.0], [100.0, 90.0, 158.9, 119.5], [3.1, 4.2, 9.9, 9.0]]
)


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    return torch.from_numpy(np.asarray(coarse.resize((160, 120), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)


def crop_regions(image, boxes, size, mean, std, interpolation="bicubic", **settings):
    """One image's crops as the teacher's input: float32 [N, S, 3, *size]."""
    return normalise(crop_batch([image], [boxes], size, mean, interpolation, **settings), mean, std)


def pil_crop(pixels, window, size, mode):
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).crop(window)
    array = np.asarray(image.resize(size[::-1], mode), np.float32) / 255
    return (array - np.array(MEAN)) / np.array(STD)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_equals_pil_within_rounding(image, mode):
    size = (32, 32)
    crops = crop_regions(image, BOXES, size, MEAN, STD, mode)
    assert crops.shape == (4, 2, 3, 32, 32)
    for s, scale in enumerate((1.0, 1.5)):
        for n, window in enumerate(to_pixels(enlarge(BOXES, scale), 120, 160).tolist()):
            expected = pil_crop(image, window, size, getattr(Image.Resampling, mode.upper()))
            difference = np.abs(crops[n, s].permute(1, 2, 0).numpy() - expected) * np.array(STD) * 255
            assert difference.max() <= 2.001 and (difference > 1.001).mean() < 0.005


def test_windows_cover_their_boxes():
    """By hand: [low, high) whole pixels around [10.5, 20.25, 50.75, 80.5] at 1x and 1.5x, clipped to 120 x 160."""
    box = torch.tensor([[10.5, 20.25, 50.75, 80.5]])
    assert to_pixels(box, 120, 160).tolist() == [[10, 20, 51, 81]]
    assert to_pixels(enlarge(box, 1.5), 120, 160).tolist() == [[0, 5, 61, 96]]
    assert to_pixels(torch.tensor([[159.9, 119.9, 170, 130]]), 120, 160).tolist() == [[159, 119, 160, 120]]


def test_batched_equals_one_by_one(image):
    together = crop_regions(image, BOXES, (24, 24), MEAN, STD)
    single = [crop_regions(image, box[None], (24, 24), MEAN, STD) for box in BOXES]
    assert torch.equal(together, torch.cat(single))


@pytest.mark.parametrize("mode", MODES)
def test_several_images_in_one_call_equal_one_by_one(image, mode):
    images = [image, image[:, 10:90, 20:70].flip(0), image[:, :50]]
    boxes = [BOXES, torch.zeros(0, 4), BOXES[1:3]]
    together = crop_batch(images, boxes, (24, 24), MEAN, mode=mode)
    single = [crop_batch([p], [b], (24, 24), MEAN, mode=mode) for p, b in zip(images, boxes, strict=True)]
    assert together.dtype == torch.uint8 and together.shape == (6, 2, 3, 24, 24)
    assert torch.equal(together, torch.cat(single))
    assert crop_batch([], [], (24, 24), MEAN, mode=mode).shape == (0, 2, 3, 24, 24)


def test_modes_show_the_whole_box_its_middle_or_all_of_it_between_bars(image):
    ramp = torch.arange(160, dtype=torch.uint8).expand(3, 120, 160)
    box = [torch.tensor([[0.0, 0.0, 160.0, 40.0]])]
    shown = {m: crop_batch([ramp], box, (40, 40), MEAN, scales=(1.0,), mode=m)[0, 0, 0] for m in MODES}
    assert shown["squash"].min() < 5 and shown["squash"].max() > 154
    assert torch.equal(shown["center"], ramp[0, :40, 60:100])
    bars = normalise(crop_batch([ramp], box, (40, 40), MEAN, scales=(1.0,), mode="pad"), MEAN, STD)[0, 0]
    assert bars[:, :15].abs().max() < 0.01 and bars[:, 25:].abs().max() < 0.01  # the mean: nothing
    assert shown["pad"][15:25].min() < 5 and shown["pad"][15:25].max() > 154
    with pytest.raises(UserError, match="'centre'"):
        crop_batch([ramp], box, (40, 40), MEAN, mode="centre")


def test_normalise(image):
    values = normalise(image.expand(2, 5, *image.shape), MEAN, STD)
    expected = (image / 255.0 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(values, expected.expand_as(values), atol=1e-5, rtol=0)
    assert torch.equal(normalise(image, MEAN, STD), values[1, 3])


def test_enlarged_boxes_keep_their_centre_and_are_clipped():
    big = enlarge(BOXES, 1.5)
    torch.testing.assert_close((big[:, :2] + big[:, 2:]) / 2, (BOXES[:, :2] + BOXES[:, 2:]) / 2)
    torch.testing.assert_close(big[:, 2:] - big[:, :2], 1.5 * (BOXES[:, 2:] - BOXES[:, :2]))
    windows = to_pixels(big, 120, 160)
    assert windows.min() >= 0 and windows[:, 2].max() <= 160 and windows[:, 3].max() <= 120


def test_degenerate_and_outside_boxes_give_at_least_a_pixel(image):
    boxes = torch.tensor([[50.0, 50.0, 50.0, 50.0], [-20.0, -20.0, -5.0, -5.0], [500.0, 500.0, 600.0, 600.0]])
    windows = to_pixels(boxes, 120, 160)
    assert (windows[:, 2:] > windows[:, :2]).all()
    assert crop_regions(image, boxes, (8, 8), MEAN, STD).isfinite().all()


def test_no_boxes(image):
    assert crop_regions(image, torch.zeros(0, 4), (8, 8), MEAN, STD).shape == (0, 2, 3, 8, 8)


def test_a_resize_of_the_whole_image_is_antialiased():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    crop = crop_regions(stripes, torch.tensor([[0.0, 0.0, 64.0, 64.0]]), (8, 8), (0, 0, 0), (1, 1, 1), scales=(1.0,))
    assert (crop - 0.5).abs().max() < 0.05


def test_fused_scales_are_unit_and_symmetric():
    embeddings = torch.nn.functional.normalize(torch.randn(5, 2, 16), dim=2)
    fused = fuse_scales(embeddings)
    torch.testing.assert_close(fused.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(fused, fuse_scales(embeddings.flip(1)))
