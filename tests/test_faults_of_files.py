"""A file or folder vanishes or is altered, the clock goes backwards: one line that names the path, and what was there
is there."""

import json
import os
import time

import pytest

from tests.test_faults import IMAGES, PLAN, build, content, detections, label, other_store, regions
from vild.apps.label import PartialLabels
from vild.store.maintenance import repair, verify
from vild.store.merge import merge
from vild.store.store import EmbeddingStore, StoreWriter
from vild.utils.errors import UserError
from vild.utils.files import write_json, written_whole


def test_a_store_that_vanishes_is_not_begun_anew_in_its_place(tmp_path):
    writer = StoreWriter(tmp_path / "store", PLAN, IMAGES, 2)
    writer.write_shard(0, regions)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"store {tmp_path}/store: manifest.json has disappeared while"):
        writer.write_shard(1, regions)
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is broken \(No such file"):
        writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"] and len(content(tmp_path / "elsewhere")) == 2


def test_a_folder_that_vanishes_during_a_write(tmp_path):
    folder = tmp_path / "folder"
    error = pytest.raises(UserError, match=rf"^{folder}/x\.json cannot be written: No such file or directory")
    with error, written_whole(folder / "x.json") as aside:
        aside.write_text("[]")
        folder.rename(tmp_path / "elsewhere")
    assert not folder.exists() and (tmp_path / "elsewhere" / "x.json.tmp").exists()


def test_labels_that_vanish(tmp_path):
    folder = tmp_path / "folder"
    error = pytest.raises(UserError, match=r"labels\.json\.partial disappeared while it was being written")
    with error, PartialLabels(folder / "labels.json", {}) as labels:
        labels.add("a.jpg", detections(3))
        folder.rename(tmp_path / "elsewhere")
        labels.finish(["a.jpg"], ["a"], {})
    assert not folder.exists()


def test_a_shard_that_vanishes_under_a_reader(tmp_path):
    build(tmp_path / "store")
    store = EmbeddingStore(tmp_path / "store")
    (tmp_path / "store" / "shard-00003.safetensors").unlink()
    assert len(store[0].boxes) == 40
    with pytest.raises(UserError, match=r"shard-00003\.safetensors has disappeared or shrunk since"):
        store[6]
    with pytest.raises(UserError, match=r"shard-00003\.safetensors is listed in manifest.json but missing"):
        EmbeddingStore(tmp_path / "store")


def test_a_flipped_bit_or_a_wrong_checksum(tmp_path):
    build(tmp_path / "store")
    whole, shard = content(tmp_path / "store"), tmp_path / "store" / "shard-00003.safetensors"
    altered = bytearray(whole[shard.name])
    altered[-700] ^= 4
    shard.write_bytes(altered)
    ((path, line),) = verify(tmp_path / "store")
    assert path == shard and "its checksum is" in line and "\n" not in line
    assert shard.read_bytes() == altered  # looking removes nothing
    repair(tmp_path / "store")
    build(tmp_path / "store")
    assert content(tmp_path / "store") == whole

    manifest = json.loads(whole["manifest.json"])
    manifest["shards"][3]["sha256"] = "0" * 64
    write_json(tmp_path / "store" / "manifest.json", manifest)
    ((path, line),) = verify(tmp_path / "store")
    assert path == shard and "the manifest says 0000000000000000..." in line
    with pytest.raises(UserError, match=r"shard-00003\.safetensors is broken \(its checksum"):
        merge([tmp_path / "store", other_store(tmp_path)], tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "store"]
    repair(tmp_path / "store")
    build(tmp_path / "store")
    assert content(tmp_path / "store") == whole


def test_a_clock_that_goes_backwards(tmp_path, monkeypatch):
    """Nothing is decided by which of two times is the later one."""
    build(tmp_path / "whole")
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    writer = StoreWriter(tmp_path / "store", PLAN, IMAGES, 2)
    for index, _ in list(writer.missing())[:7]:
        writer.write_shard(index, regions)
        os.utime(writer.shard_path(index), (next(now), next(now)))
    os.utime(tmp_path / "store" / "manifest.json", (2_100_000_000, 2_100_000_000))  # written in the future
    build(tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    assert list(verify(tmp_path / "store")) == []
    label(tmp_path / "a.json")
    label(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
