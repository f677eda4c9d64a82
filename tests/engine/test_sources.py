"""Mistakes in what a training distils from are one line."""

import pytest
import torch

from tests.engine.live import FROM, MAPS
from vild.engine.sources import open_live_teacher, parse_distillation
from vild.engine.trainer import Trainer
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary


def test_what_a_user_gets_wrong(make_cfg, teacher, vocabulary, tmp_path):
    def told(message, function, *overrides):
        with pytest.raises(UserError, match=message) as caught:
            function(make_cfg("vild", *overrides))
        assert "\n" not in str(caught.value)

    told("DISTILL_FROM: 'techer' is not one of store, teacher, mixed", Trainer, FROM, "techer")
    told("MODEL.VILD.STORE is empty, .*'vild' distils.*'mixed'", Trainer, FROM, "mixed", "MODEL.VILD.STORE", "")
    for source in ("store", "mixed"):
        maps = ("MODEL.VILD.OBJECTIVES", '[{"NAME": "l1"}, {"NAME": "tokens"}]')
        told(f"OBJECTIVES: 'tokens' needs .* not '{source}'", Trainer, FROM, source, *maps, "MODEL.VILD.STORE", "")
    told(
        "INPUT.FORMAT: .*'L' images",
        lambda cfg: open_live_teacher(cfg, None),
        FROM,
        "teacher",
        "INPUT.FORMAT",
        "L",
    )
    told("teacher 'ViT-X': open_clip has no model", Trainer, FROM, "teacher", "MODEL.VILD.TEACHER.NAME", "ViT-X")
    for name, fingerprint in (("weights", {"weights": "0" * 16}), ("width", {"width": 61, "weights": "1" * 16})):
        width = fingerprint.get("width", teacher.width)
        words = Vocabulary(vocabulary.names, torch.eye(60, width), vocabulary.splits,
                           fingerprint={**vocabulary.fingerprint, **fingerprint})  # fmt: skip
        words.save(path := tmp_path / f"{name}.safetensors")
        sides = rf"MODEL.VILD.TEACHER is of teacher .*width 64.* but vocabulary .*{name}\.safetensors is of .*width"
        told(f"{sides} {width}", Trainer, FROM, "teacher", "MODEL.VILD.VOCABULARY", str(path))


def test_a_config_that_cannot_mean_what_it_says_is_refused(make_cfg):
    key, teachers = "MODEL.VILD.", ("MODEL.VILD.TEACHERS", "[{'STORE': 'a', 'VOCABULARY': 'b'}]")
    over = (f"{key}OBJECTIVES", "[{'NAME': 'soft_targets', 'OVER': 'background'}]")
    for variant, overrides, message in [
        ("vild", (f"{key}TEMPERATURE", -0.1), "TEMPERATURE: -0.1 is below 0"),
        ("vild", (f"{key}TEST_TEMPERATURE", -0.1), "TEST_TEMPERATURE: -0.1 is below 0"),
        ("vild", (f"{key}DISTILL_WEIGHT", -1.0), "DISTILL_WEIGHT: -1.0 is below 0"),
        ("ensemble", (f"{key}ENSEMBLE_WEIGHT", 1.5), "ENSEMBLE_WEIGHT: 1.5 is not within 0 and 1"),
        ("vild", (f"{key}OLD_STUDENT.WEIGHT", -0.5), "OLD_STUDENT.WEIGHT: -0.5 is below 0"),
        ("text", teachers, "the variant 'text' distils from no teacher"),
        ("vild", (f"{key}SEVERAL_TEACHERS.WEIGHTS", "confidence"), "MODEL.VILD.TEACHERS is empty"),
        ("image", over, "the variant 'image' has no background class"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_distillation(make_cfg(variant, *overrides))
    for variant in ("text", "image", "vild", "ensemble"):
        parse_distillation(make_cfg(variant))


@pytest.mark.parametrize("variant", ["image", "ensemble"])
def test_an_image_head_that_nothing_trains_is_refused(make_cfg, variant):
    key, old = "MODEL.VILD.OBJECTIVES", ("MODEL.VILD.OLD_STUDENT.WEIGHTS", "old.pth")
    for objectives in ("[]", '[{"NAME": "attention"}, {"NAME": "tokens"}]', '[{"NAME": "distances"}]'):
        with pytest.raises(UserError, match=f"the image head of the variant '{variant}' would learn nothing"):
            parse_distillation(make_cfg(variant, FROM, "teacher", key, objectives))
    assert parse_distillation(make_cfg(variant, FROM, "teacher", *MAPS)).needs_maps
    assert not parse_distillation(make_cfg("vild", key, "[]")).needs_maps
    if variant == "image":  # its only head remembers
        assert not parse_distillation(make_cfg(variant, key, "[]", *old)).needs_maps
