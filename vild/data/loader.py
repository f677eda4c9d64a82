"""Data loaders. The training stream is a pure function of (seed, position): a resumed run sees the batches of an
uninterrupted one, with any number of workers."""

from __future__ import annotations

import logging
import random
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.build import worker_init_reset_seed
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler

from vild.data import datasets
from vild.data.mapper import InferenceMapper, ViLDMapper
from vild.data.masks import has_mask
from vild.data.new_names import load_dicts
from vild.data.unreadable import REASON, UnreadableCounter, skips
from vild.store.store import EmbeddingStore
from vild.utils import signals
from vild.utils.errors import KILLED, WORKER, BadImage, Failure, UserError
from vild.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

MOST_SKIPPED = 100  # unreadable images in a row: the folder is at fault, not the images


class WorkerDied(Failure):
    """A worker of the training loader has died, usually killed by the system for lack of memory."""


class Watched:
    """Wrap a training loader so that a worker's death raises only where the next batch is requested, after the
    previous step is complete. (PyTorch raises from a signal handler, anywhere in a step.)

    Raises:
        WorkerDied: while iterating.
        Ended: the worker died because a scheduler ends all processes of the job.
    """

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        return self._watch(batches, silence())  # PyTorch's handler by now, if there are workers

    def _watch(self, batches: Iterator, handler) -> Iterator:
        while True:
            try:
                signal.signal(signal.SIGCHLD, handler)
                try:
                    batch = next(batches)  # the stream is infinite
                finally:
                    handler = silence()  # inside the outer try: it may raise for a worker that has just died
            except (RuntimeError, ConnectionError, EOFError) as error:
                died = str(error).strip().rstrip(".")
                if not isinstance(error, RuntimeError) and not died.startswith("Caught"):  # not raised by a worker
                    died = f"{WORKER}: {died}"  # it died while sending a batch
                if died.startswith("Pin memory thread"):  # for a GPU this thread receives; it ends with such a worker
                    died = f"{WORKER}: {died}"
                if not died.startswith(WORKER):
                    raise
                break
            yield batch
        time.sleep(signals.ONE_REQUEST)  # if that was a scheduler, its signal is on the way to this process too
        if signals.pending() is not None:
            raise signals.Ended(signals.pending())
        raise WorkerDied(f"{died} ({KILLED})")


def silence():
    """Replace the handler of a child's death by the default, and return it. A signal that is pending is handled first,
    which may raise; the handler is replaced nevertheless."""
    try:
        return signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except RuntimeError:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise


class SeededStream(torch.utils.data.Dataset):
    """Map (position, index) to a mapped record, with random generators seeded by the position.

    Args:
        skip: replace an unreadable image by another record, drawn uniformly with a generator seeded by seed and
            position; the mapped record names the replaced images (``unreadable.REASON``).
        batch: (images of a step, those that have labels); the mapped records of the others have ``distill_only``.
    """

    def __init__(
        self,
        records: list[dict],
        mapper: Callable[[dict], dict],
        seed: int,
        skip: bool = False,
        batch: tuple[int, int] = (1, 1),
    ):
        self.records = DatasetFromList(records, copy=False)
        self.mapper = mapper
        self.seed = seed
        self.skip = skip
        self.batch = batch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        state = np.random.SeedSequence([self.seed, position]).generate_state(2)
        unreadable: dict[str, str] = {}
        for others in range(MOST_SKIPPED):
            np.random.seed(state[0])
            random.seed(int(state[1]))
            record = self.records[index]
            try:
                mapped = self.mapper(record)
            except BadImage as error:
                if not self.skip:
                    raise
                unreadable[record["file_name"]] = str(error)
                index = int(np.random.default_rng([self.seed, position, others]).integers(len(self.records)))
            else:
                mapped |= {REASON: unreadable} if unreadable else {}
                size, labelled = self.batch
                return mapped if position % size < labelled else mapped | {"distill_only": True}
        raise UserError(f"{MOST_SKIPPED} unusable images in a row; the last: {[*unreadable.values()][-1]}")


class ResumableSampler(RepeatFactorTrainingSampler):
    """An infinite stream of (position, index), shuffled every epoch, that can start at any position.

    Args:
        repeats: repeat factor of each record per epoch, float [size] (1.0: once; LVIS's repeat factors).
        start: first position, counted over all ranks.
    """

    def __init__(self, repeats: torch.Tensor, seed: int, start: int = 0):
        super().__init__(repeats, seed=seed)
        self.start = start

    def _epoch(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed + number)
        indices = self._get_epoch_indices(generator)
        return indices[torch.randperm(len(indices), generator=generator)].tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch = 0, 0
        while True:
            indices = self._epoch(epoch)
            first = max(self.start - position, 0)
            for offset in range(first, len(indices)):
                if (position + offset) % self._world_size == self._rank:
                    yield position + offset, indices[offset]
            position, epoch = position + len(indices), epoch + 1


def check_keeps_base(name: str, where: str) -> None:
    """UserError if a data set would leak novel annotations into what learns from it."""
    if datasets.get_entry(name).keep == "all" and "novel" in datasets.get_classes(name).splits:
        raise UserError(f"{where}: '{name}' keeps novel annotations; training needs keep = base")


def training_records(names: tuple[str, ...], filter_empty: bool, vocabulary: Vocabulary | None = None) -> list[dict]:
    """The records of the training sets. With a ``vocabulary`` their classes are those of it.

    Raises:
        UserError: an unknown or missing data set, or one that would leak novel annotations into training.
    """
    for name in names:
        check_keeps_base(name, "DATASETS.TRAIN")
    records = [r for name in names for r in load_dicts(name, vocabulary)]
    if filter_empty:
        records = [r for r in records if any(not a["iscrowd"] for a in r["annotations"])]
    if not records:
        raise UserError(f"DATASETS.TRAIN {tuple(names)}: no image has an annotation of a base class")
    return records


def check_masks(records: list[dict], mask_format: str) -> None:
    """UserError unless every annotation that is not a crowd has a mask in ``INPUT.MASK_FORMAT``."""
    masks = [(r["file_name"], a.get("segmentation")) for r in records for a in r["annotations"] if not a["iscrowd"]]
    if without := [name for name, mask in masks if not mask or not has_mask(mask)]:
        raise UserError(
            f"MODEL.MASK_ON is True, but {len(without)} of {len(masks)} annotations of DATASETS.TRAIN have no mask, "
            f"first in image {without[0]}: {'set it to False' if len(without) == len(masks) else 'add or remove them'}"
        )
    if mask_format == "polygon" and (rle := [name for name, mask in masks if isinstance(mask, dict)]):
        raise UserError(
            f"INPUT.MASK_FORMAT is polygon, but {len(rle)} of {len(masks)} masks are RLE, first in image {rle[0]}: set "
            "it to bitmask"
        )


def check_store(store: EmbeddingStore, names: tuple[str, ...], records: list[dict], mixed: bool = False) -> None:
    """UserError unless the store was built from these images and has all of them (``mixed``: some of them), each under
    a unique id."""
    if made_from := store.plan.get("pictures"):
        given = {datasets.images_hash(name) for name in names}
        # a merged store has a list, which must include every data set
        if not (given <= set(made_from) if isinstance(made_from, list) else made_from in given):
            raise UserError(f"store {store.folder}: it was built from other images than DATASETS.TRAIN {tuple(names)}")
    files: dict[int, str] = {}
    for record in records:
        image_id = record["image_id"]
        if image_id in store:
            file_name = files.setdefault(image_id, record["file_name"])
            if file_name != record["file_name"]:
                both = f"{file_name} and {record['file_name']}"
                raise UserError(f"store {store.folder}: image_id {image_id} of DATASETS.TRAIN {names} is {both}")
        elif not mixed:
            raise UserError(f"store {store.folder}: image_id {image_id} is not in it")
    if mixed:
        count = sum(r["image_id"] in store for r in records)
        logger.info("store %s has %d of %d images; other targets are computed live", store.folder, count, len(records))


def build_train_loader(cfg, store: EmbeddingStore | None, start_iteration: int = 0):
    """Build the training loader, starting with the batch of ``start_iteration``."""
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set")
    vocabulary = Vocabulary.load(cfg.MODEL.VILD.VOCABULARY) if cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS else None
    records = training_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, vocabulary)
    if cfg.MODEL.MASK_ON and not cfg.MODEL.VILD.OLD_STUDENT.HEAD_ONLY:
        check_masks(records, cfg.INPUT.MASK_FORMAT)
    if store is not None:
        check_store(store, cfg.DATASETS.TRAIN, records, cfg.MODEL.VILD.DISTILL_FROM == "mixed")
    datasets.forget()
    seed = max(cfg.SEED, 0)
    repeats = torch.ones(len(records))
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        threshold = cfg.DATALOADER.REPEAT_THRESHOLD
        repeats = ResumableSampler.repeat_factors_from_category_frequency(records, threshold)
    skip, labelled = skips(cfg), cfg.SOLVER.IMS_PER_BATCH
    size = labelled if store is None else labelled + cfg.MODEL.VILD.DISTILL_IMAGES
    loader = build_detection_train_loader(
        dataset=SeededStream(records, ViLDMapper.from_config(cfg, store), seed, skip, (size, labelled)),
        mapper=None,
        sampler=ResumableSampler(repeats, seed, start_iteration * size),
        total_batch_size=size,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
    )
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        loader.dataset = SafelyStarted(loader.dataset)
    else:
        loader = SafelyStarted(loader)
    return Watched(UnreadableCounter(loader, cfg.OUTPUT_DIR, resumed=start_iteration > 0) if skip else loader)


class SafelyStarted:
    """Wrap a PyTorch loader so that no scheduler's SIGTERM ends a worker that has not run :func:`start_worker` yet, as
    PyTorch's own handler would."""

    def __init__(self, loader: torch.utils.data.DataLoader):
        self.loader = loader
        loader.worker_init_fn = start_worker  # Detectron2 has no argument for it

    def __iter__(self) -> Iterator:
        with signals.held():
            return iter(self.loader)


def start_worker(number: int) -> None:
    """Initialise a worker process of the training loader."""
    signals.end_by_parent_only()
    worker_init_reset_seed(number)


def build_test_loader(cfg, name: str):
    """Build Detectron2's test loader for a data set."""
    records = datasets.load_dicts(name)
    for record in records:
        record.pop("annotations", None)
    mapper = InferenceMapper(cfg)
    return build_detection_test_loader(records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)
