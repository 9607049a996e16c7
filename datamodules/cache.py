"""Folders of the cache: made once, by one process, and never seen half made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.locks import lock_file
from datamodules.records import UserError


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """One process at a time makes the folder: of several ranks the first, and the others wait for it.

    Raises UserError if there can be no such folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder.parent / f".{folder.name}.lock")
    except OSError as error:
        raise UserError(f"data.cache: {folder.parent} cannot be used ({error})") from error
    with lock:
        yield


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, if all goes well; made under only_one.

    What a killed process left of it before is removed. Raises UserError if it cannot be written.
    """
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    new = folder.parent / f".{folder.name}-{os.getpid()}"
    try:
        new.mkdir()
        yield new
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except OSError as error:
        raise UserError(f"data.cache: {folder.parent} cannot be written ({error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
