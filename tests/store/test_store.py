import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.conftest import store_plan
from tests.store.reader import read_all
from vild.data.proposals import load_proposals, save_proposals
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError
from vild.utils.fingerprint import same_regions

PLAN = {"fingerprint": {"name": "t", "pretrained": "", "weights": "00", "width": 8}, "proposals": "p"}
IDS = [11, 5, 7, 20, 3]


def regions(image_id: int) -> StoredRegions:
    generator = torch.Generator().manual_seed(image_id)
    count = image_id % 4  # image 20 has none
    embeddings = torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)
    return StoredRegions(
        torch.rand(count, 4, generator=generator) * 50, embeddings, torch.rand(count, generator=generator)
    )


def write(folder, plan=PLAN, stop_after=99, dtype="float16"):
    writer = StoreWriter(folder, plan, IDS, shard_images=2, dtype=dtype)
    for done, (index, _) in enumerate(writer.missing()):
        if done == stop_after:
            return writer
        writer.write_shard(index, regions)
    writer.finish()
    return writer


def test_what_goes_in_comes_out(tmp_path):
    write(tmp_path)
    store = EmbeddingStore(tmp_path)
    assert len(store) == 5 and 20 in store and 21 not in store
    for image_id in IDS:
        mine, expected = store[image_id], regions(image_id)
        torch.testing.assert_close(mine.boxes, expected.boxes)
        torch.testing.assert_close(mine.scores, expected.scores)
        torch.testing.assert_close(mine.embeddings, expected.embeddings, atol=1e-3, rtol=0)
        torch.testing.assert_close(mine.embeddings.norm(dim=1), torch.ones(len(mine.boxes)))


def test_survives_the_way_to_a_worker(tmp_path):
    write(tmp_path)
    store = EmbeddingStore(tmp_path)
    before = store[11].boxes
    assert torch.equal(pickle.loads(pickle.dumps(store))[11].boxes, before)


def cosines(store: EmbeddingStore) -> list[float]:
    return [float((store[i].embeddings * regions(i).embeddings).sum(1).min()) for i in IDS if i != 20]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_their_parent_reads(tmp_path, method):
    write(tmp_path)
    store, context = EmbeddingStore(tmp_path), multiprocessing.get_context(method)
    expected = [float(store[i].embeddings.sum()) for i in IDS]  # mapped before the fork
    answers = context.Queue()
    workers = [
        context.Process(target=read_all, args=(store, IDS, answers)) for _ in range(3 if method == "fork" else 1)
    ]
    for worker in workers:
        worker.start()
    assert all(answers.get(timeout=1500) == expected for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def test_reading_leaves_no_file_open_and_few_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("vild.store.store.MAPPED_SHARDS", 2)
    write(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    store = EmbeddingStore(tmp_path)
    for image_id in IDS * 3:
        store[image_id]
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "shard-" in line}
        assert len([name for name in mapped if str(tmp_path) in name]) <= 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_read_is_the_readers_own(tmp_path):
    write(tmp_path)
    store = EmbeddingStore(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for tensor in (store[11].boxes, store[11].embeddings, store[11].scores, *filter(None.__ne__, store.read(11))):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no view: it would take the file with it
        tensor.fill_(7)
    torch.testing.assert_close(store[11].boxes, regions(11).boxes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_int8_reads_as_float16_does(tmp_path):
    write(tmp_path / "half")
    write(tmp_path / "int8", dtype="int8")
    half, small = EmbeddingStore(tmp_path / "half"), EmbeddingStore(tmp_path / "int8")
    assert min(cosines(half)) > 0.999999 and min(cosines(small)) > 0.9999
    for image_id in IDS:
        assert torch.equal(small[image_id].boxes, half[image_id].boxes)
        assert small[image_id].embeddings.dtype == torch.float32
        torch.testing.assert_close(small[image_id].embeddings.norm(dim=1), torch.ones(image_id % 4))
    with pytest.raises(UserError, match="begun with dtype = float16, now it is int8"):
        write(tmp_path / "half", dtype="int8")


def test_embeddings_that_are_not_finite_are_not_written(tmp_path):
    writer = StoreWriter(tmp_path, PLAN, IDS, 2)
    bad = StoredRegions(torch.zeros(1, 4), torch.full((1, 8), float("nan")), torch.zeros(1))
    with pytest.raises(UserError, match="embeddings of image_id 5 are not finite"):
        writer.write_shard(0, lambda image_id: bad if image_id == 5 else regions(image_id))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path):
    write(tmp_path / "whole")
    write(tmp_path / "killed", stop_after=1)
    with pytest.raises(UserError, match="unfinished"):
        EmbeddingStore(tmp_path / "killed")
    (tmp_path / "killed" / "shard-00001.tmp").write_bytes(b"half a shard")
    shard = tmp_path / "killed" / "shard-00000.safetensors"
    modified = shard.stat().st_mtime_ns
    write(tmp_path / "killed")
    assert shard.stat().st_mtime_ns == modified  # not made again
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


def test_another_plan_is_refused(tmp_path):
    write(tmp_path, stop_after=1)
    other = {**PLAN, "fingerprint": {**PLAN["fingerprint"], "weights": "11"}}
    with pytest.raises(UserError, match="begun with fingerprint = t .*weights 00.*now it is .*11"):
        write(tmp_path, other)
    with pytest.raises(UserError, match="begun with proposals = p, now it is q"):
        write(tmp_path, {**PLAN, "proposals": "q"})
    with pytest.raises(UserError, match="begun with fingerprint = t .*now it is .*, pad crops"):
        write(tmp_path, {**PLAN, "fingerprint": {**PLAN["fingerprint"], "preprocess": {"crop": "pad"}}})


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match="manifest.json does not exist"):
        EmbeddingStore(tmp_path / "nowhere")
    write(tmp_path)
    store = EmbeddingStore(tmp_path)
    with pytest.raises(UserError, match="image_id 99 is not in it"):
        store[99]
    with pytest.raises(UserError, match="is of teacher t .*but vocabulary v is of teacher unknown"):
        store.check_teacher({}, "vocabulary v")
    (tmp_path / "shard-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00002\.safetensors .*missing"):
        EmbeddingStore(tmp_path)


def test_manifest_counts_and_checksums(tmp_path):
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["regions"] == sum(i % 4 for i in IDS) == sum(s["regions"] for s in manifest["shards"])
    assert all(len(s["sha256"]) == 64 for s in manifest["shards"])


def test_the_store_of_the_tiny_world_has_the_teachers_embeddings(store_folder, teacher, proposals_file):
    store, proposals = EmbeddingStore(store_folder), load_proposals(proposals_file)
    assert same_regions(store.plan["fingerprint"], store_plan(teacher, proposals_file)["fingerprint"])
    for image_id, (boxes, scores) in proposals.items():
        assert torch.equal(store[image_id].boxes, boxes) and torch.equal(store[image_id].scores, scores)


def test_proposals_in_both_forms(tmp_path):
    proposals = {4: (torch.tensor([[1.0, 2.0, 5.0, 9.0]]), torch.tensor([0.5])), 2: (torch.zeros(0, 4), torch.zeros(0))}
    save_proposals(tmp_path / "p.safetensors", proposals)
    loaded = load_proposals(tmp_path / "p.safetensors")
    assert sorted(loaded) == [2, 4] and torch.equal(loaded[4][0], proposals[4][0]) and len(loaded[2][0]) == 0
    results = [
        {"image_id": 4, "bbox": [0, 0, 1, 1], "score": 0.1},
        {"image_id": 4, "bbox": [1, 2, 4, 7], "score": 0.5},
    ]
    (tmp_path / "p.json").write_text(json.dumps(results))
    assert load_proposals(tmp_path / "p.json")[4][0].tolist() == [[1, 2, 5, 9], [0, 0, 1, 1]]
    (tmp_path / "q.json").write_text("{")
    for bad in ("q.json", "none.json"):
        with pytest.raises(UserError, match=bad):
            load_proposals(tmp_path / bad)
