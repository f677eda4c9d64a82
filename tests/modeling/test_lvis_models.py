"""A training step of the LVIS configs' models at full width, on small images; and of small models of the LVIS and COCO
configs, on images without foreground or distilled regions."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from tests.conftest import REPOSITORY
from vild.config import load_config
from vild.engine.sources import is_proposal_network
from vild.modeling import build_model
from vild.modeling.region_heads import VARIANTS
from vild.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lvis_vocabulary(tmp_path_factory):
    """As many names as LVIS has, the last 337 novel, of random embeddings."""
    embeddings = torch.randn(1203, 512, generator=torch.Generator().manual_seed(0))
    names = tuple(f"name {n}" for n in range(1203))
    path = tmp_path_factory.mktemp("lvis") / "vocabulary.safetensors"
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    Vocabulary(names, unit, ("base",) * 866 + ("novel",) * 337).save(path)
    return path


def images(side=64):
    """Two images of noise with an object each and five distilled regions."""
    generator, inputs = torch.Generator().manual_seed(0), []
    for label in (3, 800):
        box = torch.tensor([[10.0, 12.0, 50.0, 58.0]])
        mask = torch.zeros(1, side, side, dtype=torch.bool)
        mask[:, 12:58, 10:50] = True
        labels, masks = torch.tensor([label]), BitMasks(mask)
        objects = Instances((side, side), gt_boxes=Boxes(box), gt_classes=labels, gt_masks=masks)
        corner = torch.rand(5, 2, generator=generator) * 30
        embeddings = torch.nn.functional.normalize(torch.randn(5, 512, generator=generator), dim=1)
        regions = Boxes(torch.cat([corner, corner + 30], 1))
        inputs.append(
            {
                "image": torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8),
                "instances": objects,
                "distill": Instances((side, side), proposal_boxes=regions, embeddings=embeddings),
                "height": side,
                "width": side,
            }
        )
    return inputs


@pytest.mark.parametrize(
    "name", ["text", "image", "vild", "ensemble", "vild_R152", "ensemble_mobilenetv3_20ep", "proposals"]
)
def test_a_model_of_lvis_size_trains(name, lvis_vocabulary):
    small = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.DEVICE", "cpu"]
    path = REPOSITORY / "configs/LVIS" / f"{name}.yaml"
    cfg = load_config(str(path), ["MODEL.VILD.VOCABULARY", str(lvis_vocabulary), *small])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(images())
    expected = {"loss_rpn_cls", "loss_rpn_loc"}
    if not is_proposal_network(cfg):
        variant = cfg.MODEL.VILD.VARIANT
        expected |= {"loss_box_reg", "loss_mask"}
        expected |= {"loss_text"} if variant != "image" else set()
        expected |= {"loss_l1"} if variant != "text" else set()
    assert set(losses) == expected and all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    trained = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, g in trained if g is None or not g.isfinite().all()] == []


# The models of the configs, with their norms, about as small as they can be
SMALL = (
    "MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 16,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
)  # fmt: skip


def emptied(inputs, *fields):
    """The same images without objects ("instances") or distilled regions ("distill")."""
    return [{**x, **{field: x[field][:0] for field in fields}} for x in inputs]


@pytest.mark.parametrize("data", ["LVIS", "COCO"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_without_foreground_or_regions_trains(data, variant, lvis_vocabulary):
    """With the norms of the configs; weights of SyncBN, which took no such batch, fit."""
    path = REPOSITORY / "configs" / data / "vild.yaml"
    words = ("MODEL.VILD.VOCABULARY", str(lvis_vocabulary), "MODEL.VILD.VARIANT", variant)
    cfg = load_config(str(path), [*words, *SMALL])
    model = build_model(cfg).train()
    for fields in (["instances"], ["distill"], ["instances", "distill"]):
        with EventStorage():
            losses = model(emptied(images(), *fields))
        sum(losses.values()).backward()
        trained = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
        assert [n for n, g in trained if g is None or not g.isfinite().all()] == [], fields
        assert all(value.isfinite() for value in losses.values())
        assert all(value.isfinite().all() for value in model.state_dict().values())  # statistics, too
    names = [f"MODEL.ROI_{head}_HEAD.NORM" for head in ("BOX", "MASK")]
    before = build_model(load_config(str(path), [*words, *SMALL, *(x for name in names for x in (name, "SyncBN"))]))
    model.load_state_dict(before.state_dict(), strict=True)
