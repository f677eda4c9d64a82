"""What tests of the teacher at work share."""

import numpy as np
import torch
from detectron2.utils.events import EventStorage

from vild.data import datasets
from vild.data.mapper import ViLDMapper
from vild.engine.sources import open_store
from vild.engine.trainer import Trainer

FROM, STILL = "MODEL.VILD.DISTILL_FROM", ("INPUT.RANDOM_FLIP", "none")
MAPS = ("MODEL.VILD.OBJECTIVES", '[{"NAME": "l1"}, {"NAME": "tokens"}, {"NAME": "attention"}]')


def records(count=4):
    return sorted(datasets.load_dicts("glyphs_train"), key=lambda r: r["image_id"])[:count]


def inputs_of(cfg, count=2):
    mapper = ViLDMapper.from_config(cfg, open_store(cfg))
    np.random.seed(0)
    return [mapper(r) for r in records(count)]


def build(cfg, live_teacher=None):
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    if live_teacher:
        model.set_live_teacher(live_teacher)
    return model


def losses_of(model, inputs):
    torch.manual_seed(1)
    with EventStorage():
        return model(inputs)


def look(live, image, window, proposals):
    """At one image."""
    return live([image], [window], [proposals])[0]
