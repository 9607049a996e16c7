"""Embed a corpus in shards that any number of processes write, and merge them into one matrix.

    FOLDER/about.json          what decides all vectors: model, tasks, precision, ...
    FOLDER/00000.TASK.npy      vectors of a shard's texts for each task, (n, D)
    FOLDER/00000.json          ids, and hashes of texts and vectors; written last, so that its shard is complete

    MATRIX.npy                 vectors of the whole corpus, (M, D); an index of them has the same two files next to it
    MATRIX.npy.ids.txt         M ids, one per line
    MATRIX.npy.json            model, task, similarity, precision, count, ...

The texts of a shard are encoded in batches of their own, so its bits do not depend on who else works on the corpus.
Processes share nothing but the folder.
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

from datamodules.files import atomic_file, write_json
from datamodules.records import Document, UserError
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.search import Advance, Shards, check_finite
from lightning_modules.retrieval.vector_cache import text_hash

log = logging.getLogger(__name__)

FORMER_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # names in folders of earlier versions


def embed_shard(
    encoder: Encoder,
    documents: Sequence[Document],
    tasks: Mapping[str, str],
    *,
    similarity: str,
    dtype: str,
    token_budget: int,
    advance: Advance | None = None,
) -> dict[str, np.ndarray]:
    """Return the vectors (n, D) of a shard's texts for each task.

    tasks: name -> task of the encoder that encodes the texts.
    similarity: "cosine" normalises the vectors.
    dtype: "float32" or "float16", the type of the result.
    token_budget: maximum number of padded tokens per forward pass.
    Raises UserError for vectors that are not finite, or become infinite as float16.
    """
    encoded = encoder.encode(list(documents), tasks=list(tasks.values()), token_budget=token_budget, advance=advance)
    arrays = {}
    for name, task in tasks.items():
        vectors = encoded[task]
        if similarity == "cosine":
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        with np.errstate(over="ignore"):
            arrays[name] = vectors.numpy().astype(dtype)
        check_finite(arrays[name], f"{name} as {dtype}" + (f", shard of {documents[0].id!r}" if documents else ""))
    return arrays


class ShardFolder:
    """The shards of one corpus.

    metadata: what decides the vectors besides the texts, in plain containers.
    Raises UserError if the folder cannot be used, or if its shards were made with other metadata.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any]):
        self.folder, self.metadata = folder, dict(metadata)
        path = folder / "about.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                _write_json(path, self.metadata)
            stored = json.loads(path.read_text(encoding="utf-8"))
            stored["precision"] = FORMER_PRECISIONS.get(stored.get("precision"), stored.get("precision"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: cannot be used as a folder of shards ({error})") from error
        changes = [
            f"{key}: {stored.get(key)} then, {self.metadata.get(key)} now"
            for key in sorted(stored.keys() | self.metadata.keys())
            if stored.get(key) != self.metadata.get(key)
        ]
        if changes:
            raise UserError(
                f"{folder}: contains vectors made with other settings ({'; '.join(changes)}); choose another output, "
                "or delete the folder"
            )

    def has(self, number: int, documents: Sequence[Document]) -> bool:
        """Return whether the shard of these texts is complete. Logs a warning if it is damaged."""
        try:
            record = self.record(number)
            texts = {"texts": text_hash(documents), "ids": [document.id for document in documents]}
            if record is None or any(record[key] != value for key, value in texts.items()):
                return False
            for task in self.metadata["tasks"]:
                self.vectors(number, task, record)
        except UserError as error:
            log.warning("%s; embedding its texts again", error)
            return False
        return True

    def record(self, number: int) -> dict[str, Any] | None:
        """Return the ids of a shard and the hashes of its texts and vectors, or None if it is not written yet.

        Raises UserError if the file is damaged.
        """
        path = self._record_path(number)
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return {key: record[key] for key in ("ids", "texts", "vectors")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error})") from error

    def vectors(self, number: int, task: str, record: Mapping[str, Any]) -> np.ndarray:
        """Return the vectors (n, D) of a shard for a task. Raises UserError if they differ from what was written."""
        path = self._vectors_path(number, task)
        try:
            vectors = np.load(path)
            intact = len(vectors) == len(record["ids"]) and _array_hash(vectors) == record["vectors"][task]
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error})") from error
        if not intact:
            raise UserError(f"{path}: damaged (its content differs from what was written)")
        return vectors

    def write(self, number: int, documents: Sequence[Document], vectors: Mapping[str, np.ndarray]) -> None:
        """Write a shard's vectors, (n, D) for each task. Raises UserError if that fails."""
        record = {
            "ids": [document.id for document in documents],
            "texts": text_hash(documents),
            "vectors": {task: _array_hash(array) for task, array in vectors.items()},
        }
        try:
            self._record_path(number).unlink(missing_ok=True)  # it may describe other texts
            for task, array in vectors.items():
                with atomic_file(self._vectors_path(number, task)) as file:
                    np.save(file, array)
            _write_json(self._record_path(number), record)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error})") from error

    def missing(self, count: int) -> list[int]:
        """Return which of the first `count` shards are not written yet."""
        return [number for number in range(count) if not self._record_path(number).is_file()]

    def merge(self, task: str, count: int, path: Path, source: Mapping[str, Any]) -> int:
        """Write the vectors of all `count` shards for a task as one matrix (M, D), and return M.

        path: file of the matrix. source: further metadata to store next to it.
        One shard is in memory at a time. A matrix that is up to date is left alone. Raises UserError for a shard that
        is missing or damaged.
        """
        records = [self.record(number) for number in range(count)]
        if None in records:
            raise UserError(f"{self.folder}: shard {records.index(None)} is missing; run the same command again")
        ids = [id for record in records for id in record["ids"]]
        hashes = [record["vectors"][task] for record in records]
        metadata = self.metadata | dict(source) | {"task": task, "count": len(ids), "shards": hashes}
        if path.is_file() and _beside(path, ".json").is_file() and read_metadata(path) == metadata:
            return len(ids)
        if repeated := len(ids) - len(set(ids)):
            log.warning("%s: %d ids occur more than once in the input; each occurrence has a row", path, repeated)
        try:
            delete_metadata(path)  # it may describe other vectors
            with atomic_file(path) as file:
                for number, record in enumerate(records):
                    vectors = self.vectors(number, task, record)
                    if number == 0:
                        shape = (len(ids), vectors.shape[1])
                        header = {"descr": vectors.dtype.str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(vectors.data)
            write_metadata(path, ids, metadata)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error})") from error
        return len(ids)

    def _record_path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"

    def _vectors_path(self, number: int, task: str) -> Path:
        return self.folder / f"{number:05d}.{task}.npy"


def _array_hash(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=12).hexdigest()


class Matrix:
    """The vectors (M, D) of a corpus, memory-mapped from a .npy file.

    metadata: the model, task and settings that made them, and their count.
    Raises UserError if a file is missing or damaged, or does not belong to the others.
    """

    def __init__(self, path: Path):
        self.path, self.metadata = path, read_metadata(path)
        try:
            vectors = np.load(path, mmap_mode="c")  # torch warns of arrays that are not writable
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if vectors.ndim != 2 or len(vectors) != self.metadata.get("count"):
            raise UserError(
                f"{path}: expected {self.metadata.get('count')} vectors, as {path.name}.json says, got an array of "
                f"shape {vectors.shape}"
            )
        self.vectors = Shards([vectors])

    @cached_property
    def ids(self) -> list[str]:
        """The M ids, in the order of the rows."""
        return read_ids(self.path, self.vectors.count)


def open_matrix(path: Path, task: str = "") -> Matrix:
    """Open a matrix by its file, or by its folder and task. The task is optional if the folder has only one."""
    if not path.is_dir():
        return Matrix(path)
    tasks = sorted(file.name.removesuffix(".npy") for file in path.glob("*.npy"))
    if not tasks:
        raise UserError(f"{path}: contains no vectors (TASK.npy); finish embedding first, with the same make embed")
    if task not in tasks and (task or len(tasks) > 1):
        raise UserError(f"task: expected one of {', '.join(tasks)}, which {path} has vectors for, got {task or 'none'}")
    return Matrix(path / f"{task or tasks[0]}.npy")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a matrix or an index. Raises UserError if it is missing or damaged."""
    file = _beside(path, ".json")
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(metadata, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    return metadata


def read_ids(path: Path, count: int) -> list[str]:
    """Return the ids of the rows of a matrix or an index. Raises UserError unless there are `count`."""
    file = _beside(path, ".ids.txt")
    try:
        ids = file.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    if len(ids) != count:
        raise UserError(f"{file}: expected {count} ids, one for each vector, got {len(ids)}")
    return ids


def write_metadata(path: Path, ids: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Write ids and metadata next to a matrix or an index."""
    with atomic_file(_beside(path, ".ids.txt")) as file:
        file.write("".join(f"{id}\n" for id in ids).encode())
    _write_json(_beside(path, ".json"), metadata)


def delete_metadata(path: Path) -> None:
    """Delete the metadata of a matrix or index that is about to be replaced."""
    _beside(path, ".json").unlink(missing_ok=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_json(path, content, indent=None, ensure_ascii=False)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
