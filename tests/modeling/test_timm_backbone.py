import pytest
import torch
from detectron2.modeling import build_backbone

from tests.conftest import REPOSITORY
from vild.checkpoint import VildCheckpointer
from vild.engine import load_config
from vild.errors import UserError
from vild.modeling.timm_backbone import TimmFeatures


def student(*overrides):
    path = REPOSITORY / "configs/LVIS/ensemble_mobilenetv3_20ep.yaml"
    return load_config(str(path), ["MODEL.DEVICE", "cpu", *overrides])


@pytest.mark.parametrize("name", ["mobilenetv3_large_100", "convnext_atto"])
def test_p2_to_p6_have_their_strides_and_channels(name):
    backbone = build_backbone(student("MODEL.VILD.TIMM_BACKBONE", name)).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, 128, 192))
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"]
    for level, (f, x) in enumerate(maps.items(), start=2):
        shape = backbone.output_shape()[f]
        assert (shape.stride, shape.channels) == (2**level, 256)
        assert x.shape == (1, 256, 128 // 2**level, 192 // 2**level)


def test_every_batch_norm_is_synchronised_where_the_config_says_so():
    def kinds(norm):
        body = build_backbone(student("MODEL.RESNETS.NORM", norm)).bottom_up
        norms = [m for m in body.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        return {isinstance(m, torch.nn.SyncBatchNorm) for m in norms}

    assert kinds("SyncBN") == {True} and kinds("BN") == {False}


def test_weights_saved_as_the_config_says_are_loaded(tmp_path):
    """The header's command writes timm's names below ``backbone.bottom_up.body.``."""
    torch.manual_seed(1)
    theirs = TimmFeatures("mobilenetv3_large_100", 3, sync_batch_norm=False).body.state_dict()
    path = tmp_path / "student.pth"
    torch.save({f"backbone.bottom_up.body.{k}": v for k, v in theirs.items()}, path)
    model = torch.nn.Module()
    model.backbone = build_backbone(student())
    VildCheckpointer(model).load(str(path))
    mine = model.backbone.bottom_up.body.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())


def test_what_cannot_serve_is_refused_in_one_line():
    with pytest.raises(UserError, match="timm has no model 'mobilenet9'"):
        TimmFeatures("mobilenet9", 3, True)
    with pytest.raises(UserError, match=r"'vit_tiny_patch16_224' has features of strides \[16, .*not 4, 8, 16, 32"):
        TimmFeatures("vit_tiny_patch16_224", 3, True)
