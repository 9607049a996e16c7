"""Mined hard negatives on disk.

A store holds those of one mining, of one or more tasks:

    FOLDER/TASK.{starts,documents,ranks,scores}.npy    records.MinedNegatives; documents are rows of the task's table
    FOLDER/meta.json                                   see write_store
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.records import MinedNegatives, UserError

VERSION = 1  # of the layout
ARRAYS = ("starts", "documents", "ranks", "scores")


def write_store(path: Path, mined: Mapping[str, MinedNegatives], meta: Mapping[str, Any]) -> HardNegativeStore:
    """Write hard negatives, whole or not at all; a store that is there already is replaced.

    meta: what they were made with: "miner" (its class and arguments), "model" (fingerprint, or none), "data" (task ->
    collection -> fingerprint), "step", "k" and whatever else is to be kept. Added are the layout's version, the numbers
    of examples and negatives, what the filters took, and a hash of all arrays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        for task, negatives in mined.items():
            for name in ARRAYS:
                np.save(unfinished / f"{task}.{name}.npy", np.ascontiguousarray(getattr(negatives, name)))
        tasks = {
            task: {"examples": len(n), "negatives": len(n.documents), "taken": dict(n.taken)}
            for task, n in mined.items()
        }
        about = {"version": VERSION, "hash": hash_arrays(mined), **meta, "tasks": tasks}
        (unfinished / "meta.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
        unfinished.chmod(0o755)
        for file in unfinished.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        _replace_store(path, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return HardNegativeStore(path, verify=False)


def hash_arrays(mined: Mapping[str, MinedNegatives]) -> str:
    """Return a hash of all arrays, with their names, types and shapes."""
    digest = hashlib.blake2b(digest_size=8)
    for task, negatives in mined.items():
        for name in ARRAYS:
            array = np.ascontiguousarray(getattr(negatives, name))
            digest.update(repr((task, name, array.dtype.str, array.shape)).encode())
            digest.update(array)
    return digest.hexdigest()


def _replace_store(path: Path, new: Path) -> None:
    """Rename the new folder to path. An older store there, even a damaged one, is removed; nothing else is."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    elif path.exists() or path.is_symlink():
        files = re.compile(rf"meta\.json|\.?report\.json|report\.svg|.+\.({'|'.join(ARRAYS)})\.npy")
        if path.is_symlink() or not path.is_dir() or not all(files.fullmatch(p.name) for p in path.iterdir()):
            raise UserError(f"{path}: is not a store of hard negatives, so it is not replaced; name another folder")
        path.replace(old := new.with_name(f"{new.name}.old"))
        new.replace(path)
        shutil.rmtree(old)
        return
    new.replace(path)


class HardNegativeStore:
    """Mined hard negatives on disk, as memory-mapped arrays.

    verify: compare the arrays with the stored hash.

    Raises UserError if the store is missing or damaged.
    """

    def __init__(self, path: Path, verify: bool = True):
        self.path = Path(path)
        try:
            self.meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
            if self.meta["version"] != VERSION:
                raise UserError(f"{path}: is of layout {self.meta['version']}, this is {VERSION}; mine anew")
            self._arrays = {task: self._load(task) for task in self.meta["tasks"]}
        except FileNotFoundError as error:
            there = "holds no hard negatives" if self.path.is_dir() else "no such folder"
            missing = Path(error.filename).name
            raise UserError(f"{path}: {there} ({missing} is not there); make mine output={path} mines some") from error
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: is no whole store of hard negatives ({error})") from error
        if verify and (actual := hash_arrays(self._arrays)) != self.hash:
            raise UserError(
                f"{path}: the arrays do not match the hash in meta.json ({self.hash} stored, {actual} found), so they "
                "were changed or damaged after mining; restore the folder from a copy, or delete it and mine again"
            )

    def _load(self, task: str) -> MinedNegatives:
        arrays = (np.load(self.path / f"{task}.{name}.npy", mmap_mode="r") for name in ARRAYS)
        return MinedNegatives(*arrays, self.meta["tasks"][task]["taken"])

    def __getstate__(self) -> Path:  # workers map the files themselves
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path, verify=False)  # the process that started the worker has verified it

    @property
    def hash(self) -> str:
        return self.meta["hash"]

    @property
    def tasks(self) -> Mapping[str, MinedNegatives]:
        return self._arrays

    def of(self, task: str, example: int) -> list[int]:
        """Rows of an example's hard negatives, best first; none for a task that was not mined."""
        if task not in self._arrays:
            return []
        found = self._arrays[task]
        return found.documents[found.starts[example] : found.starts[example + 1]].tolist()

    def check(self, data: Mapping[str, Mapping[str, str]]) -> None:
        """Raise UserError unless it was mined from these data: task -> collection -> fingerprint, in their order.

        It may hold further tasks.
        """
        common = [task for task in self.tasks if task in data]
        if not common:
            raise UserError(f"{self.path}: has hard negatives of {', '.join(self.tasks)}, which the run does not have")
        for task in common:
            mined, now = list(self.meta["data"][task].items()), list(data.get(task, {}).items())
            if mined != now:
                was, has = (", ".join(f"{name} {mark}" for name, mark in part) or "none" for part in (mined, now))
                raise UserError(
                    f"{self.path}: hard negatives of {task} were mined from other data "
                    f"(fingerprints then: {was}; now: {has}). Mine anew."
                )
