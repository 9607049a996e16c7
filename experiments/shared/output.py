"""Output folders of commands."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.files import atomic_folder
from datamodules.records import UserError, explained


@contextmanager
def writable_folder(key: str, path: Path) -> Iterator[None]:
    """Create a folder if needed. On an error, remove all folders created here that are empty.

    key: option that names the folder, for errors. Raises UserError if the folder cannot be created.
    """
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    with explained(f"{key}: {path} cannot be used"):
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty, or in use by another process
            for folder in created:
                folder.rmdir()
        raise


@contextmanager
def whole_folder(path: Path, replaces: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes path on success and is removed on an error.

    replaces: whether to replace an existing folder that has files. Raises UserError if path is in use or not writable.
    """
    path = path.resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not replaces):
        raise UserError(f"output: {path} already exists; choose another folder, or remove this one")
    with writable_folder("output", path.parent), contextlib.ExitStack() as stack:
        with explained(f"output: {path} cannot be written"):
            folder = stack.enter_context(atomic_folder(path))
        yield folder


def name_of(path: Path | str) -> str:
    """Return the name of a file or folder, even if the path is . or .."""
    return Path(os.path.abspath(path)).name


def shortened(name: str) -> str:
    """Shorten a folder name to 60 characters, with a hash that keeps it unique."""
    if len(name) <= 60:
        return name
    return f"{name[:60]}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"
