"""Make batches from scheduled examples: collation and data modules."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.hard_negatives import ExampleAt, Rounds, example_of_data
from datamodules.loader import ResumableLoader, default_num_workers
from datamodules.options import check_options, option
from datamodules.packed import Companion, ContrastiveBatch, Tokens
from datamodules.records import Benchmark, Document, Example, MiningPool, UserError
from datamodules.schedule import Draw, Phase, Schedule, mix
from datamodules.text import length_sorted_chunks
from datamodules.tokens import Encoding, TokenTable

if TYPE_CHECKING:
    from datamodules.tasks import TaskDataModule

log = logging.getLogger(__name__)
DEFAULT_NUM_BATCHES = 1000  # without a trainer, or with one that has max_epochs=1 instead of max_steps


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Options for making batches. A task may have its own options."""

    batch_size: int = option(32, "number of queries per batch on each rank", minimum=1)
    batch_tokens: int = option(0, "number of tokens per batch on each rank; 0: use batch_size instead", minimum=0)
    num_batches: int = option(0, "number of batches in training; 0: as many as trainer.max_steps needs", minimum=0)
    max_length: int = option(256, "maximum number of tokens per text, including special tokens", minimum=3)
    token_budget: int = option(16384, "maximum number of tokens in a chunk", minimum=1)
    num_positives: int = option(1, "positives per query, if the query has that many", minimum=1)
    num_hard_negatives: int = option(1, "hard negatives per query, if the query has that many", minimum=0)
    carry_texts: bool = option(False, "whether batches contain texts, for frozen models that score them")
    num_workers: int | None = option(
        None,
        "number of processes that prepare batches; 0: the training process; by default up to 4 with a GPU",
        minimum=0,
    )
    collection_temperature: float = option(
        1.0,
        "temperature for the shares of a task's collections: a share is proportional to the number of examples to the "
        "power 1 / collection_temperature",
        minimum=0.1,
    )
    mixed_batches: bool = option(False, "whether batches mix the collections of their task")
    seed: int = option(0, "seed for the schedule and for all sampling")
    phases: tuple[Phase, ...] = option((Phase(0),), "phases of the schedule; by default tasks take turns throughout")
    cache: str = option("", "folder for converted collections; if empty, collections stay in memory")

    def __post_init__(self) -> None:
        check_options(self)

    def override(self, **changes: Any) -> BatchOptions:
        """Return a copy with some values replaced. A new batch_size disables batch_tokens."""
        if "batch_size" in changes:
            changes = {"batch_tokens": 0} | changes
        return dataclasses.replace(self, **changes)


def sampled_by_grade(example: Example, count: int, rng: random.Random) -> list[int]:
    """Sample up to `count` positives without replacement, with probabilities proportional to their grades."""
    remaining = dict(zip(example.positives, example.grades, strict=True))
    sampled: list[int] = []
    while remaining and len(sampled) < count:
        sampled += rng.choices(list(remaining), weights=list(remaining.values()))
        del remaining[sampled[-1]]
    return sampled


def padded(lists: Sequence[Sequence[int]]) -> Tensor:
    """Return lists of integers as one tensor, (n, longest) int64, padded with -1."""
    lengths = np.array([len(values) for values in lists])
    columns = np.arange(lengths.max(initial=0))
    table = np.full((len(lists), len(columns)), -1)
    table[columns < lengths[:, None]] = list(chain.from_iterable(lists))
    return torch.from_numpy(table)


class StoredVectors(Protocol):
    """Stored vectors for the rows of a task's document table."""

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors (n, G) of rows (n,), in float32."""


@dataclass(frozen=True)
class CompanionSource:
    """Source of the extra texts that an additional loss needs in each batch of a task.

    table: task whose document table contains the texts.
    task: task whose prompt and expert encode them.
    rows: function that chooses the texts. Its arguments are the rows of the batch's queries, (B,), and documents, (m,),
        and a random generator with the same state on all ranks. It returns one or more rows of the table, (n,),
        possibly with repetitions. It cannot be a lambda, because it is pickled for worker processes.
    detached: whether their vectors get no gradient, which saves time and memory.
    """

    table: TaskDataModule
    task: str
    rows: Callable[[np.ndarray, np.ndarray, random.Random], np.ndarray]
    detached: bool = False

    def without_table(self) -> CompanionSource:
        """Return a copy for worker processes, which need neither the data module nor its trainer."""
        return dataclasses.replace(self, table=None)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Collator:
    """Make batches from one task's examples.

    tokens: token ids of each row of the document table.
    token_budget: maximum number of tokens in a chunk.
    num_positives, num_hard_negatives: number of documents to sample per query, if the query has that many.
    example_at: function that returns the positives and hard negatives of an example in a step (see ExampleAt).
    texts: documents of all rows, if batches contain their texts.
    teacher_vectors: a teacher's vectors of all rows, if batches contain them.
    companions: sources of the companions in each batch, with the token ids of their tables.
    """

    task: str
    examples: Sequence[Example]
    tokens: Sequence[np.ndarray]
    token_budget: int
    num_hard_negatives: int
    seed: int
    num_positives: int = 1
    example_at: ExampleAt = example_of_data
    texts: Sequence[Document] | None = None
    teacher_vectors: StoredVectors | None = None
    companions: Sequence[tuple[CompanionSource, Sequence[np.ndarray]]] = ()

    def __call__(self, draws: Sequence[Draw], step: int) -> ContrastiveBatch:
        queries, positives, negatives, known, unlabelled = [], [], [], [], []
        for index, epoch in draws:
            example = self.example_at(index, self.examples[index], step)
            rng = random.Random(mix(self.seed, "draw", self.task, index, epoch))
            queries.append(example.query)
            positives.append(sampled_by_grade(example, self.num_positives, rng))
            candidates = example.hard_negatives
            negatives.append(rng.sample(candidates, min(self.num_hard_negatives, len(candidates))))
            known.append(example.not_negatives)
            unlabelled.append(sorted(set(example.not_negatives).difference(example.positives)))

        sampled = [[row for rows in lists for row in rows] for lists in (positives, negatives)]
        document_rows = list(dict.fromkeys(sampled[0] + sampled[1]))  # distinct, in order of appearance
        column = {row: index for index, row in enumerate(document_rows)}
        chunks, text_index = self._chunks(list(dict.fromkeys(queries + document_rows)), self.tokens)
        seed = mix(self.seed, "step", step, *draws[0])
        companions = self._companions(np.array(queries), np.array(document_rows), step, seed)
        return ContrastiveBatch(
            step=step,
            task=self.task,
            seed=seed,
            fingerprint=hashlib.blake2b(repr((queries, *sampled)).encode(), digest_size=6).hexdigest(),
            num_tokens=sum(x.num_tokens for part in (chunks, *(c.chunks for c in companions)) for x in part),
            chunks=chunks,
            queries=torch.tensor([text_index[row] for row in queries]),
            documents=torch.tensor([text_index[row] for row in document_rows]),
            document_ids=torch.tensor(document_rows),
            positives=padded([[column[row] for row in rows] for rows in positives]),
            hard_negatives=padded([[column[row] for row in rows] for rows in negatives]),
            known_positives=padded(known),
            unlabelled=padded(unlabelled),
            text_keys=torch.tensor([key for chunk in chunks for key in chunk.keys]),
            texts=() if self.texts is None else tuple(self.texts[row] for row in text_index),
            teacher_vectors=self._teacher_vectors(list(text_index)),
            rows=torch.tensor(list(text_index)),
            companions=companions,
        )

    def _companions(self, queries: np.ndarray, documents: np.ndarray, step: int, seed: int) -> tuple[Companion, ...]:
        companions = []
        for number, (source, tokens) in enumerate(self.companions):
            rng = random.Random(mix(self.seed, "companions", self.task, step, number))
            rows = source.rows(queries, documents, rng).tolist()
            chunks, index = self._chunks(list(dict.fromkeys(rows)), tokens)
            tables = torch.tensor([index[row] for row in rows]), torch.tensor(rows)
            companions.append(Companion(source.task, mix(seed, number), chunks, *tables, source.detached))
        return tuple(companions)

    def _teacher_vectors(self, rows: list[int]) -> Tensor | None:
        return None if self.teacher_vectors is None else torch.from_numpy(self.teacher_vectors.gather(np.array(rows)))

    def _chunks(self, rows: list[int], tokens: Sequence[np.ndarray]) -> tuple[tuple[Tokens, ...], dict[int, int]]:
        """Return the texts of some rows in chunks, and for each row the index of its text."""
        ids = [tokens[row] for row in rows]
        chunks, text_index = list[Tokens](), dict[int, int]()
        for indices in length_sorted_chunks([len(text) for text in ids], self.token_budget):
            chunks.append(Tokens.pack(ids[i] for i in indices))
            for i in indices:
                text_index[rows[i]] = len(text_index)
        return tuple(chunks), text_index


@dataclass(frozen=True, eq=False)
class MultiTaskBatches(Dataset):
    """The batches of one rank, indexed by step."""

    collators: Mapping[str, Collator]
    schedule: Schedule
    rank: int
    world_size: int

    def __getitem__(self, step: int) -> ContrastiveBatch:
        draws = self.schedule.draws(step, self.rank, self.world_size)
        weight = self.schedule.share(step, self.rank, self.world_size)
        return dataclasses.replace(self.collators[self.schedule.task(step)](draws, step), weight=weight)

    def last_of_each_task(self, end: int) -> dict[str, ContrastiveBatch]:
        """Return the last batch of each task before a step."""
        steps: dict[str, int] = {}
        for step in range(end - 1, -1, -1):
            steps.setdefault(self.schedule.task(step), step)
            if len(steps) == len(self.collators):
                break
        return {task: self[step] for task, step in steps.items()}


class ContrastiveDataModule(L.LightningDataModule, ABC):
    """Base class for the data of one or several tasks, with a loader that follows the schedule.

    tokenizer: tokenizer of the encoder, by default the trained module's.
    prompts: text to put before the inputs of each task.
    rounds: mined hard negatives.
    teacher_vectors: task -> a teacher's vectors, to include in the task's batches.
    companions: sources of the companions in each task's batches.
    prepared_by: object that identifies the module whose losses need the companions.
    """

    options: BatchOptions
    tokenizer: Any = None
    prompts: Mapping[str, str] = {}
    rounds: Rounds | None = None
    teacher_vectors: Mapping[str, StoredVectors] = {}
    companions: Sequence[CompanionSource] = ()
    prepared_by: object = None

    @property
    @abstractmethod
    def tasks(self) -> Sequence[TaskDataModule]:
        """The data of each task."""

    @property
    def by_name(self) -> dict[str, TaskDataModule]:
        """The data of each task, by the task's name."""
        return {task.task.name: task for task in self.tasks}

    @abstractmethod
    def pools(self) -> list[MiningPool]:
        """Return, for each collection with training queries, a pool to mine hard negatives from."""

    @abstractmethod
    def benchmarks(self, split: str) -> list[Benchmark]:
        """Return a benchmark for each collection that has the split."""

    def schedule(self) -> Schedule:
        sizes = {task.task.name: len(task.examples) for task in self.tasks}
        batch_sizes = {t.task.name: t.options.batch_tokens or t.options.batch_size for t in self.tasks}
        costs = {task.task.name: self._costs(task) for task in self.tasks if task.options.batch_tokens}
        return Schedule(
            sizes,
            batch_sizes,
            self.options.seed,
            self.options.phases,
            costs,
            self._several_collections(),
            temperatures={task.task.name: task.options.collection_temperature for task in self.tasks},
            mixed=[task.task.name for task in self.tasks if task.options.mixed_batches],
        )

    def _several_collections(self) -> dict[str, dict[str, int]]:
        """Return the number of examples of each collection, for tasks that have several."""
        counts = {task.task.name: task.examples_by_collection() for task in self.tasks}
        return {task: sizes for task, sizes in counts.items() if len(sizes) > 1}

    def _costs(self, task: TaskDataModule) -> np.ndarray:
        lengths = task.tokens(self._encoding(task)).concatenated(TokenTable.lengths)
        return task.examples.costs(lengths, task.options.num_positives, task.options.num_hard_negatives)

    def _encoding(self, task: TaskDataModule, name: str = "") -> Encoding:
        """Return how the texts of a task's table are encoded.

        name: task whose prompt to put before the texts, by default the task itself.
        """
        if self.tokenizer is None:
            encoder = getattr(self.trainer.lightning_module, "encoder", None) if self.trainer else None
            if encoder is None:
                raise UserError("tokenizer: needed to make batches; pass one, or train a module that has an encoder")
            self.tokenizer, self.prompts = encoder.tokenizer, encoder.prompts
        return Encoding(self.tokenizer, self.prompts.get(name or task.task.name, ""), task.options.max_length)

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        schedule = self.schedule()
        collators = {task.task.name: self._collator(task) for task in self.tasks}
        batches = MultiTaskBatches(collators, schedule, rank, world_size)
        signature = self._signature(schedule, world_size)
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        workers = self.options.num_workers
        if workers is None:
            workers = default_num_workers(on_gpu, self.trainer.num_devices if self.trainer else 1)
        log.info("batches are prepared by %s", f"worker processes ({workers})" if workers else "the training process")
        return ResumableLoader(batches, self.num_batches(), signature, workers, self.rounds, pin_memory=on_gpu)

    def num_batches(self) -> int:
        """Return the number of batches in the training. Raises UserError if the trainer would run out of them."""
        if not self.trainer:
            return self.options.num_batches or DEFAULT_NUM_BATCHES
        steps, epochs = self.trainer.max_steps, self.trainer.max_epochs
        if steps < 0 and epochs != 1:  # the other epochs would be empty, but count in the learning-rate schedule
            raise UserError(
                f"max_epochs: expected 1, because the batches of a training are one epoch, got {epochs}; set max_steps"
            )
        needed = steps * self.trainer.accumulate_grad_batches
        count = self.options.num_batches or (needed if steps > 0 else DEFAULT_NUM_BATCHES)
        if count < needed:  # empty epochs would follow each other forever
            raise UserError(
                f"num_batches: expected at least {needed}, as many as the trainer needs for max_steps={steps}, got "
                f"{count}; leave it out"
            )
        return count

    def _signature(self, schedule: Schedule, world_size: int) -> dict[str, Any]:
        """Return everything that determines the examples of a step. Checkpoints store it, so keep its keys."""
        signature = {
            "seed": self.options.seed,
            # The global size, so that a run can resume with the same batches on a different number of ranks.
            "batch_size": {task: size * world_size for task, size in schedule.batch_sizes.items()},
            "schedule": repr(schedule.phases),
            "examples": schedule.sizes,
            "data": {name: c.fingerprint() for task in self.tasks for name, c in task.collections.items()},
        }
        if several := self._several_collections():
            signature["collections"] = {task: self._shares(schedule, task, sizes) for task, sizes in several.items()}
        if any(task.is_stripped for task in self.tasks):
            signature["examples that are left"] = {t.task.name: t.examples_fingerprint() for t in self.tasks}
        if schedule.costs:
            signature["tokens"] = {task: int(tokens.sum()) for task, tokens in schedule.costs.items()}
        return signature

    @staticmethod
    def _shares(schedule: Schedule, task: str, sizes: Mapping[str, int]) -> Mapping[str, Any]:
        """Return the settings that determine the shares of a task's collections.

        With the default settings, these are just the sizes, so old checkpoints still match.
        """
        temperature, mixed = schedule.temperatures[task], task in schedule.mixed
        return {"sizes": sizes, "temperature": temperature, "mixed": mixed} if mixed or temperature != 1 else sizes

    def _collator(self, task: TaskDataModule) -> Collator:
        tokens = task.tokens(self._encoding(task))
        return Collator(
            task=task.task.name,
            examples=task.examples,
            tokens=tokens,
            token_budget=self.options.token_budget,
            num_positives=task.options.num_positives,
            num_hard_negatives=task.options.num_hard_negatives,
            texts=task.documents if self.options.carry_texts else None,
            teacher_vectors=self.teacher_vectors.get(task.task.name),
            seed=self.options.seed,
            example_at=self.rounds.examples_for(task.task.name) if self.rounds else example_of_data,
            companions=[(c.without_table(), c.table.tokens(self._encoding(c.table, c.task))) for c in task.companions],
        )

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Return each task's fingerprints: one per collection, in row order, and one of its "examples"."""
        return {
            task.task.name: {name: collection.fingerprint() for name, collection in task.collections.items()}
            | {"examples": task.examples_fingerprint()}
            for task in self.tasks
        }

    def texts_of_rows(self) -> dict[str, list[tuple[Sequence[Document], bool]]]:
        """Return each task's document table as a list of parts: its texts, and whether the part is a corpus."""
        parts = {task.task.name: task.documents.sequences for task in self.tasks}  # corpora and queries alternate
        return {task: [(texts, i % 2 == 0) for i, texts in enumerate(each)] for task, each in parts.items()}

    def texts(self) -> Iterator[Document]:
        """Yield the documents and training queries of all tasks."""
        for task in self.tasks:
            for collection in task.collections.values():
                yield from collection.corpus.values()
            in_corpus = task.corpus_rows()
            yield from (task.documents[row] for row in task.examples.query_rows() if not in_corpus[row])


class MultiTaskDataModule(ContrastiveDataModule):
    """Several tasks that take turns, one task per step (schedule.py).

        MultiTaskDataModule([ClassificationDataModule(...), SearchDataModule(...)], batch_size=16)

    options: options for tasks without their own, which may also be passed as keyword arguments.
    """

    def __init__(
        self,
        tasks: Sequence[TaskDataModule],
        options: BatchOptions | None = None,
        tokenizer: Any = None,
        **overrides: Any,
    ):
        super().__init__()
        if not tasks:
            raise UserError("tasks: expected at least one task, got none")
        names = [task.task.name for task in tasks]
        if len(set(names)) < len(names):
            raise UserError(f"tasks: expected different names, got {', '.join(names)}")
        self._tasks, self.tokenizer = tuple(tasks), tokenizer
        self.options = (options or BatchOptions()).override(**overrides)
        for task in tasks:
            task.inherit_options(self.options)

    @property
    def tasks(self) -> Sequence[TaskDataModule]:
        return self._tasks

    def setup(self, stage: str | None = None) -> None:
        names = [name for task in self.tasks for name in task.readers]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise UserError(
                f"two tasks have a collection named {', '.join(duplicates)}; rename one, because results are reported "
                f"by collection"
            )
        for task in self.tasks:
            task.setup(stage)

    def pools(self) -> list[MiningPool]:
        return [pool for task in self.tasks for pool in task.pools()]

    def benchmarks(self, split: str) -> list[Benchmark]:
        return [benchmark for task in self.tasks for benchmark in task.benchmarks(split)]
