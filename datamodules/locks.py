"""Locks on files. The system releases a lock whenever its process ends, so locks are never stale.

This uses `flock` from the standard library, not the package filelock. A sweep passes a trial's lock to the trial's
process, which filelock cannot do. On a file system without locks, filelock leaves a file behind after a kill.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from pathlib import Path
from typing import IO

from datamodules.records import UserError

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock_file(path: Path, wait: bool = True) -> IO[str] | None:
    """Lock a file, and create it if necessary. Closing the returned file releases the lock.

    wait: whether to wait if another process holds the lock. If not, return None.

    A lock belongs to the file itself (its inode), so it holds under every path to the file: links, bind mounts and
    different spellings. On a file system without locks, log a warning and return the file unlocked.
    Raises OSError if the file cannot be written, and UserError if the path is a link or not a regular file.
    """
    while True:
        file = _open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            log.warning("%s: this file system has no locks (%s); run only one job at a time here", path, error.strerror)
            return file
        if _is_at(file, path):
            return file
        file.close()  # the process with the lock removed the file while we waited


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock on a file."""
    try:
        with _open(path, os.O_RDONLY, "r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, UserError):  # no such file, not a regular file, or no locks on this file system
        pass
    return False


def _open(path: Path, flags: int, mode: str) -> IO[str]:
    """Open a lock file. Raises UserError if it is not a regular file, because somebody may have put a link there."""
    try:
        number = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # a pipe must not block
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{path}: is a symbolic link, which a lock must not follow; delete it") from error
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise UserError(f"{path}: is not a regular file, so it cannot be locked; delete it")
    return os.fdopen(number, mode, encoding="utf-8")


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
