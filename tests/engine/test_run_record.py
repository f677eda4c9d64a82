"""What a run was made with, and a resume that would not go on with it."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

import vild
from vild.checkpoint.checkpointer import write_checkpoint
from vild.engine.run_record import RUN_FILE, check_resumable, code_version, differing, run_record
from vild.engine.setup import setup
from vild.report.run_report import origin_blocks
from vild.utils.errors import UserError
from vild.utils.files import hash_file


@pytest.fixture
def began(make_cfg, tmp_path):
    """A folder with a checkpoint that carries its config."""
    cfg = make_cfg("vild")
    write_checkpoint(tmp_path / "output" / "model_0000001.pth", {"model": {}, "run": run_record(cfg, ["glyphs_train"])})
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    return cfg


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (("MODEL.VILD.TEMPERATURE", 0.02), "MODEL.VILD.TEMPERATURE was 0.0, is 0.02"),
        (("MODEL.VILD.OBJECTIVES", '[{"NAME": "cosine"}]'), r"OBJECTIVES was \[\{'NAME': 'l1'\}\], is .*cosine"),
        (("MODEL.VILD.LOSS_WEIGHTS", '[{"LOSS": "loss_text", "WEIGHT": 0}]'), r"LOSS_WEIGHTS was \[\], is .*loss_text"),
        (("SEED", 3), "SEED was 0, is 3"),
        (
            ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 7, "SOLVER.OPTIMIZER", "SGD"),
            "PER_IMAGE was .*; SOLVER.OPTIMIZER was",
        ),
    ],
)
def test_another_model_is_refused(began, make_cfg, changed, told):
    with pytest.raises(UserError, match=rf"--resume: .*model_0000001\.pth is of .*{told}.* another OUTPUT_DIR"):
        check_resumable(make_cfg("vild", *changed))


def test_what_leaves_the_model_may_change(began, make_cfg):
    free = ("SOLVER.MAX_ITER", 9, "SOLVER.BASE_LR", 0.5, "MODEL.WEIGHTS", "w.pth", "DATALOADER.NUM_WORKERS", 3,
            "MODEL.VILD.STORE", "elsewhere", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5, "TEST.PATIENCE", 5,
            "MODEL.VILD.TEST_TEMPERATURE", 0.02, "MODEL.VILD.CALIBRATION", False)  # fmt: skip
    check_resumable(make_cfg("vild", *free))


def test_a_training_that_an_empty_batch_ended_goes_on():
    """Its config's heads had SyncBN, which takes no empty batch; the weights of its successor are the same."""
    then, now = ({"MODEL": {"ROI_MASK_HEAD": {"NORM": norm}}} for norm in ("SyncBN", "naiveSyncBN_N"))
    assert differing(then, now, {}) == []
    assert differing(then, {"MODEL": {"ROI_MASK_HEAD": {"NORM": "BN"}}}, {}) != []


def test_keys_come_and_go():
    """A key that was added since had its default's effect; one that has gone has none."""
    now, default = {"MODEL": {"A": 1, "NEW": 5}}, {"MODEL": {"A": 0, "NEW": 4}}
    assert differing({"MODEL": {"A": 1, "OLD": 2}}, now, default) == [("MODEL.NEW", 4, 5)]
    assert differing({"MODEL": {"A": 1, "NEW": 5}}, now, default) == []
    assert differing({"MODEL": {"A": (1, 2)}}, {"MODEL": {"A": [1, 2]}}, {}) == []


def test_nothing_is_written_before_it_is_refused(began, make_cfg, tmp_path):
    config = tmp_path / "output" / "config.yaml"
    config.write_text(began.dump())
    files = {p.name for p in config.parent.iterdir()}
    with pytest.raises(UserError, match="TEMPERATURE was 0.0, is 0.5"):
        setup(make_cfg("vild", "MODEL.VILD.TEMPERATURE", 0.5), SimpleNamespace(resume=True, eval_only=False))
    assert config.read_text() == began.dump() and {p.name for p in config.parent.iterdir()} == files


def test_a_training_is_not_begun_anew_where_one_lies(began, tmp_path):
    files = {p.name for p in (tmp_path / "output").iterdir()}
    with pytest.raises(UserError, match=r"holds a training already .*last_checkpoint\); continue it with --resume"):
        setup(began, SimpleNamespace(resume=False, eval_only=False))
    assert {p.name for p in (tmp_path / "output").iterdir()} == files


@pytest.mark.parametrize("eval_only", [False, True])
def test_a_lost_checkpoint_is_called_so(began, tmp_path, eval_only):
    (tmp_path / "output" / "model_0000001.pth").unlink()
    files = {p.name for p in (tmp_path / "output").iterdir()}
    with pytest.raises(UserError, match=r"last_checkpoint names model_0000001\.pth, which is not there"):
        setup(began, SimpleNamespace(resume=True, eval_only=eval_only))
    assert {p.name for p in (tmp_path / "output").iterdir()} == files


def test_a_checkpoint_without_a_record_and_a_broken_one(began, make_cfg, tmp_path):
    other = make_cfg("vild", "MODEL.VILD.TEMPERATURE", 0.5)
    write_checkpoint(tmp_path / "output" / "model_0000001.pth", {"model": {}})
    check_resumable(other)
    (tmp_path / "output" / "model_0000001.pth").write_bytes(b"PK broken")
    with pytest.raises(UserError, match=r"model_0000001\.pth cannot be read"):
        check_resumable(other)


def test_the_record_and_its_place_in_the_report(make_cfg, world, tmp_path):
    record = run_record(make_cfg("text"), ["glyphs_val"])
    assert record["data"] == {"glyphs_val": hash_file(world / "glyphs" / "annotations" / "coco_val.json")}
    assert record["packages"]["torch"] in torch.__version__ and record["packages"]["detectron2"] != "-"
    assert record["code"].startswith(vild.__version__)
    (tmp_path / "inference").mkdir()
    assert origin_blocks(tmp_path) == []
    (tmp_path / "inference" / RUN_FILE).write_text(json.dumps(record))
    told = str(origin_blocks(tmp_path))
    assert record["data"]["glyphs_val"] in told and "VARIANT: text" in told and record["code"] in told


def test_the_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    """Also: installed into another's repository, it names no commit of that."""
    package = tmp_path / "vild"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(vild, "__file__", str(package / "__init__.py"))
    assert code_version() == vild.__version__
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    commit = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=tmp_path, text=True).strip()
    assert code_version() == f"{vild.__version__}, commit {commit}"
    (package / "__init__.py").write_text("#")
    assert code_version() == f"{vild.__version__}, commit {commit} with changes"
    (package / "deeper").mkdir()
    monkeypatch.setattr(vild, "__file__", str(package / "deeper" / "__init__.py"))
    assert code_version() == vild.__version__


def test_a_built_in_config_by_its_name(make_cfg, tmp_path):
    """Detectron2's ``default_setup`` opens the file itself."""
    setup(make_cfg("vild"), SimpleNamespace(resume=False, eval_only=False, config_file="Glyphs/vild.yaml"))
    assert "both losses on one head" in (tmp_path / "output" / "log.txt").read_text()
