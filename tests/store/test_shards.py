"""Packing of rows, and the errors for broken files."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vild.store.shards import minimum_size, pack, plan_size, read_head, unpack
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError

PLAN = {"fingerprint": {"name": "t", "pretrained": "", "weights": "00", "width": 8}}


def rows_of(kind: str, width: int, count: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(count, width, generator=generator)
    if kind == "one large component":  # as CLIP's embeddings have
        rows[:, 0] = width**0.5
    return F.normalize(rows, dim=1)


@pytest.mark.parametrize("kind", ["normal", "one large component"])
@pytest.mark.parametrize("width", [64, 512, 1024])
def test_packed_rows_are_unit_and_close_to_the_original(kind, width):
    rows = rows_of(kind, width)
    # int8: an error of at most half a step, 1/254 of the row's largest, in each component
    int8_cosine = (1 - (rows.abs().amax(1) / 254).square() * width).clamp(min=0).sqrt()
    for dtype, least in (("float16", torch.full((len(rows),), 0.999999)), ("int8", int8_cosine)):
        packed = pack(rows, dtype)
        back = unpack(packed["embeddings"], packed.get("scales"))
        assert back.dtype == torch.float32
        torch.testing.assert_close(back.norm(dim=1), torch.ones(len(rows)))
        cosine = (back.double() * rows.double()).sum(1)
        assert (cosine >= least - 1e-6).all()
        assert dtype == "float16" or cosine.min() >= (0.9999 if kind == "normal" else 0.998)


def test_what_cannot_be_packed_does_not_come_back_as_numbers_from_nowhere():
    packed = pack(torch.zeros(2, 8), "int8")
    assert unpack(packed["embeddings"], packed["scales"]).tolist() == torch.zeros(2, 8).tolist()
    for dtype in ("float16", "int8"):
        packed = pack(torch.zeros(0, 8), dtype)
        assert unpack(packed["embeddings"], packed.get("scales")).shape == (0, 8)


def write(folder, dtype="float16", counts=(3, 0, 5, 1), shard_images=2, width=8):
    def regions(image_id):
        boxes = torch.rand(counts[image_id], 2).repeat(1, 2) + torch.tensor([0.0, 0, 1, 1])
        return StoredRegions(
            boxes, F.normalize(torch.randn(counts[image_id], width), dim=1), torch.rand(counts[image_id])
        )

    writer = StoreWriter(folder, PLAN, list(range(len(counts))), shard_images, dtype=dtype)
    for index, _ in writer.missing():
        writer.write_shard(index, regions)
    writer.finish()
    return folder


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_planned_size_is_exact_but_for_headers(tmp_path, dtype):
    counts = np.random.default_rng(0).integers(0, 9, 40).tolist()
    write(tmp_path, dtype, counts, shard_images=7, width=16)
    shards = list(tmp_path.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in shards)  # 8: the first offset
    assert sum(path.stat().st_size for path in shards) == plan_size(counts, 16, dtype) + headers


def test_float16_stays_within_two_percent_of_its_embeddings():
    counts = [300] * 100_170
    assert plan_size(counts, 512, "float16") <= 1.02 * minimum_size(sum(counts), 512, "float16")
    assert plan_size(counts, 512, "int8") < 0.52 * plan_size(counts, 512, "float16")


def test_a_file_truncated_anywhere_is_a_one_line_error(tmp_path):
    path = write(tmp_path) / "shard-00001.safetensors"
    whole = path.read_bytes()
    for cut in [*range(40), *range(40, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"shard-00001\.safetensors is broken \(.*--repair") as caught:
            EmbeddingStore(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="is broken .*not fully covered"):
        EmbeddingStore(tmp_path)


def test_no_altered_header_crashes(tmp_path):
    """Any byte of the header set to anything: a whole store or one line, never another exception."""
    path = write(tmp_path, "int8") / "shard-00000.safetensors"
    whole, rng, errors = bytearray(path.read_bytes()), np.random.default_rng(0), 0
    length = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(400):
        altered = whole.copy()
        altered[rng.integers(0, length)] = rng.integers(0, 256)
        path.write_bytes(altered)
        try:
            read_head(path, "int8")
        except UserError as error:
            assert re.search("is broken", str(error)) and "\n" not in str(error)
            errors += 1
    assert errors > 200


@pytest.mark.parametrize("change", [{"boxes": {"dtype": "F16"}}, {"scores": {"shape": [2, 4]}}, {"boxes": None}])
def test_a_header_of_something_else_is_refused(tmp_path, change):
    path = write(tmp_path) / "shard-00000.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for name, values in change.items():
        header[name] = {**header[name], **(values or {"data_offsets": [-8, 0]})}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(UserError, match="is broken"):
        read_head(path, "float16")
    with pytest.raises(UserError, match="is broken"):
        read_head(path, "int8")
