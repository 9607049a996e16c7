"""Store mined hard negatives on disk, and draw from them in batches.

A store has the negatives of one mining run, for one or more tasks:

    FOLDER/TASK.{starts,documents,ranks,scores}.npy    records.MinedNegatives
    FOLDER/TASK.labels.npy                             the judge's decision on each negative, if there is a judge
    FOLDER/meta.json                                   see write_store

A round is a store, and the first batch that draws from it. Rounds start at batches that are known in advance, so all
workers and ranks switch at the same batch, and each batch is a pure function of seed, step and rounds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.files import atomic_folder, load_array, read_regular
from datamodules.records import DROP, KEEP, POSITIVE, Example, MinedNegatives, UserError, check_choice, check_name

VERSION = 1  # version of the layout
ARRAYS = ("starts", "documents", "ranks", "scores", "labels")
SOURCES = ("mined", "data", "both")  # values of Rounds.source

# (index of an example, example, step) -> the example with the positives and hard negatives to draw from in this step
ExampleAt = Callable[[int, Example, int], Example]


def write_store(path: Path, mined: Mapping[str, MinedNegatives], meta: Mapping[str, Any]) -> HardNegativeStore:
    """Write mined hard negatives atomically. Replaces an existing store, even a damaged one.

    meta: description of the mining: "miner" (class and arguments), "model" (fingerprint, or None), "data"
        (fingerprints of each task's collections), "step", "k" and any other entries. This function adds the version of
        the layout, a hash of all arrays, and the counts of examples, negatives and filtered candidates.

    Raises UserError if path exists and is not a store.
    """
    check_replaceable(path)
    tasks = {
        task: {"examples": len(n), "negatives": len(n.documents), "taken": dict(n.removed)} for task, n in mined.items()
    }
    with atomic_folder(path) as new:
        for task, negatives in mined.items():
            for name, array in _arrays(negatives):
                np.save(new / f"{task}.{name}.npy", array)
        meta = {"version": VERSION, "hash": hash_arrays(mined), **meta, "tasks": tasks}
        (new / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    return HardNegativeStore(path, verify=False)


def _arrays(negatives: MinedNegatives) -> list[tuple[str, np.ndarray]]:
    arrays = ((name, getattr(negatives, name)) for name in ARRAYS)
    return [(name, np.ascontiguousarray(array)) for name, array in arrays if array is not None]


def check_replaceable(path: Path) -> None:
    """Raise UserError if path exists, unless it is an empty folder or contains only the files of a store."""
    files = re.compile(rf"meta\.json|\.?report\.json|report\.svg|.+\.({'|'.join(ARRAYS)})\.npy")
    is_store = path.is_dir() and all(files.fullmatch(file.name) for file in path.iterdir())
    if path.is_symlink() or (path.exists() and not is_store):
        raise UserError(f"{path}: is not a store of hard negatives, so it will not be replaced; name another folder")


def hash_arrays(mined: Mapping[str, MinedNegatives]) -> str:
    """Return a hash of all arrays, with their names, types and shapes."""
    digest = hashlib.blake2b(digest_size=8)
    for task, negatives in mined.items():
        for name, array in _arrays(negatives):
            digest.update(repr((task, name, array.dtype.str, array.shape)).encode())
            digest.update(array.data)
    return digest.hexdigest()


class HardNegativeStore:
    """Mined hard negatives on disk, as memory-mapped arrays.

    verify: whether to compare the arrays with the stored hash.

    Raises UserError if the store is missing or damaged.
    """

    def __init__(self, path: Path, verify: bool = True):
        self.path = Path(path)
        try:
            self.meta = json.loads(read_regular(self.path / "meta.json"))
            if self.meta["version"] != VERSION:
                raise UserError(f"{path}: expected layout {VERSION}, got {self.meta['version']}; mine again")
            self.hash: str = self.meta["hash"]
            self.tasks: dict[str, MinedNegatives] = {task: self._load(task) for task in self.meta["tasks"]}
        except UserError:
            raise
        except FileNotFoundError as error:
            problem = f"{Path(error.filename).name} is missing" if self.path.is_dir() else "no such folder"
            raise UserError(f"{path}: expected mined hard negatives, but {problem}; mine them first") from error
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: the mined hard negatives are damaged ({error}); mine again") from error
        if verify and (actual := hash_arrays(self.tasks)) != self.hash:
            raise UserError(
                f"{path}: the arrays do not match the hash in meta.json ({self.hash} stored, {actual} found), so they "
                "were changed or damaged after mining; restore the folder from a copy, or delete it and mine again"
            )

    def _load(self, task: str) -> MinedNegatives:
        check_name("task", task)
        paths = {name: self.path / f"{task}.{name}.npy" for name in ARRAYS}
        if not paths["labels"].exists():  # there was no judge; if the file was lost, the hash will show it
            del paths["labels"]
        arrays = {name: load_array(path) for name, path in paths.items()}
        return MinedNegatives(**arrays, removed=self.meta["tasks"][task]["taken"])

    def __getstate__(self) -> Path:  # workers map the files by themselves
        return self.path

    def __setstate__(self, path: Path) -> None:
        HardNegativeStore.__init__(self, path, verify=False)  # verified before the worker started

    def negatives_of(self, task: str, example: int, label: int = KEEP) -> list[int]:
        """Return the rows of an example's hard negatives, best first, or [] if the task was not mined.

        label: decision of the judge. DROP and POSITIVE return the documents that the judge dropped or made positives.
        """
        if task not in self.tasks:
            return []
        mined = self.tasks[task]
        rows = slice(mined.starts[example], mined.starts[example + 1])
        if mined.labels is None:
            return mined.documents[rows].tolist() if label == KEEP else []
        return mined.documents[rows][mined.labels[rows] == label].tolist()

    def check(self, data: Mapping[str, Mapping[str, str]]) -> None:
        """Raise UserError if the negatives were mined from other data. Tasks that are only in the store are ignored.

        data: fingerprints of each task's collections, in order.
        """
        common = [task for task in self.tasks if task in data]
        if not common:
            raise UserError(
                f"{self.path}: expected hard negatives of {' or '.join(data) or 'a task'}, but these are of "
                f"{', '.join(self.tasks)}"
            )
        for task in common:
            mined, current = list(self.meta["data"][task].items()), list(data[task].items())
            if mined != current:
                then, now = (", ".join(f"{name} {mark}" for name, mark in m) or "none" for m in (mined, current))
                raise UserError(
                    f"{self.path}: the hard negatives of {task} were mined from different data "
                    f"(fingerprints then: {then}; now: {now}); mine again"
                )


@dataclass(frozen=True, slots=True)
class Round:
    """A store, and the first batch that draws from it.

    batch: first batch that draws from the store.
    store: folder of the store, relative to Rounds.folder or absolute.
    hash, model: hash of the store's arrays, and fingerprint of the model that mined it.
    """

    batch: int
    store: str
    hash: str
    model: str | None


class Rounds:
    """The stores of mined hard negatives, and the batches that use each of them.

    folder: folder for stores mined during training.
    source: "mined" uses an example's mined negatives, or its negatives in the data if none were mined. "data" only uses
        the negatives in the data. "both" uses all.
    data: fingerprints of the training data. A store mined from different data is rejected.
    """

    def __init__(self, folder: Path, source: str = "mined", data: Mapping[str, Mapping[str, str]] | None = None):
        self.folder, self.source, self.data = Path(folder), check_choice("source", source, SOURCES), data or {}
        self.first, self.every = 0, 0  # rounds may start at batches first, first + every, ...
        self._rounds: list[Round] = []
        self._stores: dict[int, HardNegativeStore] = {}

    def plan(self, first: int, every: int) -> None:
        """Set the batches at which rounds may start: first, first + every, ..."""
        self.first, self.every = first, every

    def boundary_after(self, batch: int) -> int | None:
        """Return the next batch at which a round may start."""
        if not self.every:
            return None
        return self.first if batch < self.first else batch + self.every - (batch - self.first) % self.every

    def is_planned(self, batch: int) -> bool:
        """Return whether a round may start at a batch."""
        return bool(self.every) and batch >= self.first and (batch - self.first) % self.every == 0

    def has(self, batch: int) -> bool:
        """Return whether a round has started at a batch."""
        return any(r.batch == batch for r in self._rounds)

    def begin(self, batch: int, store: str) -> None:
        """Use a store from a batch onwards. store: name of a store in the folder, or a path.

        Raises UserError if the store is missing, damaged or mined from different data.
        """
        negatives = HardNegativeStore(self.folder / store)  # an absolute path replaces the folder
        negatives.check(self.data)
        self._rounds = [r for r in self._rounds if r.batch < batch]
        self._rounds.append(Round(batch, store, negatives.hash, negatives.meta.get("model")))
        self._stores = {batch: negatives}

    def write(self, name: str, mined: Mapping[str, MinedNegatives], meta: Mapping[str, Any]) -> Path:
        """Write a store into the folder (write_store)."""
        return write_store(self.folder / name, mined, meta).path

    def has_store(self, name: str, meta: Mapping[str, Any]) -> bool:
        """Return whether the folder has an intact store with this name and these settings."""
        try:
            store = HardNegativeStore(self.folder / name)
        except UserError:
            return False
        return all(store.meta.get(key) == value for key, value in json.loads(json.dumps(meta)).items())

    def at(self, batch: int) -> HardNegativeStore | None:
        """Return the store that a batch draws from, or None if it draws from no store."""
        current = max((r for r in self._rounds if r.batch <= batch), key=lambda r: r.batch, default=None)
        return None if current is None else self._open(current)

    def _open(self, current: Round) -> HardNegativeStore:
        if current.batch not in self._stores:
            path = self.folder / current.store
            try:
                store = HardNegativeStore(path)
            except UserError as error:
                raise UserError(
                    f"{path}: the hard negatives used since batch {current.batch} are missing or damaged; restore the "
                    f"folder (hash {current.hash}), or start a new training from the checkpoint's weights ({error})"
                ) from error
            if store.hash != current.hash:
                raise UserError(
                    f"{path}: not the hard negatives used since batch {current.batch} (expected hash {current.hash}, "
                    f"mined by model {current.model}; found hash {store.hash}, model {store.meta.get('model')}); "
                    "restore the folder, or start a new training from the checkpoint's weights"
                )
            store.check(self.data)
            self._stores[current.batch] = store
        return self._stores[current.batch]

    def examples_for(self, task: str) -> ExampleAt:
        """Return the function (see ExampleAt) that gives a task's examples the hard negatives of each step."""
        return functools.partial(self._example, task)

    def _example(self, task: str, index: int, example: Example, step: int) -> Example:
        store = self.at(step) if self.source != "data" else None
        if store is None:
            return example
        mined, dropped, positives = (store.negatives_of(task, index, label) for label in (KEEP, DROP, POSITIVE))
        unmined = [row for row in example.hard_negatives if row not in dropped and row not in positives]
        negatives = list(dict.fromkeys([*mined, *unmined])) if self.source == "both" else mined or unmined
        return replace(
            example,
            positives=(*example.positives, *positives),
            grades=(*example.grades, *(1 for _ in positives)),
            hard_negatives=tuple(negatives),
            not_negatives=(*example.not_negatives, *dropped, *positives),
        )

    def state(self) -> list[dict[str, Any]]:
        return [asdict(r) for r in self._rounds]

    def load(self, state: Sequence[Mapping[str, Any]], position: int) -> None:
        """Restore the rounds of a checkpoint. position: number of batches before the checkpoint.

        Raises UserError if the store for this position is missing or damaged, or is a different one.
        """
        # Mined before training; the folder may have moved.
        initial = next((r for r in self._rounds if r.batch == 0), None)
        rounds = [Round(**r) for r in state]
        if initial is not None:
            if not rounds or rounds[0].batch != 0 or rounds[0].hash != initial.hash:
                expected = f"hash {rounds[0].hash}, model {rounds[0].model}" if rounds else "none"
                raise UserError(
                    f"{initial.store}: the checkpoint was trained with different hard negatives (expected {expected}; "
                    f"found hash {initial.hash}, model {initial.model})"
                )
            rounds[0] = initial
        self._rounds = rounds
        self.at(position)


def example_of_data(index: int, example: Example, step: int) -> Example:
    """Return the example unchanged, with the hard negatives of the data (see ExampleAt)."""
    return example
