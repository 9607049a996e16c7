"""One job at a time trains in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities import rank_zero_only

from datamodules.records import UserError
from lightning_modules.distributed import launch
from lightning_modules.distributed.signals import leave_if_asked

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds for the processes of a former attempt to end
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def only_job(folder: Path) -> Iterator[None]:
    """Hold a run's folder, on the first rank, by a lock on the file .NAME.lock beside it.

    The system gives it back when the process ends, however it ends, so none is ever stale; on NFS it holds over
    machines. Raises UserError if another process still holds it after PATIENCE seconds.
    """
    if rank_zero_only.rank > 0:
        yield
        return
    path = _path(folder)
    lock = _locked(path, folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for this file finds that it is gone
        lock.close()


def _path(folder: Path) -> Path:
    return folder.absolute().parent / f".{folder.absolute().name}.lock"


def _locked(path: Path, folder: Path) -> IO[str]:
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock, holder = _take(path)
        except OSError as error:
            raise UserError(f"run.dir: {folder} cannot be used ({error})") from error
        if lock:
            return lock
        if holder and time.monotonic() > deadline:
            raise UserError(f"run.dir: {folder} is in use by {holder}. Wait for it, end it, or choose another run.dir.")
        if holder and not told:
            log.info("%s is in use by %s: waiting up to %.0f seconds for its end", folder, holder, PATIENCE)
            told = True
        leave_if_asked()
        time.sleep(0.2)


def _take(path: Path) -> tuple[IO[str] | None, str]:
    """The lock; or none and who holds it, or "" if the file has just been removed."""
    lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held until the run ends)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read()
        lock.close()
        return None, holder or "another process"
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s cannot be locked here (%s): see to it that one job alone trains there", path, error)
    if not _is_there(lock, path):
        lock.close()
        return None, ""
    lock.truncate(0)
    lock.write(_this_process())
    lock.flush()
    return lock, ""


def _is_there(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> str:
    job = launch.slurm_job()
    of_job = f" (job {job})" if job else ""
    return f"process {os.getpid()} on {platform.node()}{of_job} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def is_in_use(folder: Path) -> bool:
    """Whether a job trains in a run's folder just now."""
    path = _path(folder)
    if not path.exists():
        return False
    with open(path, encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # it cannot be locked here, so nobody holds it
            return False
    return False
