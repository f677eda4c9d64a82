"""What would cost time on an accelerator, counted without one: on PyTorch's device "meta", which computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import random_boxes
from vild.teacher.crops import plan_crops
from vild.teacher.region_pass import PlannedImage
from vild.teacher.teacher import Teacher


class Launches(TorchDispatchMode):
    """Counts, of what happens on a device,

    * ``launches``: operators that would start a kernel (no views, no uninitialised memory);
    * ``transfers``: copies to it or from it, and whatever the host would have to wait for: a value or a shape that
      depends on the device's numbers. ("meta" raises where one is asked for.)
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.by_name = device, Counter()
        self.launches = self.transfers = 0

    def __enter__(self):
        self.made = _MadeOfNumbers(self)
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, given, made = function.overloadpacket.__name__, [*_devices((args, kwargs))], [*_devices(result)]
        if self.device not in (*given, *made):
            return result
        copies = name in ("_to_copy", "copy_") and given and {*given, *made} != {self.device}
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal") or _has_mask(name, args)
        self.transfers += bool(copies or waits)
        alias = [r.alias_info for r in function._schema.returns]
        if not name.startswith(("empty", "new_empty")) and not any(a is not None and not a.is_write for a in alias):
            self.launches += 1
            self.by_name[name] += 1
        return result


class _MadeOfNumbers(TorchFunctionMode):
    """Counts ``torch.tensor([...], device=...)``, a transfer that the dispatcher does not show."""

    def __init__(self, counter: Launches):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
        if made and result.device.type == self.counter.device:
            self.counter.transfers += 1
        return result


def _devices(values):
    if isinstance(values, torch.Tensor):
        yield values.device.type
    elif isinstance(values, torch.device):
        yield values.type
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _devices(value)


def _has_mask(name, args):
    found = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(i is not None and i.dtype == torch.bool for i in found)


class NoTower(Teacher):
    """A teacher with crops as CLIP's, whose image tower is one operator."""

    def __init__(self, device: str, crop: str = "squash"):
        mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
        super().__init__("", "", device, crop, weights="", width=8, size=(224, 224), mean=mean, std=std)

    def encode_image(self, images):
        return images.new_zeros((len(images), self.width))

    def encode_text(self, texts, *, prompts=None):
        raise NotImplementedError


def planned_images(teacher: Teacher, count: int, regions: int, height=480, width=640) -> Iterator[PlannedImage]:
    """Black images with boxes of all sizes and shapes."""
    rng, image = np.random.default_rng(0), torch.zeros(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    for _ in range(count):
        boxes = torch.from_numpy(random_boxes(rng, regions, height, width, smallest=8)).float()
        yield PlannedImage(image, plan_crops(boxes, height, width, teacher.size, teacher.crop))
