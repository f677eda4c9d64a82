import itertools
import json
import signal
from dataclasses import replace

import pytest
import torch

from vild.data import datasets, loader
from vild.data.loader import ResumableSampler, build_train_loader, check_masks, check_store
from vild.store.store import EmbeddingStore
from vild.utils.errors import UserError


def test_images_for_a_gpu_are_pinned(make_cfg, world):
    for device, pinned in (("cuda", True), ("cpu", False)):
        cfg = make_cfg("text", "MODEL.VILD.STORE", "").clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = device
        assert build_train_loader(cfg, None).loader.loader.pin_memory == pinned


@pytest.mark.parametrize("grouping", [False, True])
def test_no_sigterm_ends_a_worker_that_is_starting(make_cfg, world, tmp_path, monkeypatch, grouping):
    """With and without aspect ratio grouping it waits until the worker knows what to do with it."""

    def start(number):
        held = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        (tmp_path / f"worker{number}").write_text(str(held))

    monkeypatch.setattr(loader, "start_worker", start)
    keys = ("DATALOADER.ASPECT_RATIO_GROUPING", grouping, "DATALOADER.NUM_WORKERS", 1)
    next(iter(build_train_loader(make_cfg("text", "MODEL.VILD.STORE", "", *keys), None)))
    assert (tmp_path / "worker0").read_text() == "True"
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def take(sampler, count):
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize("repeats", [torch.ones(7), torch.tensor([1.0, 2.5, 1.3, 1.0])])
def test_the_stream_can_start_anywhere(repeats):
    whole = take(ResumableSampler(repeats, seed=3), 60)
    for start in (0, 1, 7, 8, 33):
        assert take(ResumableSampler(repeats, seed=3, start=start), 60 - start) == whole[start:]


def test_an_epoch_holds_every_record_once():
    stream = take(ResumableSampler(torch.ones(7), seed=0), 21)
    for epoch in range(3):
        assert sorted(index for _, index in stream[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert [position for position, _ in stream] == list(range(21))
    assert stream[:7] != [(p - 7, i) for p, i in stream[7:14]]


def test_ranks_share_the_stream(monkeypatch):
    whole = take(ResumableSampler(torch.ones(5), seed=0, start=3), 20)
    parts = []
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        parts += take(ResumableSampler(torch.ones(5), seed=0, start=3), 10)
    assert sorted(parts) == sorted(whole)


def test_repeat_factors_repeat():
    stream = take(ResumableSampler(torch.tensor([1.0, 3.0]), seed=0), 400)
    share = sum(index == 1 for _, index in stream) / 400
    assert 0.7 < share < 0.8


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_position_alone(make_cfg, workers):
    """Any number of workers, started anywhere, gives the same augmented batches."""
    plain = batches(make_cfg(), 0, 5)
    resumed = batches(make_cfg("vild", "DATALOADER.NUM_WORKERS", workers), 2, 3)
    for a, b in zip(plain[2:], resumed, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x["image_id"] == y["image_id"] and torch.equal(x["image"], y["image"])
            assert torch.equal(x["distill"].proposal_boxes.tensor, y["distill"].proposal_boxes.tensor)


def batches(cfg, start, count):
    from vild.engine.sources import open_store

    return list(itertools.islice(build_train_loader(cfg, open_store(cfg), start), count))


def test_user_errors(world, make_cfg):
    with pytest.raises(UserError, match="'glyphs_trian' is not known; did you mean 'glyphs_train'"):
        build_train_loader(make_cfg("text", "DATASETS.TRAIN", "('glyphs_trian',)"), None)
    with pytest.raises(UserError, match="DATASETS.TRAIN is empty"):
        build_train_loader(make_cfg("text", "DATASETS.TRAIN", "()"), None)


def test_a_missing_annotation_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError, match=r"glyphs/annotations/coco_train\.json does not exist.*make_glyphs"):
        datasets.load_dicts("glyphs_train")


def test_a_users_own_data_set(world, tmp_path, monkeypatch):
    """One file of names and one command: base annotations for training, the rest left out."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    document = {
        "images": [{"id": 1, "coco_url": "http://x/train2017/000001.jpg", "height": 10, "width": 20}],
        "categories": [{"id": 9, "name": "cow"}, {"id": 4, "name": "sun"}, {"id": 6, "name": "moon"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": c, "bbox": [0, 0, 5, 5]} for i, c in enumerate((9, 4, 6), 1)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"base": ["sun"], "novel": ["cow"]}))
    datasets.add_entry("mine", datasets.Entry("a.json", "pictures", str(split), keep="base"))
    assert datasets.get_classes("mine").names == ("sun", "cow")
    (record,) = datasets.load_dicts("mine")
    assert record["file_name"].endswith("pictures/train2017/000001.jpg")
    assert [a["category_id"] for a in record["annotations"]] == [0]


def test_a_store_of_other_images_is_refused(make_cfg, store_folder, tmp_path):
    store = EmbeddingStore(store_folder)
    records = datasets.load_dicts("glyphs_train")
    check_store(store, ("glyphs_train",), records)
    with pytest.raises(UserError, match="image_id 4000 is not in it"):
        check_store(store, ("glyphs_train",), [*records, {"image_id": 4000}])
    store.plan["pictures"] = datasets.images_hash("glyphs_train_all")  # the same images
    check_store(store, ("glyphs_train",), records)
    store.plan["pictures"] = ["another", datasets.images_hash("glyphs_train")]  # merged
    check_store(store, ("glyphs_train",), records)
    with pytest.raises(UserError, match="other images"):
        check_store(store, ("glyphs_train", "glyphs_val"), records)
    store.plan["pictures"] = datasets.images_hash("glyphs_val")
    with pytest.raises(UserError, match="built from other images"):
        check_store(store, ("glyphs_train",), records)


def test_a_store_may_lack_images_where_a_teacher_is_at_work(store_folder, world, caplog):
    store, records = EmbeddingStore(store_folder), datasets.load_dicts("glyphs_train")
    with caplog.at_level("INFO", "vild"):
        check_store(store, ("glyphs_train",), [*records, {"image_id": 4000}], mixed=True)
    assert f"has {len(records)} of {len(records) + 1} images" in caplog.text
    store.plan["pictures"] = datasets.images_hash("glyphs_val")  # their ids would mean other images
    with pytest.raises(UserError, match="built from other images"):
        check_store(store, ("glyphs_train",), records, mixed=True)


@pytest.mark.parametrize("mixed", [False, True])
def test_two_images_under_one_id_have_no_store(store_folder, world, mixed):
    """As two data sets of one training may number theirs alike; the same image twice is no harm."""
    store, records = EmbeddingStore(store_folder), datasets.load_dicts("glyphs_train")
    check_store(store, ("glyphs_train",), [*records, records[0]], mixed)
    other = {**records[0], "file_name": "b.jpg"}
    with pytest.raises(UserError, match=rf"image_id {other['image_id']} of DATASETS.TRAIN .* is .* and b\.jpg"):
        check_store(store, ("glyphs_train", "mine"), [*records, other], mixed)


def test_masks_are_checked_before_training():
    polygon, rle = [[0, 0, 1, 1, 2, 0]], {"size": [2, 2], "counts": "13"}

    def records(*masks):
        return [
            {"file_name": f"{n}.jpg", "annotations": [{"iscrowd": 0, "segmentation": m}]} for n, m in enumerate(masks)
        ]

    check_masks(records(polygon), "polygon")
    check_masks(records(rle, polygon), "bitmask")
    check_masks([{"file_name": "a.jpg", "annotations": [{"iscrowd": 1}]}], "polygon")
    with pytest.raises(
        UserError, match=r"MASK_ON is True, but 2 of 3 .* no mask, first in image 1\.jpg: add or remove"
    ):
        check_masks(records(polygon, None, {"size": [2, 2], "counts": "4"}), "bitmask")
    with pytest.raises(
        UserError, match=r"2 of 2 annotations of DATASETS.TRAIN have no mask, .* 0\.jpg: set it to False"
    ):
        check_masks(records([], None), "polygon")
    with pytest.raises(UserError, match=r"MASK_FORMAT is polygon, but 1 of 2 masks are RLE, first in image 1\.jpg"):
        check_masks(records(polygon, rle), "polygon")


def test_a_split_is_checked(world, tmp_path):
    entry = datasets.BUILTIN["glyphs_train"]
    for text, message in (("{", "not JSON, or truncated"), ('{"base": []}', "not of the form"),
                          ('{"base": 3, "novel": []}', "3 is not a list of strings"),
                          ('{"base": ["sun", "sun"], "novel": []}', "'sun' is listed twice in base"),
                          ('{"base": ["sun"], "novel": ["sun"]}', "'sun' is both base and novel")):  # fmt: skip
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(UserError, match=message):
            datasets.get_classes("x", replace(entry, split=str(tmp_path / "split.json")))
