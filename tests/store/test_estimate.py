"""Size and time are said before a store is begun."""

import re
import time

import pytest

from vild.store import estimate
from vild.store.estimate import describe_work, time_sample


def test_lvis_in_one_line():
    text = describe_work(dict.fromkeys(range(100_170), 300), 512, "float16")
    assert text == "100,170 images, 30.1 M regions: 31.4 GB as float16"
    assert "16.1 GB as int8" in describe_work(dict.fromkeys(range(100_170), 300), 512, "int8")


@pytest.mark.parametrize("images", [1, 3, 99, 1000, 10_000])
def test_the_sample_is_small_spread_and_of_images_that_cost(images):
    counts = {i: 5 * (i % 10 > 0) for i in range(1, images + 1)}
    seen = []
    done, _, share = time_sample(counts, seen.extend, list(counts))
    sample = seen[1:] if len(seen) > 1 else seen  # the first is computed once more: it warms up
    assert len(sample) == done == len(set(sample)) <= 64 and all(counts[i] for i in sample)
    assert done == max(1, min(64, sum(map(bool, counts.values())) // 50))
    assert share == pytest.approx(5 * done / sum(counts.values()))
    if done > 30:
        assert min(sample) < 0.05 * images and max(sample) > 0.95 * images


def test_time_grows_with_the_regions_to_do(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    counts = {i: 1 + i % 7 for i in range(4000)}

    def compute(ids):
        clock[0] += sum(0.01 * counts[i] for i in ids)

    for to_do in (list(counts), list(range(1000))):
        _, seconds, share = time_sample(counts, compute, to_do)
        assert seconds / share == pytest.approx(0.01 * sum(counts[i] for i in to_do))
    text = describe_work(counts, 8, "float16", compute, list(counts))
    assert re.search(r"a sample of 64 took \d\.\d s: about 3 min on this device$", text)  # 160 s
    assert "still to do: 1,000 images" in describe_work(counts, 8, "float16", compute, range(1000))
    clock[0], longer = 0.0, estimate.SAMPLE_SECONDS + 1
    describe_work(dict.fromkeys(range(4000), 50), 8, "float16", lambda ids: clock.__setitem__(0, clock[0] + longer))
    assert clock[0] == longer  # one image took longer than a sample may


def test_nothing_to_do_costs_nothing():
    def never(ids):
        raise AssertionError

    assert "still to do" in describe_work({1: 5, 2: 5}, 8, "float16", never, [])
    assert describe_work({1: 0}, 8, "float16", never).startswith("1 image, 0 regions: ")
