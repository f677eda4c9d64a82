"""What a training distils from: the store, the live teacher, extra teachers, the old student.

First :func:`parse_distillation` checks a config without opening a file, which is also how experiment grids check their
rows. Then the ``open_`` functions open what the config names, and :func:`attach_sources` gives it to the model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from detectron2.utils import comm

from vild.checkpoint.checkpointer import VildCheckpointer
from vild.data import datasets
from vild.data.new_names import unlabelled_classes
from vild.modeling import build_model
from vild.modeling.extra_teachers import check_several, check_teachers
from vild.modeling.objectives import Objective, names_with, parse_objectives
from vild.modeling.region_heads import RANGES_AT_TEST, VARIANTS
from vild.modeling.schedule import NOT_NEGATIVE, check_ranges, parse_loss_weights
from vild.store.multi import SeveralStores
from vild.store.store import EmbeddingStore
from vild.utils.errors import UserError, count_of
from vild.utils.fingerprint import check_same_teacher, crop_of, describe, is_named
from vild.utils.weight_files import load_weights
from vild.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vild.engine.live_targets import LiveTargets

logger = logging.getLogger(__name__)

SOURCES = ("store", "teacher", "mixed")
RANGES = RANGES_AT_TEST | dict.fromkeys(("DISTILL_WEIGHT", "DISTILL_IMAGES", "OLD_STUDENT.WEIGHT"), NOT_NEGATIVE)


def is_proposal_network(cfg) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"


def check_classes(vocabulary: Vocabulary, name: str, marks: bool, remedy: str = "") -> None:
    """UserError unless the vocabulary holds exactly the data set's classes in their order and, with ``marks`` (for
    training and the ensemble's fusion), marks the same ones as base. The message ends with what to do, by default to
    build the data set's vocabulary."""
    classes = datasets.get_classes(name)
    if vocabulary.names != classes.names:
        pairs = enumerate(zip_longest(vocabulary.names, classes.names, fillvalue=""))
        n, (mine, theirs) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        remedy = remedy or f"tools/build_vocabulary.py --vocabulary {name}"
        raise UserError(
            f"data set '{name}' has {count_of(len(classes.names), 'class')}, the vocabulary {len(vocabulary)}; they "
            f"first differ at number {n}: '{theirs}' and '{mine}' ({remedy})"
        )
    if marks and vocabulary.splits != classes.splits:
        raise UserError(f"data set '{name}': the vocabulary's base/novel marks differ from the split's")


def check_teacher_name(cfg, vocabulary: Vocabulary) -> None:
    """A warning if a trained detector would look for new words' embeddings at another teacher."""
    name, pretrained = cfg.MODEL.VILD.TEACHER.NAME, cfg.MODEL.VILD.TEACHER.PRETRAINED
    if not is_named(vocabulary.fingerprint, name, pretrained):
        logger.warning("MODEL.VILD.TEACHER.NAME is %s, but vocabulary and detector are of %s: without that name there "
                       "the detector finds no words but its own", name, describe(vocabulary.fingerprint))  # fmt: skip


def open_test_vocabulary(cfg, trained: Vocabulary, names: Sequence[str], fuses: bool) -> Vocabulary:
    """The classes that an evaluation tells apart: those of ``TEST_VOCABULARY``, else ``trained``, the detector's own.

    Args:
        names: the test sets, whose classes they must be.
        fuses: of the detector's head; then the base/novel marks must be the same, too.

    Raises:
        UserError: they are other classes, or another teacher's.
    """
    if file := cfg.MODEL.VILD.TEST_VOCABULARY:
        words = Vocabulary.load(file)
        check_same_teacher(words.fingerprint, f"vocabulary {file}", trained.fingerprint, "the detector")
    else:
        words = trained
    for name in names:
        build = f"tools/build_vocabulary.py --vocabulary {name}"
        remedy = build if file else ("a test set must list the training set's categories in their order; or give "
                                     f"MODEL.VILD.TEST_VOCABULARY, made by {build}")  # fmt: skip
        check_classes(words, name, fuses, remedy)
    return words


@dataclass(frozen=True)
class DistillationConfig:
    """What a training distils, by its config.

    Attributes:
        variant: VARIANT; "" for a proposal network.
        source: DISTILL_FROM, one of SOURCES; "nothing" for a proposal network, the variant "text" and HEAD_ONLY.
        objectives: OBJECTIVES, parsed.
        extra_teachers: TEACHERS, each {STORE, VOCABULARY, WEIGHT}.
    """

    variant: str = ""
    source: str = "nothing"
    objectives: Sequence[Objective] = ()
    extra_teachers: Sequence[dict] = ()

    @property
    def uses_live_teacher(self) -> bool:
        return self.source in ("teacher", "mixed")

    @property
    def needs_maps(self) -> bool:
        """Whether an objective looks at the teacher's feature maps, which only a live teacher has."""
        return self.source != "nothing" and bool(names_with(self.objectives, "needs_maps"))


def parse_distillation(cfg) -> DistillationConfig:
    """The distillation of a training's config, checked. Opens no file.

    Raises:
        UserError: an unknown or contradictory value.
    """
    keys = cfg.MODEL.VILD
    if keys.DISTILL_FROM not in SOURCES:
        raise UserError(f"MODEL.VILD.DISTILL_FROM: '{keys.DISTILL_FROM}' is not one of {', '.join(SOURCES)}")
    if is_proposal_network(cfg):
        return DistillationConfig()
    if keys.VARIANT not in VARIANTS:
        raise UserError(f"MODEL.VILD.VARIANT: '{keys.VARIANT}' is not one of {', '.join(VARIANTS)}")
    found = DistillationConfig(
        variant=keys.VARIANT,
        source="nothing" if keys.VARIANT == "text" or keys.OLD_STUDENT.HEAD_ONLY else keys.DISTILL_FROM,
        objectives=parse_objectives(keys.OBJECTIVES),
        extra_teachers=check_teachers(keys.TEACHERS),
    )
    parse_loss_weights(keys.LOSS_WEIGHTS)
    check_ranges({**keys, "OLD_STUDENT.WEIGHT": keys.OLD_STUDENT.WEIGHT}, RANGES)
    if keys.DISTILL_IMAGES and found.source != "nothing":
        _check_distilled_images(cfg, found.source)
    _check_extra_teachers(found, keys.SEVERAL_TEACHERS)
    _check_objectives(found, keys.OLD_STUDENT.WEIGHTS)
    return found


def _check_distilled_images(cfg, source: str) -> None:
    """UserError unless every part of a step has images with labels beside those of ``DISTILL_IMAGES``."""
    images = f"MODEL.VILD.DISTILL_IMAGES: {cfg.MODEL.VILD.DISTILL_IMAGES} images that are only distilled from"
    if source != "store":
        raise UserError(f"{images} need a store, but DISTILL_FROM is '{source}'")
    if cfg.SOLVER.ACCUMULATE != 1 or cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise UserError(f"{images} need SOLVER.ACCUMULATE 1 and DATALOADER.ASPECT_RATIO_GROUPING False")
    if cfg.MODEL.VILD.DISTILL_IMAGES % (world := comm.get_world_size()) or cfg.SOLVER.IMS_PER_BATCH % world:
        raise UserError(f"{images}, and SOLVER.IMS_PER_BATCH, are not whole numbers of images on {world} processes")


def _check_extra_teachers(found: DistillationConfig, rules) -> None:
    """UserError unless variant, source and objectives go together with the extra teachers and ``SEVERAL_TEACHERS``."""
    if found.extra_teachers and found.variant == "text":
        raise UserError("MODEL.VILD.TEACHERS: the variant 'text' distils from no teacher")
    if found.extra_teachers and found.source != "store":
        raise UserError(
            f"MODEL.VILD.TEACHERS: extra teachers are read from stores, but DISTILL_FROM is '{found.source}'"
        )
    if not found.extra_teachers and (rules.BY, rules.WEIGHTS) != ("projections", "fixed"):
        raise UserError("MODEL.VILD.SEVERAL_TEACHERS is for extra teachers, but MODEL.VILD.TEACHERS is empty")
    check_several(found.extra_teachers, found.objectives, rules.BY, rules.WEIGHTS)


def _check_objectives(found: DistillationConfig, old_student: str) -> None:
    """UserError unless the objectives can be computed from the source and train what the variant has."""
    if found.variant == "image" and any(o.parameters.get("over") == "background" for o in found.objectives):
        raise UserError("MODEL.VILD.OBJECTIVES: OVER is 'background', but the variant 'image' has no background class")
    if found.source == "nothing":
        return
    of_images = names_with(found.objectives, "needs_maps")
    # objectives that do not say where in the teacher's space a region lies
    unplaced = of_images + names_with(found.objectives, "pairwise")
    # the head of the variant "image" can also learn from an old student
    taught = found.variant == "ensemble" or (found.variant == "image" and not old_student)
    if taught and len(unplaced) == len(found.objectives):
        raise UserError(
            f"MODEL.VILD.OBJECTIVES: the image head of the variant '{found.variant}' would learn nothing of the "
            f"teacher's space from {unplaced}; add an objective of embeddings, {{'NAME': 'l1'}} for example"
        )
    if of_images and found.source != "teacher":
        raise UserError(
            f"MODEL.VILD.OBJECTIVES: '{of_images[0]}' needs the teacher's feature maps, which stores do not hold: "
            f"set MODEL.VILD.DISTILL_FROM to 'teacher', not '{found.source}'"
        )


def open_store(cfg) -> EmbeddingStore | None:
    """The store with those of extra teachers, checked against their vocabularies; None if the training reads none.

    Raises:
        UserError: there is none, or it is another teacher's than the vocabulary.
    """
    keys, distillation = cfg.MODEL.VILD, parse_distillation(cfg)
    if distillation.source not in ("store", "mixed"):
        return None
    if not keys.STORE:
        raise UserError(
            f"MODEL.VILD.STORE is empty, but the variant '{keys.VARIANT}' distils (DISTILL_FROM '{keys.DISTILL_FROM}')"
        )
    extra = distillation.extra_teachers
    store = SeveralStores(keys.STORE, [e["STORE"] for e in extra])
    files = [keys.VOCABULARY, *(e["VOCABULARY"] for e in extra)]
    for each, file in zip([store, *store.others], files, strict=True):
        each.check_teacher(Vocabulary.load(file).fingerprint, f"vocabulary {file}")
    return store


def open_live_teacher(cfg, store: EmbeddingStore | None) -> LiveTargets | None:
    """The teacher that runs while the detector trains, with the crop mode of ``store`` (if any); None without one.

    Raises:
        UserError: there is no such teacher, or the vocabulary is another teacher's.
    """
    keys, distillation = cfg.MODEL.VILD, parse_distillation(cfg)
    if not distillation.uses_live_teacher:
        return None
    from vild.engine.live_targets import LiveTargets
    from vild.teacher.teacher import build_teacher

    # the fork keeps the detector's initial weights independent of where its targets come from
    with torch.random.fork_rng(devices=[]):
        crop = crop_of(store.fingerprint) if store else "squash"
        name, pretrained, precision = keys.TEACHER.NAME, keys.TEACHER.PRETRAINED, keys.TEACHER.PRECISION
        if precision not in ("fp32", "bf16", "fp16"):
            raise UserError(f"MODEL.VILD.TEACHER.PRECISION: '{precision}' is none of fp32, bf16, fp16")
        teacher = build_teacher(name, pretrained, cfg.MODEL.DEVICE, crop, precision)
    fingerprint = Vocabulary.load(keys.VOCABULARY).fingerprint
    check_same_teacher(teacher.fingerprint, "MODEL.VILD.TEACHER", fingerprint, f"vocabulary {keys.VOCABULARY}")
    maps = distillation.needs_maps
    return LiveTargets(
        teacher.encode_batch_and_maps if maps else teacher.encode_batch,
        image_format=cfg.INPUT.FORMAT,
        per_image=keys.DISTILL_PER_IMAGE,
        min_visible=keys.MIN_VISIBLE,
        map_channels=teacher.map_shape[0] if maps else 0,
    )


def load_old_student(cfg) -> tuple[torch.nn.Module, dict]:
    """The detector of ``MODEL.VILD.OLD_STUDENT.WEIGHTS``, built by the config, and its network record.

    Raises:
        UserError: it has another teacher or another architecture.
    """
    path = cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS
    old = cfg.clone()
    old.defrost()
    old.MODEL.VILD.update({"VOCABULARY": path, "OBJECTIVES": [], "TEACHERS": []})
    check_same_teacher(
        Vocabulary.load(path).fingerprint, f"MODEL.VILD.OLD_STUDENT.WEIGHTS {path}",
        Vocabulary.load(cfg.MODEL.VILD.VOCABULARY).fingerprint, f"vocabulary {cfg.MODEL.VILD.VOCABULARY}",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = build_model(old)
    weights = load_weights(path)["model"]
    for key, value in model.state_dict().items():  # Detectron2 would only log it and go on with random weights
        theirs = tuple(weights[key].shape) if key in weights else "missing"
        if theirs != tuple(value.shape):
            raise UserError(
                f"MODEL.VILD.OLD_STUDENT.WEIGHTS {path}: not a detector of the config's architecture: "
                f"{key} is {theirs}, not {tuple(value.shape)}"
            )
    return model, VildCheckpointer(model).load_recorded(path)


def attach_sources(model: torch.nn.Module, cfg, live_teacher: LiveTargets | None) -> list[dict]:
    """Give a detector (or its DistributedDataParallel wrapper) the config's old student and the live teacher.

    Returns:
        the network records of what it then learns from: the old student's, if there is one.
    """
    bare = getattr(model, "module", model)
    if live_teacher is not None:
        bare.set_live_teacher(live_teacher)
    if not cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS:
        return []
    old, record = load_old_student(cfg)
    bare.set_old_student(old)
    unlabelled = unlabelled_classes(bare.vocabulary, cfg.DATASETS.TRAIN)
    if unlabelled.any():
        bare.roi_heads.unlabelled = unlabelled.to(bare.device)
    return [record]
