"""Embed a corpus in shards, written by any number of processes, and merge them into one matrix.

    FOLDER/about.json          settings that determine the vectors: model, tasks, precision, ...
    FOLDER/00000.TASK.npy      vectors of the first shard for a task, (n, D)
    FOLDER/00000.json          ids, and hashes of texts and vectors; written last, to mark the shard as complete

    MATRIX.npy                 vectors of the whole corpus, (M, D)
    MATRIX.npy.ids.txt         M ids, one per line
    MATRIX.npy.json            model, task, similarity, precision, count, ...

An index has the same .ids.txt and .json files next to it. Batches never mix shards, so the bits of a shard do not
depend on how processes divide the work. Processes share only the folder.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from datamodules.files import atomic_file, load_array, read_json, read_regular, write_json, write_text
from datamodules.records import Document, UserError, changes, explained
from datamodules.store import CHECKED, checksum
from lightning_modules.encoders.base import Encoder
from lightning_modules.losses import comparable
from lightning_modules.retrieval.search import Advance, Shards, check_finite
from lightning_modules.retrieval.vector_cache import text_hash

log = logging.getLogger(__name__)

# Metadata that a search needs: key -> type.
KEYS = dict.fromkeys(("model", "name", "task", "similarity", "input", "on_error"), str) | {"count": int}
FORMER_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # names that earlier versions wrote


def embed_shards(
    encoder: Encoder,
    shards: Iterable[tuple[int, Sequence[Document]]],
    tasks: Mapping[str, str],
    *,
    similarity: str,
    dtype: str,
    token_budget: int | None = None,
    advance: Advance | None = None,
) -> Iterator[tuple[int, Sequence[Document], dict[str, np.ndarray]]]:
    """Yield each shard with its vectors (n, D) for each task, while the next shard is read and tokenised.

    shards: number and texts of each shard.
    tasks: name in the result -> task of the encoder.
    similarity: "cosine" normalises the vectors.
    dtype: type of the result, "float32" or "float16".
    token_budget: maximum number of tokens per forward pass.
    Raises UserError for vectors that are not finite or overflow in float16.
    """
    read: deque[tuple[int, Sequence[Document]]] = deque()

    def texts() -> Iterator[Sequence[Document]]:
        for shard in shards:
            read.append(shard)
            yield shard[1]

    names = list(tasks.values())
    with closing(encoder.encode_each(texts(), tasks=names, token_budget=token_budget, advance=advance)) as results:
        for encoded in results:
            number, documents = read.popleft()
            arrays = {}
            for name, task in tasks.items():
                with np.errstate(over="ignore"):
                    arrays[name] = comparable(encoded[task], similarity).numpy().astype(dtype)
                where = f", shard of {documents[0].id!r}" if documents else ""
                check_finite(arrays[name], f"{name} as {dtype}{where}")
            yield number, documents, arrays


class ShardFolder:
    """The shards of one corpus.

    metadata: settings that determine the vectors, in plain containers.
    Raises UserError if the folder is unusable, or if its shards were made with different settings.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any]):
        self.folder, self.metadata = folder, dict(metadata)
        path = folder / "about.json"
        with explained(f"{folder}: cannot be used as a folder of shards"):
            folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                _write_json(path, self.metadata)
            stored = read_json(path, hint="")
        stored["precision"] = FORMER_PRECISIONS.get(str(stored.get("precision")), stored.get("precision"))
        if changed := changes(stored, self.metadata):
            raise UserError(
                f"{folder}: contains vectors made with different settings ({'; '.join(changed)}); choose another "
                "output, or delete the folder"
            )

    def has(self, number: int, documents: Sequence[Document]) -> bool:
        """Return whether the shard is complete and made from these texts. Logs a warning if it is damaged."""
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
        """Return a shard's ids and hashes, or None if it is not complete. Raises UserError if the file is damaged."""
        path = self._record_path(number)
        if not path.is_file():
            return None
        record = read_json(path, hint="")
        for key, kind in (("ids", list), ("texts", str), ("vectors", dict)):
            if not isinstance(record.get(key), kind):
                raise UserError(f"{path}: damaged ({key} is missing, or not a {kind.__name__})")
        return record

    def vectors(self, number: int, task: str, record: Mapping[str, Any]) -> np.ndarray:
        """Return the vectors (n, D) of a shard for a task. Raises UserError if the file is damaged."""
        path = self._vectors_path(number, task)
        with explained(f"{path}: damaged", OSError, ValueError, EOFError, KeyError):
            vectors = load_array(path)
            intact = len(vectors) == len(record["ids"]) and _array_hash(vectors) == record["vectors"][task]
        if not intact:
            raise UserError(f"{path}: damaged (its content differs from what was written)")
        return vectors

    def write(self, number: int, documents: Sequence[Document], vectors: Mapping[str, np.ndarray]) -> None:
        """Write a shard. vectors: arrays (n, D) by task. Raises UserError if the folder is not writable."""
        record = {
            "ids": [document.id for document in documents],
            "texts": text_hash(documents),
            "vectors": {task: _array_hash(array) for task, array in vectors.items()},
        }
        with explained(f"{self.folder}: cannot be written"):
            self._record_path(number).unlink(missing_ok=True)  # the old record may describe other texts
            for task, array in vectors.items():
                with atomic_file(self._vectors_path(number, task)) as file:
                    np.save(file, array)
            _write_json(self._record_path(number), record)

    def missing(self, count: int) -> list[int]:
        """Return the numbers of incomplete shards among the first `count`."""
        return [number for number in range(count) if not self._record_path(number).is_file()]

    def merge(self, task: str, count: int, path: Path, source: Mapping[str, Any]) -> int:
        """Merge all `count` shards for a task into one matrix (M, D), and return M.

        Only one shard is in memory at a time. A matrix that is up to date and intact is not written again.

        path: file of the matrix.
        source: additional metadata of the matrix.
        Raises UserError if a shard is missing or damaged.
        """
        records: list[dict[str, Any]] = []
        for number in range(count):
            if (record := self.record(number)) is None:
                raise UserError(f"{self.folder}: shard {number} is missing; run the same command again")
            records.append(record)
        ids = [id for record in records for id in record["ids"]]
        hashes = [record["vectors"].get(task) for record in records]
        metadata = self.metadata | dict(source) | {"task": task, "count": len(ids), "shards": hashes}
        if path.is_file() and _sidecar(path, ".json").is_file():
            if _is_merged(path, metadata, [(record["ids"], record["vectors"][task]) for record in records]):
                return len(ids)
            log.info("%s: merging the shards again", path)
        with explained(f"{path}: cannot be written"):
            delete_metadata(path)  # the metadata describe the old vectors
            with atomic_file(path) as file:
                for number, record in enumerate(records):
                    vectors = self.vectors(number, task, record)
                    if number == 0:
                        shape = (len(ids), vectors.shape[1])
                        header = {"descr": vectors.dtype.str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(vectors.data)
            write_metadata(path, ids, metadata)
        return len(ids)

    def _record_path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"

    def _vectors_path(self, number: int, task: str) -> Path:
        return self.folder / f"{number:05d}.{task}.npy"


def _array_hash(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=12).hexdigest()


def _is_merged(path: Path, metadata: Mapping[str, Any], shards: Sequence[tuple[list[str], str]]) -> bool:
    """Return whether a matrix consists of these shards. If only the metadata says so, log that a file is damaged.

    shards: ids of each shard, and the hash of its vectors.
    """
    ids = [id for shard_ids, _ in shards for id in shard_ids]
    try:
        if read_metadata(path) != metadata:
            return False
        matrix, start = load_array(path), 0
        intact = len(matrix) == len(ids) and path.stat().st_size == matrix.offset + matrix.nbytes
        for shard_ids, vectors_hash in shards if intact else ():
            intact = intact and _array_hash(matrix[start : start + len(shard_ids)]) == vectors_hash
            start += len(shard_ids)
        if intact and read_ids(path, len(ids)) == ids:
            return True
        problem = "its content differs from what was written"
    except (UserError, OSError, ValueError, EOFError, TypeError) as error:
        problem = str(error)
    log.warning("%s: damaged (%s)", path, problem)
    return False


class Matrix:
    """The vectors (M, D) of a corpus, memory-mapped from a .npy file.

    metadata: model, task, settings and number of the vectors.
    Raises UserError if a file is missing or damaged, or if the files do not match each other.
    """

    def __init__(self, path: Path):
        self.path, self.metadata = path, read_metadata(path)
        with explained(f"{path}: cannot be read", OSError, ValueError, EOFError):
            vectors = load_array(path, "c")  # copy-on-write; torch warns about read-only arrays
        if vectors.ndim != 2 or len(vectors) != self.metadata.get("count"):
            raise UserError(
                f"{path}: expected {self.metadata.get('count')} vectors, according to {path.name}.json, got an array "
                f"of shape {vectors.shape}"
            )
        self.vectors = Shards([vectors])

    @cached_property
    def ids(self) -> list[str]:
        """The M ids, in the order of the rows."""
        return read_ids(self.path, self.vectors.count)


def open_matrix(path: Path, task: str = "") -> Matrix:
    """Open a matrix: a .npy file, or a task's file in a folder. `task` is optional if the folder has only one file."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected vectors of papers")
    if not path.is_dir():
        return Matrix(path)
    tasks = sorted(file.name.removesuffix(".npy") for file in path.glob("*.npy"))
    if not tasks:
        raise UserError(f"{path}: contains no vectors (TASK.npy); run the same embedding command again to finish it")
    if task not in tasks and (task or len(tasks) > 1):
        raise UserError(f"task: expected one of {', '.join(tasks)}, the tasks in {path}, got {task or 'none'}")
    return Matrix(path / f"{task or tasks[0]}.npy")


def read_metadata(path: Path, others: Mapping[str, type] = MappingProxyType({})) -> dict[str, Any]:
    """Return the metadata of a matrix or an index.

    others: types of additional required keys.
    Raises UserError if the metadata are missing or damaged, or if the file or its ids changed after writing.
    """
    metadata = read_json(_sidecar(path, ".json"), {**KEYS, **others}, hint="")
    written = metadata.pop("written", {})  # earlier versions recorded nothing
    for suffix, expected in written.items() if isinstance(written, dict) else ():
        if (file := _sidecar(path, suffix)).is_file() and _content(file) != expected:
            raise UserError(f"{file}: damaged (its content differs from what was written); write it again")
    return metadata


def read_ids(path: Path, count: int) -> list[str]:
    """Return the `count` ids of a matrix or an index. Raises UserError if the file is missing or damaged."""
    file = _sidecar(path, ".ids.txt")
    with explained(f"{file}: cannot be read", OSError, ValueError):
        ids = read_regular(file).split("\n")[:-1]
    if len(ids) != count:
        raise UserError(f"{file}: expected {count} ids, one for each vector, got {len(ids)}")
    return ids


def write_metadata(path: Path, ids: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Write ids and metadata next to a matrix or an index."""
    write_text(_sidecar(path, ".ids.txt"), "".join(f"{id}\n" for id in ids))
    written = {suffix: _content(_sidecar(path, suffix)) for suffix in ("", ".ids.txt")}
    _write_json(_sidecar(path, ".json"), {**metadata, "written": written})


def _content(path: Path) -> list[int]:
    """Return the size of a file and, unless it is large, its checksum."""
    size = path.stat().st_size
    return [size, checksum(path)] if size <= CHECKED else [size]


def delete_metadata(path: Path) -> None:
    """Delete the metadata of a matrix or index that is about to be replaced."""
    _sidecar(path, ".json").unlink(missing_ok=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_json(path, content, indent=None, ensure_ascii=False)


def _sidecar(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
