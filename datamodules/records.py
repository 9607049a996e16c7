"""The vocabulary of the data: what a document, an example, a task, a batch and a benchmark are.

The words are those of TREC and BEIR. A label is a document (its name is the title, its definition the text) and so is a
query (its words are the text), so that one encoder and one path serve all tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class UserError(ValueError):
    """Something the user can mend, told in the user's words. Entry points print it without a traceback."""


# Query id -> document id -> grade; above 0 is relevant. For a probe that learns numbers, the number, of any kind.
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Document:
    """A paper (title, abstract), a label (name, definition) or a query (no title)."""

    id: str
    title: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """What one query teaches, by rows of its task's document table.

    grades: of the positives, in their order; a positive is drawn in proportion to its grade.
    not_negatives: rows that must not serve as its negatives: its positives, and itself where it is a document.
    """

    query: int
    positives: tuple[int, ...]
    grades: tuple[int, ...]
    hard_negatives: tuple[int, ...]
    not_negatives: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A task of the encoder: its name, the expert that serves it and its instruction (paper, table 1)."""

    name: str
    expert: str
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class Collection:
    """A corpus with queries and judgements, as a reader gives it.

    qrels: split ("train", "dev", "test") -> judgements. A grade of 0 says "judged and not relevant": in the train split
    it is a hard negative.
    """

    corpus: Mapping[str, Document]
    queries: Mapping[str, Document]
    qrels: Mapping[str, Qrels]

    @property
    def splits(self) -> Mapping[str, int]:
        """Split -> its number of queries."""
        return {split: len(qrels) for split, qrels in self.qrels.items()}

    def judged(self, split: str) -> tuple[Mapping[str, Document], Qrels]:
        """A split's queries and judgements."""
        return {query: self.queries[query] for query in self.qrels[split]}, self.qrels[split]

    def fingerprint(self) -> str:
        """Of all texts and judgements: equal for equal data, on any machine."""
        digest = hashlib.blake2b(digest_size=8)
        for documents in (self.corpus, self.queries):
            for document in documents.values():
                digest.update(repr((document.id, document.title, document.text)).encode())
        digest.update(repr({split: dict(qrels) for split, qrels in self.qrels.items()}).encode())
        return digest.hexdigest()


class Sink(Protocol):
    """What a reader that streams gives its documents and judgements to, one by one.

    documents, queries: ids that were given. All documents come first; a query comes before its judgements. Raises
    UserError for an id that was given before, or another grade of the same pair, unless keep_first: then the first one
    counts.
    """

    keep_first: bool

    documents: Container[str]
    queries: Container[str]

    def add_document(self, document: Document) -> None: ...

    def add_query(self, query: Document) -> None: ...

    def add_judgement(self, split: str, query: str, document: str, grade: int) -> None: ...

    def document(self, id: str) -> Document:
        """A document that was given, once all were."""
        ...

    def has(self, split: str) -> bool:
        """Whether a judgement of the split was given."""
        ...


def plain_protocol(name: str, split: str, exclude_query: bool) -> str:
    """The id of ranking a split's whole corpus."""
    return f"{name}/{split}" + ("/without-own" if exclude_query else "")


WITHOUT_RELEVANT = ("skip", "zero", "error")


LEARNS = ("class", "labels", "number")
LOSSES = ("squared_hinge", "hinge")


@dataclass
class Probe:
    """What a linear model learns from the vectors of training papers, to tell it of the queries.

    learns: the one "class" of a paper, any number of "labels", or a "number". Classes and labels are the corpus; a
    number is the grade of the corpus's one document. loss: of classifiers; of regression it is the absolute error.
    costs: values of C, of which three-fold cross-validation chooses.

    samples: few-shot learning, from so many training papers (with labels: of each label) instead of all; 0 for all.
    draws: how often they are drawn; figures are the means.
    """

    learns: str = "class"
    loss: str = "squared_hinge"
    costs: list[float] = field(default_factory=lambda: [10.0**power for power in range(-4, 3)])
    samples: int = 0
    draws: int = 1


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Queries of a collection, to be ranked by one task's expert, and how.

    split: of the collection; several that are merged have a + between. protocol: id of all that follows; scores of
    different ids cannot be compared. metrics: its own, the main one first; none where those of a run are taken.
    exclude_query: leave the document with the query's own id out of its ranking (papers that are queries and corpus).
    candidates: query -> the documents that are ranked for it; none where all are. first: query -> documents that
    stand before all others. similarity: "dot", "cosine" or "l2"; none for the model's own. without_relevant: queries
    without any relevant document are left out of the means ("skip"), count 0 ("zero"), or are an error.
    training: papers with their judgements, whom a linear model learns from that then tells as much of the queries,
    instead of a ranking of the corpus; none where that is ranked. probe: what it learns, and how.
    """

    name: str
    task: str
    split: str
    corpus: Mapping[str, Document]
    queries: Mapping[str, Document]
    qrels: Qrels
    exclude_query: bool = False
    protocol: str = ""
    metrics: tuple[str, ...] = ()
    candidates: Mapping[str, Sequence[str]] | None = None
    first: Mapping[str, Sequence[str]] | None = None
    similarity: str = ""
    without_relevant: str = "skip"
    training: tuple[Mapping[str, Document], Qrels] | None = None
    probe: Probe = field(default_factory=Probe)

    @property
    def encoded_documents(self) -> Mapping[str, Document]:
        """What is encoded beside the queries: the corpus, or the papers that a linear model learns from."""
        return self.corpus if self.training is None else self.training[0]

    def fingerprint(self) -> str:
        """Of its texts, judgements, candidates and what stands first: equal for equal data, on any machine."""
        digest = hashlib.blake2b(digest_size=8)
        papers, classes = self.training or ({}, {})
        for documents in (self.corpus, self.queries, papers):
            for document in documents.values():
                digest.update(repr((document.id, document.title, document.text)).encode())
        for of_queries in (self.qrels, self.candidates or {}, self.first or {}, classes):
            for query, documents in of_queries.items():
                digest.update(repr((query, list(documents))).encode())
        for grades in (*self.qrels.values(), *classes.values()):
            digest.update(repr(list(grades.values())).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class MiningPool:
    """What hard negatives of one collection are mined from. Q training queries, M documents of its corpus.

    name: of the collection. corpus: M documents. queries: Q documents, one for each example. first_row, first_example:
    where the corpus and the examples begin in the task's table. own: (Q,) the document that the query itself is, or -1.
    positives: of query q are documents[starts[q] : starts[q + 1]], for (starts, documents) of (Q + 1,), (P,).
    revealed: as positives, those that only other splits than train judge relevant: for reports, never for choosing.
    shown: as positives, those that the train split judges irrelevant (grade 0).
    excluded: documents that are not trained on.
    """

    task: str
    name: str
    corpus: Sequence[Document]
    queries: Sequence[Document]
    first_row: int
    first_example: int
    own: np.ndarray
    positives: tuple[np.ndarray, np.ndarray]
    revealed: tuple[np.ndarray, np.ndarray]
    shown: tuple[np.ndarray, np.ndarray]
    excluded: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class MinedNegatives:
    """Hard negatives of n examples: of example i those from starts[i] to starts[i + 1], best first.

    starts: (n + 1,) int64. documents: (j,) rows, int32. ranks: (j,) place in the miner's ranking, from 0, int32.
    scores: (j,) the miner's, float32. taken: filter -> how many candidates it took.
    """

    starts: np.ndarray
    documents: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    taken: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass
class Tokens:
    """A chunk of texts of similar length. input_ids, attention_mask: (b, L) int64."""

    input_ids: Tensor
    attention_mask: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tokens:
        return Tokens(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.attention_mask.to(device, non_blocking=non_blocking),
        )


@dataclass
class ContrastiveBatch:
    """B queries of one task with the documents that they are compared with, each distinct text once.

    The U distinct texts lie in chunks, shortest first; their embeddings, one chunk after the other, make (U, D).

    step             the position of the batch in the schedule
    task             the task of all its queries
    seed             of the step's dropout on this rank
    fingerprint      of the ids in the batch: equal for equal batches, on any machine
    num_tokens       of all U texts, without padding
    chunks           U texts
    queries          (B,)   row of each query among the U texts
    documents        (M,)   row of each document among the U texts
    document_ids     (M,)   identity of each document, the same on every rank
    positives        (B, P) indices among the M documents of the sampled positives, at least one; padded with -1
    hard_negatives   (B, N) indices among the M documents of the query's own hard negatives; padded with -1
    known_positives  (B, K) identities that are no negatives of the query: all its positives, and itself where queries
                            are documents too; padded with -1
    text_keys        (U,)   equal for texts that the encoder reads alike; none where that is not known
    texts            of the U rows, where another encoder judges the batch, else none
    weight           of the mean loss of these queries: their number, over the mean of all ranks
    """

    step: int
    task: str
    seed: int
    fingerprint: str
    num_tokens: int
    chunks: tuple[Tokens, ...]
    queries: Tensor
    documents: Tensor
    document_ids: Tensor
    positives: Tensor
    hard_negatives: Tensor
    known_positives: Tensor
    texts: tuple[Document, ...] = ()
    weight: float = 1.0
    text_keys: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ContrastiveBatch:
        names = ("queries", "documents", "document_ids", "positives", "hard_negatives", "known_positives")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        if self.text_keys is not None:
            moved["text_keys"] = self.text_keys.to(device, non_blocking=non_blocking)
        return replace(self, chunks=tuple(chunk.to(device, non_blocking) for chunk in self.chunks), **moved)
