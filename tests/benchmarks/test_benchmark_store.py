"""The store's benchmark compares equal things and counts their bytes."""

import argparse

import pytest
import torch
from benchmarks import store


def test_rows_of_a_small_store(tmp_path):
    torch.set_num_threads(1)
    rows = list(store.run(argparse.Namespace(num_images=12, regions=40, width=512, scratch=tmp_path)))
    measured, computed = rows[:-2], rows[-2:]
    assert len(measured) == 8 and not list(tmp_path.iterdir())
    for row in measured:
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["ours_s"]) and row["ours_s"] > 0
        assert row["max_abs_diff"] == 0 and row["min_cosine"] > (0.9999 if "int8" in row["what"] else 0.999999)
        assert row["minimum_bytes"] == 12 * 40 * 512 * (1 if "int8" in row["what"] else 2)
        assert row["share_over_minimum"] == pytest.approx(row["bytes"] / row["minimum_bytes"] - 1)
    assert computed[0]["minimum_bytes"] == 100_170 * 300 * 512 * 2 and 0 < computed[0]["share_over_minimum"] <= 0.02
