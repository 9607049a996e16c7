"""The multi-task schedule: which task and which examples, at which step, on which rank.

A pure function of (seed, step). Nothing is remembered between steps, so that resuming needs one integer and costs the
same at any step, and every rank computes the same plan by itself. At each step all ranks work on one task (in-batch
negatives are shared across ranks, and an expert is used by all or by none), each on its own slice of the global batch.

Steps are planned in blocks. Within a block every task has its share of the steps, in turns for round-robin, else in an
order drawn for the block; so after any whole block the shares are exact, and the number of a task's steps before any
step follows from the block's number.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.records import UserError

BLOCK = 1000  # steps in which the shares of a weighted schedule are kept
STRATEGIES = ("round_robin", "together", "proportional", "temperature", "weights")


def mix(*keys: int | str) -> int:
    """A 63-bit seed from the keys, the same in every process (Python's hash of a string is not)."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@functools.lru_cache(maxsize=8)
def _order(seed: int, task: str, size: int, epoch: int) -> np.ndarray:
    """The order of a task's examples in its epoch-th pass. Shape (size,)."""
    order = np.random.default_rng(mix(seed, "order", task, epoch)).permutation(size)
    return order.astype(np.int32) if size < 2**31 else order


@dataclass(frozen=True)
class Phase:
    """From a step on, every task's share of the steps. weights: task -> share, in any unit; None: tasks take turns."""

    first: int
    weights: Mapping[str, float] | None = None


def task_weights(
    strategy: str, sizes: Mapping[str, int], temperature: float = 1.0, weights: Mapping[str, float] | None = None
) -> Mapping[str, float] | None:
    """The shares of a strategy, None where tasks take turns (round_robin, and together).

    proportional: to the number of examples. temperature: to its power 1 / temperature (1 is proportional, large ones
    come near to equal shares). weights: those given, for every task. Raises UserError for anything else.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"data.schedule: got {strategy!r}, allowed are {', '.join(STRATEGIES)}")
    if weights and strategy != "weights":
        raise UserError(f"data.weights: are for data.schedule=weights, which is {strategy}")
    if strategy in ("round_robin", "together"):
        return None
    if strategy == "weights":
        return checked_weights("data.weights", weights or {}, sizes)
    power = 1.0 if strategy == "proportional" else 1.0 / temperature
    return {task: size**power for task, size in sizes.items()}


def checked_weights(key: str, weights: Mapping[str, float], tasks: Mapping[str, int]) -> dict[str, float]:
    """Weights above 0 for each of the tasks. Raises UserError naming those that are missing, unknown or not above 0."""
    missing, unknown = [t for t in tasks if t not in weights], [t for t in weights if t not in tasks]
    if missing or unknown:
        what = [f"{' '.join(names)} {word}" for names, word in ((missing, "missing"), (unknown, "unknown")) if names]
        raise UserError(f"{key}: expected a weight for each of {', '.join(tasks)} ({'; '.join(what)})")
    wrong = {task: weight for task, weight in weights.items() if not 0 < weight < float("inf")}
    if wrong:
        raise UserError(f"{key}: got {wrong}, allowed are numbers above 0")
    return {task: float(weights[task]) for task in tasks}


def check_phases(phases: Sequence[Phase]) -> None:
    """Raise UserError unless they begin at step 0 and then at rising steps."""
    firsts = [phase.first for phase in phases]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise UserError(f"data.curriculum: phases begin at steps {firsts}, expected 0 and then rising steps")


class Schedule:
    """Which task and which examples, at which step.

    sizes: task -> number of examples. batch_sizes: task -> queries of a batch on each rank. phases: shares of the tasks
    from given steps on, the first from step 0; by default tasks take turns throughout. costs: tasks whose batch_sizes
    count tokens -> (examples,) tokens of each example. collections: task -> collection -> number of its examples, in
    their order, for tasks that have several.

    A batch is of one collection, since a document of another may well be relevant to a query and nobody judged it: a
    paper has a label in each of several label spaces. A task's turns are shared by its collections in proportion to
    their examples, in an inner schedule over them.

    Each task goes through its examples in passes, every pass in a new order. A small task starts its next pass while a
    large one is still in its first; a batch may span two passes, so that no example is left out.

    By tokens, a pass is a line on which every example is as long as its tokens. The lines of all passes, one after the
    other, are cut in pieces of batch_sizes tokens, and an example belongs to the piece in which it begins. So batches
    differ in their number of queries, and yet any step's is found without those before it.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        seed: int,
        phases: Sequence[Phase] = (Phase(0),),
        costs: Mapping[str, np.ndarray] | None = None,
        collections: Mapping[str, Mapping[str, int]] | None = None,
    ):
        self.sizes, self.batch_sizes, self.seed, self.phases = dict(sizes), dict(batch_sizes), seed, tuple(phases)
        self.tasks, self.costs = tuple(sizes), dict(costs or {})
        check_phases(self.phases)
        for task, tokens in self.costs.items():
            if tokens.max() > self.batch_sizes[task]:
                raise UserError(
                    f"data.batch_tokens: got {self.batch_sizes[task]}, but an example of {task} has {tokens.max()} "
                    "tokens (query, positive and hard negatives)"
                )
        self._blocks = [self._counts(phase) for phase in self.phases]
        self._lines: dict[tuple[str, int], np.ndarray] = {}
        self._inner = {task: self._of_collections(task, parts) for task, parts in (collections or {}).items()}

    def _of_collections(self, task: str, sizes: Mapping[str, int]) -> tuple[Schedule, dict[str, int]]:
        """The schedule of a task's turns over its collections, and where the examples of each begin."""
        ends = np.cumsum(list(sizes.values()))
        starts = dict(zip(sizes, (ends - list(sizes.values())).tolist(), strict=True))
        costs = {}
        if task in self.costs:
            costs = {name: self.costs[task][starts[name] : starts[name] + size] for name, size in sizes.items()}
        counts = dict.fromkeys(sizes, self.batch_sizes[task])
        seed = mix(self.seed, "collections", task)
        return Schedule(sizes, counts, seed, (Phase(0, {n: float(s) for n, s in sizes.items()}),), costs), starts

    def _counts(self, phase: Phase) -> dict[str, int]:
        """Every task's steps in a block, at least one; largest remainders get what rounding leaves."""
        if phase.weights is None:
            return dict.fromkeys(self.tasks, 1)
        total = sum(phase.weights.values())
        exact = {task: BLOCK * weight / total for task, weight in phase.weights.items()}
        counts = {task: max(1, int(share)) for task, share in exact.items()}
        for task in sorted(exact, key=lambda t: counts[t] - exact[t])[: max(0, BLOCK - sum(counts.values()))]:
            counts[task] += 1
        while sum(counts.values()) > BLOCK:  # tasks that were lifted to one
            counts[max(counts, key=counts.__getitem__)] -= 1
        return counts

    def _block(self, phase: int, block: int) -> tuple[str, ...]:
        return _block_order(
            tuple(self._blocks[phase].items()), self.phases[phase].weights is None, self.seed, phase, block
        )

    def _place(self, step: int) -> tuple[int, int, int]:
        """Phase, block in it, and place in the block, of a step."""
        phase = max(i for i, p in enumerate(self.phases) if p.first <= step)
        block, offset = divmod(step - self.phases[phase].first, sum(self._blocks[phase].values()))
        return phase, block, offset

    def task(self, step: int) -> str:
        phase, block, offset = self._place(step)
        return self._block(phase, block)[offset]

    def turns(self, step: int, task: str) -> int:
        """How many steps before this one are the task's."""
        last, block, offset = self._place(step)
        total = block * self._blocks[last].get(task, 0) + self._block(last, block)[:offset].count(task)
        for phase in range(last):
            length = self.phases[phase + 1].first - self.phases[phase].first
            blocks, rest = divmod(length, sum(self._blocks[phase].values()))
            total += blocks * self._blocks[phase].get(task, 0) + self._block(phase, blocks)[:rest].count(task)
        return total

    def draws(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """The rank's draws at a step, as (example, epoch of the task).

        The global batch is the same for any number of ranks that divide it.
        """
        task = self.task(step)
        if task in self._inner:
            inner, starts = self._inner[task]
            turn = self.turns(step, task)
            start = starts[inner.task(turn)]
            return [(start + index, epoch) for index, epoch in inner.draws(turn, rank, world_size)]
        first = (self.turns(step, task) * world_size + rank) * self.batch_sizes[task]
        positions = self._positions(task, first, first + self.batch_sizes[task])
        return [(int(_order(self.seed, task, self.sizes[task], e)[place]), e) for e, place in positions]

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> float:
        """The rank's number of queries at a step, over the mean of all ranks: the weight of its mean loss."""
        task = self.task(step)
        if task in self._inner:
            return self._inner[task][0].share(self.turns(step, task), rank, world_size)
        if task not in self.costs:
            return 1.0
        size = self.batch_sizes[task]
        first = self.turns(step, task) * world_size * size
        counts = [len(self._positions(task, at, at + size)) for at in range(first, first + world_size * size, size)]
        return counts[rank] * world_size / sum(counts)

    def passes(self, steps: int, task: str, world_size: int = 1) -> float:
        """How often a task's examples are gone through in a number of steps."""
        length = int(self.costs[task].sum()) if task in self.costs else self.sizes[task]
        return self.turns(steps, task) * self.batch_sizes[task] * world_size / length

    def _positions(self, task: str, first: int, end: int) -> list[tuple[int, int]]:
        """Pass and place in it of the examples between two points of a task's line."""
        if task not in self.costs:
            return [divmod(position, self.sizes[task]) for position in range(first, end)]
        length = int(self.costs[task].sum())
        found = []
        for epoch in range(first // length, (end - 1) // length + 1):
            begins = self._line(task, epoch)
            places = np.searchsorted(begins, (first - epoch * length, end - epoch * length))
            found += [(epoch, place) for place in range(*places.tolist())]
        return found

    def _line(self, task: str, epoch: int) -> np.ndarray:
        """Where the examples of a pass begin on their line, in the order of the pass."""
        if (task, epoch) not in self._lines:
            for old in [key for key in self._lines if key[0] == task and key[1] < epoch - 1]:
                del self._lines[old]
            tokens = self.costs[task][_order(self.seed, task, self.sizes[task], epoch)]
            self._lines[task, epoch] = np.cumsum(tokens) - tokens
        return self._lines[task, epoch]


@functools.lru_cache(maxsize=32)
def _block_order(
    counts: tuple[tuple[str, int], ...], in_turns: bool, seed: int, phase: int, block: int
) -> tuple[str, ...]:
    """The tasks of a block's steps."""
    tasks = [task for task, count in counts for _ in range(count)]
    if in_turns:
        return tuple(tasks)
    order = np.random.default_rng(mix(seed, "block", phase, block)).permutation(len(tasks))
    return tuple(tasks[i] for i in order)
