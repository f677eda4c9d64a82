"""The same commands on several processes, however these are started: by --num-gpus, torchrun or srun."""

import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from tests.conftest import REPOSITORY
from vild.engine.launch import ProcessPlace, find_process, launch
from vild.utils.errors import UserError, one_line_errors


def test_place_of_torchrun_and_srun():
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert find_process(torchrun) == ProcessPlace(5, 8, 1, 4)
    srun = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    assert find_process(srun | {"MASTER_ADDR": "node0"}) == ProcessPlace(5, 8, 1, 4)
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        find_process(srun)
    with pytest.raises(UserError, match="8 tasks do not spread evenly over 3 nodes"):
        find_process(srun | {"SLURM_STEP_NUM_NODES": "3"})
    # a batch script knows the job's tasks, but is no step of many
    assert find_process({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    assert find_process({}) is None


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("environment", "flags", "line"),
    [
        (STEP, {}, "error: srun: MASTER_ADDR is not set"),
        (STEP | {"MASTER_ADDR": "a"}, {}, "error: torchrun or srun: the environment does not say which process"),
        ({}, {"num_machines": 2}, "error: --dist-url auto: is for one machine"),
        ({}, {"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, "error: --machine-rank 2: counts from 0"),
        ({}, {"num_gpus": 3}, "error: --num-gpus 3: 2 GPUs can be seen here"),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(monkeypatch, capsys, environment, flags, line):
    for key in [k for k in os.environ if k.startswith(("SLURM", "TORCHELASTIC", "MASTER"))]:
        monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "num_gpus" in flags)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"} | flags
    with pytest.raises(SystemExit) as caught:
        one_line_errors(launch)(print, Namespace(**args))  # as the tools do
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.startswith(line) and told.count("\n") == 1


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("how", ["num-gpus", "torchrun", "srun"])
def test_two_processes_write_the_same_store_as_one(world, proposals_file, teacher_folder, tmp_path, how):
    def command(output):
        return [str(REPOSITORY / "tools" / "build_teacher_store.py"), "--dataset", "glyphs_train", "--proposals",
                str(proposals_file), "--teacher", f"local-dir:{teacher_folder}", "--shard-images", "8",
                "--num-workers", "0", "--output-dir", str(tmp_path / output)]  # fmt: skip

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    port = str(29600 + os.getpid() % 300)
    if how == "num-gpus":
        starts = [([sys.executable, *command("two"), "--num-gpus", "2"], {})]
    elif how == "torchrun":
        starts = [([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port,
                    *command("two")], {})]  # fmt: skip
    else:
        common = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": port}
        ranks = [common | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(2)]
        starts = [([sys.executable, *command("two")], rank) for rank in ranks]
    running = [
        subprocess.Popen(c, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c, more in starts
    ]
    for process in running:
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told
    done = subprocess.run([sys.executable, *command("one")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one") and len(files_of(tmp_path / "one")) == 6
