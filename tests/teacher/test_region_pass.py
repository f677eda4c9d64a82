import logging

import pytest
import torch
from torch import nn

from vild.data import datasets
from vild.data.proposals import load_proposals
from vild.store.store import EmbeddingStore, StoreWriter
from vild.teacher.clip import round_weights
from vild.teacher.region_pass import CROP_MEMORY, Encoder, encode_images, load_images, write_shards

NOTHING = torch.zeros(0, 4), torch.zeros(0)


@pytest.fixture(scope="module")
def work(world, proposals_file):
    """Files and regions of 20 images: some without regions, some with many more than others."""
    files = {r["image_id"]: r["file_name"] for r in datasets.load_dicts("glyphs_train")[:20]}
    found = load_proposals(proposals_file)
    regions = {i: found[i] for i in files}
    for n, i in enumerate(sorted(files)):
        regions[i] = NOTHING if n in (0, 5, 6, 19) else tuple(t[: 1 + n % 10] for t in regions[i])
    return files, regions


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b).min() if len(a) else torch.tensor(1.0)


@pytest.mark.parametrize("batch", [2, 7, 64, 4096])
def test_batches_across_images_equal_one_by_one(teacher, work, batch):
    files, regions = work
    ids = sorted(files)
    images = list(load_images(teacher, files, regions, ids, workers=0))
    together = list(encode_images(Encoder(teacher, batch), images))
    assert len(together) == len(ids)
    for (image, _), i, embeddings in zip(images, ids, together, strict=True):
        alone = teacher.encode_regions(image, regions[i][0])
        assert embeddings.shape == alone.shape and cosine(embeddings, alone) > 1 - 1e-5


def test_images_are_handed_out_as_soon_as_they_are_done(teacher, work):
    """Memory does not grow with the number of images: few are taken ahead of what is handed out."""
    files, regions = work
    ids, taken = sorted(files), []

    def stream():
        for i, image in zip(ids, load_images(teacher, files, regions, ids, workers=0), strict=True):
            taken.append(i)
            yield image

    ahead = []
    for n, _ in enumerate(encode_images(Encoder(teacher, 16), stream())):
        ahead.append(len(taken) - n)
    assert max(ahead) <= 8


def test_running_out_of_memory_halves_the_batch(teacher, work, monkeypatch, caplog):
    files, regions = work
    ids = sorted(files)
    images = list(load_images(teacher, files, regions, ids, workers=0))
    expected = torch.cat(list(encode_images(Encoder(teacher, 64), images)))
    encode, cut = teacher.encode_image, teacher.cut_planned

    def small_card(images):
        if len(images) > 10:
            raise torch.cuda.OutOfMemoryError
        return encode(images)

    def small_card_to_crop_on(images, plans, memory):
        if memory > 10 * CROP_MEMORY:
            raise torch.cuda.OutOfMemoryError
        return cut(images, plans, memory)

    for name, failing in (("encode_image", small_card), ("cut_planned", small_card_to_crop_on)):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(teacher, name, failing)
            encoder = Encoder(teacher, 64)
            found = torch.cat(list(encode_images(encoder, images)))
        assert encoder.batch == 8 and "going on with 8 crops" in caplog.text
        assert cosine(found, expected) > 1 - 1e-5
        caplog.clear()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_the_same_bytes_whoever_writes_them(teacher, work, tmp_path, workers):
    files, regions = work
    ids = sorted(files)

    def write(folder, *parts):
        for part in parts:
            writer = StoreWriter(folder, {"fingerprint": teacher.fingerprint}, ids, shard_images=6)
            shards = [s for s in writer.missing() if part is None or s[0] in part]
            images = load_images(teacher, files, regions, [i for _, some in shards for i in some], workers)
            assert sum(write_shards(writer, shards, Encoder(teacher, 16), images, regions)) == sum(
                len(some) for _, some in shards
            )
        writer.finish()
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    whole = write(tmp_path / "whole", None)
    assert len(whole) == 5 and write(tmp_path / "parts", {1}, {3, 0}, {2}) == whole
    store = EmbeddingStore(tmp_path / "whole")
    for i in ids:
        assert torch.equal(store[i].boxes, regions[i][0]) and torch.equal(store[i].scores, regions[i][1])


def test_precision_keeps_the_direction(teacher, teacher_folder):
    from vild.teacher.teacher import build_teacher

    images = torch.randn(8, 3, *teacher.size, generator=torch.Generator().manual_seed(0))
    half = build_teacher(f"local-dir:{teacher_folder}", precision="bf16")
    found = half.encode_image(images)
    assert found.dtype == torch.float32 and torch.allclose(found.norm(dim=1), torch.ones(8), atol=1e-5)
    assert cosine(found, teacher.encode_image(images)) > 0.99
    assert half.fingerprint == teacher.fingerprint


def test_rounded_weights_change_nothing_under_autocast():
    """As on a GPU, where autocast turns off the fused path of attention."""
    torch.manual_seed(0)
    tower = nn.Sequential(
        nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
    )
    images, fused = torch.randn(4, 3, 32, 32), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode():
            exact = tower.eval()(images)
            with torch.autocast("cpu", torch.bfloat16):
                before = tower(images)
                round_weights(tower, torch.bfloat16)
                assert torch.equal(tower(images), before) and not torch.equal(exact, before.float())
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    kinds = {p.dtype for n, p in tower.named_parameters() if "norm" not in n}
    assert kinds == {torch.bfloat16} and tower[2].norm1.weight.dtype == torch.float32
