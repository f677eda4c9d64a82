"""Data loaders. The training stream is a pure function of (seed, position), so that a resumed run sees exactly
what an undisturbed one would have seen, with any number of workers."""

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
from detectron2.utils import comm

from vild.data import datasets
from vild.data.mapper import InferenceMapper, ViLDMapper
from vild.data.unreadable import REASON, Counted, skips
from vild.store.store import EmbeddingStore
from vild.utils import signals
from vild.utils.errors import KILLED, WORKER, BadImage, Failure, UserError

logger = logging.getLogger(__name__)


MOST_SKIPPED = 100  # unreadable images in a row: then it is not the images, but where they lie


class WorkerDied(Failure):
    """A process of the training loader has ended, killed by the system mostly, when memory is short."""


class Watched:
    """A training loader whose workers' death is told where the next batch is asked for, and nowhere else: by then the
    step before is whole. (PyTorch tells of it by an exception out of a signal's handler, wherever the step is.)

    Raises:
        WorkerDied: while iterating.
        Ended: the worker died as a scheduler ends all processes of the job.
    """

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self) -> Iterator:
        return _WatchedIterator(iter(self.loader))


class _WatchedIterator:
    def __init__(self, iterator: Iterator):
        self.iterator = iterator
        self.told = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by now PyTorch's, where there are workers

    def __iter__(self):
        return self

    def __next__(self):
        signal.signal(signal.SIGCHLD, self.told)
        try:
            return next(self.iterator)
        except (RuntimeError, ConnectionError, EOFError) as error:
            died = str(error).strip().rstrip(".")
            if not isinstance(error, RuntimeError) and not died.startswith("Caught"):  # (what a worker caught itself)
                died = f"{WORKER}: {died}"  # it died while it handed over a batch
            if not died.startswith(WORKER):
                raise
        finally:
            self.told = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        time.sleep(signals.ONE_WISH)  # if that was a scheduler, its signal is on the way to this process too
        if signals.asked() is not None:
            raise signals.Ended(signals.asked())
        raise WorkerDied(f"{died} ({KILLED})")


class SeededStream(torch.utils.data.Dataset):
    """Map (position, index) to a mapped record, the random generators seeded by the position.

    Args:
        skip: in place of an image that cannot be read comes another, drawn by the seed and the position alone from
            all records alike; the record says for which (``unreadable.REASON``).
    """

    def __init__(self, records: list[dict], mapper: Callable[[dict], dict], seed: int, skip: bool = False):
        self.records = DatasetFromList(records, copy=False)
        self.mapper = mapper
        self.seed = seed
        self.skip = skip

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
                return {**mapped, REASON: unreadable} if unreadable else mapped
        raise UserError(
            f"{MOST_SKIPPED} images in a row are not as they should be; the last: {[*unreadable.values()][-1]}"
        )


class ResumableSampler(torch.utils.data.Sampler):
    """An endless stream of (position, index), shuffled anew each epoch, that can start anywhere.

    Args:
        repeats: how often each record comes in an epoch, float [size] (1.0: once; LVIS's repeat factors).
        start: the first position, over all ranks.
    """

    def __init__(self, repeats: torch.Tensor, seed: int, start: int = 0):
        self.repeats = repeats
        self.seed = seed
        self.start = start
        self.rank, self.world = comm.get_rank(), comm.get_world_size()  # a worker process could not ask

    def _epoch(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + number)
        whole = self.repeats.trunc()
        counts = whole + (torch.rand(len(self.repeats), generator=generator) < self.repeats - whole)
        indices = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
        return indices[torch.randperm(len(indices), generator=generator)].tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch = 0, 0
        while True:
            indices = self._epoch(epoch)
            first = max(self.start - position, 0)
            for offset in range(first, len(indices)):
                if (position + offset) % self.world == self.rank:
                    yield position + offset, indices[offset]
            position, epoch = position + len(indices), epoch + 1


def training_records(names: tuple[str, ...], filter_empty: bool) -> list[dict]:
    """The records of the training sets.

    Raises:
        UserError: an unknown or missing set, or one that would let novel annotations into training.
    """
    for name in names:
        if datasets.get_entry(name).keep == "all" and "novel" in datasets.get_classes(name).splits:
            raise UserError(f"DATASETS.TRAIN: '{name}' keeps novel annotations; train on a set with keep = base")
    records = [r for name in names for r in datasets.load_dicts(name)]
    if filter_empty:
        records = [r for r in records if any(not a["iscrowd"] for a in r["annotations"])]
    if not records:
        raise UserError(f"DATASETS.TRAIN {tuple(names)}: no image with an annotation of a base name")
    return records


def check_masks(records: list[dict], mask_format: str) -> None:
    """UserError unless every annotation has a mask of the form that ``INPUT.MASK_FORMAT`` wants."""
    for record in records:
        for annotation in record["annotations"]:
            mask = annotation.get("segmentation")
            if annotation["iscrowd"]:
                continue
            if not mask:
                raise UserError(f"image {record['file_name']}: a box without a mask, but MODEL.MASK_ON is True")
            if isinstance(mask, dict) and mask_format == "polygon":
                raise UserError(f"image {record['file_name']}: its masks are RLE; set INPUT.MASK_FORMAT to bitmask")


def check_store(store: EmbeddingStore, names: tuple[str, ...], records: list[dict], mixed: bool = False) -> None:
    """UserError unless the store was made from these images and holds all of them (``mixed``: or some), each
    under an id of its own."""
    if made_from := store.plan.get("pictures"):
        given = {datasets.images_hash(name) for name in names}
        # a merged store has a list, and must know every set
        if not (given <= set(made_from) if isinstance(made_from, list) else made_from in given):
            raise UserError(f"store {store.folder}: it was made from other images than DATASETS.TRAIN {tuple(names)}")
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
        held = sum(r["image_id"] in store for r in records)
        logger.info("store %s has %d of %d images; the others' targets come live", store.folder, held, len(records))


def build_train_loader(cfg, store: EmbeddingStore | None, start_iteration: int = 0):
    """The training loader of a config, at the position where ``start_iteration`` begins."""
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set")
    records = training_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    if cfg.MODEL.MASK_ON:
        check_masks(records, cfg.INPUT.MASK_FORMAT)
    if store is not None:
        check_store(store, cfg.DATASETS.TRAIN, records, cfg.MODEL.VILD.DISTILL_FROM == "mixed")
    datasets.forget()
    seed = max(cfg.SEED, 0)
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        repeats = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
    else:
        repeats = torch.ones(len(records))
    skip = skips(cfg)
    loader = build_detection_train_loader(
        dataset=SeededStream(records, ViLDMapper.from_config(cfg, store), seed, skip),
        mapper=None,
        sampler=ResumableSampler(repeats, seed, start_iteration * cfg.SOLVER.IMS_PER_BATCH),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    inner = loader.dataset if cfg.DATALOADER.ASPECT_RATIO_GROUPING else loader
    inner.worker_init_fn = start_worker  # Detectron2 takes none
    return Watched(Counted(loader, cfg.OUTPUT_DIR, resumed=start_iteration > 0) if skip else loader)


def start_worker(number: int) -> None:
    """In a new worker process of the training loader."""
    worker_init_reset_seed(number)
    signals.heed_parent_alone()


def build_test_loader(cfg, name: str):
    """Detectron2's test loader over one data set."""
    records = datasets.load_dicts(name)
    for record in records:
        record.pop("annotations", None)
    mapper = InferenceMapper(cfg)
    return build_detection_test_loader(records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)
