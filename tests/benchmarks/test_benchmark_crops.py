import pytest
import torch
from benchmark import make_benchmark_parser
from benchmarks import common, crops

from vild.utils.errors import UserError


def arguments(*words):
    small = ("--device", "cpu", "--boxes", "20", "--repeats", "1", "--embedded", "5")
    return make_benchmark_parser().parse_args(["crops", *small, *words])


def test_crops_are_measured_beside_both_baselines(teacher_folder):
    pil, aligned = crops.run(arguments("--teacher", f"local-dir:{teacher_folder}", "--at-once", "7"))
    for row in (pil, aligned):
        assert row["ratio"] == row["baseline_s"] / row["ours_s"]
        assert row["worst_crop_share_over_2"] == 0 and row["max_abs_diff_255"] <= 2 and row["min_cosine"] > 0.9995
    assert pil["baseline_max_abs_diff_255"] == 0
    assert aligned["baseline_worst_crop_share_over_2"] > 0.1  # the measure sees what is not antialiased


def test_a_pixel_off_by_three_levels_is_seen():
    a, b = torch.zeros(2, 3, 10, 10), torch.zeros(2, 3, 10, 10)
    b[1, 2, 4, 4], b[0, 1, 3, 3] = 3, 2
    torch.testing.assert_close(crops.difference(a, b), torch.tensor([[0.0, 2.0], [0.01, 3.0]]))


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        common.list_images(tmp_path)
