"""What comes before a training or an evaluation: may it write here, its logs, the data sets."""

from __future__ import annotations

import os
from argparse import Namespace

from detectron2.engine import default_setup
from detectron2.utils import comm

from vild.config import check_weights, find_config, pick_device
from vild.data import datasets
from vild.engine.logs import quiet_console, set_up_logs
from vild.engine.run_record import check_resumable, last_checkpoint
from vild.utils.errors import UserError


def setup(cfg, args) -> None:
    """Set up loggers, the output folder and data sets. ``args``: Detectron2's command-line arguments.

    Environment and config go to ``log.txt`` and ``config.yaml`` in OUTPUT_DIR, not to the console.

    Raises:
        UserError: --resume with another model or a lost checkpoint, a new training in the folder of another one, no
            such weights, or a device that this machine does not have; nothing is written then.
    """
    if not (args.resume and last_checkpoint(cfg.OUTPUT_DIR)):
        check_weights(cfg)
    pick_device(cfg.MODEL.DEVICE, "MODEL.DEVICE")
    if not args.eval_only:
        if args.resume:
            check_resumable(cfg)
        elif os.path.exists(last := os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
            raise UserError(
                f"OUTPUT_DIR {cfg.OUTPUT_DIR}: holds a training already ({last}); continue it with --resume, or "
                "choose another folder for a new one"
            )
        comm.synchronize()  # every process checks before one writes
    set_up_logs(cfg.OUTPUT_DIR)
    if name := getattr(args, "config_file", ""):
        args = Namespace(**{**vars(args), "config_file": find_config(name)})  # Detectron2 copies the file to log.txt
    with quiet_console():
        default_setup(cfg, args)
    datasets.register_all()
