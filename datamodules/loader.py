"""A batch loader that can resume at any step, and its worker processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset

from datamodules.cores import available_cores
from datamodules.hard_negatives import Rounds
from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError, changes

MAX_WORKERS = 4  # maximum per rank, unless the user asks for more


def _ignore_signals(worker: int) -> None:
    """Let a worker ignore signals to the process group, so that the training process can finish its last step.

    Workers end when the training process shuts them down or dies.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def default_num_workers(on_gpu: bool, num_ranks: int) -> int:
    """Return the number of worker processes per rank: one per spare core, at most MAX_WORKERS.

    Without a GPU, this is 0, because workers would take cores from the model.

    num_ranks: number of ranks that share the cores of this machine.
    """
    if not on_gpu:
        return 0
    return max(0, min(MAX_WORKERS, available_cores() // num_ranks - 1))


class ResumableLoader:
    """Iterate over the batches from the current position to num_batches.

    This is a plain iterable, not a DataLoader, so that Lightning does not replace the sampler under DDP, and stores the
    state in every checkpoint. (torchdata's StatefulDataLoader skips an epoch on resuming.) The state is one integer,
    the same on all ranks, and the rounds of hard negatives.

    signature: everything that determines the batches, except the step. A state with a different signature is rejected.
    rounds: mined hard negatives. Workers stop before the next batch at which a round may start. New workers, which see
        the new round, then take over.
    pin_memory: whether batches are in pinned memory.

    asked_at: time of the last request for a batch, in seconds (time.perf_counter).
    waited: total seconds between requesting batches and getting them.
    """

    def __init__(
        self,
        batches: Dataset,
        num_batches: int,
        signature: Mapping[str, Any],
        num_workers: int = 0,
        rounds: Rounds | None = None,
        pin_memory: bool = False,
    ):
        self.batches, self.num_batches = batches, num_batches
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.signature, self.rounds = dict(signature), rounds
        self.position = 0  # number of batches handed out; workers may have prepared more
        self.asked_at, self.waited = 0.0, 0.0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[ContrastiveBatch]:
        while self.position < self.num_batches:
            boundary = self.rounds.boundary_after(self.position) if self.rounds else None
            last = min(self.num_batches, boundary or self.num_batches)
            loader = DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(self.position, last),
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                worker_init_fn=_ignore_signals,
            )
            for batch in self._timed(loader):
                self.position = batch.step + 1
                yield batch

    def _timed(self, loader: DataLoader) -> Iterator[ContrastiveBatch]:
        """Yield the batches of a loader, and add up the waiting time, including the start of workers."""
        batches = None
        while True:
            self.asked_at = time.perf_counter()
            batches = iter(loader) if batches is None else batches
            batch = next(batches, None)
            self.waited += time.perf_counter() - self.asked_at
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        rounds = {"rounds": self.rounds.state()} if self.rounds else {}
        return {"position": self.position, "signature": self.signature} | rounds

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if changed := changes(state["signature"], self.signature):
            raise UserError(
                f"cannot resume at the exact batch: the schedule differs from the checkpoint's ({'; '.join(changed)}). "
                "Restore the old values, or start a new training from the checkpoint's weights. With another number of "
                "ranks, change batch_size so that the batch of all ranks together stays the same"
            )
        self.position = state["position"]
        if not self.rounds and state.get("rounds"):
            last = state["rounds"][-1]["store"]
            raise UserError(
                f"cannot resume: the checkpoint was trained with mined hard negatives ({last}), but this training has "
                "none; use the same store again"
            )
        if self.rounds:
            self.rounds.load(state.get("rounds", ()), self.position)
