"""The multi-task schedule: which task and which examples each rank trains at each step.

It is a pure function of (seed, step) without any state. So resuming needs one integer, every step costs the same, and
every rank computes the same plan independently. At each step, all ranks work on the same task, because they share
in-batch negatives, and because an expert must be used by all ranks or none. Each rank has its own slice of the global
batch.

Steps are planned in blocks. Within a block, every task gets its share of the steps: in turns for round-robin, otherwise
in random order. So the shares are exact after every block, and the number of a block determines how many steps a task
had before it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datamodules.records import UserError, check_choice

BLOCK = 1000  # number of steps after which the shares of a weighted schedule are exact
STRATEGIES = ("round_robin", "together", "proportional", "temperature", "weights")


def mix(*keys: int | str) -> int:
    """Return a 63-bit seed made from the keys. Unlike Python's hash of strings, it is the same in every process."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Draw(NamedTuple):
    """An example to train on. epoch: number of the pass through the examples, which seeds the sampling of documents."""

    example: int
    epoch: int


@dataclass(frozen=True)
class Phase:
    """A part of the schedule.

    first: first step of the phase.
    weights: relative share of the steps per task; None if tasks take turns.
    """

    first: int
    weights: Mapping[str, float] | None = None


def task_weights(
    schedule: str, sizes: Mapping[str, int], temperature: float = 1.0, weights: Mapping[str, float] | None = None
) -> Mapping[str, float] | None:
    """Return each task's share of the steps, or None if tasks take turns (round_robin and together).

    schedule: "proportional" makes shares proportional to the number of examples; "temperature" raises that number to
        the power 1 / temperature, so a high temperature makes the shares nearly equal; "weights" uses `weights`.
    sizes: number of examples of each task.

    Raises UserError for an unknown schedule, or if the weights do not match it.
    """
    check_choice("schedule", schedule, STRATEGIES)
    if weights and schedule != "weights":
        raise UserError(f"weights: only the schedule 'weights' uses them, but the schedule is {schedule!r}")
    if schedule in ("round_robin", "together"):
        return None
    if schedule == "weights":
        return checked_weights(weights or {}, sizes)
    power = 1.0 if schedule == "proportional" else 1.0 / temperature
    return {task: size**power for task, size in sizes.items()}


def checked_weights(weights: Mapping[str, float], tasks: Mapping[str, int]) -> dict[str, float]:
    """Return the weights in the order of the tasks. Raises UserError unless each task has a weight above 0."""
    missing, unknown = [t for t in tasks if t not in weights], [t for t in weights if t not in tasks]
    if missing or unknown:
        problems = [
            f"{' '.join(names)} {word}" for names, word in ((missing, "missing"), (unknown, "unknown")) if names
        ]
        raise UserError(f"weights: expected a weight for each of {', '.join(tasks)} ({'; '.join(problems)})")
    wrong = {task: weight for task, weight in weights.items() if not 0 < weight < float("inf")}
    if wrong:
        raise UserError(f"weights: expected numbers above 0, got {wrong}")
    return {task: float(weights[task]) for task in tasks}


def check_phases(phases: Sequence[Phase]) -> None:
    """Raise UserError unless the first phase starts at step 0, and the others start at increasing steps."""
    firsts = [phase.first for phase in phases]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise UserError(f"phases: the first must start at step 0 and the others at increasing steps, got {firsts}")


class Schedule:
    """The task and the examples of each step.

    sizes: number of examples of each task.
    batch_sizes: size of each task's batches on each rank, in queries, or in tokens for the tasks in `costs`.
    phases: shares of the tasks in each phase. By default, tasks take turns throughout.
    costs: number of tokens of each example, (examples,), for tasks whose batches are sized in tokens.
    collections: number of examples of each collection, in order, for tasks with several collections.
    temperatures: temperature of the collections of a task, by default 1.
    mixed: tasks whose batches mix their collections.

    A batch comes from one collection, because documents of other collections may be relevant without being judged. For
    example, a paper can have labels in several label spaces. A second schedule divides a task's turns among its
    collections, in proportion to the number of examples to the power 1 / temperature. In mixed batches, it divides the
    queries instead.

    A task makes passes through its examples, each in a new order. A small task starts its second pass while a large
    task is still in its first. A batch may span two passes, so that no example is left out.

    If batches are sized in tokens, the examples of all passes form a line, each as long as its number of tokens. The
    line is cut into pieces of batch_sizes tokens, and an example belongs to the piece in which it starts. So batches
    have different numbers of queries, and any batch can be computed without computing earlier ones.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        seed: int,
        phases: Sequence[Phase] = (Phase(0),),
        costs: Mapping[str, np.ndarray] | None = None,
        collections: Mapping[str, Mapping[str, int]] | None = None,
        temperatures: Mapping[str, float] | None = None,
        mixed: Collection[str] = (),
    ):
        self.sizes, self.batch_sizes, self.seed, self.phases = dict(sizes), dict(batch_sizes), seed, tuple(phases)
        self.tasks, self.costs = tuple(sizes), dict(costs or {})
        check_phases(self.phases)
        for task, tokens in self.costs.items():
            if tokens.max() > self.batch_sizes[task]:
                raise UserError(
                    f"batch_tokens: got {self.batch_sizes[task]}, but an example of {task} has {tokens.max()} tokens "
                    "(query, positives and hard negatives); use at least that many"
                )
        self._counts = [self._steps_per_block(phase) for phase in self.phases]
        self._orders: dict[tuple[str, int], np.ndarray] = {}  # task and pass -> _order
        self._lines: dict[tuple[str, int], np.ndarray] = {}  # task and pass -> _line
        self.temperatures, self.mixed = dict(temperatures or {}), frozenset(mixed)
        if wrong := [task for task in collections or () if task in self.mixed and task in self.costs]:
            raise UserError(f"mixed_batches: the batches of {wrong[0]} are sized in tokens; set its batch_size instead")
        self._inner = {task: self._collection_schedule(task, counts) for task, counts in (collections or {}).items()}

    def _collection_schedule(self, task: str, sizes: Mapping[str, int]) -> tuple[Schedule, dict[str, int]]:
        """Return the schedule of a task's turns over its collections, and the first example of each collection."""
        ends = np.cumsum(list(sizes.values()))
        starts = dict(zip(sizes, (ends - list(sizes.values())).tolist(), strict=True))
        costs = {}
        if task in self.costs:
            costs = {name: self.costs[task][starts[name] : starts[name] + size] for name, size in sizes.items()}
        batch_sizes = dict.fromkeys(sizes, 1 if task in self.mixed else self.batch_sizes[task])
        phase = Phase(0, task_weights("temperature", sizes, self.temperatures.get(task, 1.0)))
        return Schedule(sizes, batch_sizes, mix(self.seed, "collections", task), (phase,), costs), starts

    def _steps_per_block(self, phase: Phase) -> dict[str, int]:
        """Return each task's number of steps in a block, at least one, rounded by the largest-remainder method."""
        if phase.weights is None:
            return dict.fromkeys(self.tasks, 1)
        total = sum(phase.weights.values())
        exact = {task: BLOCK * weight / total for task, weight in phase.weights.items()}
        counts = {task: max(1, int(share)) for task, share in exact.items()}
        for task in sorted(exact, key=lambda t: counts[t] - exact[t])[: max(0, BLOCK - sum(counts.values()))]:
            counts[task] += 1
        while sum(counts.values()) > BLOCK:  # because some tasks were raised to one step
            counts[max(counts, key=counts.__getitem__)] -= 1
        return counts

    def _block(self, phase: int, block: int) -> tuple[str, ...]:
        """Return the task of each step of a block."""
        in_turns = self.phases[phase].weights is None
        return _block_order(tuple(self._counts[phase].items()), in_turns, self.seed, phase, block)

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Return a step's phase, its block in the phase, and its position in the block."""
        phase = max(i for i, p in enumerate(self.phases) if p.first <= step)
        block, offset = divmod(step - self.phases[phase].first, sum(self._counts[phase].values()))
        return phase, block, offset

    def task(self, step: int) -> str:
        phase, block, offset = self._locate(step)
        return self._block(phase, block)[offset]

    def turns(self, step: int, task: str) -> int:
        """Return the number of steps that the task has had before this step."""
        last, block, offset = self._locate(step)
        total = block * self._counts[last].get(task, 0) + self._block(last, block)[:offset].count(task)
        for phase in range(last):
            length = self.phases[phase + 1].first - self.phases[phase].first
            blocks, rest = divmod(length, sum(self._counts[phase].values()))
            total += blocks * self._counts[phase].get(task, 0) + self._block(phase, blocks)[:rest].count(task)
        return total

    def draws(self, step: int, rank: int = 0, world_size: int = 1) -> list[Draw]:
        """Return the rank's slice of the global batch. The global batch does not depend on the number of ranks."""
        task = self.task(step)
        if task in self._inner:
            inner, starts = self._inner[task]
            turn = self.turns(step, task)
            if task in self.mixed:  # each query has its own turn
                first = (turn * world_size + rank) * self.batch_sizes[task]
                turns = range(first, first + self.batch_sizes[task])
                return [self._shifted(draw, starts[inner.task(turn)]) for turn in turns for draw in inner.draws(turn)]
            start = starts[inner.task(turn)]
            return [self._shifted(draw, start) for draw in inner.draws(turn, rank, world_size)]
        first = (self.turns(step, task) * world_size + rank) * self.batch_sizes[task]
        positions = self._positions(task, first, first + self.batch_sizes[task])
        return [Draw(int(self._order(task, epoch)[index]), epoch) for epoch, index in positions]

    @staticmethod
    def _shifted(draw: Draw, start: int) -> Draw:
        return Draw(start + draw.example, draw.epoch)

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> float:
        """Return the weight of the rank's mean loss: its number of queries divided by the mean over all ranks."""
        task = self.task(step)
        if task in self._inner and task not in self.mixed:
            return self._inner[task][0].share(self.turns(step, task), rank, world_size)
        if task not in self.costs:
            return 1.0
        size = self.batch_sizes[task]
        first = self.turns(step, task) * world_size * size
        starts = range(first, first + world_size * size, size)
        counts = [len(self._positions(task, start, start + size)) for start in starts]
        return counts[rank] * world_size / sum(counts)

    def passes(self, steps: int, task: str, world_size: int = 1) -> float:
        """Return the number of passes through a task's examples within `steps` steps."""
        length = int(self.costs[task].sum()) if task in self.costs else self.sizes[task]
        return self.turns(steps, task) * self.batch_sizes[task] * world_size / length

    def batches_per_pass(self, world_size: int = 1) -> int:
        """Return the number of batches per rank in one pass through the examples of all tasks."""
        # Lengths have the unit of the batch sizes: tokens for tasks with costs, queries for other tasks.
        lengths = self.sizes | {task: int(costs.sum()) for task, costs in self.costs.items()}
        return sum(-(-length // (self.batch_sizes[task] * world_size)) for task, length in lengths.items())

    def _positions(self, task: str, first: int, end: int) -> list[tuple[int, int]]:
        """Return (pass, position in the pass) of each example that starts between two points on a task's line."""
        if task not in self.costs:
            return [divmod(position, self.sizes[task]) for position in range(first, end)]
        length = int(self.costs[task].sum())
        positions = []
        for epoch in range(first // length, (end - 1) // length + 1):
            bounds = np.searchsorted(self._line(task, epoch), (first - epoch * length, end - epoch * length))
            positions += [(epoch, index) for index in range(*bounds.tolist())]
        return positions

    def _order(self, task: str, epoch: int) -> np.ndarray:
        """Return the order of a task's examples in one pass, (size,)."""
        if (order := self._orders.get((task, epoch))) is None:
            size = self.sizes[task]
            order = np.random.default_rng(mix(self.seed, "order", task, epoch)).permutation(size)
            order = order.astype(np.int32) if size < 2**31 else order
            _keep(self._orders, task, epoch, order)
        return order

    def _line(self, task: str, epoch: int) -> np.ndarray:
        """Return where each example of a pass starts on the task's line, in tokens from the start of the pass."""
        if (line := self._lines.get((task, epoch))) is None:
            tokens = self.costs[task][self._order(task, epoch)]
            line = np.cumsum(tokens) - tokens
            _keep(self._lines, task, epoch, line)
        return line


def _keep(cache: dict[tuple[str, int], np.ndarray], task: str, epoch: int, array: np.ndarray) -> None:
    """Keep the array of a task's pass, and those of the passes before and after it, which a batch can also need."""
    for other in [(name, number) for name, number in cache if name == task and abs(number - epoch) > 1]:
        del cache[other]
    cache[task, epoch] = array


@functools.lru_cache(maxsize=32)
def _block_order(
    counts: tuple[tuple[str, int], ...], in_turns: bool, seed: int, phase: int, block: int
) -> tuple[str, ...]:
    tasks = [task for task, count in counts for _ in range(count)]
    if in_turns:
        return tuple(tasks)
    order = np.random.default_rng(mix(seed, "block", phase, block)).permutation(len(tasks))
    return tuple(tasks[i] for i in order)
