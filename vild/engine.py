"""From a config to a trained and evaluated detector, with Detectron2's trainer."""

from __future__ import annotations

import logging
import os
import weakref

import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, HookBase, default_setup
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm

import vild.modeling  # noqa: F401  (registers the detector)
from vild.best import BEST, KeepBest, StopEarly
from vild.checkpoint import VildCheckpointer
from vild.config import add_vild_config
from vild.data import datasets
from vild.data.live import LiveTargets
from vild.data.loader import build_test_loader, build_train_loader
from vild.data.provenance import training_record
from vild.errors import UserError
from vild.evaluation.evaluator import OpenVocabularyEvaluator, ProposalRecallEvaluator, write_metrics
from vild.modeling.objectives import of_maps, parse_objectives
from vild.modeling.other_teachers import check_teachers
from vild.teacher.clip import Teacher, check_same_teacher, crop_of, describe
from vild.teacher.several_stores import SeveralStores
from vild.teacher.store import EmbeddingStore
from vild.untrusted import check_config, refused_as
from vild.vocabulary import Vocabulary

logger = logging.getLogger("vild")


def load_config(config_file: str, overrides: list[str] | None = None):
    """Detectron2's defaults, vild's keys, the file, the overrides; frozen. On a machine without a GPU the
    device becomes "cpu" and AMP is switched off.

    Raises:
        UserError: no such file, or a key or value that does not fit.
    """
    cfg = get_cfg()
    add_vild_config(cfg)
    if not os.path.isfile(config_file):
        raise UserError(f"config {config_file} does not exist")
    check_config(config_file)
    with refused_as(f"config {config_file}"):
        cfg.merge_from_file(config_file, allow_unsafe=False)
        cfg.merge_from_list(overrides or [])
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    return cfg


def setup(args):
    """Config of Detectron2's command-line arguments, logger, output folder, data sets."""
    cfg = load_config(args.config_file, args.opts)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_no_user_errors)
    default_setup(cfg, args)
    if logger.level == logging.NOTSET:
        from detectron2.utils.logger import setup_logger

        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="vild")
    datasets.register_all()
    return cfg


def _no_user_errors(record: logging.LogRecord) -> bool:
    """Detectron2 logs every exception with its traceback; a user's mistake is told in one line instead, and an early
    end is none."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError | StopEarly))


def is_proposal_network(cfg) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"


def distils_from(cfg) -> str:
    """``MODEL.VILD.DISTILL_FROM``; "nothing" where nothing is distilled."""
    source = cfg.MODEL.VILD.DISTILL_FROM
    if source not in ("store", "teacher", "mixed"):
        raise UserError(f"MODEL.VILD.DISTILL_FROM: '{source}' is not one of store, teacher, mixed")
    return "nothing" if is_proposal_network(cfg) or cfg.MODEL.VILD.VARIANT == "text" else source


def distils_maps(cfg) -> bool:
    """Do the objectives look at the teacher's feature maps? UserError where they do and no live teacher has them."""
    source = distils_from(cfg)
    names = [] if source == "nothing" else of_maps(parse_objectives(cfg.MODEL.VILD.OBJECTIVES))
    if names and source != "teacher":
        raise UserError(
            f"MODEL.VILD.OBJECTIVES: '{names[0]}' needs the teacher's feature maps, which no store holds: "
            f"set MODEL.VILD.DISTILL_FROM to 'teacher', not '{source}'"
        )
    return bool(names)


def open_store(cfg) -> EmbeddingStore | None:
    """The store of a training config, with those of further teachers, checked against their vocabularies; None where
    none is read."""
    source, others = distils_from(cfg), check_teachers(cfg.MODEL.VILD.TEACHERS)
    if others and source in ("teacher", "mixed"):
        raise UserError(f"MODEL.VILD.TEACHERS: further teachers are read from stores, DISTILL_FROM is '{source}'")
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
        teacher = Teacher(vild.TEACHER.NAME, vild.TEACHER.PRETRAINED, cfg.MODEL.DEVICE, crop)
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


def load_old_student(cfg) -> torch.nn.Module:
    """The detector of ``MODEL.VILD.OLD_STUDENT.WEIGHTS``, of the config's own kind."""
    path = cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS
    old = cfg.clone()
    old.defrost()
    old.MODEL.VILD.update({"VOCABULARY": path, "OBJECTIVES": [], "TEACHERS": []})
    check_same_teacher(
        Vocabulary.load(path).fingerprint, f"MODEL.VILD.OLD_STUDENT.WEIGHTS {path}",
        Vocabulary.load(cfg.MODEL.VILD.VOCABULARY).fingerprint, f"vocabulary {cfg.MODEL.VILD.VOCABULARY}",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = DefaultTrainer.build_model(old)
    VildCheckpointer(model).load(path, checkpointables=[])
    return model


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


class SeedEveryStep(HookBase):
    """Seed torch by the iteration (RoI sampling draws from it), so that a resumed run draws the same."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_train(self):
        iter(self.trainer._trainer._data_loader_iter)  # making the iterator draws a number: have it made by now

    def before_step(self):
        torch.manual_seed((self.seed << 32) + (self.trainer.iter << 8) + comm.get_rank())


class Trainer(DefaultTrainer):
    """Detectron2's trainer with vild's data, evaluators, optimizer and checkpoint.

    ``--resume`` after a kill gives what an undisturbed run would have given: the data stream and every random
    draw depend on (SEED, iteration) alone. (Not with ``DATALOADER.ASPECT_RATIO_GROUPING``, whose half-filled groups
    are lost with the process.)
    """

    def __init__(self, cfg):
        if not is_proposal_network(cfg):
            for name in cfg.DATASETS.TRAIN:
                check_classes(Vocabulary.load(cfg.MODEL.VILD.VOCABULARY), name, marks=True)
        distils_maps(cfg)  # a mistake is told before files are opened
        store = open_store(cfg)
        record = training_record(cfg.DATASETS.TRAIN, store)  # now: the loader drops the parsed files
        live_teacher = open_live_teacher(cfg, store)
        super().__init__(with_map_channels(cfg, live_teacher))
        if cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS:
            getattr(self.model, "module", self.model).set_old_student(load_old_student(cfg))
        if live_teacher is not None:
            getattr(self.model, "module", self.model).set_live_teacher(live_teacher)
        self.checkpointer = VildCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), trained_on=record)
        for hook in self._hooks:  # Detectron2 has bound the hook to its own checkpointer
            if hasattr(hook, "checkpointer"):
                hook.checkpointer = self.checkpointer
        self.register_hooks([SeedEveryStep(max(cfg.SEED, 0))])
        if cfg.TEST.BEST_METRIC:
            best = KeepBest(cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE, cfg.TEST.EVAL_PERIOD, cfg.OUTPUT_DIR)
            self.register_hooks([best])

    def train(self):
        """As Detectron2's. A training that ends early leaves the best checkpoint as ``model_final.pth``, evaluated."""
        try:
            return super().train()
        except StopEarly as reason:
            logger.info("the training ends early: %s", reason)
            self.checkpointer.load(os.path.join(self.cfg.OUTPUT_DIR, f"{BEST}.pth"), checkpointables=[])
            self.checkpointer.save("model_final", iteration=self.max_iter - 1)
            return self.test(self.cfg, self.model)

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter > 0:
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, self.start_iter))

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        # channels last is the faster layout for convolutions on a CPU
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.DEVICE == "cpu" else model

    @classmethod
    def build_train_loader(cls, cfg, start_iteration: int = 0):
        return build_train_loader(cfg, open_store(cfg), start_iteration)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_optimizer(cls, cfg, model):
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER != "AdamW":
            raise UserError(f"SOLVER.OPTIMIZER: '{cfg.SOLVER.OPTIMIZER}' is neither SGD nor AdamW")
        parameters = get_default_optimizer_params(model, weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM)
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(parameters, cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        if is_proposal_network(cfg):
            return ProposalRecallEvaluator(dataset_name, cfg.TEST.PROPOSALS_PER_IMAGE)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            folder = os.path.join(folder, dataset_name)
        return OpenVocabularyEvaluator(dataset_name, folder, masks=cfg.MODEL.MASK_ON)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluate on ``DATASETS.TEST`` with the test vocabulary; writes ``inference/vild_metrics.json``."""
        bare = getattr(model, "module", model)
        trained = getattr(bare, "vocabulary", None)
        if trained is not None and cfg.MODEL.VILD.TEST_VOCABULARY:
            other = Vocabulary.load(cfg.MODEL.VILD.TEST_VOCABULARY)
            check_same_teacher(
                other.fingerprint,
                f"vocabulary {cfg.MODEL.VILD.TEST_VOCABULARY}",
                trained.fingerprint,
                "the detector",
            )
            bare.set_vocabulary(other)
        try:
            if trained is not None:
                for name in cfg.DATASETS.TEST:
                    check_classes(bare.vocabulary, name, marks=cfg.MODEL.VILD.VARIANT == "ensemble")
                words = bare.vocabulary
                teacher = describe(words.fingerprint)
                logger.info("vocabulary: %d names, prompts '%s', teacher %s", len(words), words.prompts, teacher)
            results = super().test(cfg, model, evaluators)
        finally:
            if trained is not None:
                bare.set_vocabulary(trained)
        if comm.is_main_process() and cfg.DATASETS.TEST:
            by_name = {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results
            logger.info("metrics written to %s", write_metrics(cfg.OUTPUT_DIR, by_name))
        return results
