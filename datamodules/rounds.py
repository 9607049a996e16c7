"""Which mined hard negatives hold at which step.

A round is a store (hard_negatives.py) and the batch from which on it is drawn from. Rounds begin at batches that are
known beforehand, so that every worker and rank changes over at the same one; batches stay a pure function of seed, step
and rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.hard_negatives import HardNegativeStore, write_store
from datamodules.records import Example, MinedNegatives, UserError

SOURCES = ("mined", "data", "both")
NegativesOf = Callable[[int, Example, int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Round:
    """batch: the first that draws from it. store: its folder, within the rounds' own or a path. hash, model: of it."""

    batch: int
    store: str
    hash: str
    model: str | None


class Rounds:
    """Which hard negatives hold at which step.

    folder: in which stores of the training itself lie. source: "mined" (an example's mined ones, where it has any, else
    those of the data), "data" or "both". data: fingerprints, which every store must have.
    """

    def __init__(self, folder: Path, source: str = "mined", data: Mapping[str, Mapping[str, str]] | None = None):
        if source not in SOURCES:
            raise UserError(f"mining.use: got {source!r}, allowed are {', '.join(SOURCES)}")
        self.folder, self.source, self.data = Path(folder), source, data or {}
        self.first, self.every = 0, 0  # batches at which rounds may begin: first, first + every, ...
        self._rounds: list[Round] = []
        self._stores: dict[int, HardNegativeStore] = {}

    def plan(self, first: int, every: int) -> None:
        """Rounds begin at these batches: first, first + every, ..."""
        self.first, self.every = first, every

    def boundary_after(self, batch: int) -> int | None:
        """The next batch at which a round may begin."""
        if not self.every:
            return None
        return self.first if batch < self.first else batch + self.every - (batch - self.first) % self.every

    def is_planned(self, batch: int) -> bool:
        return bool(self.every) and batch >= self.first and (batch - self.first) % self.every == 0

    def has(self, batch: int) -> bool:
        """Whether a round begins at the batch."""
        return any(r.batch == batch for r in self._rounds)

    def begin(self, batch: int, store: str) -> None:
        """From this batch on a store holds: its name in the folder, or its path. Raises UserError if it cannot."""
        found = HardNegativeStore(self.folder / store)  # a path of its own stays one
        found.check(self.data)
        self._rounds = [r for r in self._rounds if r.batch < batch]
        self._rounds.append(Round(batch, store, found.hash, found.meta.get("model")))
        self._stores = {batch: found}

    def write(self, name: str, mined: Mapping[str, MinedNegatives], meta: Mapping[str, Any]) -> Path:
        """Write a store into the folder (write_store)."""
        return write_store(self.folder / name, mined, meta).path

    def has_made(self, name: str, meta: Mapping[str, Any]) -> bool:
        """Whether a store of this name is in the folder, and was made with just this."""
        try:
            store = HardNegativeStore(self.folder / name)
        except UserError:
            return False
        return all(store.meta.get(key) == value for key, value in json.loads(json.dumps(meta)).items())

    def at(self, step: int) -> HardNegativeStore | None:
        """The store that holds at a step."""
        found = max((r.batch for r in self._rounds if r.batch <= step), default=None)
        return None if found is None else self._store(next(r for r in self._rounds if r.batch == found))

    def _store(self, wanted: Round) -> HardNegativeStore:
        if wanted.batch not in self._stores:
            path = self.folder / wanted.store
            if not (path / "meta.json").is_file():
                raise UserError(
                    f"{path}: the hard negatives that hold from batch {wanted.batch} on are gone. Put them back "
                    f"(hash {wanted.hash}), or start a new run with init_from=CHECKPOINT."
                )
            store = HardNegativeStore(path)
            if store.hash != wanted.hash:
                raise UserError(
                    f"{path}: holds other hard negatives than those drawn from since batch {wanted.batch} (hash "
                    f"{wanted.hash}, mined by model {wanted.model}; here: hash {store.hash}, model "
                    f"{store.meta.get('model')}). Put the former back, or start a new run with init_from=CHECKPOINT."
                )
            store.check(self.data)
            self._stores[wanted.batch] = store
        return self._stores[wanted.batch]

    def of(self, task: str) -> NegativesOf:
        return TaskNegatives(self, task)

    def state(self) -> list[dict[str, Any]]:
        return [asdict(r) for r in self._rounds]

    def load(self, state: Sequence[Mapping[str, Any]], position: int) -> None:
        """Take over a checkpoint's rounds. Raises UserError if the store that holds at the position is not there."""
        given = next((r for r in self._rounds if r.batch == 0), None)  # mined beforehand; its folder may have moved
        rounds = [Round(**r) for r in state]
        if given is not None:
            if not rounds or rounds[0].batch != 0 or rounds[0].hash != given.hash:
                was = f"hash {rounds[0].hash}, model {rounds[0].model}" if rounds else "none"
                raise UserError(
                    f"mining.store: the checkpoint was trained with other hard negatives ({was}) than {given.store} "
                    f"(hash {given.hash}, model {given.model})"
                )
            rounds[0] = given
        self._rounds = rounds
        self.at(position)


@dataclass(frozen=True, slots=True)
class TaskNegatives:
    """The hard negatives that may be drawn for an example of a task at a step: rows."""

    rounds: Rounds
    task: str

    def __call__(self, index: int, example: Example, step: int) -> Sequence[int]:
        store = self.rounds.at(step) if self.rounds.source != "data" else None
        mined = store.of(self.task, index) if store else []
        if self.rounds.source == "both":
            return list(dict.fromkeys([*mined, *example.hard_negatives]))
        return mined or example.hard_negatives


def negatives_of_data(index: int, example: Example, step: int) -> Sequence[int]:
    return example.hard_negatives
