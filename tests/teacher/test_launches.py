"""The teacher pass keeps a GPU busy: few operators an image, and a batch waits for nothing. Counted without one."""

import math

import pytest
import torch
from benchmarks.launches import Launches, NoTower, planned_images

from vild.engine import build_store
from vild.teacher.crops import crop_batch
from vild.teacher.region_pass import Encoder, encode_images, to_host

REGIONS = 300
MEAN = (0.48, 0.46, 0.41)


@pytest.mark.parametrize("crop", ["squash", "center", "pad"])
def test_an_image_of_the_teacher_pass(crop):
    teacher, batch = NoTower("meta", crop), 2048
    list(encode_images(Encoder(teacher, batch), planned_images(teacher, 4, REGIONS)))  # constants are on the device now
    images = list(planned_images(teacher, 10, REGIONS))
    with Launches() as counter:
        found = list(encode_images(Encoder(teacher, batch), images))
    assert [tuple(e.shape) for e in found] == [(REGIONS, teacher.width)] * len(images)
    batches = math.ceil(len(images) * REGIONS * 2 / batch)
    assert 50 < counter.launches / len(images) <= 600, counter.by_name
    assert 0 < counter.transfers <= batches


def test_images_on_the_device_send_their_numbers_once():
    image = torch.zeros(3, 480, 640, dtype=torch.uint8, device="meta")
    boxes = torch.tensor([[0.0, 0.0, 50.0, 60.0]] * 9)
    crop_batch([image], [boxes], (48, 48), MEAN, device="meta")
    with Launches() as counter:
        crops = crop_batch([image] * 4, [boxes] * 4, (48, 48), MEAN, device="meta")
    assert crops.shape == (36, 2, 3, 48, 48) and crops.device.type == "meta" and counter.transfers == 1


def test_the_counter_sees_what_waits():
    device, mask = torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.bool, device="meta")
    with Launches() as counter:
        device[1:].view(2, 1)  # views
        device.add(1).mul_(2)
        device.copy_(torch.zeros(3))
        torch.tensor([1.0, 2.0], device="meta")
    assert (counter.launches, counter.transfers) == (3, 2)
    for wait in (lambda: device[0].item(), lambda: device[mask], lambda: mask.nonzero(), lambda: device.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)), Launches():
            wait()


def test_results_and_the_timed_sample_are_waited_for(
    tool, monkeypatch, world, proposals_file, teacher_folder, tmp_path
):
    """Only what copies the embeddings to the host has seen the device finish, and "meta" refuses to copy."""
    with pytest.raises(NotImplementedError, match="meta"):
        to_host([torch.zeros(2, 8, device="meta")])
    sampled = []

    def describe(counts, width, dtype, compute, to_do):
        with monkeypatch.context() as patch, pytest.raises(NotImplementedError, match="meta"):
            patch.setattr(build_store, "encode_images", lambda *_: iter([torch.zeros(2, 8, device="meta")]))
            compute(list(to_do)[:1])
        sampled.append(True)
        return ""

    monkeypatch.setattr(build_store, "describe_work", describe)
    words = ["--dataset", "glyphs_train", "--proposals", proposals_file, "--teacher", f"local-dir:{teacher_folder}"]
    words += ["--output-dir", tmp_path / "store", "--max-per-image", 1, "--device", "cpu", "--num-workers", 0]
    assert tool("build_teacher_store.py", *words, "--num-gpus", 0) == 0 and sampled
