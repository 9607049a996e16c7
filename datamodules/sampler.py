"""The multi-task schedule: which task and which examples, at which step, on which rank.

A pure function of (seed, step). Nothing is remembered between steps, so that resuming needs one integer and every rank
computes the same plan by itself. At each step all ranks work on one task (in-batch negatives are shared across ranks,
and an expert is used by all or by none), each on its own slice of the global batch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

import numpy as np


def mix(*keys: int | str) -> int:
    """A 63-bit seed from the keys, the same in every process (Python's hash of a string is not)."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@functools.lru_cache(maxsize=16)
def _order(seed: int, task: str, size: int, epoch: int) -> np.ndarray:
    """The order of a task's examples in its epoch-th pass. Shape (size,)."""
    return np.random.default_rng(mix(seed, "order", task, epoch)).permutation(size)


class RoundRobinSchedule:
    """Tasks take turns; each goes through its examples in passes, every pass in a new order.

    sizes: task -> number of examples. A small task starts its next pass while a large one is still in its first; a
    batch may span two passes, so that no example is left out.
    """

    def __init__(self, sizes: Mapping[str, int], batch_size: int, seed: int):
        self.sizes, self.batch_size, self.seed = dict(sizes), batch_size, seed
        self.tasks = tuple(sizes)

    def task(self, step: int) -> str:
        return self.tasks[step % len(self.tasks)]

    def draws(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """The rank's batch_size draws at a step, as (example, epoch of the task)."""
        task = self.task(step)
        turn = step // len(self.tasks)
        first = (turn * world_size + rank) * self.batch_size
        draws = []
        for position in range(first, first + self.batch_size):
            epoch, offset = divmod(position, self.sizes[task])
            draws.append((int(_order(self.seed, task, self.sizes[task], epoch)[offset]), epoch))
        return draws
