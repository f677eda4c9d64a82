"""The teacher pass: from image files and boxes to region embeddings, the encoder kept busy.

Images are read and decoded by worker processes, travel to the device as bytes, are cropped there, and crops of
several images fill each batch of the encoder. What a region's embedding is does not depend on how many processes
work or where a killed run began again: batches are filled within one shard of the store, from its first image.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vild.store.store import StoredRegions, StoreWriter
from vild.teacher.crops import SCALES, fuse_scales, normalise
from vild.teacher.teacher import Teacher
from vild.utils.errors import BadImage
from vild.utils.images import read_image

logger = logging.getLogger(__name__)


class ImageFiles(Dataset):
    """Decoded images, uint8 [3, H, W], RGB. ``files``: image_id to path; ``image_ids``: which, in what order;
    ``skip``: what is wrong with one that cannot be read comes in its place, as a line."""

    def __init__(self, files: dict[int, str], image_ids: Sequence[int], skip: bool = False):
        self.files, self.image_ids, self.skip = files, image_ids, skip

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = read_image(self.files[self.image_ids[index]], "RGB")
        except BadImage as error:
            if not self.skip:
                raise
            return str(error)
        return torch.from_numpy(image.copy()).permute(2, 0, 1)


def load_images(
    files: dict[int, str], image_ids: Sequence[int], workers: int, pin: bool, skip: bool = False
) -> DataLoader:
    """Images one by one, read ahead by worker processes; pinned where they go to a GPU."""
    return DataLoader(ImageFiles(files, image_ids, skip), batch_size=None, num_workers=workers, pin_memory=pin)


class Encoder:
    """The teacher's image tower in batches of at most ``batch`` crops; runs out of memory gracefully."""

    def __init__(self, teacher: Teacher, batch: int):
        self.teacher, self.batch = teacher, batch

    def __call__(self, crops: Tensor) -> Tensor:
        """uint8 [N, 3, h, w] to unit float32 [N, D]; halves the batch for good when memory runs out."""
        while True:
            try:
                parts = [self._encode(part) for part in crops.split(self.batch)]
                return torch.cat(parts) if len(parts) != 1 else parts[0]
            except torch.cuda.OutOfMemoryError:
                if self.batch == 1:
                    raise
                self.batch //= 2
                torch.cuda.empty_cache()
                logger.warning("the GPU's memory does not hold the batch; going on with %d crops", self.batch)

    def _encode(self, crops: Tensor) -> Tensor:
        return self.teacher.encode_image(normalise(crops, self.teacher.mean, self.teacher.std))


def encode_images(encoder: Encoder, images: Iterable[Tensor | str], boxes: Iterable[Tensor]) -> Iterator[Tensor]:
    """Distillation targets, an image at a time, of crops that fill batches across images.

    Args:
        images: uint8 [3, H, W], RGB, anywhere; or a line that says why there is none, which gives no embeddings.
        boxes: for each, float [N, 4] xyxy in its pixels.

    Yields:
        for each, unit float32 [N, D] on the teacher's device.
    """
    teacher = encoder.teacher
    per_batch = max(1, encoder.batch // len(SCALES))  # regions
    counts: list[int] = []  # of images whose embeddings are not handed out yet
    waiting: list[Tensor] = []  # crops [n, S, 3, h, w] not encoded yet
    ready = torch.zeros((0, teacher.width), device=teacher.device)

    def encode(everything: bool) -> Tensor:
        crops = torch.cat(waiting) if waiting else torch.zeros((0, len(SCALES), 3, *teacher.size), dtype=torch.uint8)
        whole = len(crops) if everything else len(crops) // per_batch * per_batch
        waiting[:] = [crops[whole:]] if whole < len(crops) else []
        parts = [ready]
        for part in crops[:whole].split(per_batch) if whole else ():
            embeddings = encoder(part.flatten(0, 1))
            parts.append(fuse_scales(embeddings.view(len(part), len(SCALES), -1)))
        return torch.cat(parts)

    for image, box in zip(images, boxes, strict=True):
        if isinstance(image, str):
            logger.warning("no regions: %s", image)
            box = box[:0]
        counts.append(len(box))
        if len(box):
            image = image.to(teacher.device, non_blocking=True)
            waiting.append(teacher.cut([image], [box.to(teacher.device)]))
        if sum(map(len, waiting)) >= per_batch:
            ready = encode(everything=False)
            while counts and counts[0] <= len(ready):
                yield ready[: counts[0]]
                ready = ready[counts.pop(0) :]
    ready = encode(everything=True)
    for count in counts:
        yield ready[:count]
        ready = ready[count:]


def write_shards(
    writer: StoreWriter,
    shards: Sequence[tuple[int, Sequence[int]]],
    encoder: Encoder,
    images: Iterable[Tensor],
    regions: dict[int, tuple[Tensor, Tensor]],
) -> Iterator[int]:
    """Encode and write shards, one written (by a thread) while the next is encoded.

    Args:
        shards: (index, image ids), as ``writer.missing()`` gives them.
        images: of all these image ids, in this order.
        regions: image_id to boxes [N, 4] and scores [N].

    Yields:
        1 for every image that is encoded.
    """
    stream = iter(images)
    written: Future | None = None
    with ThreadPoolExecutor(1) as thread:
        for index, ids in shards:
            found: dict[int, Tensor] = {}
            some = (next(stream) for _ in ids)
            for image_id, embeddings in zip(
                ids, encode_images(encoder, some, [regions[i][0] for i in ids]), strict=True
            ):
                found[image_id] = embeddings
                yield 1
            rows = torch.cat(list(found.values())).cpu().split([len(e) for e in found.values()])
            whole = {  # all of an image's rows, or none where it cannot be read
                i: StoredRegions(regions[i][0][: len(e)], e, regions[i][1][: len(e)])
                for i, e in zip(ids, rows, strict=True)
            }
            if written is not None:
                written.result()
            written = thread.submit(writer.write_shard, index, whole.__getitem__)
        if written is not None:
            written.result()
