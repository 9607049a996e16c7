"""Lists of integers of different lengths, as two arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Ragged(NamedTuple):
    """Lists of integers of different lengths in two arrays: list i is values[starts[i] : starts[i + 1]].

    starts: (n + 1,) int64. values: (j,) int32 or int64.
    """

    starts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, lists: Iterable[Sequence[int] | np.ndarray]) -> Ragged:
        """Pack lists."""
        arrays = [np.asarray(values, dtype=np.int32) for values in lists]
        return cls.of_counts([len(values) for values in arrays], np.concatenate([*arrays, np.zeros(0, dtype=np.int32)]))

    @classmethod
    def of_counts(cls, counts: Sequence[int] | np.ndarray, values: np.ndarray) -> Ragged:
        """Split values into lists. counts: length of each list, (n,)."""
        return cls(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), values)

    @classmethod
    def empty(cls, num_lists: int) -> Ragged:
        """Return `num_lists` empty lists."""
        return cls(np.zeros(num_lists + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))

    @property
    def counts(self) -> np.ndarray:
        """Length of each list, (n,)."""
        return np.diff(self.starts)

    @property
    def owners(self) -> np.ndarray:
        """Index of the list that each value is in, (j,)."""
        return np.arange(len(self.starts) - 1).repeat(self.counts)

    @property
    def positions(self) -> np.ndarray:
        """Position of each value within its list, (j,)."""
        return np.arange(self.starts[-1]) - self.starts[:-1].repeat(self.counts)

    def take(self, indices: np.ndarray) -> Ragged:
        """Return the lists at some indices, (n,). Index -1 gives an empty list."""
        counts = np.append(self.counts, 0)[indices]
        taken = Ragged.of_counts(counts, self.values)
        return taken._replace(values=self.values[self.starts[indices].repeat(counts) + taken.positions])

    def minus(self, number: int) -> Ragged:
        """Return the lists with a number subtracted from each value."""
        return self._replace(values=self.values - number)

    def padded(self) -> np.ndarray:
        """Return the lists as one array, (n, longest), padded with -1; the longest counts as at least 1."""
        array = np.full((len(self.counts), max(self.counts.max(initial=0), 1)), -1, dtype=self.values.dtype)
        array[self.owners, self.positions] = self.values
        return array
