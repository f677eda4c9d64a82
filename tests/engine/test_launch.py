"""The same commands on several processes, however these are started: by --num-gpus, torchrun or srun."""

import os
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from detectron2 import engine
from detectron2.engine import defaults
from detectron2.utils import comm

from tests.conftest import REPOSITORY
from vild.engine.launch import ProcessPlace, ddp_on, find_process, launch
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
PLACE = {"MASTER_ADDR": "a", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("environment", "flags", "line"),
    [
        (STEP, {}, "error: srun: MASTER_ADDR is not set"),
        (STEP | {"MASTER_ADDR": "a"}, {}, "error: torchrun or srun: the environment does not say which process"),
        # three tasks on one machine and one on the other; tasks dealt to machines in turn
        (STEP | PLACE | {"SLURM_LOCALID": "2"}, {}, "error: torchrun or srun: process 2 of 4 is number 2 of 2 on its"),
        (STEP | PLACE | {"SLURM_LOCALID": "1"}, {}, "error: torchrun or srun: process 2 of 4 is number 1 of 2 on its"),
        ({}, {"num_machines": 2}, "error: --dist-url auto: is for one machine"),
        ({}, {"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, "error: --machine-rank 2: counts from 0"),
        ({}, {"num_gpus": 3}, "error: --num-gpus 3: 2 GPUs can be seen here"),
        ({}, {"num_gpus": 8, "gpus": 0}, "error: --num-gpus 8: no GPU can be seen here; give --num-gpus 0, or "),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(monkeypatch, capsys, environment, flags, line):
    for key in [k for k in os.environ if k.startswith(("SLURM", "TORCHELASTIC", "MASTER"))]:
        monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    gpus = flags.pop("gpus", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "num_gpus" in flags and gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    args = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"} | flags
    with pytest.raises(SystemExit) as caught:
        one_line_errors(launch)(print, Namespace(**args))  # as the tools do
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.startswith(line) and told.count("\n") == 1


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
SRUN = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "13", "SLURM_LOCALID": "5",
        "MASTER_ADDR": "node0"}  # fmt: skip


@pytest.fixture
def joined(monkeypatch):
    """How a process joins a job, on a machine with so many visible GPUs; nothing of it needs one."""

    def run(environment, gpus, device=None, uuids=range(16), num_gpus=1):
        for key in [k for k in os.environ if k.startswith(("SLURM", "TORCHELASTIC", "MASTER"))]:
            monkeypatch.delenv(key)
        for key, value in {**environment, "CUDA_VISIBLE_DEVICES": "all"}.items():
            monkeypatch.setenv(key, value)
        seen = {"gpu": None}
        cuda, dist = torch.cuda, torch.distributed
        monkeypatch.setattr(cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(cuda, "set_device", lambda index: seen.update(gpu=index))
        monkeypatch.setattr(cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="own"))
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **k: seen.update(backend=backend, **k))
        monkeypatch.setattr(comm, "create_local_process_group", lambda size: seen.update(local_world=size))
        monkeypatch.setattr(comm, "all_gather", lambda mine: [(mine[0], uuid) for uuid in uuids])
        launcher = lambda main, processes, *_: seen.update(  # noqa: E731
            processes=processes, visible=os.environ["CUDA_VISIBLE_DEVICES"]
        )
        monkeypatch.setattr(engine, "launch", launcher)
        args = Namespace(num_gpus=num_gpus, num_machines=1, machine_rank=0, dist_url="auto")
        launch(lambda args: seen.update(ran=True), args, device)
        return seen

    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    return run


@pytest.mark.parametrize("started_by", [TORCHRUN, SRUN])
@pytest.mark.parametrize(("gpus", "own"), [(1, 0), (8, 5), (9, 5)])
def test_each_process_takes_its_own_gpu(joined, started_by, gpus, own):
    """The one that it sees (srun --gpus-per-task=1), or that of its local rank."""
    seen = joined(started_by, gpus)
    assert seen["ran"] and seen["gpu"] == own and seen["backend"] == "nccl"
    assert (seen["rank"], seen["world_size"], seen["local_world"]) == (13, 16, 8)


@pytest.mark.parametrize("started_by", [TORCHRUN, SRUN])
def test_processes_that_share_a_gpu_are_refused(joined, started_by):
    with pytest.raises(UserError, match="processes here 8: 4 GPUs can be seen"):
        joined(started_by, 4)
    with pytest.raises(UserError, match=r"processes 2 and 3 see the same GPU .*--gpus-per-task=1"):
        joined(started_by, 1, uuids=[0, 1, 2, 2, 4, 5, 6, 7])


def test_a_process_with_an_error_ends_at_once(joined, monkeypatch):
    """Destroying NCCL's group waits for the other processes, which may be waiting for this one."""
    ended = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(1))
    monkeypatch.setattr(comm, "synchronize", lambda: None)
    joined(SRUN, 8)
    assert ended == [1]

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(comm, "synchronize", broken)
    with pytest.raises(ZeroDivisionError):
        joined(SRUN, 8)
    assert ended == [1]


def test_two_steps_of_slurm_on_one_machine_meet_at_two_ports(joined):
    ports = []
    for job, step in (("71", "0"), ("71", "1"), ("72", "0")):
        for rank in (13, 14):
            place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank - 8)}
            joined(SRUN | place | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}, 8)
            ports.append(int(os.environ["MASTER_PORT"]))
    assert ports[::2] == ports[1::2] and len({*ports}) == 3 and all(20000 <= port < 30000 for port in ports)
    joined(SRUN | {"MASTER_PORT": "1234", "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0"}, 8)
    assert os.environ["MASTER_PORT"] == "1234"


def test_nccl_is_for_gpus(joined):
    """A training on the CPU of a machine with GPUs takes gloo and none of them, however many processes it has."""
    for gpus, device in ((8, "cpu"), (4, "cpu"), (0, None), (0, "cuda")):
        seen = joined(TORCHRUN, gpus, device)
        assert seen["ran"] and seen["gpu"] is None and seen["backend"] == "gloo"
    assert joined(TORCHRUN, 8, "cuda")["backend"] == "nccl"
    assert joined({}, 1, "cpu", num_gpus=3).items() >= {"processes": 3, "visible": ""}.items()
    for device in ("cuda", None):
        assert joined({}, 2, device, num_gpus=2).items() >= {"processes": 2, "visible": "all"}.items()


@pytest.mark.parametrize(("device", "ids"), [("cuda", [0]), ("cpu", None)])
def test_ddp_takes_the_process_s_own_gpu(monkeypatch, device, ids):
    """Not that of its local rank, which is another one where each process sees one GPU only."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(comm, "get_world_size", lambda: 8)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 5)
    monkeypatch.setattr(defaults, "DistributedDataParallel", lambda model, **settings: settings)
    with ddp_on(device):
        assert defaults.create_ddp_model(None, broadcast_buffers=False)["device_ids"] == ids


def test_the_device_of_a_training_decides_about_the_backend(tool, monkeypatch):
    asked = []
    monkeypatch.setattr("vild.engine.launch.launch", lambda main, args, device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = ("--config-file", REPOSITORY / "configs" / "Glyphs" / "vild.yaml")
    for name in ("train_net.py", "transfer.py"):
        assert tool(name, *config) == tool(name, *config, "MODEL.DEVICE", "cpu") == 0
    store = ("--dataset", "d", "--proposals", "p", "--teacher", "t", "--output-dir", "o")
    tool("build_teacher_store.py", *store, "--device", "cpu")
    assert asked == ["cuda", "cpu", "cuda", "cpu", "cpu"]


def test_tests_hide_the_gpus():
    code = "import os, tests; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    environment = {k: v for k, v in os.environ.items() if k != "VILD_TEST_GPU"} | {"CUDA_VISIBLE_DEVICES": "3"}
    for more, visible in (({}, ""), ({"VILD_TEST_GPU": "1"}, "3")):
        done = subprocess.run([sys.executable, "-c", code], env=environment | more, cwd=REPOSITORY, text=True,
                              capture_output=True)  # fmt: skip
        assert done.stdout.strip() == visible


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def builder(world, proposals_file, teacher_folder):
    """What builds a store, after the interpreter."""
    return lambda output: [
        str(REPOSITORY / "tools" / "build_teacher_store.py"), "--dataset", "glyphs_train", "--proposals",
        str(proposals_file), "--teacher", f"local-dir:{teacher_folder}", "--shard-images", "8",
        "--num-workers", "0", "--device", "cpu", "--output-dir", str(output)]  # fmt: skip


@pytest.fixture(scope="module")
def store_of_one_process(builder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "store"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *builder(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("how", ["num-gpus", "torchrun", "srun"])
def test_two_processes_write_the_same_store_as_one(builder, store_of_one_process, tmp_path, how):
    environment, two = os.environ | {"OMP_NUM_THREADS": "1"}, builder(tmp_path / "two")
    port = str(29600 + os.getpid() % 300)
    if how == "num-gpus":
        starts = [([sys.executable, *two, "--num-gpus", "2", "--device", "cpu"], {})]
    elif how == "torchrun":
        starts = [([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port,
                    *two], {})]  # fmt: skip
    else:
        common = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": port}
        ranks = [common | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(2)]
        starts = [([sys.executable, *two], rank) for rank in ranks]
    running = [
        subprocess.Popen(c, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c, more in starts
    ]
    for process in running:
        told, _ = process.communicate(timeout=1500)
        assert process.returncode == 0, told
    one = files_of(store_of_one_process)
    assert files_of(tmp_path / "two") == one and len(one) == 6
