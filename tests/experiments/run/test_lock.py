"""The lock that lets only one job train in a folder, and the file lock behind it."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from datamodules import locks
from datamodules.records import UserError
from datamodules.store import locked
from experiments import data
from experiments.run import lock as run_lock
from experiments.run.lock import lock_run


def fork_holder(folder):
    """Fork a process that holds the folder's lock until it is killed. Returns its id."""
    ready, calls = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock_run(folder):
            os.write(calls, b"held")
            time.sleep(60)
        os._exit(0)
    assert os.read(ready, 4) == b"held"
    return pid


def test_a_second_job_is_refused_but_not_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    folder = tmp_path / "run"
    holder = fork_holder(folder)
    try:
        with pytest.raises(UserError, match=rf"run is in use by process {holder} on .* since 20"), lock_run(folder):
            pass
        with lock_run(tmp_path / "other"):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    with lock_run(folder):
        pass
    assert not list(tmp_path.iterdir())  # a lock leaves no file


def test_the_next_attempt_waits_for_the_end_of_the_previous_one(tmp_path, caplog):
    caplog.set_level("INFO")
    holder = fork_holder(tmp_path / "run")
    threading.Timer(0.5, os.kill, (holder, signal.SIGKILL)).start()
    with lock_run(tmp_path / "run"):
        assert os.waitpid(holder, os.WNOHANG) == (holder, signal.SIGKILL)
    assert "waiting up to 30 seconds for it to end" in caplog.text


def test_a_run_is_locked_under_every_name_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    runs, link = tmp_path / "runs", tmp_path / "link"
    (runs / "a").mkdir(parents=True)
    link.symlink_to(runs / "a")
    (tmp_path / "elsewhere").symlink_to(runs)
    holder = fork_holder(runs / "a")
    try:
        for name in (link, tmp_path / "elsewhere" / "a", runs / ".." / "runs" / "a"):
            assert run_lock.is_in_use(name)
            with pytest.raises(UserError, match="is in use by process"), lock_run(name):
                pass
        (runs / "a").rename(runs / "b")  # the same folder under another path, as through a bind mount
        with pytest.raises(UserError, match="is in use by process"), lock_run(runs / "b"):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert not run_lock.is_in_use(runs / "b")


def test_the_lock_stays_with_the_folder_that_replaces_an_old_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    folder, kept = tmp_path / "run", tmp_path / "run.1"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0")
    with lock_run(folder):
        run_lock.replace_folder(folder, kept)
        assert (kept / "config.yaml").exists()
        assert run_lock.is_in_use(folder)
        assert not run_lock.is_in_use(kept)
        (folder / "config.yaml").write_text("seed: 1")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "run",
        "run.1",
        "run.1/config.yaml",
        "run/config.yaml",
    ]


# Each place that locks a file: a call with the folder, and the path of the lock in it.
PLACES = {
    "run": (lambda folder: lock_run(folder).__enter__(), ".lock"),
    "cache": (lambda folder: locked(folder / "copy").__enter__(), ".copy.lock"),
    "data": (lambda folder: data._locked(folder).__enter__(), ".lock"),
    "trial": (lambda folder: locks.lock_file(folder / "t000.lock"), "t000.lock"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device"])
def test_links_and_pipes_planted_at_a_lock_are_refused(tmp_path, place, kind):
    """The lock of a run was emptied, and with it the file that a link led to."""
    take, name = PLACES[place]
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    folder.mkdir()
    victim.write_text("mine")
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        targets = {"link": victim, "dangling link": tmp_path / "new", "device": Path("/dev/null")}
        (folder / name).symlink_to(targets[kind])
    with pytest.raises(UserError, match=f"{name}: is (a symbolic link|not a regular file)"):
        take(folder)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert not locks.is_locked(folder / name)


@pytest.mark.parametrize("number", locks.NO_LOCKS)
@pytest.mark.parametrize("place", PLACES)
def test_without_locks_on_the_file_system_every_folder_is_used(tmp_path, monkeypatch, caplog, place, number):
    def missing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", missing)
    PLACES[place][0](tmp_path)
    assert "this file system has no locks" in caplog.text


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", missing)
    with lock_run(tmp_path / "run"), locked(tmp_path / "cache"):
        assert (tmp_path / "run").is_dir()
        assert not run_lock.is_in_use(tmp_path / "run")
    assert caplog.text.count("this file system has no locks") == 2
