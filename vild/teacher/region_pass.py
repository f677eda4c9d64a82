"""The teacher pass: from image files and boxes to region embeddings.

Worker processes read and decode images, which travel to the device as bytes and are cropped there. Crops of several
images fill each batch of the encoder. Batches are filled within one shard of the store, from its first image, so that
an embedding does not depend on the number of processes or on where a killed run resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vild.store.store import StoredRegions, StoreWriter
from vild.teacher.crops import SCALES, fuse_scales, normalise
from vild.teacher.teacher import Teacher
from vild.utils.errors import BadImage
from vild.utils.images import read_image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _ImageFiles:
    """Decoded images by image_id, uint8 RGB [3, H, W]; with ``skip``, the error message of an unreadable one."""

    files: dict[int, str]
    skip: bool

    def __getitem__(self, image_id: int) -> Tensor | str:
        try:
            image = read_image(self.files[image_id], "RGB")
        except BadImage as error:
            if not self.skip:
                raise
            return str(error)
        return torch.from_numpy(image.copy()).permute(2, 0, 1)


def load_images(
    files: dict[int, str], image_ids: Sequence[int], workers: int, pin: bool, skip: bool = False
) -> DataLoader:
    """Images one by one in the order of ``image_ids``, read ahead by worker processes.

    Args:
        files: image_id to path.
        pin: into pinned memory, for a GPU.
        skip: yield the error message of an unreadable image instead of raising BadImage.
    """
    images = _ImageFiles(files, skip)
    return DataLoader(images, batch_size=None, sampler=image_ids, num_workers=workers, pin_memory=pin)


class Encoder:
    """The teacher's image tower in batches of at most ``batch`` crops, halved for good when GPU memory runs out."""

    def __init__(self, teacher: Teacher, batch: int):
        self.teacher, self.batch = teacher, batch

    def __call__(self, crops: Tensor) -> Tensor:
        """uint8 [N, 3, h, w] to unit float32 [N, D]."""
        teacher = self.teacher
        while True:
            try:
                parts = crops.split(self.batch)
                return torch.cat([teacher.encode_image(normalise(p, teacher.mean, teacher.std)) for p in parts])
            except torch.cuda.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
                torch.cuda.empty_cache()
                logger.warning("the GPU's memory does not hold the batch; going on with %d crops", self.batch)


def encode_images(encoder: Encoder, images: Iterable[Tensor | str], boxes: Iterable[Tensor]) -> Iterator[Tensor]:
    """Distillation targets of one image after the other, from batches that are filled across images.

    Args:
        images: uint8 RGB [3, H, W] on any device; or the error message of an unreadable one, which gives no embeddings.
        boxes: of each image, float [N, 4] xyxy in its pixels.

    Yields:
        for each image, unit float32 [N, D] on the teacher's device.
    """
    teacher = encoder.teacher
    per_batch = max(1, encoder.batch // len(SCALES))  # regions
    counts: list[int] = []  # of images whose embeddings are not complete yet
    crops = torch.zeros((0, len(SCALES), 3, *teacher.size), dtype=torch.uint8, device=teacher.device)
    ready = torch.zeros((0, teacher.width), device=teacher.device)

    def encode(crops: Tensor) -> Tensor:
        parts = [encoder(part.flatten(0, 1)) for part in crops.split(per_batch)]
        return torch.cat([ready, fuse_scales(torch.cat(parts).unflatten(0, (-1, len(SCALES))))])

    for image, box in zip(images, boxes, strict=True):
        if isinstance(image, str):
            logger.warning("no regions: %s", image)
            box = box[:0]
        counts.append(len(box))
        if len(box):
            image = image.to(teacher.device, non_blocking=True)
            crops = torch.cat([crops, teacher.cut([image], [box.to(teacher.device)])])
        if whole := len(crops) // per_batch * per_batch:
            ready, crops = encode(crops[:whole]), crops[whole:]
            while counts and counts[0] <= len(ready):
                yield ready[: counts[0]]
                ready = ready[counts.pop(0) :]
    yield from encode(crops).split(counts)


def write_shards(
    writer: StoreWriter,
    shards: Sequence[tuple[int, Sequence[int]]],
    encoder: Encoder,
    images: Iterable[Tensor | str],
    regions: dict[int, tuple[Tensor, Tensor]],
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
            for embeddings in encode_images(encoder, islice(images, len(ids)), [regions[i][0] for i in ids]):
                encoded.append(embeddings)
                yield 1
            rows = torch.cat(encoded).cpu().split([len(e) for e in encoded])
            found = {}
            for i, embeddings in zip(ids, rows, strict=True):
                boxes, scores = regions[i]
                n = len(embeddings)  # 0 for an unreadable image
                found[i] = StoredRegions(boxes[:n], embeddings, scores[:n])
            if writing is not None:
                writing.result()
            writing = thread.submit(writer.write_shard, index, found.__getitem__)
        if writing is not None:
            writing.result()
