"""A writer killed by SIGKILL at any moment, and begun again, leaves the bytes of one that was never killed."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError

PLAN = {"fingerprint": {"name": "t", "pretrained": "", "weights": "00", "width": 64}, "proposals": "p"}
FORK = multiprocessing.get_context("fork")  # a new interpreter for each of some hundred writers would take minutes


def regions(image_id: int) -> StoredRegions:
    generator = torch.Generator().manual_seed(image_id)
    count = 40 + image_id % 4
    embeddings = torch.nn.functional.normalize(torch.randn(count, 64, generator=generator), dim=1)
    return StoredRegions(torch.rand(count, 4, generator=generator), embeddings, torch.rand(count, generator=generator))


def write(folder: Path, dtype: str, images: int, dies_at: int | None = None) -> None:
    """``dies_at``: before the n-th time (from 0) that Python makes, opens or renames something of the store's."""
    events = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal events
        if event in ("open", "os.rename", "os.mkdir") and str(folder) in str(arguments[0]):
            if events == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            events += 1

    if dies_at is not None:
        sys.addaudithook(watch)
    torch.set_num_threads(1)
    writer = StoreWriter(folder, PLAN, list(range(images)), 2, {"data_set": "d"}, dtype)
    for index, _ in writer.missing():
        writer.write_shard(index, regions)
    writer.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stats(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [folder, *folder.iterdir()]}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_complete_store_is_left_alone(tmp_path, dtype):
    write(tmp_path, dtype, 5)
    before = content(tmp_path), stats(tmp_path)
    write(tmp_path, dtype, 5)
    assert (content(tmp_path), stats(tmp_path)) == before
    for step in range(4):  # killed while it reads
        process = FORK.Process(target=write, args=(tmp_path, dtype, 5, step))
        process.start()
        assert killed(process)
        assert (content(tmp_path), stats(tmp_path)) == before
    (tmp_path / "manifest.json.tmp").write_text("left by a killed process")
    write(tmp_path, dtype, 5)
    assert content(tmp_path) == before[0] and {**stats(tmp_path), tmp_path.name: 0} == {**before[1], tmp_path.name: 0}


def test_a_flipped_bit_in_a_complete_store_is_found_by_building_again(tmp_path):
    write(tmp_path, "float16", 5)
    path = tmp_path / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is broken \(its checksum"):
        write(tmp_path, "float16", 5)
    assert content(tmp_path) == before


def killed(process: multiprocessing.Process) -> bool:
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_killed_before_every_step(tmp_path, dtype):
    write(tmp_path / "whole", dtype, 5)
    whole, step, dies = content(tmp_path / "whole"), 0, True
    while dies:
        folder = tmp_path / f"killed{step}"
        process = FORK.Process(target=write, args=(folder, dtype, 5, step))
        process.start()
        if dies := killed(process):
            write(folder, dtype, 5)
        assert content(folder) == whole, step
        step += 1
    assert step > 12  # manifest, three shards, their checksums, the manifest again


def test_killed_at_random_moments(tmp_path):
    start = time.perf_counter()
    write(tmp_path / "whole", "float16", 60)
    took, whole = time.perf_counter() - start, content(tmp_path / "whole")
    rng, kills = np.random.default_rng(0), 0
    for run in range(12):
        folder = tmp_path / f"killed{run}"
        for _ in range(3):
            process = FORK.Process(target=write, args=(folder, "float16", 60))
            process.start()
            time.sleep(rng.uniform(0, took))
            process.kill()
            if not killed(process):
                took *= 0.7  # the machine is faster by now
            else:
                kills += 1
                try:
                    EmbeddingStore(folder)
                except UserError as error:
                    assert "unfinished" in str(error) or "does not exist" in str(error)
                else:  # killed on its way out, or after a run that had ended
                    assert content(folder) == whole
        write(folder, "float16", 60)
        assert content(folder) == whole
    assert kills > 6
