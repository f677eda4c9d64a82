"""What strangers' files can ask for and do not get: memory, files elsewhere. Each is one line for the user."""

import json
import os
import pickle
import struct
import tracemalloc
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import open_clip
import pytest
import torch
from detectron2.config import get_cfg
from experiments.grid import read_grid
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import REPOSITORY
from vild.config import load_config
from vild.data.annotations import check_annotations, read_json, stays_below
from vild.data.proposals import load_proposals, read_provenance
from vild.inference.words import read_words
from vild.store.maintenance import repair
from vild.store.manifest import read_manifest
from vild.store.shards import read_head
from vild.teacher.teacher import build_teacher
from vild.utils import untrusted
from vild.utils.errors import UserError
from vild.utils.images import read_image
from vild.utils.weight_files import load_weights
from vild.vocabulary.prompts import LearnedPrompts
from vild.vocabulary.vocabulary import Vocabulary


def one_line(call, *arguments, match: str = "") -> str:
    with pytest.raises(UserError, match=match) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("kind", ["memo", "strides", "compressed"])
def test_small_weights_stay_small(tmp_path, kind):
    """Some KB that ask for a GB: a number in a pickle's memo, a tensor that repeats one number, zeros compressed."""
    path = tmp_path / ("w.pkl" if kind == "memo" else "w.pth")
    if kind == "memo":
        path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 1 << 26) + b".")
    elif kind == "strides":
        torch.save({"model": {"w": torch.zeros(1).expand(1 << 28)}}, path)
    else:
        torch.save({"model": {"w": torch.zeros(1 << 16)}}, tmp_path / "plain.pth")
        with ZipFile(tmp_path / "plain.pth") as plain, ZipFile(path, "w", ZIP_DEFLATED) as packed:
            for part in plain.infolist():
                packed.writestr(part.filename, plain.read(part))
    assert path.stat().st_size < 5000
    tracemalloc.start()
    one_line(load_weights, path, match=r"contains no weights|larger than its storage|are compressed")
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
                                     b"<!doctype html><html>Sign in</html>"])  # fmt: skip
def test_a_file_saved_in_place_of_another_is_said_to_be(tmp_path, teacher_folder, content):
    """What a clone without Git LFS, and a download of a page, leave."""
    what = "it is a Git LFS pointer" if content.startswith(b"version") else "it is a web page"
    readers = {"a.pth": load_weights, "a.pkl": load_weights, "a.safetensors": load_weights, "a.json": read_json,
               "v.safetensors": Vocabulary.load, "p.safetensors": load_proposals, "l.safetensors": LearnedPrompts.load,
               "w.txt": lambda path: read_words(str(path)), "m.npy": lambda path: Vocabulary.from_npy(path, ["a"]),
               "c.yaml": lambda path: load_config(str(path)), "g.yaml": read_grid}  # fmt: skip
    for name, read in readers.items():
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in one_line(read, tmp_path / name, match=what)
    (tmp_path / "teacher").mkdir()
    for part in teacher_folder.iterdir():
        (tmp_path / "teacher" / part.name).write_bytes(content if part.suffix == ".safetensors" else part.read_bytes())
    one_line(build_teacher, f"local-dir:{tmp_path}/teacher", match=f"open_clip_model.safetensors: {what}")


# ---- memory


@pytest.mark.parametrize("content", [{}, {"blobs": {}}, {"w_momentum": np.ones(2)}])
def test_a_file_without_weights_of_the_model_zoos_is_refused(tmp_path, content):
    """Found by the fuzz test: Detectron2 then fails with an IndexError."""
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"c\.pkl cannot be read .*it contains no weights"):
        load_weights(tmp_path / "c.pkl")


def test_configs_stand_on_few_files_of_this_machine(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("_BASE_: two.yaml\n")
    two.write_text("_BASE_: one.yaml\n")
    one_line(load_config, str(one), match="a cycle")
    for base in ("https://example.org/a.yaml", "[3]", "{a: b}", "''"):
        one.write_text(f"_BASE_: {base}\n")
        one_line(load_config, str(one), match="is not a file name")
    one.write_text("_BASE_: /dev/zero\n")
    one_line(load_config, str(one), match="not a regular file")
    one.write_text("a: " + "[" * 5000)
    one_line(load_config, str(one), match="RecursionError")


def test_ten_lines_of_yaml_stay_ten_lines(tmp_path):
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (tmp_path / "a.yaml").write_text(laughs)
    one_line(load_config, str(tmp_path / "a.yaml"), match="aliases expand to 7.5e")
    merged = laughs.replace("[x]", "{k: x}").replace("[", "{<<: [").replace("]", "]}")
    for text, reason in ((merged, "merge keys"), ("a: &a [*a]", "contains itself")):
        (tmp_path / "a.yaml").write_text(text)
        one_line(load_config, str(tmp_path / "a.yaml"), match=reason)
    (tmp_path / "a.yaml").write_text("DATASETS:\n  TRAIN: &id001 ['a']\n  TEST: *id001\n")  # as a config is dumped
    assert load_config(str(tmp_path / "a.yaml")).DATASETS.TEST == ("a",)
    (tmp_path / "a.yaml").write_text("#" * (untrusted.MOST_YAML + 1))
    one_line(read_grid, tmp_path / "a.yaml", match="more than 262,144 bytes")


def test_a_config_that_detectron2_has_written_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text(get_cfg().dump())
    assert "*id001" in (tmp_path / "config.yaml").read_text()
    load_config(str(tmp_path / "config.yaml"))


def test_headers_are_bounded(tmp_path, vocabulary_file):
    """Each reader of a safetensors file refuses a header that it would take gigabytes to parse."""
    long = tmp_path / "long.safetensors"
    save_file({"embeddings": torch.eye(2)}, long, {"vild": "[" + "[]," * 7_000_000 + "[]]"})
    for read in (Vocabulary.load, LearnedPrompts.load, load_weights, load_proposals, read_provenance):
        one_line(read, long, match="a header of")
    one_line(read_head, long, "float16", match="a header of")
    long.write_bytes(struct.pack("<Q", 1 << 60) + vocabulary_file.read_bytes()[8:])
    one_line(Vocabulary.load, long, match="a header of")


def test_an_array_larger_than_its_file(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2, 1 << 40)})
    one_line(Vocabulary.from_npy, tmp_path / "a.npy", ["a", "b"], match="cannot be read as .npy")
    np.savez(tmp_path / "a.npz", np.eye(2))
    one_line(Vocabulary.from_npy, tmp_path / "a.npz", ["a", "b"], match="cannot be read as .npy")


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    """Pillow by itself only warns up to twice its limit."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    Image.init()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    one_line(read_image, tmp_path / "a.png", match="10,000 x 10,000 pixels, more than the limit")


def test_images_are_files_that_no_other_program_reads(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n")
    one_line(read_image, tmp_path / "a.jpg", match="cannot identify")  # Pillow would start Ghostscript
    os.mkfifo(tmp_path / "pipe.jpg")
    one_line(read_image, tmp_path / "pipe.jpg", match="not a regular file")
    one_line(read_json, tmp_path / "pipe.jpg", match="not a regular file")


def test_words_are_read_in_bounds(tmp_path):
    names = [str(n) for n in range(200_000)]
    (tmp_path / "a.txt").write_text("\n".join([*names, "7"]))
    one_line(read_words, str(tmp_path / "a.txt"), match="duplicate class name '7'")  # in seconds, not hours
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(untrusted.MOST_JSON + 1)
    one_line(read_words, str(tmp_path / "a.txt"), match="more than 16,777,216 bytes")


# ---- files elsewhere


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("file_name", n) for n in ("../a.jpg", "/etc/passwd", "a/../../b.jpg", "..", "", "a\0b", "\ud800.jpg")),
        *(("file_name", n) for n in ("\\\\host\\a", "C:\\a", "a\\..\\..\\b")),
        *(("coco_url", n) for n in ("http://x/../a.jpg", "x/..", "", "http://x/a\\..\\..\\b", "x/\ud800.jpg")),
    ],
)
def test_an_image_is_inside_its_folder(key, name):
    image = {"id": 1, "height": 4, "width": 4, key: name}
    message = one_line(check_annotations, {"images": [image], "annotations": [], "categories": []}, "f.json")
    assert message.startswith(f"f.json: images[0] (id 1): {key} is ") and "inside the image folder" in message


def test_names_that_stay_below():
    assert all(map(stays_below, ("a.jpg", "train2017/000000000139.jpg", "a..b.jpg", "..a/b", "ä/ö.png", "a b.jpg")))


@pytest.mark.parametrize("name", ["../a.safetensors", "/tmp/a", "shard-00000.safetensors\n", "b.safetensors", 3])
def test_a_repair_removes_nothing_but_shards(store_folder, tmp_path, name):
    """``--repair`` removes the broken files that a manifest lists."""
    manifest = json.loads((store_folder / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "a.safetensors").write_bytes(b"precious")
    for call in (read_manifest, repair):
        one_line(call, tmp_path / "store", match="invalid shard name")
    assert (tmp_path / "a.safetensors").exists()


def test_a_shard_is_listed_once(store_folder, tmp_path):
    manifest = json.loads((store_folder / "manifest.json").read_text())
    manifest["shards"] += manifest["shards"][:1]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    one_line(read_manifest, tmp_path, match="duplicate shard")


# ---- one line


def test_a_message_is_one_line_whatever_is_in_it():
    error = UserError("file 'a\nb\x1b[2J\u2028\r'" + "x" * 9999)
    assert str(error).startswith("file 'a b [2J  'xxx") and len(str(error)) == 2000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    message = "Caught UserError in DataLoader process 0.\nTraceback ...\nvild.utils.errors.UserError: image a is broken"
    assert str(UserError(message)) == "image a is broken"


def test_what_ships_is_read(teacher_folder):
    for config in (REPOSITORY / "configs").rglob("*.yaml"):
        untrusted.read_yaml(config, "config")
    assert "trust_remote_code" not in json.dumps(open_clip.get_model_config(f"local-dir:{teacher_folder}"))
