"""The teacher pass: from image files and boxes to region embeddings.

Worker processes read and decode images and plan their crops. Images travel to the device as bytes, several at a time,
and are cropped there; in between the host waits for nothing, so that the device always has work. Crops of several
images fill each batch of the encoder. Batches are filled within one shard of the store, from its first image, so that
an embedding does not depend on the number of processes or on where a killed run resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vild.store.store import StoredRegions, StoreWriter
from vild.teacher.crops import SCALES, fuse_scales, normalise, plan_crops
from vild.teacher.teacher import Teacher
from vild.utils.errors import BadImage
from vild.utils.images import read_image

logger = logging.getLogger(__name__)

CROP_MEMORY = 2**20  # bytes to crop in, for each crop of the encoder's batch
IMAGE_MEMORY = 2**27  # bytes of images that are sent to the device together


class PlannedImage(NamedTuple):
    """A decoded image, uint8 RGB [3, H, W], and the plan of its crops (``crops.plan_crops``), both on the CPU."""

    image: Tensor
    plan: Tensor


@dataclass(frozen=True)
class _ImageFiles:
    files: Mapping[int, str]
    regions: Mapping[int, tuple[Tensor, Tensor]]
    size: tuple[int, int]
    crop: str
    skip: bool

    def __getitem__(self, image_id: int) -> PlannedImage | str:
        try:
            image = read_image(self.files[image_id], "RGB")
        except BadImage as error:
            if not self.skip:
                raise
            return str(error)
        plan = plan_crops(self.regions[image_id][0], *image.shape[:2], self.size, self.crop)
        return PlannedImage(torch.from_numpy(image.copy()).permute(2, 0, 1), plan)


def load_images(
    teacher: Teacher,
    files: Mapping[int, str],
    regions: Mapping[int, tuple[Tensor, Tensor]],
    image_ids: Sequence[int],
    workers: int,
    skip: bool = False,
) -> DataLoader:
    """Images one by one in the order of ``image_ids``, with the plans of their crops, made ahead by worker processes.

    Args:
        teacher: whose crops they are.
        files: image_id to path.
        regions: image_id to boxes, float [N, 4] xyxy in the image's pixels, and scores [N]; on the CPU.
        skip: yield the error message of an unreadable image instead of raising BadImage.
    """
    images = _ImageFiles(files, regions, teacher.size, teacher.crop, skip)
    return DataLoader(images, batch_size=None, sampler=image_ids, num_workers=workers)


class Encoder:
    """The teacher's crops and image tower in batches of at most ``batch`` crops, halved for good when GPU memory runs
    out."""

    def __init__(self, teacher: Teacher, batch: int):
        self.teacher, self.batch = teacher, batch

    def __call__(self, crops: Tensor) -> Tensor:
        """uint8 [N, 3, h, w] to unit float32 [N, D]."""
        teacher = self.teacher
        return self._within_memory(
            lambda: torch.cat(
                [teacher.encode_image(normalise(p, teacher.mean, teacher.std)) for p in crops.split(self.batch)]
            )
        )

    def cut(self, images: Sequence[PlannedImage]) -> Tensor:
        """uint8 [N, S, 3, h, w] of all crops on the teacher's device."""
        planned = tuple(zip(*images, strict=True))
        return self._within_memory(lambda: self.teacher.cut_planned(*planned, self.batch * CROP_MEMORY))

    def _within_memory(self, work: Callable[[], Tensor]) -> Tensor:
        while True:
            try:
                return work()
            except torch.cuda.OutOfMemoryError:
                if self.batch == 1:
                    raise
            # the error is forgotten by now, and with it the tensors of its frames
            self.batch //= 2
            torch.cuda.empty_cache()
            logger.warning("the GPU's memory does not hold the batch; going on with %d crops", self.batch)


def encode_images(encoder: Encoder, images: Iterable[PlannedImage | str]) -> Iterator[Tensor]:
    """Distillation targets of one image after the other, from batches that are filled across images.

    Args:
        images: as :func:`load_images` gives them; an unreadable one (its error message) gives no embeddings.

    Yields:
        for each image, unit float32 [N, D] on the teacher's device.
    """
    teacher = encoder.teacher
    per_batch = max(1, encoder.batch // len(SCALES))  # regions
    counts: list[int] = []  # of images whose embeddings are not complete yet
    waiting: list[PlannedImage] = []  # images to be cropped together
    crops = torch.zeros((0, len(SCALES), 3, *teacher.size), dtype=torch.uint8, device=teacher.device)
    ready = torch.zeros((0, teacher.width), device=teacher.device)

    def encode(crops: Tensor) -> Tensor:
        parts = [encoder(part.flatten(0, 1)) for part in crops.split(per_batch)]
        return torch.cat([ready, fuse_scales(torch.cat(parts).unflatten(0, (-1, len(SCALES))))])

    for image in images:
        if isinstance(image, str):
            logger.warning("no regions: %s", image)
            counts.append(0)
            continue
        counts.append(len(image.plan) // len(SCALES))
        if counts[-1]:
            waiting.append(image)
        enough = sum(counts) - len(ready) >= per_batch
        if enough or sum(i.image.numel() for i in waiting) > IMAGE_MEMORY:
            crops, waiting = torch.cat([crops, encoder.cut(waiting)]), []
        if enough:
            whole = len(crops) // per_batch * per_batch
            ready, crops = encode(crops[:whole]), crops[whole:]
            while counts and counts[0] <= len(ready):
                yield ready[: counts[0]]
                ready = ready[counts.pop(0) :]
    if waiting:
        crops = torch.cat([crops, encoder.cut(waiting)])
    yield from encode(crops).split(counts)


def to_host(encoded: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors on the CPU, once the device has finished them all."""
    return list(torch.cat(list(encoded)).cpu().split([len(e) for e in encoded]))


def write_shards(
    writer: StoreWriter,
    shards: Sequence[tuple[int, Sequence[int]]],
    encoder: Encoder,
    images: Iterable[PlannedImage | str],
    regions: Mapping[int, tuple[Tensor, Tensor]],
) -> Iterator[int]:
    """Encode and write shards; a thread writes one while the next is encoded.

    Args:
        shards: (index, image ids), as ``writer.missing()`` gives them.
        images: of all these image ids, in this order.
        regions: image_id to boxes [N, 4] and scores [N].

    Yields:
        1 for every image that is encoded.
    """
    images, writing = iter(images), None
    with ThreadPoolExecutor(1) as thread:
        for index, ids in shards:
            encoded: list[Tensor] = []
            for embeddings in encode_images(encoder, islice(images, len(ids))):
                encoded.append(embeddings)
                yield 1
            found = {}
            for i, embeddings in zip(ids, to_host(encoded), strict=True):
                boxes, scores = regions[i]
                n = len(embeddings)  # 0 for an unreadable image
                found[i] = StoredRegions(boxes[:n], embeddings, scores[:n])
            if writing is not None:
                writing.result()
            writing = thread.submit(writer.write_shard, index, found.__getitem__)
        if writing is not None:
            writing.result()
