"""The disk is full or read-only, a file may not grow: one line that names the path, and what was there is there."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes
from PIL import Image

from vild.apps.label import PartialLabels
from vild.data.proposals import save_proposals
from vild.evaluation.results import ResultsWriter
from vild.glyphs.world import write_world
from vild.inference.detections import Detections
from vild.store.merge import merge
from vild.store.store import StoredRegions, StoreWriter
from vild.utils.errors import UserError, one_line_errors
from vild.utils.files import write_image, write_json, write_tensors, written_whole
from vild.utils.lock import only_writer
from vild.vocabulary.vocabulary import Vocabulary

FORK = multiprocessing.get_context("fork")
PLAN = {"fingerprint": {"name": "t", "pretrained": "", "weights": "00", "width": 64}, "proposals": "p"}
IMAGES = list(range(40))
NOISE = torch.rand(3, 250, 250, generator=torch.Generator().manual_seed(0))

IMAGE = Image.fromarray((NOISE * 255).byte().permute(1, 2, 0).numpy())


def regions(image_id: int) -> StoredRegions:
    generator = torch.Generator().manual_seed(image_id)
    embeddings = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=1)
    return StoredRegions(torch.arange(160.0).view(40, 4), embeddings, torch.rand(40, generator=generator))


def build(folder: Path) -> None:
    """A store of 240 kB in 20 shards."""
    writer = StoreWriter(folder, PLAN, IMAGES, 2)
    for index, _ in writer.missing():
        writer.write_shard(index, regions)
    writer.finish()


def detections(count: int) -> Detections:
    return Detections(
        (100, 100), ["a"], [""], pred_boxes=Boxes(torch.arange(4 * count).view(count, 4) / 7), scores=torch.ones(count),
        pred_classes=torch.zeros(count, dtype=torch.int64),
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def label(path: Path) -> None:
    with PartialLabels(path, {"words": ["a"]}) as labels:
        for n in range(9):
            labels.add(f"{n}.jpg", detections(200))
        labels.finish([f"{n}.jpg" for n in range(9)], ["a"], {})


def results(path: Path) -> None:
    writer = ResultsWriter(str(path.parent))
    for n in range(5000):
        writer.add([{"image_id": n, "category_id": 1, "bbox": [0.5, 0.5, 10.25, 10.25], "score": 0.5}])
    writer.finish(path)


# each writes more than 128 kB below a folder
WRITERS = {
    "store": lambda folder: build(folder / "store"),
    "json": lambda folder: write_json(folder / "x.json", list(range(50_000))),
    "tensors": lambda folder: write_tensors(folder / "x.safetensors", {"x": NOISE}),
    "proposals": lambda folder: save_proposals(folder / "p.safetensors", {1: (torch.ones(9999, 4), torch.ones(9999))}),
    "vocabulary": lambda folder: Vocabulary(["a", "b"], torch.eye(2, 40_000), ["", ""]).save(folder / "v.safetensors"),
    "labels": lambda folder: label(folder / "labels.json"),
    "results": lambda folder: results(folder / "results.json"),
    "picture": lambda folder: write_image(folder / "x.png", IMAGE),
    "world": lambda folder: write_world(folder / "glyphs", sets=("val",), workers=1, fraction=0.1),
}  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    """A file system of 128 kB of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "vild", folder]).returncode:
        pytest.skip("mount is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk(disk, kind):
    (disk / "mine.txt").write_text("there before")
    with pytest.raises(UserError, match=r"No space left on device") as caught:
        WRITERS[kind](disk)
    assert str(caught.value).startswith(str(disk)) and "\n" not in str(caught.value)
    after = content(disk)
    assert after.pop("mine.txt") == b"there before"
    assert not [name for name in after if name.endswith(".tmp")]
    # nothing, or what the next run goes on from
    assert all(name.startswith(("store/", "labels.json.partial", "glyphs/val/")) for name in after), after


def test_a_store_goes_on_when_there_is_room_again(disk, tmp_path):
    with pytest.raises(UserError, match=r"shard-000\d\d\.safetensors cannot be written: No space left on device"):
        build(disk / "store")
    begun = content(disk / "store")
    assert 2 < len(begun) < 12
    remount(disk, "size=1m")
    build(disk / "store")
    build(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    assert content(disk / "store") == whole
    assert all(whole[name] == begun[name] for name in begun if name != "manifest.json")


def test_labels_go_on_when_there_is_room_again(disk, tmp_path):
    with pytest.raises(UserError, match=r"labels\.json\.partial cannot be written: No space left"):
        label(disk / "labels.json")
    remount(disk, "size=4m")
    label(disk / "labels.json")
    label(tmp_path / "labels.json")
    assert (disk / "labels.json").read_bytes() == (tmp_path / "labels.json").read_bytes()
    assert sorted(content(disk)) == ["labels.json"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_read_only_disk(disk, kind):
    write_json(disk / "x.json", [1])
    remount(disk, "ro")
    with pytest.raises(UserError, match="cannot be written: .*Read-only file system") as caught:
        WRITERS[kind](disk)
    assert str(caught.value).startswith(str(disk)) and sorted(content(disk)) == ["x.json"]


def test_a_disk_that_becomes_read_only_on_the_way(disk):
    writer = StoreWriter(disk / "store", PLAN, IMAGES, 2)
    writer.write_shard(0, regions)
    before = content(disk)
    remount(disk, "ro")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors cannot be written: Read-only file system"):
        writer.write_shard(1, regions)
    assert content(disk) == before
    with pytest.raises(UserError, match="store cannot be written: Read-only"), only_writer(disk / "store", folder=True):
        pass


def limited(kind: str, folder: Path, answer) -> None:
    """In a process of its own: no file may grow beyond 20 kB."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        WRITERS[kind](folder)
    except UserError as error:
        answer.send(str(error))
    except BaseException as error:
        answer.send(repr(error))


@pytest.mark.parametrize("kind", ["json", "tensors", "labels", "results", "picture"])
def test_a_file_that_may_not_grow(tmp_path, kind):
    """As a full disk, for those who may not mount one."""
    mine, its = FORK.Pipe()
    process = FORK.Process(target=limited, args=(kind, tmp_path, its))
    process.start()
    assert mine.poll(600) and (error := mine.recv()).startswith(str(tmp_path)) and error.endswith("File too large"), (
        error
    )
    process.join()
    assert {p.name for p in tmp_path.iterdir()} <= {"labels.json.partial"}


def test_a_replaced_file_stays_when_the_new_one_cannot_be_written(tmp_path):
    write_json(tmp_path / "x.json", [1])
    error = pytest.raises(UserError, match=r"x\.json cannot be written: No space left on device")
    with error, written_whole(tmp_path / "x.json") as aside:
        aside.write_text("[2")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert content(tmp_path) == {"x.json": b"[\n 1\n]"}


def test_a_device_or_pipe_is_written_to_and_not_replaced(tmp_path):
    """``--output /dev/null`` by root would otherwise put a regular file in the place of the device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, [1])
    assert os.read(reader, 100) == b"[\n 1\n]" and pipe.is_fifo()
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def other_store(tmp_path: Path) -> Path:
    writer = StoreWriter(tmp_path / "other", PLAN, [100, 101], 2)
    writer.write_shard(0, regions)
    writer.finish()
    return tmp_path / "other"


def test_a_merge_that_finds_no_room_leaves_nothing(disk, tmp_path):
    build(tmp_path / "store")
    with pytest.raises(UserError, match=r"merged cannot be written: No space left on device"):
        merge([tmp_path / "store", other_store(tmp_path)], disk / "merged")
    assert content(disk) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EACCES])
def test_a_librarys_disk_error_is_one_line_too(capsys, number):
    @one_line_errors
    def main():
        raise OSError(number, os.strerror(number), "/data/log.txt")

    with pytest.raises(SystemExit) as caught:
        main()
    line = f"error: /data/log.txt: {os.strerror(number)}\n"
    assert caught.value.code == 2 and capsys.readouterr().err == line

    @one_line_errors
    def wrong():
        raise FileNotFoundError(errno.ENOENT, "of ours, perhaps")

    with pytest.raises(FileNotFoundError):
        wrong()


def test_the_store_builder_on_a_full_disk(disk, world, proposals_file, teacher_folder, tool, capsys):
    remount(disk, "size=40k")  # the store would have 60 kB
    status = tool("build_teacher_store.py", "--dataset", "glyphs_train", "--proposals", proposals_file, "--teacher",
                  f"local-dir:{teacher_folder}", "--shard-images", "8", "--num-workers", "0",
                  "--output-dir", disk / "deep" / "store")  # fmt: skip
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err, err
    assert last.startswith(f"error: {disk}/deep/store/shard-0000") and last.endswith("No space left on device")
    assert not list((disk / "deep" / "store").glob("*.tmp")) and not (disk / "deep" / "store" / ".lock").exists()
