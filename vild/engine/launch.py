"""Run a tool on several processes: by Detectron2's launcher, or as started by torchrun or SLURM's srun."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
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
from vild.utils.errors import UserError, first_to_report, report_once
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


def launch(main: Callable, args) -> None:
    """Run ``main(args)`` on every process.

    Args:
        args: with Detectron2's num_gpus, num_machines, machine_rank and dist_url, which are ignored if torchrun or srun
            started the processes. Without a GPU, num_gpus is the number of processes.
    """
    here = _checked_place(args)
    if here is None:
        _launch_here(main, args)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=here.rank, world_size=here.world, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(here.local_world)
    comm.synchronize()
    try:
        main(args)
    finally:
        dist.destroy_process_group()


def _checked_place(args) -> ProcessPlace | None:
    """This process's place; UserError if its GPU does not exist or the launch flags contradict each other."""
    with refused_as("torchrun or srun: the environment does not say which process this is"):
        here = find_process(os.environ)
    if here is None and args.num_gpus * args.num_machines > 1:
        if args.num_machines > 1 and args.dist_url == "auto":
            raise UserError("--dist-url auto: is for one machine; give tcp://ADDRESS:PORT of the first of several")
        if not 0 <= args.machine_rank < args.num_machines:
            raise UserError(f"--machine-rank {args.machine_rank}: counts from 0 to --num-machines - 1")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    wanted = here.local_world if here else args.num_gpus
    if gpus is not None and wanted > gpus:
        raise UserError(f"{'processes here' if here else '--num-gpus'} {wanted}: {gpus} GPUs can be seen here")
    return here


@contextmanager
def ddp_without_gpu(device: str) -> Iterator[None]:
    """Let Detectron2 wrap models on a CPU in the block: it passes ``device_ids`` to DistributedDataParallel, which are
    an error without a GPU."""
    original = defaults.create_ddp_model
    if device == "cpu":
        defaults.create_ddp_model = functools.partial(original, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = original


def _on_rank(main: Callable, args, marker: Path) -> None:
    """Run ``main`` as one process of several; only the first that fails reports its error."""
    report_once(marker)
    try:
        main(args)
    except Exception:
        # If another process died, this is a broken connection, and the launcher ends us meanwhile.
        time.sleep(2)
        if first_to_report():
            print(f"process {comm.get_rank()} of {comm.get_world_size()}:", file=sys.stderr)
            traceback.print_exc()
        sys.exit(1)


def _launch_here(main: Callable, args) -> None:
    """Start the processes with Detectron2's launcher, and exit with the status of the first that failed."""
    settings = args.num_gpus, args.num_machines, args.machine_rank, args.dist_url
    if args.num_gpus * args.num_machines <= 1:
        engine.launch(main, *settings, (args,))
        return
    # it would log which of the other processes it ends then
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        with signals.forwarded_to_children(), tempfile.TemporaryDirectory() as folder:
            engine.launch(_on_rank, *settings, (main, args, Path(folder) / "reported"))
    except ProcessExitedException as error:
        if error.exit_code < 0:
            print(f"error: {error.msg}; when memory is short, the system kills with SIGKILL", file=sys.stderr)
        sys.exit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code)
