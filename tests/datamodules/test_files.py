"""Files and folders are replaced whole, or stay unchanged."""

import contextlib
import errno
import fcntl
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from datamodules.files import atomic_file, atomic_folder, load_array, open_new, read_json, write_json, write_text
from datamodules.records import LONGEST_NAME, UserError


def test_written_json_is_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, "ä"]})
    assert read_json(tmp_path / "a.json") == {"x": [1, "ä"]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_failed_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with contextlib.suppress(ZeroDivisionError), atomic_file(tmp_path / "a.txt") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe"])
def test_planted_links_and_pipes_are_deleted_not_written_to(tmp_path, kind, keep):
    victim, planted = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    if kind == "pipe":
        os.mkfifo(planted)
    elif kind == "hard link":
        planted.hardlink_to(victim)
    else:
        planted.symlink_to(victim if kind == "link" else tmp_path / "new")
    with open_new(planted, keep=keep) as file:
        file.write(b"ours")
    assert (planted.read_text(), victim.read_text()) == ("ours", "mine")
    assert not (tmp_path / "new").exists()
    with open_new(planted, keep=keep) as file:
        file.write(b" too")
    assert planted.read_text() == ("ours too" if keep else " too")


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_full_disk_is_reported_with_the_path(tmp_path, atomic):
    """The error of a write has no file name, so a message did not say which disk was full."""
    with pytest.raises(OSError, match="No space left on device: '.*/name'"), atomic(tmp_path / "name"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not any(tmp_path.iterdir())


def test_planted_link_at_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    """The name of a temporary file can be guessed."""
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".a.txt.host.{os.getpid()}.{threading.get_native_id()}").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "a.txt", "ours")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "ours"
    assert not (tmp_path / "a.txt").is_symlink()


def test_folder_replaces_the_old_one_only_if_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "folder"
    with atomic_folder(path) as folder:
        (folder / "old").touch()
    with contextlib.suppress(ZeroDivisionError), atomic_folder(path) as folder:
        (folder / "new").touch()
        raise ZeroDivisionError
    assert [file.name for file in path.iterdir()] == ["old"]
    with atomic_folder(path) as folder:
        (folder / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert len(list(path.parent.iterdir())) == 1


def test_what_killed_processes_left_is_removed_by_the_next_one(tmp_path):
    """A kill of an export or import left a hidden folder, which nobody removed."""
    path, beside = tmp_path / "a[b]", tmp_path / ".a[b]-personal"
    beside.mkdir()
    if not (child := os.fork()):
        with atomic_folder(path) as folder:
            (folder / "half").touch()
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_folder(path), atomic_folder(path) as second:  # the first one is in use
        (second / "new").touch()
        assert len(list(tmp_path.iterdir())) == 3
    assert sorted(tmp_path.iterdir()) == [beside, path]
    old = tmp_path / ".a[b]-12345678.partial.old"
    old.mkdir()
    path.rename(tmp_path / "moved")
    with atomic_folder(path):
        assert old.exists()  # killed before the new folder was in its place
    with atomic_folder(path):
        assert not old.exists()


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_folder_that_another_process_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch, when):
    make, lock, removed = tempfile.mkdtemp, fcntl.flock, []

    def remove_first(folder):
        if not removed:
            removed.append(folder)
            os.rmdir(folder)

    def mkdtemp(**options):
        folder = make(**options)
        if when == "before it is opened":
            remove_first(folder)
        return folder

    def flock(file, how):
        if when == "before it is locked":
            remove_first(next(tmp_path.glob(".new-*")))
        lock(file, how)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert removed
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]


def test_any_damage_to_an_array_raises_two_kinds_of_errors(tmp_path):
    """Damaged headers raised tokenize.TokenError, SyntaxError and MemoryError; a pipe was waited for."""
    path, numbers = tmp_path / "a.npy", np.arange(30)
    np.save(path, numbers)
    good = path.read_bytes()
    for position in range(100):
        for bit in range(8):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            with contextlib.suppress(OSError, ValueError):
                load_array(path)
    path.write_bytes(good)
    assert load_array(path).tolist() == numbers.tolist()
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(OSError, match="expected a regular file"):
        load_array(tmp_path / "pipe.npy")


def test_threads_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    """They shared a temporary file: one deleted that of the other, which failed or wrote a mixture."""
    barrier, errors = threading.Barrier(2), []

    def write(text):
        try:
            with atomic_file(tmp_path / "a") as file:
                barrier.wait(10)  # both have opened their files
                file.write(text)
                barrier.wait(10)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter * 9999,)) for letter in (b"x", b"y")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (tmp_path / "a").read_bytes() in (b"x" * 9999, b"y" * 9999)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """The old folder stayed under a hidden name if it was interrupted between two renames."""
    path, replace = tmp_path / "folder", Path.replace
    path.mkdir()
    (path / "old").touch()

    def interrupted(source, target):
        if target == path and not source.name.endswith(".old"):
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as folder:
        (folder / "new").touch()
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["folder", "folder/old"]


def test_damaged_json_raises_user_error(tmp_path):
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "missing.json"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read_json(tmp_path / name)


@pytest.mark.parametrize("letter", ["a", "\u00e9"])
def test_file_with_the_longest_name_can_be_written(tmp_path, letter):
    """Its temporary file had a longer name than file systems allow."""
    name = letter * (LONGEST_NAME // len(letter.encode()))
    write_text(tmp_path / f"{name}.{name}.queries.tsv", "content")
    (path,) = tmp_path.iterdir()
    assert path.read_text(encoding="utf-8") == "content"
