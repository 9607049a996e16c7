"""Vectors in several arrays, of which a block at a time is read.

Shapes: M vectors, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor

from datamodules.records import UserError

Array = np.ndarray | Tensor
Advance = Callable[[int], None]


class Shards(Sequence[np.ndarray]):
    """Vectors (M, D) in several arrays, which may be memory-mapped. As a sequence: the arrays.

    prepare: what becomes of float32 vectors (n, D) when they are read.
    """

    def __init__(self, parts: Sequence[Array], prepare: Callable[[np.ndarray], np.ndarray] | None = None):
        self.parts = [part.numpy() if isinstance(part, Tensor) else part for part in parts]
        self.prepare = prepare or (lambda vectors: vectors)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index):
        return self.parts[index]

    @property
    def count(self) -> int:
        return int(self.starts[-1])

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Vectors (n, D) float32 of rows (n,)."""
        if len(self.parts) == 1:
            return self.prepare(np.asarray(self.parts[0][rows], dtype=np.float32))
        found = np.empty((len(rows), self.parts[0].shape[1]), dtype=np.float32)
        place = np.searchsorted(self.starts, rows, side="right") - 1
        for i in np.unique(place):
            found[place == i] = self.parts[i][rows[place == i] - self.starts[i]]
        return self.prepare(found)

    def blocks(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of at most count vectors, contiguous float32, and the row at which each begins."""
        for start, part in zip(self.starts, self.parts, strict=False):
            for first in range(0, len(part), count):
                block = np.ascontiguousarray(part[first : first + count], dtype=np.float32)
                yield int(start) + first, self.prepare(block)


def shards_of(vectors: Array | Shards) -> Shards:
    return vectors if isinstance(vectors, Shards) else Shards([vectors])


def check_finite(vectors: np.ndarray, what: str, first: int = 0) -> None:
    """Raise UserError if a vector (n, D) has a value that is no finite number. first: the number of the first one."""
    wrong = ~np.isfinite(vectors).all(axis=1)
    if wrong.any():
        number = first + int(wrong.argmax())
        raise UserError(
            f"{what}: {int(wrong.sum())} of {len(vectors)} vectors are not finite, the first is number {number} "
            "(training diverged?)"
        )
