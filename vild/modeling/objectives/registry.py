"""The registry of distillation objectives and the decorator that fills it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.schedule import Range


@dataclass(frozen=True)
class ObjectiveFunction:
    """A registered objective, called like its function: a :class:`RegionBatch` and keyword parameters to a scalar.

    Attributes:
        pairwise: compares pairs or triples of regions. It is then not a mean over regions, so regions cannot be
            weighted one by one, and it does not say where in the teacher's space an embedding belongs.
        needs_maps: looks at the teacher's feature maps, which only a live teacher provides.
        adapter: which learned 1x1 convolution to the channels of the teacher's maps it needs: "roi" (of RoI features),
            "image" (of an FPN level over the whole image) or None.
        averages_teachers: imitates a distribution over words and takes it from ``regions.logits``, where the
            distributions of several teachers are averaged.
        runs_when_empty: the function is called even if the step has no region; all others then give 0.
        ranges: allowed values of numeric parameters, at both ends of a schedule.
    """

    function: Callable[..., Tensor]
    pairwise: bool = False
    needs_maps: bool = False
    adapter: Literal["roi", "image"] | None = None
    averages_teachers: bool = False
    runs_when_empty: bool = False
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def __call__(self, regions: RegionBatch, **parameters) -> Tensor:
        if not len(regions.student) and not self.runs_when_empty:
            return regions.zero()
        return self.function(regions, **parameters)

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """The keyword parameters; each is a key of the config in upper case."""
        return list(inspect.signature(self.function).parameters.values())[1:]


OBJECTIVES: dict[str, ObjectiveFunction] = {}  # by the NAME that MODEL.VILD.OBJECTIVES uses


def objective(*, name: str | None = None, **traits) -> Callable[[Callable], Callable]:
    """Register the decorated function under ``name`` (default: its own). ``traits``: see :class:`ObjectiveFunction`."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        key = name or function.__name__
        assert key not in OBJECTIVES, f"duplicate objective '{key}'"
        OBJECTIVES[key] = ObjectiveFunction(function, **traits)
        return function

    return register
