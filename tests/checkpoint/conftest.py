"""A checkpoint with the released names and shapes, and detectors made from it."""

import pytest
import torch
from torch import nn

from tests.checkpoint import released_checkpoint as reference
from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import save_weights
from vild.checkpoint.released import Released
from vild.checkpoint.tensorflow import convert_variables
from vild.config import load_config
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import build_model


@pytest.fixture(scope="module")
def released_arrays():
    return reference.variables("ensemble")


@pytest.fixture(scope="session")
def released_weights(tmp_path_factory):
    found = Released(*convert_variables(reference.variables("ensemble"), "CKPT"))
    assert (found.variant, found.depth, found.left_out) == ("ensemble", 50, ())
    path = tmp_path_factory.mktemp("released") / "ensemble.safetensors"
    found.write(path)
    return path


@pytest.fixture(scope="module")
def released_cfg(released_weights):
    """A canvas of 128 pixels, 20 proposals and 20 detections instead of 1024, 1,000 and 300."""
    file = str(released_weights)
    files = ["MODEL.WEIGHTS", file, "MODEL.VILD.VOCABULARY", file, "MODEL.DEVICE", "cpu"]
    small = ["INPUT.MAX_SIZE_TEST", 128, "MODEL.RPN.POST_NMS_TOPK_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 20]
    small += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8]
    return load_config(str(REPOSITORY / "configs/LVIS/released/ensemble_R50.yaml"), [*files, *small])


@pytest.fixture(scope="module")
def released_detector(released_cfg):
    return OpenVocabularyDetector(released_cfg)


@pytest.fixture(scope="module")
def thin_cfg(released_cfg, tmp_path_factory):
    """The same detector with narrower layers and other weights."""
    cfg = released_cfg.clone()
    cfg.defrost()
    thin = {"RESNETS.STEM_OUT_CHANNELS": 8, "RESNETS.WIDTH_PER_GROUP": 8, "RESNETS.RES2_OUT_CHANNELS": 16}
    thin |= {"FPN.OUT_CHANNELS": 16, "ROI_BOX_HEAD.CONV_DIM": 16, "ROI_BOX_HEAD.FC_DIM": 32}
    thin |= {"ROI_MASK_HEAD.CONV_DIM": 16, "WEIGHTS": str(tmp_path_factory.mktemp("thin") / "model.safetensors")}
    cfg.merge_from_list([x for key, value in thin.items() for x in (f"MODEL.{key}", value)])
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if "anchor_deltas" in name or "bbox_pred" in name or "mask_head.predictor" in name:
            nn.init.normal_(parameter, std=0.5)  # instead of the small values at the start of a training
    save_weights(cfg.MODEL.WEIGHTS, model)
    return cfg
