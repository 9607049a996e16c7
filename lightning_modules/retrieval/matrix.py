"""A corpus's vectors as one memory-mapped matrix, with what is known of it in files beside it.

FILE             (M, D) vectors, .npy; or an index of them
FILE.ids.txt     their M ids, one a line
FILE.json        model, task, similarity, precision, count, ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.records import UserError
from lightning_modules.retrieval.vector_cache import whole_file
from lightning_modules.retrieval.shards import Shards


class Matrix:
    """The vectors (M, D) in a .npy file. about: what they were made of and with.

    Raises UserError if the file or what stands beside it is missing, damaged or of other vectors.
    """

    def __init__(self, path: Path):
        self.path, self.about = path, read_about(path)
        try:
            vectors = np.load(path, mmap_mode="c")  # torch warns of arrays that cannot be written to
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if vectors.ndim != 2 or len(vectors) != self.about.get("count"):
            raise UserError(f"{path}: holds {vectors.shape}, and {path.name}.json tells of {self.about.get('count')}")
        self.vectors = Shards([vectors])

    @cached_property
    def ids(self) -> list[str]:
        return read_ids(self.path, self.vectors.count)


def open_matrix(path: Path, task: str = "") -> Matrix:
    """The matrix in a file, or a task's in a folder; the task may be left out where there is one alone."""
    if not path.is_dir():
        return Matrix(path)
    there = sorted(p.name.removesuffix(".npy") for p in path.glob("*.npy"))
    if not there:
        raise UserError(f"{path}: holds no vectors (TASK.npy); were all shards made? The same make embed goes on")
    if task not in there and (task or len(there) > 1):
        raise UserError(f"task: got {task or 'none'!r}, {path} has vectors for {', '.join(there)}")
    return Matrix(path / f"{task or there[0]}.npy")


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def read_about(path: Path) -> dict[str, Any]:
    """What is known of a matrix or an index. Raises UserError."""
    note = beside(path, ".json")
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{note}: cannot be read ({error})") from error


def read_ids(path: Path, count: int) -> list[str]:
    """The ids of the rows of a matrix or an index. Raises UserError if they are not count."""
    lines = beside(path, ".ids.txt")
    try:
        ids = lines.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise UserError(f"{lines}: cannot be read ({error})") from error
    if len(ids) != count:
        raise UserError(f"{lines}: holds {len(ids)} ids for {count} vectors")
    return ids


def write_ids(path: Path, ids: Sequence[str]) -> None:
    with whole_file(beside(path, ".ids.txt")) as file:
        file.write("".join(f"{id}\n" for id in ids).encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=False).encode())
