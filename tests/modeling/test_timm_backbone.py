import pytest
import timm
import torch
from torch import nn

from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.modeling import build_backbone
from vild.modeling.backbones.timm_fpn import TimmFeatures, with_norm
from vild.utils.errors import UserError

STUDENTS = sorted(REPOSITORY.glob("configs/*/students/*.yaml"))
TINY = {"resnet": "test_resnet", "with activations inside": "mobilenetv3_small_050"}


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


@pytest.mark.parametrize("name", ["dla34", "test_resnet"])
def test_features_lie_at_the_strides_of_their_names(name):
    """Also for models that offer stride 2 first, or do not count it."""
    with torch.device("meta"):
        body = TimmFeatures(name, 3, "BN", ("res3", "res5"))
        maps = body(torch.randn(2, 3, 64, 96))
    assert {f: x.shape for f, x in maps.items()} == {
        f: (2, body.channels[f], 64 // stride, 96 // stride) for f, stride in (("res3", 8), ("res5", 32))
    }


@pytest.mark.parametrize("path", STUDENTS, ids=lambda p: f"{p.parts[-3]}/{p.stem}")
def test_every_student_of_the_configs_trains_all_weights(path):
    """Every weight gets a gradient, as DistributedDataParallel requires."""
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    backbone = build_backbone(cfg).train()
    maps = backbone(torch.randn(2, 3, 32, 32))
    assert list(maps) == list(cfg.MODEL.RPN.IN_FEATURES)
    sum(x.sum() for x in maps.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    if cfg.MODEL.WEIGHTS:
        published = timm.get_pretrained_cfg(cfg.MODEL.WEIGHTS.removeprefix("timm://"), allow_unregistered=False)
        assert published.architecture == cfg.MODEL.VILD.TIMM_BACKBONE
        assert [255 * x for x in published.mean] == pytest.approx(cfg.MODEL.PIXEL_MEAN)
        assert [255 * x for x in published.std] == pytest.approx(cfg.MODEL.PIXEL_STD)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", "GN"])
@pytest.mark.parametrize("kind", TINY)
def test_what_a_norm_means(kind, norm):
    """GN is independent of the batch, FrozenBN is not trained; the others use a batch's statistics."""
    torch.manual_seed(0)
    body = TimmFeatures(TINY[kind], 3, norm, ("res2", "res3")).train()
    batch = torch.randn(4, 3, 64, 64)
    whole, alone = body(batch)["res3"], torch.cat([body(x[None])["res3"] for x in batch])
    assert torch.allclose(whole, alone, atol=1e-4) == (norm in ("GN", "FrozenBN"))
    norms = [m for m in body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {isinstance(m, nn.SyncBatchNorm) for m in norms} == {"BN": {False}, "SyncBN": {True}}.get(norm, set())
    named = [n for n, _ in TimmFeatures(TINY[kind], 3, "BN", ("res2", "res3")).named_parameters()]
    learn = [n for n, p in body.named_parameters() if p.requires_grad]
    assert (learn == named) == (norm != "FrozenBN") and not any("bn" in n for n in learn if norm == "FrozenBN")


@pytest.mark.parametrize("norm", ["SyncBN", "FrozenBN"])
@pytest.mark.parametrize("kind", TINY)
def test_converted_batch_norms_give_the_same_at_test(kind, norm):
    body = TimmFeatures(TINY[kind], 3, "BN").train()
    x = torch.randn(2, 3, 64, 64)
    body(x)  # statistics and, below, scales other than those of a new network
    for p in body.parameters():
        p.data += 0.1 * torch.rand_like(p)
    before = body.eval()(x)
    body.body = with_norm(body.body, norm)
    for f, y in body.eval()(x).items():
        assert (y - before[f]).abs().max() < 1e-4 * before[f].abs().max()


def test_weights_of_timm_are_loaded_from_a_file(tmp_path, monkeypatch):
    """timm://NAME/FILE, and the cached file of a name that timm would download."""
    monkeypatch.setenv("VILD_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(1)
    theirs = timm.create_model("mobilenetv3_small_050")
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    cfg = student("MODEL.VILD.TIMM_BACKBONE", "mobilenetv3_small_050", "MODEL.RESNETS.NORM", "FrozenBN")
    model = nn.Module()
    model.backbone = build_backbone(cfg)
    path = f"timm://mobilenetv3_small_050/{tmp_path / 'theirs.pth'}"
    VildCheckpointer(model).load(path)
    mine, theirs = model.backbone.bottom_up.body.state_dict(), theirs.state_dict()
    assert mine.keys() <= theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())
    (made,) = (tmp_path / "cache" / "timm").glob("*.pth")
    made.rename(made.with_name("mobilenetv3_small_050.lamb_in1k.pth"))
    record = VildCheckpointer(model).load_recorded("timm://mobilenetv3_small_050.lamb_in1k")
    assert record["file"] == "timm://mobilenetv3_small_050.lamb_in1k"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("timm://resnet18/none.pth", r"none.pth has .* of another network than the backbone \(mobilenetv3_large_100"),
        ("timm://mobilenetv3_large_100/none.pth", "none.pth does not exist"),
        ("timm://mobilenetv3_large_100/README.md", "MODEL.WEIGHTS: timm://mobilenetv3_large_100/README.md: "),
        ("timm://mobilenetv3_large_100.none", r"Invalid pretrained tag \(none\)"),
    ],
)
def test_weights_that_cannot_be_loaded_are_one_line(path, message, tmp_path, monkeypatch):
    monkeypatch.setenv("VILD_CACHE", str(tmp_path))
    monkeypatch.chdir(REPOSITORY)
    model = nn.Module()
    model.backbone = build_backbone(student())
    with pytest.raises(UserError, match=message) as caught:
        VildCheckpointer(model).load(path)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.pth"))


def test_unsuitable_backbones_are_refused_in_one_line():
    with pytest.raises(UserError, match="timm has no model 'mobilenet9'"):
        TimmFeatures("mobilenet9", 3, "BN")
    with pytest.raises(UserError, match=r"'vit_tiny_patch16_224' has features of strides \[16, .*not 4, 8, 16, 32"):
        TimmFeatures("vit_tiny_patch16_224", 3, "BN")
    for name in ("swin_tiny_patch4_window7_224", "coatnet_0_rw_224"):
        with pytest.raises(UserError, match=f"'{name}' only takes images of one size"):
            TimmFeatures(name, 3, "BN")
    with pytest.raises(UserError, match=r"FPN.IN_FEATURES: \['p2'\] are not some of res2"):
        build_backbone(student("MODEL.FPN.IN_FEATURES", ["p2"]))
    with pytest.raises(UserError, match="NORM: 'LN' is not one of BN, SyncBN, FrozenBN, GN"):
        TimmFeatures("test_resnet", 3, "LN")
