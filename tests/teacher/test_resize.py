"""Against Pillow itself (the version constraints.txt pins: its order of the two passes is of version 13)."""

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from vild.teacher import resize_exact
from vild.teacher.crops import MODES, input_windows
from vild.teacher.resize import resize_windows
from vild.teacher.resize_exact import columns_first, count_taps, find_weights, resize_matmul, spread

FILL = (122, 117, 104)


@pytest.fixture(scope="module")
def images():
    """Noise of black and white, the hardest case for rounding and clipping, and a smooth image of another size."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (230, 310, 3), dtype=np.uint8) * 255
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((200, 280), Image.Resampling.BICUBIC))
    return [torch.from_numpy(p.copy()).permute(2, 0, 1) for p in (noise, smooth)]


def windows(images, count, seed=0):
    """(image, window) of all sizes and shapes: whole images, single pixels, lines, the borders, and at random."""
    rng, result = np.random.default_rng(seed), []
    for number, image in enumerate(images):
        h, w = image.shape[1:]
        result += [
            (number, box)
            for box in [(0, 0, w, h), (0, 0, 1, 1), (w - 1, h - 1, w, h), (0, 5, w, 6), (7, 0, 8, h), (0, 0, 2, h)]
        ]
        for _ in range(count):
            bw, bh = (int(np.exp(rng.uniform(0, np.log(n + 1)))) for n in (w, h))
            x, y = rng.integers(0, w - bw + 1), rng.integers(0, h - bh + 1)
            result.append((number, (int(x), int(y), int(x) + bw, int(y) + bh)))
    return result


def to_jobs(cases, size, mode):
    rows = np.array([(n, *window) for n, window in cases])
    _, x0, y0, x1, y1 = rows.T
    return torch.from_numpy(np.stack([*rows.T, *input_windows(y1 - y0, x1 - x0, size, mode)], 1))


def by_pillow(images, cases, size, mode, interpolation):
    """uint8 [N, 3, *size] by PIL; "center" by open_clip's own preprocessing."""
    opened = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in images]
    crops = (opened[n].crop(window) for n, window in cases)
    if mode == "center":
        chain = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation)
        return torch.stack([(chain(crop) * 255).round().to(torch.uint8) for crop in crops])
    pil = getattr(Image.Resampling, interpolation.upper())
    resized = [pad(crop, size, pil) if mode == "pad" else crop.resize(size[::-1], pil) for crop in crops]
    return torch.from_numpy(np.stack([np.array(r) for r in resized])).permute(0, 3, 1, 2)


def pad(crop, size, pil):
    shrink = min(size[1] / crop.width, size[0] / crop.height)
    small = crop.resize((max(round(crop.width * shrink), 1), max(round(crop.height * shrink), 1)), pil)
    canvas = Image.new("RGB", size[::-1], FILL)
    canvas.paste(small, ((size[1] - small.width) // 2, (size[0] - small.height) // 2))
    return canvas


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (45, 45)])
def test_equals_pillow(images, size, interpolation, mode):
    cases = windows(images, 60)
    jobs, expected = to_jobs(cases, size, mode), by_pillow(images, cases, size, mode, interpolation)
    exact = resize_matmul(images, jobs, size, interpolation, FILL)
    assert torch.equal(exact, expected)
    fast = resize_windows(images, jobs, size, interpolation, FILL)
    difference = (fast.int() - expected.int()).abs()
    assert difference.max() <= 2 and (difference > 1).float().mean() < 1e-3


@pytest.mark.parametrize("size", [(20, 60), (60, 20), (224, 224)])
def test_equals_pillow_in_other_canvases(images, size):
    cases = windows(images, 15, seed=1)
    exact = resize_matmul(images, to_jobs(cases, size, "squash"), size, "bicubic", FILL)
    assert torch.equal(exact, by_pillow(images, cases, size, "squash", "bicubic"))


def test_both_orders_of_the_passes_occur_and_matter(images, monkeypatch):
    """So that the tests above cannot pass by a fixed order."""
    jobs = to_jobs(windows(images[:1], 60), (32, 32), "squash")
    first = torch.from_numpy(columns_first(jobs.numpy()))
    assert first.any() and not first.all()
    right = resize_matmul(images, jobs, (32, 32), "bicubic", FILL)
    monkeypatch.setattr(resize_exact, "columns_first", lambda jobs: np.zeros(len(jobs), bool))
    fixed = resize_matmul(images, jobs, (32, 32), "bicubic", FILL)
    assert torch.equal(right[~first], fixed[~first]) and (right[first].int() - fixed[first].int()).abs().max() > 2


def test_groups_and_threads_change_nothing(images, monkeypatch):
    jobs = to_jobs(windows(images, 30, seed=2), (32, 32), "pad")
    exact, fast = (f(images, jobs, (32, 32), "bicubic", FILL) for f in (resize_matmul, resize_windows))
    alone = resize_matmul(images, jobs, (32, 32), "bicubic", FILL, memory=1)  # every window
    assert torch.equal(alone, exact)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(resize_windows(images, jobs, (32, 32), "bicubic", FILL), fast)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_matmul(images, jobs, (32, 32), "bicubic", FILL), exact)


def test_a_single_row_of_padding_is_filled(images):
    """It comes after the image, so that the output begins at 0."""
    job = to_jobs([(0, (0, 0, 32, 31))], (32, 32), "pad")
    assert job[0, 5:].tolist() == [31, 32, 0, 0]
    for function in (resize_matmul, resize_windows):
        assert function(images, job, (32, 32), "bicubic", FILL)[0, :, 31, 7].tolist() == list(FILL)


def test_flipping_the_image_flips_the_crops(images):
    size, width = (32, 32), images[1].shape[2]
    cases = [(0, window) for n, window in windows(images, 40) if n == 1]
    flipped = [(0, (width - x1, y0, width - x0, y1)) for _, (x0, y0, x1, y1) in cases]
    a = resize_matmul(images[1:], to_jobs(cases, size, "squash"), size, "bicubic", FILL)
    b = resize_matmul([images[1].flip(2)], to_jobs(flipped, size, "squash"), size, "bicubic", FILL)
    difference = (a.flip(3).int() - b.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01  # a half rounds up, not outwards


def test_matrices_survive_eleven_bits():
    """The factors keep their value in TF32 or half precision; all rows sum to one."""
    n, m = torch.tensor([1, 2, 7, 300, 640]), torch.tensor([224, 224, 3, 224, 50])
    count, taps = torch.arange(640), count_taps(n.numpy(), m.numpy(), "bicubic").max()
    high, low = spread(*find_weights(n, m, torch.zeros_like(n), count, 224, taps, "bicubic"), count, 640).unbind(1)
    assert torch.equal(high.half().float(), high) and torch.equal(low.half().float(), low)
    whole = high.double() * 4096 + low.double()
    inside = torch.arange(224) < m[:, None]
    assert (whole.sum(2)[inside] / 2**22 - 1).abs().max() < 1e-5
    assert (whole[~inside] == 0).all()


def test_no_windows(images):
    none = torch.zeros((0, 9), dtype=torch.int64)
    for function in (resize_matmul, resize_windows):
        assert function(images, none, (8, 8), "bicubic", FILL).shape == (0, 3, 8, 8)
        assert function([], none, (8, 8), "bicubic", FILL).shape == (0, 3, 8, 8)
