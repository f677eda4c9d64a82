"""A checkpoint with the released names and shapes becomes a detector that computes what NumPy computes from the same
variables."""

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from tests.checkpoint import released_checkpoint as reference
from tests.conftest import REPOSITORY
from tests.modeling.agreement import agrees
from vild.checkpoint.released import with_teacher
from vild.checkpoint.tensorflow import Variables, convert_variables, lvis_vocabulary, resnet
from vild.config import load_config
from vild.modeling import build_backbone, build_model
from vild.utils.errors import UserError
from vild.utils.weight_files import load_weights

pytestmark = pytest.mark.slow


def random(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


# the converter


def test_every_weight_of_the_detector_is_in_the_checkpoint(released_weights, released_cfg):
    model = build_model(released_cfg)
    state = load_weights(released_weights)["model"]
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("depth", [50, 152])
def test_every_weight_of_either_resnet_has_its_place(depth):
    shapes = {name: shape for name, shape in reference.shapes("vild", depth).items() if name.startswith("resnet")}
    variables = Variables({n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}, "CKPT")
    state = {f"bottom_up.{key}": value.shape for key, value in resnet(variables, depth).items()}
    assert variables.left_out() == ()
    cfg = load_config(str(REPOSITORY / f"configs/LVIS/released/vild_R{depth}.yaml"))
    with torch.device("meta"):
        model = build_backbone(cfg, ShapeSpec(channels=3))
    theirs = {k: v.shape for k, v in model.state_dict().items() if "bottom_up" in k and "num_batches" not in k}
    assert state == theirs


def test_variant_vocabulary_and_what_training_leaves(released_arrays):
    plain = {name: released_arrays[name] for name in reference.shapes("vild", 50)}
    plain |= {"global_step": np.int64(180000), "fpn/l2/kernel/Momentum": np.zeros(3, np.float32)}
    state, vocabulary, variant, _, left_out = convert_variables(plain, "CKPT")
    assert left_out == ("fpn/l2/kernel/Momentum", "global_step")
    assert variant == "vild" and not any("image_embedding" in key for key in state)
    assert len(vocabulary) == 1203 and vocabulary.names[:2] == ("aerosol_can", "air_conditioner")
    assert vocabulary.splits.count("base") == 866 and vocabulary.splits.count("novel") == 337
    text = released_arrays[f"{reference.HEAD}/class-predict/kernel"]
    assert agrees(vocabulary.embeddings.T, text / np.linalg.norm(text, axis=0), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fpn/p6/bias": None}, "CKPT: the variable 'fpn/p6/bias' is missing"),
        ({"fpn/p5-bn/gamma_sim_clr": np.zeros(256)}, "'fpn/p5-bn/gamma' and 'fpn/p5-bn/gamma_sim_clr' differ only in"),
        ({"fpn/l2/bias": np.zeros(255)}, "CKPT: the variable 'fpn/l2/bias' has the shape [255], not [256]"),
        ({f"{reference.HEAD}/class-predict/kernel": np.zeros((512, 80))}, "[512, 80], not [512, 1203]"),
        ({f"{reference.HEAD}/distill_fc7/bias": None}, f"variable '{reference.HEAD}/distill_fc7/bias' is missing"),
        (
            {"resnet152/conv2d/kernel": np.zeros(3)},
            "CKPT: the variables belong to resnet50, resnet152, not to resnet50 or",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(released_arrays, change, message):
    changed = {name: array for name, array in {**released_arrays, **change}.items() if array is not None}
    with pytest.raises(UserError) as error:
        convert_variables(changed, "CKPT")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_something_else():
    with pytest.raises(UserError, match="the variables belong to none, not to resnet50 or resnet152"):
        convert_variables({"dense/kernel": np.zeros((3, 4))}, "CKPT")


def test_the_teacher_must_recognise_the_names(released_arrays, teacher):
    vocabulary = lvis_vocabulary(Variables(released_arrays, "CKPT"))
    with pytest.raises(UserError, match=f"embedding width is {teacher.width}, not 512"):
        with_teacher(vocabulary, teacher)
    rows = dict(zip(vocabulary.names, vocabulary.embeddings, strict=True))

    class OtherTeacher:
        logit_scale, logit_bias = 100.0, 0.0
        fingerprint = {"name": "other", "pretrained": "", "width": 512, "weights": "0"}  # noqa: RUF012

        def encode_text(self, texts):
            return torch.ones(len(texts), 512)

    with pytest.raises(UserError, match="only . of 16 names"):
        with_teacher(vocabulary, OtherTeacher())

    class OwnTeacher(OtherTeacher):
        def encode_text(self, texts):
            spelled = {name.replace("_", " "): row for name, row in rows.items()}
            found = [max((n for n in spelled if n in text), key=len, default="anklet") for text in texts]
            return torch.stack([spelled[n] for n in found])

    assert with_teacher(vocabulary, OwnTeacher()).fingerprint == OtherTeacher.fingerprint


# the heads, from the variables on


def test_the_rpn_normalises_each_level_by_itself(released_arrays, released_detector):
    head = released_detector.model.proposal_generator.rpn_head
    maps = [random(1, 4, 5, 256) * (level - 3) for level in range(2, 7)]
    expected = [reference.rpn_head(released_arrays, x[0], level) for level, x in enumerate(maps, 2)]

    def found():
        with torch.no_grad():
            scores, codes = head([channels_first(x) for x in maps])
        codes = [x[0].unflatten(0, (3, 4))[:, [1, 0, 3, 2]].flatten(0, 1) for x in codes]
        return [(s[0].permute(1, 2, 0), c.permute(1, 2, 0)) for s, c in zip(scores, codes, strict=True)]

    def right():
        pairs = zip(found(), expected, strict=True)
        return all(agrees(m, t, 1e-3) for mine, theirs in pairs for m, t in zip(mine, theirs, strict=True))

    assert right()
    norms = [module for module in head.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 10
    for norm in norms:
        norm.eps = 1e-5  # PyTorch's
    assert not right()
    for norm in norms:
        norm.eps = 1e-4
    head.norms = nn.ModuleList(reversed(head.norms))
    assert not right()
    head.norms = nn.ModuleList(reversed(head.norms))
    assert right()


def test_every_norm_has_the_released_eps(released_detector):
    norms = [m for m in released_detector.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 53 + 5 + 10 + 8 + 4 and {m.eps for m in norms} == {1e-4}


def test_the_box_head(released_arrays, released_detector):
    heads, x = released_detector.model.roi_heads, random(3, 7, 7, 256)
    with torch.no_grad():
        (main, distilled), deltas = heads._embed(channels_first(x))
        logits = [heads.classifier(e) for e in (main, distilled)]
    for n in range(3):
        embedding, code = reference.box_head(released_arrays, x[n])
        other, _ = reference.box_head(released_arrays, x[n], distill=True)
        assert agrees(main[n], embedding, 1e-3) and agrees(distilled[n], other, 1e-3)
        assert agrees(deltas[n][[1, 0, 3, 2]], code, 1e-3)
        background_first = reference.logits(released_arrays, embedding)
        assert agrees(logits[0][n], np.roll(background_first, -1), 1e-3)
        assert agrees(logits[1][n][:-1], reference.logits(released_arrays, other, background=False), 1e-3)


def test_the_mask_head(released_arrays, released_detector):
    x = random(2, 14, 14, 256)
    with torch.no_grad():
        found = released_detector.model.roi_heads.mask_head.layers(channels_first(x)).sigmoid()[:, 0]
    for n in range(2):
        assert agrees(found[n], reference.mask_head(released_arrays, x[n]), 1e-3)
