"""What a region can learn from the teacher: one small function per objective, chosen and weighted by the config.

``MODEL.VILD.OBJECTIVES`` is a list of {NAME, WEIGHT, parameters ...}. The sum of its losses, times ``DISTILL_WEIGHT``,
is the distillation loss; each is logged as ``loss_<NAME>``. Any number may be a schedule (``modeling/schedule.py``).
ViLD's own is ``[{"NAME": "l1"}]``. To add one, decorate a function in any module of this folder with ``@objective()``
(example in CONTRIBUTING.md): all modules of the folder are imported here.

Functions take a :class:`RegionBatch` and keyword parameters and return a scalar, the mean over regions (or pairs).
"""

import pkgutil
from importlib import import_module

from vild.modeling.objectives.config import Objective, load_word_lists, names_with, parse_objectives, word_lists
from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.objectives.registry import OBJECTIVES

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "OBJECTIVES",
    "Objective",
    "RegionBatch",
    "load_word_lists",
    "names_with",
    "parse_objectives",
    "word_lists",
]
