"""Every key that vild adds to Detectron2's config, the defaults of Detectron2's own keys that ViLD fixes, and how a
config file is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import reduce
from importlib.resources import files
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg

from vild.utils.errors import UserError, first_line
from vild.utils.untrusted import check_config, refused_as


def add_vild_config(cfg: CfgNode) -> None:
    """Add ``MODEL.VILD`` and set the defaults that differ from Detectron2's, in place."""
    cfg.MODEL.VILD = node = CfgNode()
    # What trains the region embedding: "text", "image", "vild" (both losses, one head) or "ensemble" (two heads)
    node.VARIANT = "vild"
    # Vocabulary file (.safetensors) with the training classes, in the order of the data set's categories
    node.VOCABULARY = ""
    # Another vocabulary for evaluation and the demo ("": the same)
    node.TEST_VOCABULARY = ""
    # Where distilled regions and their targets come from (every variant but "text"):
    #   "store"    precomputed embeddings, as in the paper: cheapest step, the same regions in every epoch
    #   "teacher"  the teacher runs during training on the top proposals of the current RPN, cropped from the augmented
    #              image; no store needed, but 2 x DISTILL_PER_IMAGE crops per image and step, and useful only once
    #              the RPN finds objects (start from the weights of a proposal network)
    #   "mixed"    the store; "teacher" for images that the store lacks
    node.DISTILL_FROM = "store"
    # Embedding store of the training images ("store" and "mixed")
    node.STORE = ""
    # The teacher, needed for new words and for "teacher" and "mixed": open_clip name and tag or file; or
    # local-dir:FOLDER. PRECISION: of its image tower while the detector trains, "fp32", "bf16" or "fp16"
    node.TEACHER = CfgNode({"NAME": "ViT-B-32-quickgelu", "PRETRAINED": "openai", "PRECISION": "fp32"})
    # Extra teachers, a list of {"STORE", "VOCABULARY", "WEIGHT" (1)}: stores of the same proposals, vocabularies of the
    # same names. Their objectives may use OVER "base" only
    node.TEACHERS = []
    # How extra teachers are combined with the first. BY "projections": the student has a projection into the space of
    # each and learns the objectives there. BY "average": soft_targets and hard_targets use the mean of the teachers'
    # distributions over the base names; the other objectives use the first teacher. WEIGHTS "fixed": each teacher's
    # WEIGHT (the first has 1). WEIGHTS "confidence": per-region weights that sum to 1 and favour the teacher that is
    # more confident on the base classes
    node.SEVERAL_TEACHERS = CfgNode({"BY": "projections", "WEIGHTS": "fixed"})
    # Train on new data without forgetting: the weights of a trained detector of the same architecture and teacher ("":
    # off), often MODEL.WEIGHTS, too. Its embeddings of the sampled proposals that lie on no annotation are imitated, by
    # L1. The vocabulary may have more base classes than the training set, whose objects are not taught as background.
    # HEAD_ONLY: train the box head with its projection into the teacher's space and the background only, on labels and
    # the old student; proposals, masks and feature maps stay those of MODEL.WEIGHTS, and nothing is distilled from the
    # teacher
    node.OLD_STUDENT = CfgNode({"WEIGHTS": "", "WEIGHT": 0.5, "HEAD_ONLY": False})
    # Softmax temperature in training and test. 0: 1 / the teacher's learned logit scale (with SigLIP's bias), which is
    # the 0.01 of the paper for CLIP [released code] and another number for every other teacher
    node.TEMPERATURE = 0.0
    # Another temperature at test (0: the same)
    node.TEST_TEMPERATURE = 0.0
    # Weight of the sum of all objectives. 0: 0.5 x sqrt(512 / D) for a teacher of width D, because the L1 distance of
    # unit vectors grows with sqrt(D). For the paper's CLIP (D = 512) that is its 0.5 (table 3, R50). Larger weights
    # starve the box regression, which shares the head, in schedules of few iterations (docs/training.md)
    node.DISTILL_WEIGHT = 0.0
    # Distillation objectives, a list of {"NAME", "WEIGHT" (1), parameters ...}, summed (vild/modeling/objectives/):
    #   l1, smooth_l1 (BETA 0.05), squared, cosine   the teacher's region embedding
    #   soft_targets (TEMPERATURE 1, OVER "base")    the teacher's distribution over words: OVER "base" names,
    #   hard_targets (CONFIDENCE 0, OVER "base")     "background" (base names and the background), or a vocabulary file
    #                                                of other words; or its best word, where at least this confident
    #   distances, angles                            relations between the regions of an image
    #   contrast (TEMPERATURE 0.07)                  identify a region's own teacher embedding within the batch
    #   tokens, attention, picture_tokens            the teacher's feature maps (DISTILL_FROM "teacher" only)
    # Any number may be a schedule: {"FROM": 1, "TO": 0, "SHAPE": "linear" | "cosine" | "step", "BETWEEN": [0.2, 0.8]},
    # in fractions of the training. [{"NAME": "l1"}] is the paper's objective; [] distils nothing
    node.OBJECTIVES = [{"NAME": "l1"}]
    # Extra weights of any loss by its name in metrics.json, a list of {"LOSS", "WEIGHT": number or schedule}; logged
    # values include them. [{"LOSS": "loss_text", "WEIGHT": {"FROM": 0, "TO": 1}}] phases the text loss in.
    # "loss_old_student" and "loss_l1_1" (L1 to the first extra teacher) are valid names too
    node.LOSS_WEIGHTS = []
    # Channels of the teacher's feature maps, for the adapters of "tokens" and "picture_tokens". Set by the trainer; 0
    # means no adapter, as in a detector that is not being trained
    node.MAP_CHANNELS = 0
    # Maximum number of distilled regions per image, sampled from the store or taken from the top RPN proposals
    node.DISTILL_PER_IMAGE = 300
    # Images a step beside SOLVER.IMS_PER_BATCH of which only the distilled regions are used: no box, mask, text or RPN
    # loss. Where a schedule is short for what the teacher knows they are worth more than regions of the same images
    node.DISTILL_IMAGES = 0
    # Drop a distilled region if less than this fraction of its area is left after augmentation
    node.MIN_VISIBLE = 0.5
    # Ensemble weight w: p_text^w p_image^(1-w) on base names, exponents swapped on novel ones (paper, eq. 5)
    node.ENSEMBLE_WEIGHT = 2.0 / 3.0
    # Use the calibration of a checkpoint that has one (tools/calibrate.py)
    node.CALIBRATION = True
    # Maximum number of (region, class) pairs that enter NMS at test
    node.PRE_NMS_TOPK = 20000
    # timm model used as the backbone if BACKBONE.NAME is "build_timm_fpn_backbone". RESNETS.NORM (BN, SyncBN, FrozenBN,
    # GN) replaces its BatchNorms; MODEL.WEIGHTS may be "timm://NAME.TAG" (vild/checkpoint/timm_weights.py)
    node.TIMM_BACKBONE = ""

    # ViLD's box and mask heads are class-agnostic
    cfg.MODEL.META_ARCHITECTURE = "ViLDRCNN"
    cfg.MODEL.ROI_HEADS.NAME = "ViLDROIHeads"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    # With TEST.EVAL_PERIOD: the metric whose best checkpoint is kept as model_best.pth ("bbox/AP50_novel", for
    # example). best.json beside it holds all values
    cfg.TEST.BEST_METRIC = ""
    # Stop training after this many evaluations without improvement, with the best checkpoint as model_final.pth (0:
    # never)
    cfg.TEST.PATIENCE = 0
    # Proposals per image that tools/make_proposals.py keeps for distillation (paper, section 3.3: at most 300)
    cfg.TEST.PROPOSALS_PER_IMAGE = 300
    # Large-scale jitter: resize by a random factor of SIZE between MIN and MAX, then crop or pad to SIZE x SIZE.
    # Replaces Detectron2's resize and crop keys in training
    cfg.INPUT.LARGE_SCALE_JITTER = CfgNode({"ENABLED": False, "SIZE": 1024, "MIN": 0.1, "MAX": 2.0})
    # Images that cannot be read, or in training differ in size from their annotations. "refuse": stop with the file
    # name. "skip": train on another image instead, evaluate without detections, and count them
    cfg.INPUT.UNREADABLE = "refuse"
    # Seed of initial weights, data order and all sampling, on all ranks and in all workers (Detectron2's default, -1,
    # cannot be reproduced)
    cfg.SEED = 0
    # Also send metrics.json's values to "wandb" (Weights & Biases) or "mlflow", if that package is installed; its own
    # environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...) say where. A resumed training continues its run
    cfg.TRACKER = ""
    # "SGD" (Detectron2's) or "AdamW"; gradients are clipped as SOLVER.CLIP_GRADIENTS says
    cfg.SOLVER.OPTIMIZER = "SGD"
    # In how many parts a step's images (IMS_PER_BATCH) pass the model, one after the other, for GPUs that cannot hold
    # them all. Gradients and losses are means over the parts; the statistics of BatchNorms and the negatives of the
    # objective "contrast" are a part's
    cfg.SOLVER.ACCUMULATE = 1


def default_config():
    """Detectron2's defaults and vild's keys."""
    cfg = get_cfg()
    add_vild_config(cfg)
    return cfg


def find_config(name: str | Path) -> str:
    """The path of a config: a file, or the name of one that comes with vild, as ``"LVIS/ensemble_20ep.yaml"``.

    Raises:
        UserError: neither.
    """
    if not str(name):
        raise UserError("--config-file: give a config file, or the name of a built-in one")
    candidates = [Path(name), Path(str(files("vild") / "configs")) / name]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError(f"config {name} does not exist")
    return str(found)


def load_config(config_file: str | Path, overrides: Sequence[object] | None = None):
    """Detectron2's defaults, vild's keys, the file, the overrides (KEY, VALUE, ...); frozen. Without a GPU,
    MODEL.DEVICE "cuda" becomes "cpu", and on a CPU automatic mixed precision is off.

    Raises:
        UserError: no such file, or a key or value that does not fit.
    """
    cfg = default_config()
    config_file = find_config(config_file)
    check_config(config_file)
    where = f"config {config_file}"
    try:
        with refused_as(where):
            cfg.merge_from_file(config_file, allow_unsafe=False)
        where = "overrides"
        with refused_as(where):
            cfg.merge_from_list(list(overrides or []))
    except UserError as error:
        if where == "overrides" and (wrong := _wrong_value(overrides)):
            raise UserError(f"overrides: {wrong}") from None
        if unknown := re.search(r"Non-existent (?:config )?key: ([\w.]+)", str(error)):
            raise UserError(f"{where}: {_no_such_key(unknown[1])}") from None
        raise
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    return cfg


def _wrong_value(overrides: Sequence[object]) -> str:
    """What is wrong with KEY, VALUE, ... if a value is missing or of another type than its key's default."""
    if len(overrides) % 2:
        return f"pairs of KEY VALUE are wanted; the last, '{overrides[-1]}', has no value"
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            default_config().merge_from_list([key, value])
        except ValueError:
            default = reduce(getattr, key.split("."), default_config())
            if isinstance(default, CfgNode):
                return f"{key}: is a group of keys, {key}.{next(iter(default), '...')} for one"
            of_one = {tuple: f"\"('{value}',)\"", list: f"\"['{value}']\""}
            example = repr(default) if default else of_one.get(type(default))
            return f"{key}: '{value}' is no {type(default).__name__}" + (f", such as {example}" if example else "")
        except (KeyError, AssertionError):
            return ""
    return ""


def _no_such_key(key: str) -> str:
    known = list(_keys(default_config()))
    near = get_close_matches(key, known, 3, 0.75) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:3]
    return f"{key} is not a config key" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def check_weights(cfg) -> None:
    """UserError if ``MODEL.WEIGHTS`` is a path and no file is there."""
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not Path(weights).is_file():
        raise UserError(f"MODEL.WEIGHTS: {weights} does not exist")


def pick_device(name: str | None, flag: str = "--device") -> str:
    """What was asked for by ``flag``, else "cuda" if there is a GPU, else "cpu".

    Raises:
        UserError: a device that this machine does not have.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():  # without a context on the first GPU, which a launcher would keep
        return name
    try:
        torch.device(name)
    except Exception as error:
        raise UserError(f"{flag} '{name}': is no device, such as cpu, cuda or cuda:1") from error
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError, by device
        reason = first_line(error).split(". ")[0]
        raise UserError(f"{flag} {name}: {reason}") from error
    return name


def pick_precision(device: str) -> str:
    """The default arithmetic of a teacher's image tower: "bf16" on a GPU that has it, else "fp32"."""
    has_it = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_it else "fp32"
