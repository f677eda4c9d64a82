"""Every byte of a store matters to --verify, --repair leads back to the same bytes, --merge adds and refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vild.store.maintenance import coverage, histogram, repair, summarise, verify
from vild.store.manifest import read_manifest
from vild.store.merge import merge
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError

PLAN = {"fingerprint": {"name": "t", "pretrained": "", "weights": "00", "width": 8}, "scales": [1, 1.5]}
IDS = [11, 5, 7, 20, 3]


def regions(image_id: int) -> StoredRegions:
    generator = torch.Generator().manual_seed(image_id)
    count = image_id % 4  # image 20 has none
    embeddings = torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)
    boxes = torch.rand(count, 4, generator=generator) * 50
    boxes[:, 2:] += boxes[:, :2]
    return StoredRegions(boxes, embeddings, torch.rand(count, generator=generator))


def write(folder, ids=IDS, dtype="float16", stop_after=99, provenance=None, **plan):
    writer = StoreWriter(folder, {**PLAN, **plan}, ids, 2, provenance, dtype)
    for done, (index, _) in enumerate(writer.missing()):
        if done == stop_after:
            return folder
        writer.write_shard(index, regions)
    writer.finish()
    return folder


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_any_altered_byte_is_found_and_repaired(tmp_path, dtype):
    folder = write(tmp_path / "store", dtype=dtype)
    assert list(verify(folder)) == [] and repair(folder) == []
    whole, rng = content(folder), np.random.default_rng(0)
    for name in sorted(whole.keys() - {"manifest.json"}):
        for _ in range(6):
            altered = bytearray(whole[name])
            altered[rng.integers(len(altered))] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(altered)
            ((path, line),) = verify(folder)
            assert path.name == name and f"{name} is broken" in line and "\n" not in line
        assert len(repair(folder)) == 1 and not (folder / name).exists()
        with pytest.raises(UserError, match="unfinished"):
            EmbeddingStore(folder)
        write(folder, dtype=dtype)
        assert content(folder) == whole


def flip(path) -> None:
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)


def test_building_again_does_not_take_a_flipped_bit_for_the_truth(tmp_path):
    folder = write(tmp_path / "store")
    flip(folder / "shard-00001.safetensors")
    before = content(folder)
    with pytest.raises(UserError, match=r"shard-00001.safetensors is broken \(its checksum"):
        write(folder)
    assert content(folder) == before and len(list(verify(folder))) == 1


def test_a_repair_that_is_killed_forgets_nothing(tmp_path, monkeypatch):
    folder = write(tmp_path / "store")
    whole = content(folder)
    for name in ("shard-00000.safetensors", "shard-00001.safetensors"):
        flip(folder / name)

    def killed(path, **_):
        if path.name == "shard-00001.safetensors":
            raise KeyboardInterrupt
        path.rename(tmp_path / path.name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(folder), "unlink", killed)
        repair(folder)
    assert not (folder / "shard-00000.safetensors").exists()
    with pytest.raises(UserError, match="is broken"):  # the other one is still known
        write(folder)
    assert len(repair(folder)) == 1
    assert content(write(folder)) == whole


def test_shards_that_nothing_is_known_of_are_not_taken_in(tmp_path):
    folder = write(tmp_path / "store")
    (folder / "manifest.json").unlink()
    before = content(folder)
    with pytest.raises(UserError, match="it has shards but no manifest.json"):
        write(folder)
    assert content(folder) == before


def test_every_broken_shard_has_its_line(tmp_path):
    folder = write(tmp_path)
    (folder / "shard-00000.safetensors").unlink()
    (folder / "shard-00002.safetensors").write_bytes(b"{")
    assert [path.name[6:11] for path, _ in verify(folder)] == ["00000", "00002"]
    assert len(repair(folder)) == 2 and [p.name[6:11] for p in folder.glob("shard*")] == ["00001"]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("embeddings", float("nan"), "an embedding that is not of unit length"),
        ("embeddings", 0.9, "an embedding that is not of unit length"),
        ("boxes", float("inf"), "a non-finite box"),
        ("boxes", 1000.0, "a box with corners out of order"),
        ("scores", float("nan"), "a non-finite score"),
    ],
)
def test_wrong_numbers_are_found_where_there_is_no_checksum_yet(tmp_path, name, value, what):
    folder = write(tmp_path, stop_after=2)
    path = folder / "shard-00001.safetensors"  # images 7 (three rows) and 20 (none)
    tensors = load_file(path)
    tensors[name].view(len(tensors["boxes"]), -1)[2, 0] = value
    save_file(tensors, path)
    ((_, line),) = verify(folder)
    assert f"image_id 7 has {what}" in line
    repair(folder)
    assert not path.exists() and content(write(folder)) == content(write(tmp_path / "other"))


def test_shards_in_another_order_are_an_error(tmp_path):
    folder = write(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"].reverse()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ((path, line),) = verify(folder)
    assert path is None and "do not have the images" in line
    with pytest.raises(UserError, match="build it again from scratch"):
        repair(folder)


def test_summary_and_coverage(tmp_path):
    text = summarise(write(tmp_path / "store", dropped={"nms": 1234}))
    total = sum(i % 4 for i in IDS)
    assert f"regions     {total}" in text and "complete" in text and "1,234 by nms" in text
    assert coverage(tmp_path / "store", [5, 20, 8, 2]) == ([2, 8], 1)
    write(tmp_path / "begun", stop_after=1)
    assert "unfinished, 2 of 5 images" in summarise(tmp_path / "begun")
    assert coverage(tmp_path / "begun", IDS) == ([3, 7, 20], 0)


def test_a_histogram_counts_every_image_once():
    rng = np.random.default_rng(0)
    for top in (0, 1, 7, 8, 9, 300):
        counts = rng.integers(0, top + 1, 500)
        lines = list(histogram(counts))
        assert sum(int(line.split("regions: ")[1].split()[0].replace(",", "")) for line in lines) == 500
        assert f" 0 regions: {(counts == 0).sum()} " in lines[0] + " "


def test_merged_stores_answer_as_their_parts(tmp_path):
    a = write(tmp_path / "a", pictures="pa", proposals="q", provenance={"data_set": "a"})
    b = write(tmp_path / "b", ids=[2, 6, 9], pictures="pb", proposals="q")
    merge([a, b], tmp_path / "ab")
    merged = EmbeddingStore(tmp_path / "ab")
    assert len(merged) == 8 and list(verify(tmp_path / "ab")) == []
    for part in map(EmbeddingStore, (a, b)):
        for image_id in part.image_ids.tolist():
            mine, theirs = merged[image_id], part[image_id]
            assert all(torch.equal(getattr(mine, k), getattr(theirs, k)) for k in ("boxes", "embeddings", "scores"))
    assert merged.plan["pictures"] == ["pa", "pb"] and merged.plan["proposals"] == "q"
    assert merged.provenance == {"merged": [{"data_set": "a"}, None]}
    c = write(tmp_path / "c", ids=[100], pictures="pc", proposals="r")
    merge([tmp_path / "ab", c], tmp_path / "abc")
    assert EmbeddingStore(tmp_path / "abc").plan["pictures"] == ["pa", "pb", "pc"]
    (tmp_path / "ab" / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-00000.*merged from .*/a, .*/b: repair those"):
        repair(tmp_path / "ab")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"ids": [7, 8]}, "both have image_id 7"),
        ({"dtype": "int8"}, "has dtype = float16, store .*b has int8"),
        ({"scales": [1]}, r"has scales = \[1, 1.5\], store .*b has \[1\]"),
        ({"fingerprint": {**PLAN["fingerprint"], "weights": "11"}}, "weights 00.*, store .*weights 11"),
        ({"fingerprint": {**PLAN["fingerprint"], "preprocess": {"crop": "pad"}}}, "pad crops.*cannot be merged"),
        ({"stop_after": 0}, "unfinished"),
    ],
)
def test_stores_that_do_not_belong_together_are_not_merged(tmp_path, other, message):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", **{"ids": [1, 2], **other})
    with pytest.raises(UserError, match=message):
        merge([a, b], tmp_path / "ab")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_broken_part_is_not_merged(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", ids=[1, 2])
    shutil.copytree(a, tmp_path / "ab.partial")  # of a merge that was killed
    path = b / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="checksum"):
        merge([a, b], tmp_path / "ab")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(UserError, match="exists"):
        merge([a, b], a)


def test_an_invalid_manifest_is_an_error(tmp_path):
    for text in ("{", "[]", "{}", '{"plan": {"dtype": "int4", "fingerprint": {}}, "shards": [], "complete": true}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="manifest.json is not a store's"):
            read_manifest(tmp_path)
