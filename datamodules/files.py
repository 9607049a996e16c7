"""Write files and folders atomically: a killed process never leaves a half-written one under its final name."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from datamodules.records import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file, and move it to path once it is completely on disk. On an error, delete it."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # unique among processes
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder to fill, and move it to path once it is complete. On an error, delete it.

    path: new folder, or an existing one to replace. Its parent is created if needed.
    """
    path = path.resolve()  # a link stays, and its target is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if path.is_dir() and any(path.iterdir()):
            path.replace(old := partial.with_name(f"{partial.name}.old"))
            partial.replace(path)
            shutil.rmtree(old)
        else:
            partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write a JSON file atomically. options: arguments of json.dumps, by default indent=2."""
    write_text(path, json.dumps(content, **{"indent": 2, **options}))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Delete it, and it will be created again.") from error
