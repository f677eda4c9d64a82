"""Several processes (gloo, on the CPU): training and evaluation equal one process's, and a process that dies takes the
job down with its own error. (Store building: tests/engine/test_launch.py.)

A training of R processes averages the gradients of R parts of the batch. Losses that are means over regions are so in
each part, what is drawn is each process's own: "equal" needs a setting in which neither matters. Nothing is sampled
(every anchor and proposal is taken), there are no batch statistics (GN), and the optimizer is SGD, since Adam divides
what is nearly zero by itself.
"""

import argparse
import functools
import os
import signal
import subprocess
import time

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.engine import defaults
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from tests.modeling.test_lvis_models import SMALL, emptied, images, lvis_vocabulary  # noqa: F401
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.data import datasets
from vild.data.proposals import load_proposals, read_provenance
from vild.engine.launch import ddp_on, launch
from vild.engine.make_proposals import make_proposals
from vild.engine.trainer import Trainer
from vild.evaluation import evaluator
from vild.modeling import build_model
from vild.utils.errors import UserError, one_line_errors

TAKE_ALL = (
    "MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN", "MODEL.ROI_BOX_HEAD.NORM", "GN",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000,
    "MODEL.VILD.DISTILL_PER_IMAGE", 1000, "INPUT.RANDOM_FLIP", "none",
    "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 0.02, "SOLVER.WARMUP_ITERS", 0,
    "SOLVER.CHECKPOINT_PERIOD", 100, "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu",
)  # fmt: skip


@pytest.fixture
def forked(monkeypatch):
    """Ranks that are copies of this process: new interpreters would take ten seconds to load everything."""
    monkeypatch.setattr(mp, "start_processes", functools.partial(mp.start_processes, start_method="fork"))


def on_ranks(main, **arguments):
    """Run ``main`` under the launcher, within minutes; its exit status."""
    args = argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", **arguments)
    try:
        launch(functools.partial(alone, main), args, "cpu")
    except SystemExit as ended:
        return ended.code
    return 0


def alone(main, args):
    """What a new interpreter has: one thread, no handlers; and no hang."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(1500)
    main(args)


def train(args):
    torch.manual_seed(0)
    trainer = Trainer(args.cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


def weights(cfg) -> dict[str, torch.Tensor]:
    return torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)["model"]


def one_image(monkeypatch):
    """Every part of a batch has as many regions: all are of the same image."""
    everything = datasets.load_dicts
    monkeypatch.setattr(datasets, "load_dicts", lambda name: everything(name)[:1])


@pytest.fixture
def in_float64(monkeypatch):
    """Training in double precision. In single, last bits decide which box NMS takes, and four steps of ViLD end 2 % of
    their way apart; in double they end 1e-14 apart."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("config", "ranks", "parts"), [("proposals", 2, 1), ("vild", 2, 1), ("proposals", 1, 2), ("vild", 2, 2)]
)
def test_training_equals_one_process(forked, in_float64, make_cfg, tmp_path, monkeypatch, config, ranks, parts):
    """The proposal network, on different images; ViLD, whose losses are means over a part's regions, on one. On
    several processes, and in several parts of a step (SOLVER.ACCUMULATE)."""
    settings = (*TAKE_ALL, "SOLVER.IMS_PER_BATCH", ranks * parts, "SOLVER.MAX_ITER", 4)
    cfgs = [
        make_cfg(config, *settings, "SOLVER.ACCUMULATE", n, "OUTPUT_DIR", str(tmp_path / folder))
        for n, folder in ((parts, "a"), (1, "b"))
    ]
    if config == "vild":
        one_image(monkeypatch)
    if ranks > 1:
        assert on_ranks(train, cfg=cfgs[0]) == 0
    else:
        alone(train, argparse.Namespace(cfg=cfgs[0]))
    alone(train, argparse.Namespace(cfg=cfgs[1]))
    signal.alarm(0)
    two, one = map(weights, cfgs)
    torch.manual_seed(0)
    start = Trainer.build_model(cfgs[1]).state_dict()
    assert two.keys() == one.keys() == start.keys()
    way = {key: (value - start[key]).norm() for key, value in one.items()}
    apart = {key: (two[key] - value).norm() for key, value in one.items()}
    assert sum(length > 1e-5 for length in way.values()) > 20
    wrong = {key: (float(apart[key]), float(way[key])) for key in way if apart[key] > 1e-9 * way[key] + 1e-12}
    assert not wrong


def one_step(args):
    """The gradients and statistics of a detector after a step on this rank's images."""
    torch.manual_seed(0)
    model = build_model(args.cfg).train()
    with ddp_on("cpu"):
        wrapped = defaults.create_ddp_model(model, broadcast_buffers=False)
    for _ in range(2):  # in the second DDP reports which weights took no part in the first
        model.zero_grad()
        torch.manual_seed(1)
        with EventStorage():
            sum(wrapped(args.inputs[comm.get_rank()]).values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save((gradients, dict(model.named_buffers())), args.folder / f"rank{comm.get_rank()}.pth")


@pytest.mark.parametrize("variant", ["vild", "ensemble"])
def test_a_rank_without_foreground_or_regions(forked, lvis_vocabulary, tmp_path, variant):  # noqa: F811
    """With the norms of the LVIS configs' heads: a mask or image head, of which rank 1 has no RoI, has rank 0's
    statistics on both, and half of rank 0's gradient. (SyncBN, which the backbone has, runs on GPUs only.)"""
    cfg = load_config(
        "LVIS/vild.yaml", ["MODEL.VILD.VOCABULARY", str(lvis_vocabulary), "MODEL.VILD.VARIANT", variant, *SMALL,
                           "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "FrozenBN",
                           "MODEL.VILD.OBJECTIVES", '[{"NAME": "l1"}, {"NAME": "contrast"}]'],
    )  # fmt: skip
    inputs = [images(), emptied(images(), "instances", "distill")]
    assert on_ranks(one_step, cfg=cfg, inputs=inputs, folder=tmp_path) == 0
    (gradients, buffers), second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    alone(one_step, argparse.Namespace(cfg=cfg, inputs=inputs, folder=tmp_path))
    signal.alarm(0)
    of_rank_0, its_buffers = torch.load(tmp_path / "rank0.pth")
    assert gradients.keys() == second[0].keys() == of_rank_0.keys()
    assert all(torch.equal(g, second[0][name]) and g.isfinite().all() for name, g in gradients.items())
    heads = ("roi_heads.mask_head.", *(("roi_heads.image_embedding.",) if variant == "ensemble" else ()))
    for head in heads:
        names = [name for name in gradients if name.startswith(head)]
        assert any(gradients[name].abs().max() > 0 for name in names)
        for name in names:
            torch.testing.assert_close(gradients[name], of_rank_0[name] / 2, rtol=1e-3, atol=1e-6)
        for name in (name for name in buffers if name.startswith(head) and name.endswith("running_mean")):
            torch.testing.assert_close(buffers[name], its_buffers[name])
            assert torch.equal(buffers[name], second[1][name]) and buffers[name].abs().max() > 0


def evaluate(args):
    score = evaluator.score_file

    def noted(truth, path, iou_types):
        with open(f"{args.cfg.OUTPUT_DIR}-scored", "a") as file:
            file.write(f"{comm.get_rank()} {' '.join(iou_types)}\n")
        return score(truth, path, iou_types)

    evaluator.score_file = noted
    datasets.register_all()
    model = Trainer.build_model(args.cfg)
    VildCheckpointer(model).load(args.cfg.MODEL.WEIGHTS)
    Trainer.test(args.cfg, model)


def test_evaluation_equals_one_process(make_cfg, checkpoint_file, tmp_path, monkeypatch):
    """The second process scores masks. In new interpreters: the evaluation's threads (hotcoco's) do not live on in a
    copy of a process that had them."""
    settings = ("MODEL.WEIGHTS", str(checkpoint_file), "MODEL.DEVICE", "cpu")
    cfgs = [make_cfg("vild", *settings, "OUTPUT_DIR", str(tmp_path / n)) for n in "ab"]
    assert on_ranks(evaluate, cfg=cfgs[0]) == 0
    monkeypatch.setattr(evaluator, "score_file", evaluator.score_file)  # put back what evaluate() replaces
    alone(evaluate, argparse.Namespace(cfg=cfgs[1]))
    signal.alarm(0)
    assert sorted((tmp_path / "a-scored").read_text().splitlines()) == ["0 bbox", "1 segm"]
    assert (tmp_path / "b-scored").read_text() == "0 bbox segm\n"
    names = sorted(p.name for p in (tmp_path / "b" / "inference").iterdir())
    assert names == ["coco_instances_results.json", "per_class.json", "run.json", "vild_metrics.json"]
    names.remove("run.json")  # of the command: it says where the output went
    for name in names:
        many, one = (tmp_path / n / "inference" / name for n in "ab")
        assert many.read_bytes() == one.read_bytes(), name


def dies(args):
    if args.how == "all":
        raise UserError("store /nowhere: there is none")
    if comm.get_rank() == 1:
        if args.how == "user":
            raise UserError("store /nowhere: there is none")
        if args.how == "bug":
            raise ZeroDivisionError("of rank 1")
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()  # the other one waits for it
    time.sleep(30)


@pytest.mark.parametrize(
    ("how", "status", "last"),
    [
        ("all", 2, "error: store /nowhere: there is none"),
        ("user", 2, "error: store /nowhere: there is none"),
        ("bug", 1, "ZeroDivisionError: of rank 1"),
        ("killed", 128 + 9, "error: process 1 terminated with signal SIGKILL; when memory is short, the system"),
    ],
)
def test_a_dead_process_takes_the_job_down_with_its_own_error(forked, capfd, how, status, last):
    start = time.monotonic()
    assert on_ranks(one_line_errors(dies), how=how) == status
    assert time.monotonic() - start < 1400  # the others do not wait out the half hour that a collective may take
    lines = [line for line in capfd.readouterr().err.splitlines() if "[rank" not in line and "TCPStore" not in line]
    assert lines[-1].startswith(last), lines
    told = [line for line in lines if "rror:" in line]
    assert len(told) == 1, lines
    assert any("Traceback" in line for line in lines) == (how == "bug")
    if how == "bug":
        assert "process 1 of 2:" in lines


def test_a_mistake_is_told_once_by_a_command_of_two_processes(command, tmp_path):
    done = subprocess.run(
        command(tmp_path / "o", "MODEL.VILD.STORE", "/nowhere", "MODEL.DEVICE", "cpu", flags=("--num-gpus", "2")),
        capture_output=True, text=True, timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line.lower()] == [
        "error: store /nowhere: /nowhere/manifest.json does not exist; tools/build_teacher_store.py makes a store"
    ]


def test_two_processes_end_together_on_a_signal(command, tmp_path):
    """It goes to their launcher; what they leave can be gone on with."""
    settings = ("SOLVER.MAX_ITER", "200", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu")
    arguments = command(tmp_path, *settings, flags=("--num-gpus", "2"))
    process = subprocess.Popen([*arguments[:2], "--dist-url", "auto", *arguments[2:]], text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while process.poll() is None and not (tmp_path / "last_checkpoint").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, told = process.communicate(timeout=1500)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in told + output
    last = (tmp_path / "last_checkpoint").read_text()
    assert last != "model_final.pth"
    lines = [line for line in told.splitlines() if line.startswith(("ended", "error"))]
    assert lines == [f"ended by SIGTERM; --resume continues from {tmp_path}/{last}"]
    torch.load(tmp_path / last, weights_only=True)


def test_two_processes_end_together_on_a_loss_that_is_not_finite(forked, make_cfg, tmp_path, capfd):
    settings = (*TAKE_ALL, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 20, "SOLVER.BASE_LR", 1e30)
    cfg = make_cfg("vild", *settings, "OUTPUT_DIR", str(tmp_path))
    assert on_ranks(one_line_errors(train), cfg=cfg) == 1
    told = capfd.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("error")]
    assert "Traceback" not in told and len(lines) == 1 and lines[0].startswith("error: step ")
    assert any(tmp_path.glob("nan_*/step.json"))
    assert not (tmp_path / "model_final.pth").exists()


def test_two_processes_share_the_images_of_a_proposals_file(forked, make_cfg, checkpoint_file, tmp_path):
    cfg = make_cfg("vild", "MODEL.WEIGHTS", str(checkpoint_file))
    one, two = (tmp_path / f"{n}.safetensors" for n in (1, 2))
    make_proposals(cfg, "glyphs_val", one)
    assert on_ranks(lambda args: make_proposals(cfg, "glyphs_val", two)) == 0
    expected, found = load_proposals(one), load_proposals(two)
    assert list(found) == list(expected) and read_provenance(two) == read_provenance(one)
    for image_id, tensors in expected.items():
        for mine, theirs in zip(found[image_id], tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
