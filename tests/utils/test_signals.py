"""What SIGTERM and SIGINT do: a line and a status in every tool, a wait for the end of the step in training."""

import os
import signal
import subprocess
import sys
import time

import pytest
from detectron2.engine import DefaultTrainer
from torch.utils.data import DataLoader, Dataset

from tests.conftest import REPOSITORY
from vild.engine.trainer import Trainer
from vild.utils import signals
from vild.utils.errors import one_line_errors
from vild.utils.signals import Ended

LIMIT = 600  # seconds; of what hangs, not of a slow machine


@pytest.fixture(autouse=True)
def sigint_is_heard():
    """Also where the tests run in the background of a shell, which has SIGINT ignored in all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_waits_for_the_end_of_a_step_and_interrupts_an_evaluation(number):
    before = signal.getsignal(number)
    with signals.deferred():
        assert signals.pending() is None
        signal.raise_signal(number)
        signal.raise_signal(number)  # as torchrun passes on what all have got
        assert signals.pending() == number
        with pytest.raises(Ended) as ended, signals.interruptible():
            raise AssertionError("the evaluation has begun")
        assert ended.value.signal == number
    assert signals.pending() is None and signal.getsignal(number) is before
    with signals.deferred():
        with pytest.raises(Ended), signals.interruptible():
            signal.raise_signal(number)
        with signals.uninterruptible():
            signal.raise_signal(number)
    with signals.interruptible():  # outside a training it is nothing
        pass


def script(body):
    return subprocess.Popen([sys.executable, "-c", f"import signal, sys, time\n{body}"], cwd=REPOSITORY, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_a_second_signal_ends_at_once():
    process = script("""
from vild.utils import signals
with signals.deferred():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
""")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: the training ends after this step")
    time.sleep(signals.ONE_REQUEST + 0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == -signal.SIGTERM


def test_a_worker_heeds_its_parent_alone():
    """A scheduler's SIGTERM does not end it, its trainer's does, at once: multiprocessing waits for it at the exit."""
    process = script("""
import multiprocessing, os, subprocess
from vild.utils.signals import end_by_parent_only
def work(pipe):
    end_by_parent_only()
    pipe.send("ready")
    time.sleep(3600)
mine, other = multiprocessing.Pipe()
worker = multiprocessing.get_context("fork").Process(target=work, args=(other,), daemon=True)
worker.start()
mine.recv()
subprocess.run(["kill", str(worker.pid)], check=True)
worker.join(0.5)
print(worker.exitcode, flush=True)
""")
    assert process.communicate(timeout=LIMIT)[0] == "None\n" and process.returncode == 0


TOOL = """
from vild.utils.errors import Failure, one_line_errors
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run
@one_line_errors
def main():
    print("ready", flush=True)
    {}
main()
"""


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_every_tool_ends_in_one_line(number):
    process = script(TOOL.format("time.sleep(3600)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    told = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 128 + number and told == f"ended by {number.name}\n"


@pytest.mark.parametrize(
    ("raised", "told", "status"),
    [
        ("OSError(28, 'No space left on device', '/o')", "error: /o: No space left on device\n", 2),
        ("Failure('a loss')", "error: a loss\n", 1),
    ],
)
def test_what_nobody_typed_wrong_is_one_line_too(raised, told, status):
    process = script(TOOL.format(f"raise {raised}"))
    assert process.communicate(timeout=LIMIT)[1] == told and process.returncode == status


class Deadly(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line_outside_of_training_too(capsys):
    @one_line_errors
    def main():
        list(DataLoader(Deadly(), num_workers=1))

    with pytest.raises(SystemExit) as caught:
        main()
    told = capsys.readouterr().err
    assert caught.value.code == 1 and told.startswith("error: DataLoader worker (pid") and told.count("\n") == 1
    assert "when memory is short" in told

    @one_line_errors
    def wrong():
        raise RuntimeError("of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        wrong()


def test_what_a_tool_prints_is_escaped_too(capsys):
    one_line_errors(print)("\udcff")
    assert capsys.readouterr().out == "\\udcff\n"


def test_an_oserror_of_our_own_keeps_its_traceback():
    process = script(TOOL.format("raise FileNotFoundError(2, 'No such file', 'x')"))
    assert "Traceback" in process.communicate(timeout=LIMIT)[1]


def test_a_signal_in_an_evaluation_ends_it_and_keeps_the_step(make_cfg, world, tmp_path, monkeypatch):
    """And the training goes on from there; the last checkpoint is not written twice."""
    settings = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 2)
    asked = []

    def evaluate(cls, cfg, model, evaluators=None):
        asked.append(1)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the evaluation goes on")

    monkeypatch.setattr(DefaultTrainer, "test", classmethod(evaluate))
    for resume, last in ((False, "model_0000001.pth"), (True, "model_final.pth")):
        trainer = Trainer(make_cfg("text", *settings, "OUTPUT_DIR", str(tmp_path)))
        trainer.resume_or_load(resume)
        with pytest.raises(Ended, match=rf"^ended by SIGINT; --resume continues from {tmp_path}/{last}$"):
            trainer.train()
        assert (tmp_path / "last_checkpoint").read_text() == last
        assert trainer.start_iter == (2 if resume else 0)
    assert len(asked) == 2  # of the second training only the last: a signal is no failure to be evaluated again


def test_sigterm_waits_where_a_worker_is_forked():
    def blocked() -> bool:
        return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    with signals.held():
        child = os.fork()
        if child == 0:
            os._exit(7 if blocked() else 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not blocked()
