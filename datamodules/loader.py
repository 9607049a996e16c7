"""The loader that resumes at the exact batch.

A plain iterable and no torch DataLoader by design: Lightning leaves it alone (it would replace the sampler of a
DataLoader under DDP) and stores its state in every checkpoint. That state is one integer, the same on all ranks, and
which hard negatives were mined on the way.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from datamodules.collate import Collator
from datamodules.records import ContrastiveBatch, UserError
from datamodules.rounds import Rounds
from datamodules.schedule import Schedule


class MultiTaskBatches(Dataset):
    """The batch of every step on one rank: batches[step]."""

    def __init__(self, collators: Mapping[str, Collator], schedule: Schedule, rank: int, world_size: int):
        self.collators = collators
        self.schedule, self.rank, self.world_size = schedule, rank, world_size

    def __getitem__(self, step: int) -> ContrastiveBatch:
        draws = self.schedule.draws(step, self.rank, self.world_size)
        weight = self.schedule.share(step, self.rank, self.world_size)
        return replace(self.collators[self.schedule.task(step)](draws, step), weight=weight)


def leave_signals_to_parent(worker: int) -> None:
    """What asks a whole process group to end lets workers go on until their parent has made its last step.

    They end when it is done with them, and watch whether it lives.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class ResumableLoader:
    """Batches of the steps from the current position to num_batches.

    signature: what the plan depends on besides the step; a state of another plan is refused. rounds: of mined hard
    negatives. Workers never prepare batches beyond the next batch at which a round may begin: those after it are made
    by workers that are started then, and see it.
    """

    def __init__(
        self,
        batches: Dataset,
        num_batches: int,
        signature: Mapping[str, Any],
        num_workers: int = 0,
        rounds: Rounds | None = None,
    ):
        self.batches, self.num_batches, self.num_workers = batches, num_batches, num_workers
        self.signature, self.rounds = dict(signature), rounds
        self.position = 0  # batches handed out; workers may have prepared more

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
                worker_init_fn=leave_signals_to_parent,
            )
            for batch in loader:
                self.position = batch.step + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        rounds = {"rounds": self.rounds.state()} if self.rounds else {}
        return {"position": self.position, "signature": self.signature} | rounds

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        changed = [
            f"{key}: {state['signature'].get(key)} in the checkpoint, {value} now"
            for key, value in self.signature.items()
            if state["signature"].get(key) != value
        ]
        if changed:
            raise UserError(
                "the checkpoint cannot be resumed at its exact batch, since the schedule has changed ("
                + "; ".join(changed)
                + "). Put the former values back, or start a new run with init_from=CHECKPOINT."
            )
        self.position = state["position"]
        if not self.rounds and state.get("rounds"):
            last = state["rounds"][-1]["store"]
            raise UserError(f"the checkpoint was trained with mined hard negatives ({last}): give mining.store")
        if self.rounds:
            self.rounds.load(state.get("rounds", ()), self.position)
