"""Files and folders, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.records import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write beside the file and rename: who is killed while writing leaves the file as it was."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2))


@contextmanager
def writable_folder(key: str, path: Path) -> Iterator[None]:
    """A folder, made if it is not there; on an error what was made for it goes again while it is empty.

    key: that names it in errors. Raises UserError if it cannot be made.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be used ({error})") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty, or another process's
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def whole_folder(path: Path, replaces: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes the given one when all is written; on an error nothing is left.

    replaces: a folder that is there stands until then, and goes. Raises UserError if there is one else that is not
    empty, or if it cannot be made.
    """
    path = path.resolve()  # a link stays one, and its target is written
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not replaces):
        raise UserError(f"output: {path} is there already; name another one, or remove it")
    with writable_folder("output", path.parent):
        try:
            unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        except OSError as error:
            raise UserError(f"output: {path} cannot be written ({error})") from error
        try:
            yield unfinished
            unfinished.chmod(0o755)
            if path.is_dir() and replaces:
                path.replace(old := unfinished.with_name(f"{unfinished.name}.old"))
                unfinished.replace(path)
                shutil.rmtree(old)
            else:
                unfinished.replace(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def shortened(name: str, longest: int = 60) -> str:
    """A name of a folder as it is, or its beginning and digits that tell it from others."""
    if len(name) <= longest:
        return name
    return f"{name[:longest]}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"


def read_json(path: Path) -> Any:
    """The content of a file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Delete it to have it made again.") from error
