"""Lock a run's folder, so that only one job at a time trains in it."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from datamodules.locks import is_locked, lock_file
from datamodules.records import UserError
from lightning_modules.distributed import launch
from lightning_modules.distributed.signals import leave_if_asked

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds to wait for the processes of the previous attempt to end
LOCK = ".lock"  # in the run's folder, so that all paths to the folder share the lock


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """On the first rank, hold the lock on a run's folder. Creates the folder, and removes it if it stays empty.

    Raises UserError if another process still holds the lock after PATIENCE seconds.
    """
    if launch.rank() > 0:
        yield
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    if (folder / LOCK).exists():  # left by a killed job, which may also have created the folder
        created = created or [folder]
    lock = _wait_for_lock(folder)
    try:
        lock.truncate(0)
        job = f" (job {number})" if (number := launch.slurm_job()) else ""
        lock.write(f"process {os.getpid()} on {platform.node()}{job} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before the lock is released, so that a waiting job notices
        lock.close()
        with suppress(OSError):  # not empty, or in use by another job
            for path in created:
                path.rmdir()


def is_in_use(folder: Path) -> bool:
    """Return whether a job is training in a run's folder."""
    return is_locked(folder / LOCK)


def replace_folder(folder: Path, kept: Path) -> None:
    """Rename a run's folder to `kept`, and replace it by an empty folder with the same lock. Raises OSError."""
    empty = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    empty.chmod(folder.stat().st_mode)
    try:
        if (folder / LOCK).exists():
            # A hard link, so that the folder is never unlocked in between.
            os.link(folder / LOCK, empty / LOCK)
        folder.rename(kept)
        empty.rename(folder)  # fails if another job has just created this folder
    except OSError:
        (empty / LOCK).unlink(missing_ok=True)
        empty.rmdir()
        raise
    (kept / LOCK).unlink(missing_ok=True)


def _wait_for_lock(folder: Path) -> IO[str]:
    deadline, announced = time.monotonic() + PATIENCE, False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if lock := lock_file(folder / LOCK, wait=False):
                return lock
            holder = (folder / LOCK).read_text(encoding="utf-8") or "another process"
        except OSError as error:
            if folder.is_file():
                raise UserError(f"run.dir: {folder} is a file") from None
            if isinstance(error, FileNotFoundError) and time.monotonic() < deadline:
                continue  # the last job has just removed the folder
            raise UserError(f"run.dir: {folder} cannot be used ({error})") from error
        if time.monotonic() > deadline:
            raise UserError(
                f"run.dir: {folder} is in use by {holder}. Wait until it ends, stop it, or choose another run.dir."
            )
        if not announced:
            log.info("%s is in use by %s; waiting up to %.0f seconds for it to end", folder, holder, PATIENCE)
            announced = True
        leave_if_asked()
        time.sleep(0.2)
