"""A corpus's vectors in shards, which any number of processes make and one merges.

    FOLDER/about.json          what all shards are made with: model, tasks, precision, ...
    FOLDER/00000.TASK.npy      (n, D) vectors of a shard's texts, for each task
    FOLDER/00000.json          ids and hashes of texts and vectors; written last, so that with it the shard is there

A shard's texts are encoded by themselves, in batches of its own: its bits do not depend on who else works on the
corpus. Processes share nothing but the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.files import atomic_file
from datamodules.records import Document, UserError
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.search import Shards, check_finite
from lightning_modules.retrieval.vector_cache import text_hash

log = logging.getLogger(__name__)

STORED = ("float32", "float16")
FORMERLY = {"float32": "fp32", "bfloat16": "bf16"}  # words of precision in folders of before
Arrays = Mapping[str, np.ndarray]


class ShardFolder:
    """The shards of one corpus. about: what decides their vectors, beside the texts; plain containers.

    Raises UserError if the folder cannot be used, or its shards were made with something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.folder, self.about = folder, dict(about)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = folder / "about.json"
            if not known.is_file():
                write_json(known, self.about)
            there = json.loads(known.read_text(encoding="utf-8"))
            there["precision"] = FORMERLY.get(there.get("precision"), there.get("precision"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: cannot be used ({error})") from error
        changed = [
            f"{key}: {there.get(key)} there, {self.about.get(key)} now"
            for key in sorted(there.keys() | self.about.keys())
            if there.get(key) != self.about.get(key)
        ]
        if changed:
            raise UserError(
                f"{folder} holds vectors that were made otherwise ({'; '.join(changed)}); name another output, or "
                "remove it"
            )

    def path(self, number: int, task: str) -> Path:
        return self.folder / f"{number:05d}.{task}.npy"

    def has(self, number: int, documents: Sequence[Document]) -> bool:
        """Whether the shard of these texts is there and whole; one that is damaged is told of."""
        try:
            note = self.note(number)
            if note is None or note["texts"] != hash_of(documents) or note["ids"] != [d.id for d in documents]:
                return False
            for task in self.about["tasks"]:
                self.vectors(number, task, note)
        except UserError as error:
            log.warning("%s: it is made again", error)
            return False
        return True

    def note(self, number: int) -> dict[str, Any] | None:
        """ids, and hashes of texts and vectors; None where the shard is not there. Raises UserError for damage."""
        path = self.folder / f"{number:05d}.json"
        if not path.is_file():
            return None
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            return {key: note[key] for key in ("ids", "texts", "vectors")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is damaged ({error})") from error

    def vectors(self, number: int, task: str, note: Mapping[str, Any]) -> np.ndarray:
        """A shard's vectors (n, D) for a task. Raises UserError if they are not those that were written."""
        path = self.path(number, task)
        try:
            vectors = np.load(path)
            whole = len(vectors) == len(note["ids"]) and hash_of_array(vectors) == note["vectors"][task]
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise UserError(f"{path}: is damaged ({error})") from error
        if not whole:
            raise UserError(f"{path}: is damaged (it does not hold what was written)")
        return vectors

    def write(self, number: int, documents: Sequence[Document], vectors: Arrays) -> None:
        """Raises UserError where it cannot be written."""
        note = {
            "ids": [document.id for document in documents],
            "texts": hash_of(documents),
            "vectors": {task: hash_of_array(array) for task, array in vectors.items()},
        }
        try:
            (self.folder / f"{number:05d}.json").unlink(missing_ok=True)  # of other texts
            for task, array in vectors.items():
                with atomic_file(self.path(number, task)) as file:
                    np.save(file, array)
            write_json(self.folder / f"{number:05d}.json", note)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error})") from error

    def missing(self, count: int) -> list[int]:
        """Those of the first count shards that are not there."""
        return [number for number in range(count) if not (self.folder / f"{number:05d}.json").is_file()]


def hash_of(documents: Sequence[Document]) -> str:
    return text_hash(documents)


def hash_of_array(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=12).hexdigest()


def embed_shard(
    encoder: Encoder,
    documents: Sequence[Document],
    tasks: Mapping[str, str],
    *,
    similarity: str,
    stored: str,
    token_budget: int,
    advance=None,
) -> dict[str, np.ndarray]:
    """Task -> vectors (n, D) of a shard's texts. tasks: name -> task that the texts are encoded for.

    similarity: "cosine" normalises. stored: one of STORED. Raises UserError for vectors that are not finite, also when
    they are so in float16 alone.
    """
    found = encoder.encode(list(documents), tasks=list(tasks.values()), token_budget=token_budget, advance=advance)
    arrays = {}
    for name, encoded in tasks.items():
        vectors = found[encoded]
        if similarity == "cosine":
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        with np.errstate(over="ignore"):
            arrays[name] = vectors.numpy().astype(stored)
        check_finite(arrays[name], f"{name}, as {stored}" + (f", from {documents[0].id!r} on" if documents else ""))
    return arrays


def merge(shards: ShardFolder, task: str, count: int, path: Path, about: Mapping[str, Any]) -> int:
    """A task's vectors in all count shards as one matrix (M, D) in path, with ids and description beside it.

    Returns M. One shard is in memory at a time. Raises UserError for a shard that is missing or damaged.
    """
    notes = [shards.note(number) for number in range(count)]
    if None in notes:
        raise UserError(f"{shards.folder}: shard {notes.index(None)} is missing")
    ids = [id for note in notes for id in note["ids"]]
    wanted = dict(about) | {"task": task, "count": len(ids), "shards": [note["vectors"][task] for note in notes]}
    if path.is_file() and beside(path, ".json").is_file() and read_about(path) == wanted:
        return len(ids)
    if repeated := len(ids) - len(set(ids)):
        log.warning("%s: %d ids stand more than once in the input; each has a row", path, repeated)
    try:
        beside(path, ".json").unlink(missing_ok=True)  # of other vectors
        with atomic_file(path) as file:
            for number, note in enumerate(notes):
                vectors = shards.vectors(number, task, note)
                if number == 0:
                    header = {"descr": vectors.dtype.str, "fortran_order": False, "shape": (len(ids), vectors.shape[1])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(vectors.data)
        write_ids(path, ids)
        write_json(beside(path, ".json"), wanted)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    return len(ids)


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
    with atomic_file(beside(path, ".ids.txt")) as file:
        file.write("".join(f"{id}\n" for id in ids).encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=False).encode())
