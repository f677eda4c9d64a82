"""Two writers of one output: the second gets an error that names the first."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from vild.utils.errors import UserError
from vild.utils.lock import only_writer

FORK = multiprocessing.get_context("fork")


def hold(output, folder, line):
    with only_writer(output, folder):
        line.send("held")
        line.recv()


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock on an output; returns it and the connection that ends it."""
    running = []

    def start(output, folder=False, target=hold):
        mine, its = FORK.Pipe()
        process = FORK.Process(target=target, args=(output, folder, its))
        process.start()
        running.append((process, mine))
        assert mine.poll(600) and mine.recv() == "held"
        return process, mine

    yield start
    for process, line in running:
        if process.is_alive():
            line.send("leave")
        process.join()


@pytest.mark.parametrize("folder", [True, False])
def test_the_error_names_the_first_writer(holder, tmp_path, folder):
    output = tmp_path / "new" / "output"
    process, line = holder(output, folder)
    message = rf"^{output}: process {process.pid} on {socket.gethostname()}, since 20\S+ \S+ UTC, is writing it; wait"
    for _ in range(2):  # asking does not break the first one's lock
        with pytest.raises(UserError, match=message) as caught, only_writer(output, folder):
            pass
    assert "\n" not in str(caught.value)
    with only_writer(tmp_path / "new" / "other", folder):
        pass
    line.send("leave")
    process.join()
    with only_writer(output, folder):
        pass
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert left == (["new", "new/other", "new/output"] if folder else ["new"])  # no lock's file


@pytest.mark.parametrize("folder", [True, False])
def test_one_that_fails_before_it_writes_leaves_no_folder(tmp_path, folder):
    for kept in (None, tmp_path / "new" / "file"):
        with pytest.raises(UserError, match="wrong"), only_writer(tmp_path / "new" / "deep" / "output", folder):
            if kept:
                kept.write_text("")
            raise UserError("wrong")
        assert list(tmp_path.rglob("*")) == ([kept.parent, kept] if kept else [])


def test_a_killed_writer_holds_nothing(holder, tmp_path):
    process, _ = holder(tmp_path / "output")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "output.lock").exists()
    with only_writer(tmp_path / "output"):
        assert f"process {os.getpid()} on" in (tmp_path / "output.lock").read_text()
    assert not (tmp_path / "output.lock").exists()


def test_one_that_waits_is_the_next(holder, tmp_path, monkeypatch):
    process, line = holder(tmp_path / "output")
    told = []

    def warn(message, *values):
        told.append(message % values)
        line.send("leave")

    monkeypatch.setattr("vild.utils.lock.logger.warning", warn)
    with only_writer(tmp_path / "output", wait=True):
        process.join()
        assert process.exitcode == 0 and f"process {os.getpid()} on" in (tmp_path / "output.lock").read_text()
    assert f"output: waiting for process {process.pid} on" in told[0] and not (tmp_path / "output.lock").exists()


def hold_with_a_child(output, folder, line):
    with only_writer(output, folder):
        FORK.Process(target=linger, args=(line,)).start()
        time.sleep(3600)


def linger(line):
    line.send("held")
    line.recv()


def test_the_lock_is_not_inherited_by_workers_that_outlive_their_parent(holder, tmp_path):
    process, line = holder(tmp_path / "output", target=hold_with_a_child)
    process.kill()
    process.join()
    with only_writer(tmp_path / "output"):
        pass
    line.send("leave")


def test_a_lock_file_removed_under_a_waiting_writer_is_created_again(tmp_path, monkeypatch):
    """The first ends, and removes the file, between the second's opening and locking it."""
    import fcntl

    path, lockf = tmp_path / "output.lock", fcntl.lockf

    def ends_first(file, flags):
        if path.exists() and not seen:
            seen.append(os.stat(path).st_ino)
            path.unlink()
        lockf(file, flags)

    seen = []
    monkeypatch.setattr(fcntl, "lockf", ends_first)
    with only_writer(tmp_path / "output"):
        assert seen and path.exists()


def test_a_folder_removed_under_a_waiting_writer_is_created_again(tmp_path, monkeypatch):
    """The first fails, and removes its empty folder, between the second's opening and locking the file."""
    import fcntl

    path, lockf, seen = tmp_path / "new" / "output.lock", fcntl.lockf, []

    def fails_first(file, flags):
        if not seen:
            seen.append(path.unlink())
            path.parent.rmdir()
        lockf(file, flags)

    monkeypatch.setattr(fcntl, "lockf", fails_first)
    with only_writer(tmp_path / "new" / "output", wait=True):
        assert seen and path.exists()


def test_a_folder_removed_between_its_making_and_the_lock_file_is_made_again(tmp_path, monkeypatch):
    """The first fails in that moment."""
    path, make, seen = tmp_path / "new" / "output.lock", Path.mkdir, []

    def is_removed(folder, *args, **kwargs):
        make(folder, *args, **kwargs)
        if folder == path.parent and len(seen) < 3:
            seen.append(folder.rmdir())

    monkeypatch.setattr(Path, "mkdir", is_removed)
    with only_writer(tmp_path / "new" / "output"):
        assert len(seen) == 3 and path.exists()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with only_writer(tmp_path / "output"):
        pass
    assert "a second writer would not be detected" in caplog.text


def test_an_output_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/store cannot be written: .*Not a directory"):  # noqa: SIM117
        with only_writer(tmp_path / "file" / "store", folder=True):
            pass


@pytest.mark.parametrize("what", ["store", "training"])
def test_a_second_command_stops_in_one_line_and_touches_nothing(
    holder, world, proposals_file, teacher_folder, tmp_path, tool, capsys, what
):
    output = tmp_path / what
    if what == "store":
        command = ("build_teacher_store.py", "--dataset", "glyphs_train", "--proposals", proposals_file,
                   "--teacher", f"local-dir:{teacher_folder}", "--output-dir", output)  # fmt: skip
    else:
        config = REPOSITORY / "configs" / "Glyphs" / "proposals.yaml"
        command = ("train_net.py", "--config-file", config, "--resume", "OUTPUT_DIR", output)
    process, _ = holder(output, True)
    assert tool(*command) == 2
    assert [p.name for p in output.iterdir()] == [".lock"]
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"error: {output}: process {process.pid} on ") and "Traceback" not in err
