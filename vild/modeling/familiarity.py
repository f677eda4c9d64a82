"""Is an image like those that a detector knows? Means and spreads of its features against those of known images. No
label is used. It tells a photograph from a drawing, not one thing from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WITHIN = 0.9  # share of the statistics that count
KNOWN = 0.99  # share of the known images within the limit
FEWEST_IMAGES = 40  # the limit that fewer give is too low: more of the known images lie beyond it


def image_statistics(maps: Sequence[Tensor]) -> Tensor:
    """Mean and standard deviation (0 for one position) over positions of each channel of the feature maps
    [N, F_l, H_l, W_l] of N images: [N, 2 * sum of F_l]."""
    flat = [x.flatten(2).float() for x in maps]
    return torch.cat([part for x in flat for part in (x.mean(2), _deviation(x, 2))], 1)


@dataclass(frozen=True)
class Familiarity:
    """What is known of the images that a detector was calibrated on.

    Attributes:
        mean, spread: of each statistic over those images.
        limit: the distance within which KNOWN of them lie.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    limit: float

    @classmethod
    def fit(cls, statistics: Tensor) -> Familiarity:
        """From the statistics [N, S] of known images, FEWEST_IMAGES or more."""
        mean, spread = statistics.mean(0), _deviation(statistics, 0).clamp(min=1e-6)
        limit = _distance(statistics, mean, spread).quantile(KNOWN).clamp(min=1e-6)
        return cls(tuple(mean.tolist()), tuple(spread.tolist()), limit.item())

    @classmethod
    def from_state(cls, state: dict, statistics: int | None = None) -> Familiarity:
        """From plain values, as :func:`dataclasses.asdict` gives them; see ``Calibration.from_state``."""
        mean, spread = (tuple(map(float, state[key])) for key in ("mean", "spread"))
        limit = float(state["limit"])
        if not all(map(math.isfinite, (*mean, *spread, limit))) or min(*spread, limit) <= 0:
            raise ValueError("the calibration's image statistics are not finite, or a spread or limit is not above 0")
        if {len(mean), len(spread)} != {statistics or len(mean)}:
            raise ValueError(f"the calibration has {len(mean)} image statistics, the detector {statistics}")
        return cls(mean, spread, limit)

    def distance(self, statistics: Tensor) -> Tensor:
        """[N, S] to [N], in units of the limit: above 1, an image is unlike the known ones."""
        mean, spread = (statistics.new_tensor(values) for values in (self.mean, self.spread))
        return _distance(statistics, mean, spread) / self.limit


def _deviation(x: Tensor, dim: int) -> Tensor:
    return x.std(dim) if x.shape[dim] > 1 else torch.zeros_like(x.mean(dim))


def _distance(statistics: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    return ((statistics - mean) / spread).abs().quantile(WITHIN, dim=1)
