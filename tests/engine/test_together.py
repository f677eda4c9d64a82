"""What one process of several does for all (gloo, on the CPU), and that none waits for it in vain."""

import argparse
import errno
import json
import marshal
import shutil
import sys
import tempfile

import pytest
from detectron2.utils import comm

from tests.engine.test_distributed import forked, on_ranks  # noqa: F401  (a fixture)
from vild.data import annotations, datasets
from vild.engine.build_store import build_store
from vild.engine.make_proposals import make_proposals
from vild.engine.together import share_annotations
from vild.engine.trainer import Trainer
from vild.utils.errors import UserError, one_line_errors

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """The annotation files that processes parse, each as (rank, file name); none has been read before."""
    load, log = datasets.load_annotations, tmp_path / "parsed"

    def noted(path):
        with open(log, "a") as file:
            file.write(f"{comm.get_rank()} {path.name}\n")
        return load(path)

    log.touch()
    monkeypatch.setattr(datasets, "load_annotations", noted)
    datasets.forget()
    yield lambda: [line.split() for line in log.read_text().splitlines()]
    datasets.forget()


def share(args):
    for _ in range(2):  # what has been read is not read again
        share_annotations(["glyphs_train", "glyphs_val"])
    found = [datasets.read_annotations(name) for name in ("glyphs_train", "glyphs_val")]
    (args.folder / f"rank{comm.get_rank()}.json").write_text(json.dumps(found))
    datasets.load_dicts("glyphs_val")


def test_one_process_parses_annotation_files_for_all(world, parsed, tmp_path, capfd):
    """With repairs, which one process reports; its files are removed."""
    val = "glyphs/annotations/coco_val.json"
    document = json.loads((world / val).read_text())
    for annotation in document["annotations"]:
        annotation["image_id"] = float(annotation["image_id"])
    copy = shutil.copytree(world, tmp_path / "datasets")
    (copy / val).write_text(json.dumps(document))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(copy))
        patch.setenv("TMPDIR", str(copy))
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(annotations.logger, "warning", lambda text, *words: print(text % words, file=sys.stderr))
        assert on_ranks(share, folder=tmp_path) == 0
        assert sorted(parsed()) == [["0", "coco_train.json"], ["0", "coco_val.json"]]
        assert capfd.readouterr().err.count("accepted with repairs") == 1
        share(argparse.Namespace(folder=copy))
    one = (copy / "rank0.json").read_text()
    assert [(tmp_path / f"rank{rank}.json").read_text() for rank in (0, 1)] == [one, one]
    assert not list(copy.glob("vild-*"))


def test_one_process_parses_for_proposals_and_for_a_store(
    parsed, make_cfg, checkpoint_file, proposals_file, teacher_folder, tmp_path
):
    cfg = make_cfg("vild", "MODEL.WEIGHTS", str(checkpoint_file))
    assert on_ranks(lambda args: make_proposals(cfg, "glyphs_val", tmp_path / "p.safetensors")) == 0
    assert parsed() == [["0", "coco_val.json"]]
    store = {
        "dataset": "glyphs_train", "proposals": proposals_file, "teacher": f"local-dir:{teacher_folder}",
        "pretrained": "", "device": "cpu", "crop": "squash", "precision": "fp32", "compile": False, "dtype": "float16",
        "max_per_image": 2, "nms": None, "min_size": None, "shard_images": 20, "batch_size": 128, "num_workers": 0,
        "unreadable": "refuse", "output_dir": tmp_path / "store",
    }  # fmt: skip
    assert on_ranks(build_store, **store) == 0
    assert parsed()[1:] == [["0", "coco_train.json"]]
    assert (tmp_path / "store" / "manifest.json").is_file()


def test_without_space_every_process_parses(world, parsed, tmp_path, monkeypatch):
    def dump(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(marshal, "dump", dump)
    assert on_ranks(share, folder=tmp_path) == 0
    assert {rank for rank, _ in parsed()} == {"0", "1"}


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.json is not JSON, or truncated"), 2, "error: a.json is not JSON, or truncated"),
        (OSError(errno.EIO, "Input/output error", "a.json"), 2, "error: a.json: Input/output error"),
        (ZeroDivisionError("of rank 0"), 1, "ZeroDivisionError: of rank 0"),
    ],
)
def test_what_fails_in_the_process_that_parses_ends_all(world, parsed, monkeypatch, capfd, error, status, line):
    def fails(path):
        raise error

    monkeypatch.setattr(datasets, "load_annotations", fails)
    assert on_ranks(one_line_errors(share)) == status
    lines = [told for told in capfd.readouterr().err.splitlines() if "rror:" in told]
    assert lines == [line]


def test_masks_of_a_test_set_are_checked_by_one_process(parsed, make_cfg):
    """Before a training nothing else needs the annotations of the test set."""
    cfg = make_cfg("vild", "MODEL.DEVICE", "cpu")
    assert on_ranks(lambda args: Trainer(cfg)) == 0
    assert sorted(parsed()) == [["0", "coco_train.json"], ["0", "coco_val.json"]]
