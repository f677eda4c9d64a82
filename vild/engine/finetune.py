"""The config that teaches a trained detector new names from a few images, without forgetting the others.

What could be forgotten, and what keeps it: proposals and features of everything (only the box head is trained), region
embeddings of all that is not annotated (the old student is imitated), old names (they stay in the softmax, and an
object of one of them, which the new images do not annotate, is not taught as background: ``text_loss``). The teacher is
not asked: in the one trial of it (glyphs_dev, one seed) its pull on so few images cost base names. What all this is
worth: docs/training.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vild.data import datasets
from vild.data.loader import training_records
from vild.utils.errors import UserError
from vild.utils.untrusted import refused_as

EPOCHS, LEAST, BATCH = 20, 60, 8  # no others were tried
# Of the config's learning rate, and OLD_STUDENT.WEIGHT: chosen by base and new names of glyphs_dev, seed 0, among 0.25
# to 2 and 0.1 to 2. Lower weights and higher rates learn more and forget more
LEARNING_RATE, OLD_WEIGHT = 0.5, 0.25

LOSSES = ("loss_text", "loss_old_student")  # of such a training; LOSS_WEIGHTS of others would be refused


def schedule(images: int, images_per_batch: int, learning_rate: float) -> dict[str, object]:
    """The schedule for so few images: EPOCHS passes, at least LEAST steps, in batches of at most BATCH images.

    Args:
        images_per_batch, learning_rate: of the old detector's config. The learning rate goes down with the batch.
    """
    batch = min(images_per_batch, BATCH)
    iterations = max(LEAST, round(EPOCHS * images / batch))
    return {
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.ACCUMULATE": 1,
        "SOLVER.BASE_LR": learning_rate * LEARNING_RATE * batch / images_per_batch,
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
        "SOLVER.WARMUP_ITERS": iterations // 10,
        "SOLVER.CHECKPOINT_PERIOD": iterations,
    }


def finetuning_config(cfg, vocabulary: Path, name: str, output_dir: Path, overrides: Sequence[object] = ()):
    """The training's config; frozen.

    Args:
        cfg: of the old detector, with its weights in a local file.
        vocabulary: the file of old and new names.
        name: the data set with the new ones.
        overrides: KEY, VALUE, ..., after everything else.

    Raises:
        UserError: a detector that cannot be trained, or a data set without annotations of base classes.
    """
    if cfg.MODEL.META_ARCHITECTURE != "ViLDRCNN":
        raise UserError(f"weights {cfg.MODEL.WEIGHTS}: a {cfg.MODEL.META_ARCHITECTURE} cannot be trained further")
    if cfg.MODEL.VILD.VARIANT == "image":
        raise UserError(f"weights {cfg.MODEL.WEIGHTS}: the variant 'image' learns nothing from labels; "
                        "use tools/probe.py")  # fmt: skip
    images = len(training_records((name,), filter_empty=True))
    datasets.forget()
    old = cfg.MODEL.WEIGHTS
    values = {
        **schedule(images, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR),
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (),
        "OUTPUT_DIR": str(output_dir),
        "MODEL.VILD.VOCABULARY": str(vocabulary),
        "MODEL.VILD.TEST_VOCABULARY": "",
        "MODEL.VILD.OLD_STUDENT.WEIGHTS": old,
        "MODEL.VILD.OLD_STUDENT.WEIGHT": OLD_WEIGHT,
        "MODEL.VILD.OLD_STUDENT.HEAD_ONLY": True,
        "MODEL.VILD.TEACHERS": [],
        "MODEL.VILD.SEVERAL_TEACHERS.BY": "projections",
        "MODEL.VILD.SEVERAL_TEACHERS.WEIGHTS": "fixed",
        "MODEL.VILD.LOSS_WEIGHTS": [e for e in cfg.MODEL.VILD.LOSS_WEIGHTS if e["LOSS"] in LOSSES],
        "TEST.EVAL_PERIOD": 0,
        "TEST.BEST_METRIC": "",
        "TEST.PATIENCE": 0,
    }
    cfg = cfg.clone()
    cfg.defrost()
    with refused_as("overrides"):
        cfg.merge_from_list([x for pair in values.items() for x in pair])
        cfg.merge_from_list([*overrides])
    cfg.freeze()
    return cfg
