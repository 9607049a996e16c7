"""What one task and several have in common: how batches are made, and the loader that follows the schedule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np

from datamodules.collate import Collator
from datamodules.loader import MultiTaskBatches, ResumableLoader
from datamodules.records import Benchmark, Document, MiningPool
from datamodules.rounds import Rounds, negatives_of_data
from datamodules.schedule import Phase, Schedule
from datamodules.tokens import Encoding, TokenTable

if TYPE_CHECKING:
    from datamodules.tasks import TaskDataModule


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How batches are made. A task's own batch_size, max_length, num_positives and num_hard_negatives hold for its
    batches.

    batch_size: queries on each rank. batch_tokens: tokens on each rank, instead of batch_size. num_batches: in the
    whole training. max_length: tokens of a text, special tokens included. token_budget: padded tokens of one chunk.
    num_positives, num_hard_negatives: for each query, where it has them. carry_texts: batches hold their texts, for
    encoders that judge them. num_workers: processes that prepare batches. phases: of the schedule. cache: folder of
    converted collections, none for data in memory.
    """

    batch_size: int = 32
    batch_tokens: int = 0
    num_batches: int = 1000
    max_length: int = 256
    token_budget: int = 16384
    num_positives: int = 1
    num_hard_negatives: int = 1
    carry_texts: bool = False
    num_workers: int = 0
    seed: int = 0
    phases: tuple[Phase, ...] = (Phase(0),)
    cache: str = ""


class ContrastiveDataModule(L.LightningDataModule):
    """What tasks and their combination have in common: a loader over the schedule, and benchmarks."""

    options: BatchOptions
    # Needed for batches, and set before them: a random backbone takes its vocabulary from the texts.
    tokenizer: Any
    prompts: Mapping[str, str] = {}  # task -> what precedes its texts
    rounds: Rounds | None = None  # of mined hard negatives

    @property
    @abstractmethod
    def tasks(self) -> Sequence[TaskDataModule]:
        """The single tasks."""

    def schedule(self) -> Schedule:
        sizes = {task.task.name: len(task.examples) for task in self.tasks}
        batch_sizes = {t.task.name: t.options.batch_tokens or t.options.batch_size for t in self.tasks}
        costs = {task.task.name: self._costs(task) for task in self.tasks if task.options.batch_tokens}
        parts = {task.task.name: task.examples_by_collection() for task in self.tasks}
        several = {task: counts for task, counts in parts.items() if len(counts) > 1}
        return Schedule(sizes, batch_sizes, self.options.seed, self.options.phases, costs, several)

    def _encoding(self, task: TaskDataModule) -> Encoding:
        return Encoding(self.tokenizer, self.prompts.get(task.task.name, ""), task.options.max_length)

    def _costs(self, task: TaskDataModule) -> np.ndarray:
        lengths = task.tokens(self._encoding(task)).concatenated(TokenTable.lengths)
        return task.examples.costs(lengths, task.options.num_positives, task.options.num_hard_negatives)

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        schedule = self.schedule()
        signature = {
            "seed": self.options.seed,
            # Of all ranks together: another number of them may go on with the same global batches.
            "batch_size": {task: size * world_size for task, size in schedule.batch_sizes.items()},
            "schedule": repr(schedule.phases),
            "examples": schedule.sizes,
            "data": {name: c.fingerprint() for task in self.tasks for name, c in task.collections.items()},
        }
        several = {task.task.name: parts for task in self.tasks if len(parts := task.examples_by_collection()) > 1}
        if several:
            signature["collections"] = several
        if any(task.is_stripped for task in self.tasks):
            signature["examples that are left"] = {t.task.name: t.examples_fingerprint() for t in self.tasks}
        if schedule.costs:
            signature["tokens"] = {task: int(tokens.sum()) for task, tokens in schedule.costs.items()}
        collators = {task.task.name: self._collator(task) for task in self.tasks}
        batches = MultiTaskBatches(collators, schedule, rank, world_size)
        return ResumableLoader(batches, self.options.num_batches, signature, self.options.num_workers, self.rounds)

    def _collator(self, task: TaskDataModule) -> Collator:
        return Collator(
            task.task.name,
            task.examples,
            task.tokens(self._encoding(task)),
            self.tokenizer.pad_token_id,
            token_budget=self.options.token_budget,
            num_positives=task.options.num_positives,
            num_hard_negatives=task.options.num_hard_negatives,
            texts=task.documents if self.options.carry_texts else None,
            seed=self.options.seed,
            negatives_of=self.rounds.of(task.task.name) if self.rounds else negatives_of_data,
        )

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Task -> collection -> fingerprint, in the order of their rows, and "examples": of which are trained on."""
        return {
            task.task.name: {name: collection.fingerprint() for name, collection in task.collections.items()}
            | {"examples": task.examples_fingerprint()}
            for task in self.tasks
        }

    def pools(self) -> list[MiningPool]:
        """What hard negatives are mined from: every collection with training queries."""
        return [pool for task in self.tasks for pool in task.own_pools()]

    def texts(self) -> Iterator[Document]:
        """Documents and training queries of all tasks."""
        for task in self.tasks:
            for collection in task.collections.values():
                yield from collection.corpus.values()
            corpora = task.corpus_rows()
            yield from (task.documents[row] for row in task.examples.query_rows() if not corpora[row])

    def benchmarks(self, split: str) -> list[Benchmark]:
        """Every collection's queries of a split; collections without that split are left out."""
        return [benchmark for task in self.tasks for benchmark in task.own_benchmarks(split)]
