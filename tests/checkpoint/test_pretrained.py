"""Detectors by name, from servers on this machine: first and second start, and everything that goes wrong between."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import time
from argparse import Namespace
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoint import released_checkpoint as reference
from tests.checkpoint.bundle_writer import write_bundle
from tests.checkpoint.hub import hub
from tests.loopback import serving
from vild.checkpoint import released_archives
from vild.checkpoint.crc32c import masked_crc32c
from vild.checkpoint.pretrained import config_from_flags, detector_config, find_weights
from vild.checkpoint.released_archives import RELEASED
from vild.checkpoint.tensorflow import convert_variables
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import NotAvailable, UserError
from vild.utils.weight_files import load_weights

FORK = multiprocessing.get_context("fork")
SMALL = ["INPUT.MAX_SIZE_TEST", 128, "MODEL.RPN.POST_NMS_TOPK_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 20]


def pack(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=0) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return packed.getvalue()


OTHERS = [pytest.param(n, marks=pytest.mark.slow) for n in RELEASED if n != "vild-r50"]


@pytest.fixture(scope="module", params=["vild-r50", *OTHERS])
def name(request) -> str:
    """Each of the authors' detectors."""
    return request.param


@pytest.fixture
def path(name) -> str:
    """Of its archive, on the server."""
    return f"/{RELEASED[name].file}"


@pytest.fixture(scope="module")
def arrays(name):
    return reference.variables("ensemble" if "ensemble" in name else "vild", 152 if "152" in name else 50)


@pytest.fixture(scope="module")
def archive(name, arrays, tmp_path_factory) -> bytes:
    """As published: with ResNet-152's odd names, and what a training leaves in a checkpoint."""
    folder, odd = tmp_path_factory.mktemp("archive"), "batch_normalization" + "_sim_clr" * ("152" in name)
    extra = {"global_step": np.int64(180000), "fpn/l2/bias/Momentum": np.zeros(256, np.float32), "x/y": np.int64(7)}
    marked = {key.replace("batch_normalization", odd): array for key, array in (arrays | extra).items()}
    write_bundle(folder / "model.ckpt-180000", marked, checksum=masked_crc32c)
    files = {f"published/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}
    shutil.rmtree(folder)
    return pack({**files, "published/model.ckpt-180000.meta": b"a graph"})


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Whose files a test fills in; the cache is empty, and there is no text encoder."""
    monkeypatch.setenv("VILD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with serving({}) as server:
        monkeypatch.setenv("VILD_RELEASED_URL", f"{server.url}/")
        yield server


def here(tmp_path) -> list[str]:
    return sorted(p.name for p in tmp_path.glob("cache/detectors/*"))


def line_of(call, *arguments, kind=UserError) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    line = str(caught.value)
    assert type(caught.value) is kind and "\n" not in line and len(line) < 700
    return line


def until(condition) -> None:
    end = time.monotonic() + 1500
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def fetch(name) -> None:
    torch.set_num_threads(1)  # those of OpenMP do not survive a fork
    find_weights(name)


def start(name):
    process = FORK.Process(target=fetch, args=(name,))
    process.start()
    return process


def test_the_whole_way(server, name, path, archive, arrays, tmp_path, monkeypatch):
    """Killed while downloading, killed while converting, two at once; then from the cache, without network."""
    server.files[path], detectors = archive, tmp_path / "cache" / "detectors"
    part, folder = detectors / f"{name}.tar.gz.part", detectors / name
    server.cut, server.stall = len(archive) // 2, True
    process = start(name)
    until(lambda: part.is_file() and part.stat().st_size > len(archive) // 3)
    process.kill()
    process.join()
    assert part.is_file() and not folder.exists()
    server.cut, server.stall = None, False
    process = start(name)
    until((detectors / f"{name}.tmp").exists)
    process.kill()
    process.join()
    assert (detectors / f"{name}.tar.gz").read_bytes() == archive and not folder.exists()
    (_, first), (_, second) = server.asked
    assert first is None and int(second.removeprefix("bytes=").removesuffix("-")) > len(archive) // 4
    both = [start(name), start(name)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(server.asked) == 2 and here(tmp_path) == [name, f"{name}.json"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "model.safetensors"]
    record = json.loads((detectors / f"{name}.json").read_text())
    assert record["sha256"] == sha256(archive).hexdigest() and record["size"] == len(archive)

    server.files.clear()
    for work in ("_make_released", "sha256"):  # of which a folder needs neither
        monkeypatch.setattr(released_archives, work, None)
    written = {p: p.stat().st_mtime_ns for p in detectors.rglob("*")}
    assert find_weights(name) == folder and {p: p.stat().st_mtime_ns for p in detectors.rglob("*")} == written
    checkpoint, (state, vocabulary, variant, depth, _) = (
        load_weights(folder / "model.safetensors"), convert_variables(arrays, "C")
    )  # fmt: skip
    assert checkpoint["model"].keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in checkpoint["model"].items())
    assert torch.equal(checkpoint["vocabulary"]["embeddings"], vocabulary.embeddings)
    cfg = detector_config(name)
    assert cfg.MODEL.WEIGHTS == cfg.MODEL.VILD.VOCABULARY == str(folder / "model.safetensors")
    assert (variant, depth) == (cfg.MODEL.VILD.VARIANT, cfg.MODEL.RESNETS.DEPTH)
    if name == "vild-r50":
        detects_the_same(folder)
    assert len(server.asked) == 2

    (folder / "model.safetensors").write_bytes(b"other weights")
    assert "model.safetensors: has 13 bytes, not the " in line_of(find_weights, name)


def detects_the_same(folder) -> None:
    """By name, as a folder, as a file."""
    image = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    file = folder / "model.safetensors", "LVIS/released/vild_R50.yaml", "cpu"
    detector = lambda given, more: OpenVocabularyDetector(detector_config(*given, overrides=[*SMALL, *more]))  # noqa: E731
    found = [detector(given, more)(image, threshold=0, channels="RGB") for given, more in (
        (("vild-r50", None, "cpu"), []), ((folder, None, "cpu"), []), (file, ["MODEL.VILD.VOCABULARY", str(file[0])]),
    )]  # fmt: skip
    assert len(found[0]) > 0
    for other in found[1:]:
        assert torch.equal(other.pred_boxes.tensor, found[0].pred_boxes.tensor)
        assert torch.equal(other.scores, found[0].scores)


def test_a_changed_archive_is_refused(server, name, path, tmp_path):
    server.files[path] = pack({})
    detectors = tmp_path / "cache" / "detectors"
    detectors.mkdir(parents=True)
    record = {"url": "", "size": len(server.files[path]), "sha256": "0" * 64, "weights": 1}
    (detectors / f"{name}.json").write_text(json.dumps(record))
    line = line_of(find_weights, name)
    assert f"{path}: has changed since it was first seen" in line and f"remove {detectors / name}.json" in line
    assert here(tmp_path) == [f"{name}.json"]
    (detectors / f"{name}.json").write_text("[]")
    assert f"{name}.json: is not a record of a download" in line_of(find_weights, name)


def link(name, target) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        header = tarfile.TarInfo(name)
        header.type, header.linkname = tarfile.SYMTYPE, target
        tar.addfile(header)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pack({"../model.ckpt-1.index": b""}), "'../model.ckpt-1.index' leaves the folder"),
        (link("model.ckpt-1.index", "/etc/passwd"), "'model.ckpt-1.index' is not a plain file"),
        (pack({"resnet50_vild/notes.txt": b"nothing else"}), "the folder holds 0 checkpoints"),
        (pack({"a/model.ckpt-1.index": b"no index"}), "not the index of a TensorFlow checkpoint"),
        (pack({"a/model.ckpt-1.index": bytes(5000)})[:-3000], "cannot be unpacked"),
        (b"<html>not found</html>", "cannot be unpacked"),
    ],
)
def test_an_archive_that_is_none_is_one_line_and_is_not_kept(server, name, path, tmp_path, content, reason):
    server.files[path] = content
    assert reason in line_of(find_weights, name)
    assert here(tmp_path) == [] and not list(tmp_path.glob("model*"))


def test_a_checkpoint_of_another_detector_is_one_line(server, name, path, tmp_path):
    write_bundle(tmp_path / "model.ckpt-1", {"dense/kernel": np.zeros((3, 4), np.float32)})
    server.files[path] = pack({p.name: p.read_bytes() for p in tmp_path.glob("model.ckpt*")})
    assert "the variables belong to none, not to resnet50 or resnet152" in line_of(find_weights, name)
    assert here(tmp_path) == []


def test_a_file_that_is_larger_than_expected(server, name, path, tmp_path, monkeypatch):
    server.files[path] = pack({"a": bytes(5000)})
    monkeypatch.setitem(RELEASED, name, replace(RELEASED[name], most=5000))
    assert "has more than 5,000 bytes" in line_of(find_weights, name) and here(tmp_path) == []


def test_a_connection_that_breaks_off(server, name, path, tmp_path):
    server.files[path], server.cut = pack({"notes.txt": bytes(5000)}), 3000
    line = line_of(find_weights, name, kind=NotAvailable)
    assert f"{path}: broke off after 3,000" in line and here(tmp_path) == [f"{name}.tar.gz.part"]
    server.cut = None
    assert "holds 0 checkpoints" in line_of(find_weights, name)  # the rest was fetched, and the whole unpacked
    assert server.asked == [(path, None), (path, "bytes=3000-")] and here(tmp_path) == []


def test_no_network_and_no_file(server, name, path, tmp_path):
    line = line_of(find_weights, name, kind=NotAvailable)
    assert f"{path}: cannot be downloaded (HTTP 404" in line and here(tmp_path) == []


def test_a_full_disk_leaves_the_download_and_nothing_half_written(server, name, path, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server.files[path] = pack({"a/model.ckpt-1.index": b"no index"})
    with monkeypatch.context() as patch:
        patch.setattr("vild.utils.archives.shutil.copyfileobj", full)
        line = line_of(find_weights, name)
    assert line.endswith("model.ckpt-1.index cannot be written: No space left on device")
    assert here(tmp_path) == [f"{name}.tar.gz"]
    assert "not the index" in line_of(find_weights, name)  # goes on with what it has
    assert len(server.asked) == 1 and here(tmp_path) == []


def test_a_file_at_an_address(server, checkpoint_file, tmp_path):
    content = checkpoint_file.read_bytes()
    server.files["/a%20b/model.pth"] = content
    url = f"{server.url}/a%20b/model.pth"
    assert "put the SHA-256 of the file behind the address" in line_of(find_weights, url)
    for broken in ("http://[", "https://[a/b.pth"):
        assert "is not an address (ValueError: " in line_of(find_weights, f"{broken}#sha256={'0' * 64}")
    line = line_of(find_weights, f"{url}#sha256={'0' * 64}")
    assert f"has the SHA-256 {sha256(content).hexdigest()}, not 0000" in line
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    name = f"{url}#sha256={sha256(content).hexdigest()}"
    found = find_weights(name)
    assert found.name == "model.pth" and found.read_bytes() == content
    server.files.clear()
    assert find_weights(name) == found and len(server.asked) == 2
    assert "a file of weights has no config" in line_of(detector_config, name)


def test_a_repository_of_the_hub(detector, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    detector.save(tmp_path / "folder")
    files = {p.relative_to(tmp_path / "folder").as_posix(): p.read_bytes()
             for p in (tmp_path / "folder").rglob("*") if p.is_file()}  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 150, 3), dtype=np.uint8))
    with hub("me/kites", {**files, "pickle.bin": b"not asked for"}) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        found = OpenVocabularyDetector.from_pretrained("hf-hub:me/kites", device="cpu")
        assert "hf-hub:me/boats: cannot be downloaded" in line_of(find_weights, "hf-hub:me/boats", kind=NotAvailable)
    assert not list((tmp_path / "hub").rglob("pickle.bin"))
    again = OpenVocabularyDetector.from_pretrained("hf-hub:me/kites", device="cpu")  # without network
    for other in (found, again):
        theirs, own = other(image, ["violin"], threshold=0), detector(image, ["violin"], threshold=0)
        assert len(own) > 0 and torch.allclose(theirs.scores, own.scores, atol=1e-6)


def test_what_the_flags_say(checkpoint_file, tmp_path):
    def line(**flags):
        given = {"config_file": None, "weights": None, "device": None, "opts": []} | flags
        return line_of(config_from_flags, Namespace(**given))

    assert "give --config-file, or --weights with the name or folder of a detector" in line()
    assert "weights: vild-r51 does not exist; did you mean 'vild-r50'?" in line(weights="vild-r51")
    assert "weights: none does not exist, and is not one of vild-r50, vild-r50-ensemble" in line(weights="none")
    assert "a file of weights has no config" in line(weights=str(checkpoint_file))
    assert "a detector folder has its own config" in line(weights=str(tmp_path), config_file="Glyphs/vild.yaml")
    assert "config.yaml does not exist" in line(weights=str(tmp_path))


def test_the_names_are_those_of_the_published_files():
    assert {name: archive.file for name, archive in RELEASED.items()} == {
        f"vild-r{depth}{end}": f"pretrained_ckpts/resnet{depth}_vild{end.replace('-', '_')}.tar.gz"
        for depth in (50, 152)
        for end in ("", "-ensemble")
    }
    assert released_archives.URL.startswith("https://storage.googleapis.com/cloud-tpu-checkpoints/")
