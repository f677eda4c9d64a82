"""Run a tool on several processes: by Detectron2's launcher, or as started by torchrun or SLURM's srun."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2 import engine
from detectron2.engine import defaults
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from vild.utils import signals
from vild.utils.errors import UserError, count_of, first_to_report, report_once, silence_known_warnings
from vild.utils.untrusted import refused_as


@dataclass(frozen=True)
class ProcessPlace:
    """A process of a distributed job: rank of ``world``, and local rank of the ``local_world`` on its machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def find_process(environment: Mapping[str, str]) -> ProcessPlace | None:
    """This process's place by torchrun's or srun's environment variables; None if neither started it.

    For srun the step's variables count, as the job's are also set in a batch script that is a single process.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return ProcessPlace(*(int(environment[k]) for k in keys))
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
        world = int(environment["SLURM_STEP_NUM_TASKS"])
        if world % nodes:
            raise UserError(f"srun: {world} tasks do not spread evenly over {nodes} nodes (--ntasks-per-node)")
        if nodes > 1 and "MASTER_ADDR" not in environment:
            raise UserError("srun: MASTER_ADDR is not set; export the name of the first node (scontrol show hostnames)")
        return ProcessPlace(int(environment["SLURM_PROCID"]), world, int(environment["SLURM_LOCALID"]), world // nodes)
    return None


def launch(main: Callable, args, device: str | None = None) -> None:
    """Run ``main(args)`` on every process.

    Args:
        args: with Detectron2's num_gpus, num_machines, machine_rank and dist_url, which are ignored if torchrun or srun
            started the processes. Without GPUs, num_gpus is the number of processes; more than one only where the CPU
            was asked for ("MODEL.DEVICE cpu" in ``opts``, or ``device``).
        device: what ``main`` computes on (None: a GPU if there is one). Unless it is a GPU, the processes communicate
            by gloo, and need no GPU.
    """
    gpus = 0
    if torch.cuda.is_available() and (device is None or device.startswith("cuda")):
        gpus = torch.cuda.device_count()
    opts = (args.opts or []) if hasattr(args, "opts") else ["MODEL.DEVICE", device]
    asks_for_cpu = dict(zip(opts[::2], opts[1::2], strict=False)).get("MODEL.DEVICE") == "cpu"
    here = _checked_place(args, gpus, asks_for_cpu)
    if here is None:
        _launch_here(main, args, gpus)
        return
    if gpus:
        torch.cuda.set_device(0 if gpus == 1 else here.local_rank)  # srun --gpus-per-task=1 shows each its own alone
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_port(os.environ)))
    backend = "nccl" if gpus else "gloo"
    dist.init_process_group(backend, rank=here.rank, world_size=here.world, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(here.local_world)
    if gpus == 1 and here.local_world > 1:
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        check_different_gpus(comm.all_gather((socket.gethostname(), uuid)))
    comm.synchronize()
    main(args)
    # Not after an error: NCCL would wait here for the other processes, and whoever started them would not see this one
    # end (pytorch/torchtitan#1342)
    dist.destroy_process_group()


def _port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT where none is given: of its own for each step of a SLURM job, as two may share a machine."""
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    if not (job.isdecimal() and step.isdecimal()):
        return 29500
    return 20000 + (31 * int(job) + int(step)) % 10000


def check_different_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """UserError if two processes have the same GPU, which NCCL cannot use.

    Args:
        gpus: machine and GPU of each process, by rank.
    """
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < rank:
            raise UserError(
                f"processes {first} and {rank} see the same GPU of {gpu[0]} and no other; start one process for each "
                "GPU, or give each its own (srun --gpus-per-task=1)"
            )


def _checked_place(args, gpus: int, asks_for_cpu: bool) -> ProcessPlace | None:
    """This process's place; UserError if its GPU does not exist or the launch flags contradict each other."""
    with refused_as("torchrun or srun: the environment does not say which process this is"):
        here = find_process(os.environ)
    if here and not (0 <= here.rank < here.world and here.rank % here.local_world == here.local_rank):
        raise UserError(
            f"torchrun or srun: process {here.rank} of {here.world} is number {here.local_rank} of {here.local_world} "
            "on its machine; each needs as many, numbered in turn (srun --ntasks-per-node, --distribution=block)"
        )
    if args.num_gpus < 0 or args.num_machines < 1:
        raise UserError(f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: at least 0 and 1")
    if here is None and args.num_gpus * args.num_machines > 1:
        if args.num_machines > 1 and args.dist_url == "auto":
            raise UserError("--dist-url auto: is for one machine; give tcp://ADDRESS:PORT of the first of several")
        if not 0 <= args.machine_rank < args.num_machines:
            raise UserError(f"--machine-rank {args.machine_rank}: counts from 0 to --num-machines - 1")
    wanted = here.local_world if here else args.num_gpus
    if gpus and wanted > gpus and not (here and gpus == 1):
        what = "processes here" if here else "--num-gpus"
        raise UserError(f"{what} {wanted}: {count_of(gpus, 'GPU')} can be seen here")
    if not gpus and here is None and wanted > 1 and not asks_for_cpu:
        cpu = "MODEL.DEVICE cpu" if hasattr(args, "opts") else "--device cpu"
        instead = f"give --num-gpus 0, or add {cpu} for {wanted} processes"
        raise UserError(f"--num-gpus {wanted}: no GPU can be seen here; {instead}")
    return here


@contextmanager
def ddp_on(device: str) -> Iterator[None]:
    """Let Detectron2 wrap models for this process's device in the block. It passes the local rank to
    DistributedDataParallel as ``device_ids``: an error without a GPU, and the wrong GPU where each process sees one."""
    original = defaults.create_ddp_model
    ids = [torch.cuda.current_device()] if device.startswith("cuda") else None
    defaults.create_ddp_model = functools.partial(original, device_ids=ids)
    try:
        yield
    finally:
        defaults.create_ddp_model = original


def _on_rank(main: Callable, args, marker: Path) -> None:
    """Run ``main`` as one process of several; only the first that fails reports its error."""
    report_once(marker)
    silence_known_warnings()
    try:
        main(args)
    except Exception:
        # If another process died, this is a broken connection, and the launcher ends us meanwhile.
        time.sleep(2)
        if first_to_report():
            print(f"process {comm.get_rank()} of {comm.get_world_size()}:", file=sys.stderr)
            traceback.print_exc()
        sys.exit(1)


def _launch_here(main: Callable, args, gpus: int) -> None:
    """Start the processes with Detectron2's launcher, and exit with the status of the first that failed."""
    settings = args.num_gpus, args.num_machines, args.machine_rank, args.dist_url
    if args.num_gpus * args.num_machines <= 1:
        engine.launch(main, *settings, (args,))
        return
    # it would log which of the other processes it ends then
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the launcher takes NCCL and a GPU wherever its processes see one
    try:
        with signals.forwarded_to_children(), tempfile.TemporaryDirectory() as folder:
            engine.launch(_on_rank, *settings, (main, args, Path(folder) / "reported"))
    except ProcessExitedException as error:
        if error.exit_code < 0:
            print(f"error: {error.msg}; when memory is short, the system kills with SIGKILL", file=sys.stderr)
        sys.exit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code)
