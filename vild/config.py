"""Every key that vild adds to Detectron2's config, the defaults of Detectron2's own keys that ViLD fixes, and how a
config file is read."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg

from vild.utils.errors import UserError
from vild.utils.untrusted import check_config, refused_as


def add_vild_config(cfg: CfgNode) -> None:
    """Add ``MODEL.VILD`` and set those defaults, in place."""
    cfg.MODEL.VILD = vild = CfgNode()
    # What trains the region embedding: "text", "image", "vild" (both losses, one head) or "ensemble" (two heads)
    vild.VARIANT = "vild"
    # The vocabulary (.safetensors) the classes come from; names in the data set's category order
    vild.VOCABULARY = ""
    # Another vocabulary for evaluation and demo ("": the same)
    vild.TEST_VOCABULARY = ""
    # Where the distilled regions and their targets come from (every variant but "text"):
    #   "store"    the paper's: made beforehand, the cheapest step, the same regions in every epoch
    #   "teacher"  nothing to make beforehand: the best proposals of the current RPN, cropped from the augmented
    #              image as the detector sees it; costs the teacher 2 x DISTILL_PER_IMAGE crops an image and step,
    #              and is about objects only once the RPN is (start from a proposal network's weights)
    #   "mixed"    from the store; where it has nothing of an image, as "teacher"
    vild.DISTILL_FROM = "store"
    # The teacher's store of the training images ("store" and "mixed")
    vild.STORE = ""
    # The teacher itself, for the demo's words and for "teacher" and "mixed": an open_clip name and tag or file, or
    # local-dir:FOLDER
    vild.TEACHER = CfgNode({"NAME": "ViT-B-32-quickgelu", "PRETRAINED": "openai"})
    # Further teachers, {"STORE", "VOCABULARY", "WEIGHT" (1)} each: stores of the same proposals, vocabularies of the
    # same names (vild/modeling/extra_teachers.py). Their objectives may look at "base" words only
    vild.TEACHERS = []
    # How they go together with the first. BY: "projections", the student learns its objectives in the space of each;
    # or "average", soft_targets and hard_targets imitate the mean of their distributions over the base names, anything
    # else the first teacher alone. WEIGHTS: "fixed", WEIGHT (the first teacher's is 1; in a mean over their sum); or
    # "confidence", of each region their sum is 1, and who is surer over the base names counts more
    vild.SEVERAL_TEACHERS = CfgNode({"BY": "projections", "WEIGHTS": "fixed"})
    # Continue on new data without forgetting: a trained detector of the same architecture and teacher, whose region
    # embeddings of the sampled proposals are imitated by L1 ("" for none); MODEL.WEIGHTS usually names it too
    vild.OLD_STUDENT = CfgNode({"WEIGHTS": "", "WEIGHT": 0.5})
    # Softmax temperature, the same in training and test [released code]
    vild.TEMPERATURE = 0.01
    # Weight of the distillation, that is of all objectives together: 0.5 for R50 (paper, table 3)
    vild.DISTILL_WEIGHT = 0.5
    # What is distilled: {"NAME", "WEIGHT" (1), parameters ...} each, summed (vild/modeling/objectives/):
    #   l1, smooth_l1 (BETA 0.05), squared, cosine        the teacher's embedding of a region
    #   soft_targets (TEMPERATURE 1, OVER "base")         its distribution over words: OVER "base" names, "background"
    #   hard_targets (CONFIDENCE 0, OVER "base")          (these and the background), or FILE, a vocabulary file of
    #                                                     other words; or its best word, where it is that sure
    #   distances, angles                                 how an image's regions lie to each other
    #   contrast (TEMPERATURE 0.07)                       which of the batch's embeddings is its own
    #   tokens, attention, picture_tokens                 its feature maps; DISTILL_FROM "teacher" alone has them
    # A number may be a schedule, {"FROM": 1, "TO": 0, "SHAPE": "linear", "cosine" or "step", "BETWEEN": [0.2, 0.8] of
    # the training}. [{"NAME": "l1"}] is the paper's; [] pools the regions and learns nothing of them
    vild.OBJECTIVES = [{"NAME": "l1"}]
    # Further weights of any loss of the detector, {"LOSS": its name in metrics.json, "WEIGHT": number or schedule, as
    # above} each; what is logged is weighted. [{"LOSS": "loss_text", "WEIGHT": {"FROM": 0, "TO": 1}}] brings the labels
    # in by and by; "loss_old_student" and "loss_l1_1" (L1 to the first further teacher) are losses too
    vild.LOSS_WEIGHTS = []
    # Channels of the teacher's feature maps, for the adapters of "tokens" and "picture_tokens": the trainer asks the
    # teacher. 0: no adapter, as in a detector that is not in training
    vild.MAP_CHANNELS = 0
    # Distilled regions an image and step: drawn from those in the store, or the best of the RPN's
    vild.DISTILL_PER_IMAGE = 300
    # A distilled region leaves when less of its area than this lies in what augmentation left of the image
    vild.MIN_VISIBLE = 0.5
    # Ensemble: p_text^w p_image^(1-w) on base names, exponents swapped on novel ones (paper, eq. 5)
    vild.ENSEMBLE_WEIGHT = 2.0 / 3.0
    # (region, class) pairs that enter NMS at test
    vild.PRE_NMS_TOPK = 20000
    # The student's backbone where BACKBONE.NAME is "build_timm_fpn_backbone": a model name of timm. RESNETS.NORM (BN,
    # SyncBN, FrozenBN, GN) is what its BatchNorms become; MODEL.WEIGHTS may be timm's: vild/checkpoint/timm_weights.py
    vild.TIMM_BACKBONE = ""

    # ViLD's two heads for boxes and masks do not know the classes
    cfg.MODEL.META_ARCHITECTURE = "ViLDRCNN"
    cfg.MODEL.ROI_HEADS.NAME = "ViLDROIHeads"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    # With TEST.EVAL_PERIOD: the evaluation's metric whose best checkpoint is kept as model_best.pth, "bbox/AP50_novel"
    # say; and after how many evaluations without a better one the training ends, with the best as model_final.pth (0:
    # never; the last evaluation ends nothing). best.json beside them has all values
    cfg.TEST.BEST_METRIC = ""
    cfg.TEST.PATIENCE = 0
    # Regions kept by tools/make_proposals.py for distillation: at most 300 an image (paper, section 3.3)
    cfg.TEST.PROPOSALS_PER_IMAGE = 300
    # Large-scale jitter: resize by a random factor of SIZE, then a random SIZE x SIZE crop (or padding);
    # replaces the resize and crop keys of Detectron2 in training
    cfg.INPUT.LARGE_SCALE_JITTER = CfgNode({"ENABLED": False, "SIZE": 1024, "MIN": 0.1, "MAX": 2.0})
    # An image that cannot be read, or in training is of another size than its annotations say: "refuse" ends the run
    # with its name; "skip" trains on another in its place, evaluates it as one without detections, and counts it
    cfg.INPUT.UNREADABLE = "refuse"
    # Of first weights, data stream and every draw, on all ranks and in all workers (Detectron2's -1 draws first weights
    # that no later run can have again)
    cfg.SEED = 0
    # Adam beside Detectron2's SGD: "SGD" or "AdamW"; gradients as SOLVER.CLIP_GRADIENTS says
    cfg.SOLVER.OPTIMIZER = "SGD"


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
    candidates = [Path(name), Path(str(files("vild") / "configs")) / name]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError(f"config {name} does not exist")
    return str(found)


def load_config(config_file: str | Path, overrides: list[str] | None = None):
    """Detectron2's defaults, vild's keys, the file, the overrides; frozen. On a machine without a GPU the
    device becomes "cpu" and AMP is switched off.

    Raises:
        UserError: no such file, or a key or value that does not fit.
    """
    cfg = default_config()
    config_file = find_config(config_file)
    check_config(config_file)
    with refused_as(f"config {config_file}"):
        cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg.merge_from_list(overrides or [])
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    return cfg
