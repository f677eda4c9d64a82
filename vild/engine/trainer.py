"""Training and evaluation from a config, with Detectron2's trainer."""

from __future__ import annotations

import logging
import os
import sys
import weakref

import torch
from detectron2.engine import DefaultTrainer, hooks
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm

from vild.checkpoint.checkpointer import VildCheckpointer, detector_hash
from vild.data import datasets
from vild.data.loader import WorkerDied, build_test_loader, build_train_loader
from vild.data.new_names import unlabelled_classes
from vild.data.provenance import training_record
from vild.engine import accumulate
from vild.engine.best import BEST, KeepBest, StopEarly, check_patience
from vild.engine.guards import TrainingGuard, seed_step
from vild.engine.launch import ddp_on
from vild.engine.logs import build_writers, quiet_console
from vild.engine.run_record import RUN_FILE, run_record
from vild.engine.sources import (
    attach_sources,
    check_classes,
    check_teacher_name,
    is_proposal_network,
    open_live_teacher,
    open_store,
    open_test_vocabulary,
)
from vild.engine.together import once_a_machine, share_annotations
from vild.engine.tracker import Tracker, check_tracker
from vild.evaluation.evaluator import OpenVocabularyEvaluator, check_test_masks, write_metrics
from vild.evaluation.recall import ProposalRecallEvaluator
from vild.modeling import register_parts
from vild.utils import signals
from vild.utils.errors import UserError
from vild.utils.files import write_json
from vild.utils.fingerprint import describe
from vild.utils.signals import Ended
from vild.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger("vild")


def check_test_sets(cfg, vocabulary: Vocabulary) -> None:
    """Before a training: UserError if a test set that is there could not be scored after it. (Projections of extra
    teachers fuse, too; whether the marks suit them is checked once the model is there.)"""
    there = [name for name in cfg.DATASETS.TEST if datasets.is_there(name)]
    open_test_vocabulary(cfg, vocabulary, there, fuses=cfg.MODEL.VILD.VARIANT == "ensemble")
    if cfg.MODEL.MASK_ON:
        check_test_masks(there)


class Trainer(DefaultTrainer):
    """Detectron2's trainer with vild's data, evaluators, optimizer and checkpoint.

    ``--resume`` after a kill gives the same result as a run that was never stopped: the data stream and every random
    number depend only on (SEED, iteration). (Not with ``DATALOADER.ASPECT_RATIO_GROUPING``, whose half-filled groups
    are lost with the process.)
    """

    tracker: Tracker | None = None  # build_writers makes it

    def __init__(self, cfg):
        share_annotations(cfg.DATASETS.TRAIN)
        if not is_proposal_network(cfg):
            vocabulary = Vocabulary.load(cfg.MODEL.VILD.VOCABULARY)
            if cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS:  # then they may have some of the classes only
                unlabelled_classes(vocabulary, cfg.DATASETS.TRAIN)
            else:
                for name in cfg.DATASETS.TRAIN:
                    check_classes(vocabulary, name, marks=True)
            once_a_machine(lambda: check_test_sets(cfg, vocabulary))
            check_teacher_name(cfg, vocabulary)
        accumulate.check_parts(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE)
        check_patience(cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE)
        check_tracker(cfg.TRACKER)
        store = open_store(cfg)
        record = training_record(cfg.DATASETS.TRAIN, store)  # before the data loader drops the parsed files
        run = run_record(cfg, cfg.DATASETS.TRAIN)
        live_teacher = open_live_teacher(cfg, store)
        with_channels = cfg.clone()
        with_channels.defrost()
        with_channels.MODEL.VILD.MAP_CHANNELS = live_teacher.map_channels if live_teacher else 0
        with_channels.freeze()
        with ddp_on(cfg.MODEL.DEVICE):
            super().__init__(with_channels)
        record["starts"] += attach_sources(self.model, cfg, live_teacher)
        self.checkpointer = VildCheckpointer(
            self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), trained_on=record, beside={"run": run}
        )
        for hook in self._hooks:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.checkpointer = self.checkpointer
        self.whole = -1  # the last step that this process completed, learning rate schedule included
        self.guard = TrainingGuard()
        test = cfg.TEST
        best = KeepBest(test.BEST_METRIC, test.PATIENCE, test.EVAL_PERIOD, cfg.OUTPUT_DIR) if test.BEST_METRIC else None
        self.register_hooks([best, self.guard])  # None is skipped

    def train(self):
        """As Detectron2's. After early stopping, the best checkpoint becomes ``model_final.pth`` and is evaluated.

        On SIGTERM or SIGINT it writes a checkpoint after the current step (during an evaluation, immediately).

        Raises:
            Ended: on such a signal.
            WorkerDied: a process of the data loader was killed. There is a checkpoint of the last complete step.
        """
        with signals.deferred():
            try:
                return self._train()
            except Ended as ended:
                kept = self._keep()
                if self.guard.agreed:  # the launcher kills the other processes as soon as one has ended
                    comm.synchronize()
                line = f"ended by {ended.signal.name}; {kept}" if comm.is_main_process() else ""
                raise Ended(ended.signal, line) from None
            except WorkerDied as error:
                raise WorkerDied(f"{error}; {self._keep()}") from None

    def _train(self):
        complete = self.start_iter == self.max_iter > 0
        if complete and not self.checkpointer.get_checkpoint_file().endswith("model_final.pth"):
            # the run was killed after the last step's checkpoint and before this one
            self.checkpointer.save("model_final", iteration=self.max_iter - 1)
        if self.tracker is not None:
            self.tracker.open()
        try:
            return super().train()
        except StopEarly as reason:
            logger.info("the training ends early: %s", reason)
            self.checkpointer.load(os.path.join(self.cfg.OUTPUT_DIR, f"{BEST}.pth"), checkpointables=[])
            self.iter = self.whole = self.max_iter - 1  # so that --resume has nothing left to do
            self.checkpointer.save("model_final", iteration=self.max_iter - 1)
            return self.test(self.cfg, self.model)

    def run_step(self):
        iter(self._trainer._data_loader_iter)  # creates the iterator, which draws a number
        parts = self.cfg.SOLVER.ACCUMULATE

        def seed(part: int) -> None:
            seed_step(self.cfg.SEED, self.iter * parts + part, comm.get_rank())

        try:
            if parts == 1:
                seed(0)
                super().run_step()
            else:
                self._trainer.iter = self.iter
                accumulate.run_step(self._trainer, parts, seed)
        except FloatingPointError as error:  # Detectron2's, for boxes of the RPN; the guard checks the losses
            raise self.guard.failure(str(error)) from error

    def after_step(self):
        self.whole = self.iter  # hooks that may end the training come after those that belong to the step
        super().after_step()

    def after_train(self):
        if sys.exc_info()[0] is not None:  # the training failed: do not evaluate
            self._hooks = [h for h in self._hooks if not isinstance(h, hooks.EvalHook | KeepBest)]
        super().after_train()

    def _keep(self) -> str:
        """Write a checkpoint of the last complete step, unless it was the very last, which has one.

        Returns:
            how to go on, for the user.
        """
        if 0 <= self.whole < self.max_iter - 1:
            self.iter = self.whole
            with signals.uninterruptible():
                self.checkpointer.save(f"model_{self.whole:07d}", iteration=self.whole)
        if not self.checkpointer.has_checkpoint():
            return "no step was completed"
        return f"--resume continues from {self.checkpointer.get_checkpoint_file()}"

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if self.start_iter > 0:
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg, self.start_iter))

    @classmethod
    def build_model(cls, cfg):
        register_parts(cfg)
        with quiet_console():  # a line for every layer
            model = super().build_model(cfg)
        if cfg.MODEL.VILD.OLD_STUDENT.HEAD_ONLY:
            model.train_head_only()
        # convolutions on a CPU are faster with channels last
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.DEVICE == "cpu" else model

    def build_writers(self):
        """Detectron2 calls it on the main process only."""
        writers = build_writers(self.cfg.OUTPUT_DIR, self.max_iter)
        self.tracker = Tracker(self.cfg) if self.cfg.TRACKER else None
        return [*writers, self.tracker] if self.tracker else writers

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
        share_annotations(cfg.DATASETS.TEST)
        bare = getattr(model, "module", model)
        trained = getattr(bare, "vocabulary", None)  # a proposal network has none
        if trained is not None:
            words = open_test_vocabulary(cfg, trained, cfg.DATASETS.TEST, bare.roi_heads.fuses)
            teacher = describe(words.fingerprint)
            logger.info("vocabulary: %d names, prompts '%s', teacher %s", len(words), words.prompts, teacher)
            bare.set_vocabulary(words)
        try:
            with signals.interruptible():  # an interrupted evaluation loses nothing
                results = super().test(cfg, model, evaluators)
        finally:
            if trained is not None:
                bare.set_vocabulary(trained)
        if comm.is_main_process() and cfg.DATASETS.TEST:
            by_name = {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results
            path = write_metrics(cfg.OUTPUT_DIR, by_name)
            weights = {} if trained is None else {"detector": detector_hash(bare)}
            write_json(path.with_name(RUN_FILE), run_record(cfg, cfg.DATASETS.TEST) | weights)
            logger.info("metrics written to %s", path)
        return results
