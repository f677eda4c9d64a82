"""What a training distils from: the store, the live teacher, further teachers, the old student; found in the config,
checked against one another, handed to the model."""

from __future__ import annotations

import torch

from vild.checkpoint.checkpointer import VildCheckpointer
from vild.data import datasets
from vild.engine.live_targets import LiveTargets
from vild.modeling import build_model
from vild.modeling.extra_teachers import check_several, check_teachers
from vild.modeling.objectives import names_with, parse_objectives
from vild.modeling.roi_heads import VARIANTS
from vild.modeling.schedule import parse_loss_weights
from vild.store.multi import SeveralStores
from vild.store.store import EmbeddingStore
from vild.teacher.teacher import build_teacher
from vild.utils.errors import UserError
from vild.utils.fingerprint import check_same_teacher, crop_of
from vild.utils.weight_files import load_weights
from vild.vocabulary.vocabulary import Vocabulary


def is_proposal_network(cfg) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"


def check_classes(vocabulary: Vocabulary, name: str, marks: bool) -> None:
    """UserError unless the vocabulary holds exactly the data set's classes, in order; and, where the ``marks``
    matter (training, the ensemble's fusion), marks the same ones as base."""
    classes = datasets.get_classes(name)
    if vocabulary.names != classes.names:
        pairs = zip(vocabulary.names, classes.names, strict=False)
        n, (mine, theirs) = next(
            ((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1]),
            (min(len(vocabulary), len(classes.names)), ("nothing", "nothing")),
        )
        raise UserError(
            f"data set '{name}' has {len(classes.names)} classes, the vocabulary {len(vocabulary)}; they first "
            f"differ at number {n}: '{theirs}' and '{mine}' (tools/build_vocabulary.py --dataset {name})"
        )
    if marks and vocabulary.splits != classes.splits:
        raise UserError(f"data set '{name}': the vocabulary's base/novel marks differ from the split's")


def distils_from(cfg) -> str:
    """``MODEL.VILD.DISTILL_FROM``; "nothing" where nothing is distilled."""
    source = cfg.MODEL.VILD.DISTILL_FROM
    if source not in ("store", "teacher", "mixed"):
        raise UserError(f"MODEL.VILD.DISTILL_FROM: '{source}' is not one of store, teacher, mixed")
    return "nothing" if is_proposal_network(cfg) or cfg.MODEL.VILD.VARIANT == "text" else source


# What a number of MODEL.VILD may be
RANGES = {
    "TEMPERATURE": (lambda x: x > 0, "not above 0"),
    "DISTILL_WEIGHT": (lambda x: x >= 0, "below 0"),
    "ENSEMBLE_WEIGHT": (lambda x: 0 <= x <= 1, "not within 0 and 1"),
    "OLD_STUDENT.WEIGHT": (lambda x: x >= 0, "below 0"),
}


def check_teaching(cfg) -> None:
    """UserError for what a training's config says of objectives, weights and teachers and cannot mean. Opens no
    file."""
    if is_proposal_network(cfg):
        return
    vild = cfg.MODEL.VILD
    if vild.VARIANT not in VARIANTS:
        raise UserError(f"MODEL.VILD.VARIANT: '{vild.VARIANT}' is not one of {', '.join(VARIANTS)}")
    values = {**vild, "OLD_STUDENT.WEIGHT": vild.OLD_STUDENT.WEIGHT}
    for name, (fits, wrong) in RANGES.items():
        if not fits(value := values[name]):
            raise UserError(f"MODEL.VILD.{name}: {value} is {wrong}")
    parse_loss_weights(vild.LOSS_WEIGHTS)
    objectives, teachers = parse_objectives(vild.OBJECTIVES), check_teachers(vild.TEACHERS)
    several = vild.SEVERAL_TEACHERS
    if teachers and vild.VARIANT == "text":
        raise UserError("MODEL.VILD.TEACHERS: the variant 'text' distils from no teacher")
    if teachers and vild.DISTILL_FROM != "store":
        raise UserError(
            f"MODEL.VILD.TEACHERS: further teachers are read from stores, DISTILL_FROM is '{vild.DISTILL_FROM}'"
        )
    if not teachers and (several.BY, several.WEIGHTS) != ("projections", "fixed"):
        raise UserError("MODEL.VILD.SEVERAL_TEACHERS is for further teachers, but MODEL.VILD.TEACHERS is empty")
    check_several(teachers, objectives, several.BY, several.WEIGHTS)
    if vild.VARIANT == "image" and any(o.parameters.get("over") == "background" for o in objectives):
        raise UserError("MODEL.VILD.OBJECTIVES: OVER is 'background', but the variant 'image' learns no background")
    distils_maps(cfg)


def distils_maps(cfg) -> bool:
    """Do the objectives look at the teacher's feature maps? UserError where they do and no live teacher has them, or
    where no other trains an image head."""
    source = distils_from(cfg)
    if source == "nothing":
        return False
    objectives = parse_objectives(cfg.MODEL.VILD.OBJECTIVES)
    names = names_with(objectives, "needs_maps")
    nowhere = names + names_with(objectives, "pairwise")
    if len(nowhere) == len(objectives):
        _check_image_head(cfg.MODEL.VILD, nowhere)
    if names and source != "teacher":
        raise UserError(
            f"MODEL.VILD.OBJECTIVES: '{names[0]}' needs the teacher's feature maps, which no store holds: "
            f"set MODEL.VILD.DISTILL_FROM to 'teacher', not '{source}'"
        )
    return bool(names)


def _check_image_head(vild, names: list[str]) -> None:
    """UserError for a variant with an image head that only ``names`` would train: objectives of maps, or of pairs,
    which do not say where an embedding lies."""
    remembers = vild.VARIANT == "image" and vild.OLD_STUDENT.WEIGHTS  # whose embeddings train its only head
    if vild.VARIANT in ("image", "ensemble") and not remembers:
        raise UserError(
            f"MODEL.VILD.OBJECTIVES: the image head of the variant '{vild.VARIANT}' would learn nothing of the "
            f"teacher's space from {names}; add one that says where an embedding lies, {{'NAME': 'l1'}} say"
        )


def open_store(cfg) -> EmbeddingStore | None:
    """The store of a training config, with those of further teachers, checked against their vocabularies; None where
    none is read."""
    source, others = distils_from(cfg), check_teachers(cfg.MODEL.VILD.TEACHERS)
    if source in ("nothing", "teacher"):
        return None
    if not cfg.MODEL.VILD.STORE:
        variant = cfg.MODEL.VILD.VARIANT
        raise UserError(f"MODEL.VILD.STORE is empty, but the variant '{variant}' distils (DISTILL_FROM '{source}')")
    store = SeveralStores(cfg.MODEL.VILD.STORE, [o["STORE"] for o in others])
    files = [cfg.MODEL.VILD.VOCABULARY, *(o["VOCABULARY"] for o in others)]
    for each, file in zip([store, *store.others], files, strict=True):
        each.check_teacher(Vocabulary.load(file).fingerprint, f"vocabulary {file}")
    return store


def open_live_teacher(cfg, store: EmbeddingStore | None) -> LiveTargets | None:
    """The teacher at work in training, checked against the vocabulary, cropping as the store's did where there is
    one; None where no teacher is at work."""
    if distils_from(cfg) in ("nothing", "store"):
        return None
    vild = cfg.MODEL.VILD
    # the detector's first weights are the same wherever its targets come from
    with torch.random.fork_rng(devices=[]):
        crop = crop_of(store.fingerprint) if store else "squash"
        teacher = build_teacher(vild.TEACHER.NAME, vild.TEACHER.PRETRAINED, cfg.MODEL.DEVICE, crop)
    maps = distils_maps(cfg)
    check_same_teacher(
        teacher.fingerprint,
        "MODEL.VILD.TEACHER",
        Vocabulary.load(vild.VOCABULARY).fingerprint,
        f"vocabulary {vild.VOCABULARY}",
    )
    return LiveTargets(
        teacher.encode_regions_and_maps if maps else teacher.encode_regions,
        image_format=cfg.INPUT.FORMAT,
        per_image=vild.DISTILL_PER_IMAGE,
        min_visible=vild.MIN_VISIBLE,
        map_channels=teacher.map_shape[0] if maps else 0,
    )


def with_map_channels(cfg, live_teacher: LiveTargets | None):
    """The config with ``MODEL.VILD.MAP_CHANNELS`` as the live teacher has them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.VILD.MAP_CHANNELS = live_teacher.map_channels if live_teacher else 0
    cfg.freeze()
    return cfg


def load_old_student(cfg) -> tuple[torch.nn.Module, dict]:
    """The detector of ``MODEL.VILD.OLD_STUDENT.WEIGHTS``, of the config's own kind, and its network record.

    Raises:
        UserError: it is of another teacher or another architecture.
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
    for key, value in model.state_dict().items():  # Detectron2 would say so in the log, and go on with random weights
        theirs = tuple(weights[key].shape) if key in weights else "missing"
        if theirs != tuple(value.shape):
            raise UserError(
                f"MODEL.VILD.OLD_STUDENT.WEIGHTS {path}: it is no detector of the config's architecture: "
                f"{key} is {theirs}, not {tuple(value.shape)}"
            )
    return model, VildCheckpointer(model).load_recorded(path)


def set_helpers(model: torch.nn.Module, cfg, live_teacher: LiveTargets | None) -> list[dict]:
    """Hand a detector (or what DistributedDataParallel made of it) the old student of its config and the live
    teacher. The network records of what it learns from: the old student's, if there is one."""
    bare = getattr(model, "module", model)
    records = []
    if cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS:
        old, record = load_old_student(cfg)
        bare.set_old_student(old)
        records.append(record)
    if live_teacher is not None:
        bare.set_live_teacher(live_teacher)
    return records
