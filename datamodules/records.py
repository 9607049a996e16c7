"""The vocabulary of the data: document, example, task, collection, benchmark.

The terms are those of TREC and BEIR. Labels and queries are documents too, so one encoder and one code path serve all
tasks. A label's title is its name, and its text is its definition. A query only has a text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from datamodules.ragged import Ragged


class UserError(ValueError):
    """An error that the user can fix, explained in the user's terms. Entry points print it without a traceback."""


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Put a key or a file before the messages of errors that are raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


@contextmanager
def explained(problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of some types, by default OSError, into UserErrors: the problem, then the error in parentheses."""
    kinds = kinds or (OSError,)
    try:
        yield
    except kinds as error:
        raise UserError(f"{problem} ({error})") from error


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe each key whose value has changed: "key: X then, Y now"."""
    keys = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return [f"{key}: {then.get(key)} then, {now.get(key)} now" for key in keys]


def reason(error: Exception) -> str:
    """Return the first line of an error message, or the error's class if the message is empty."""
    text = str(error).strip()
    if "weights_only" in text:  # because torch's message recommends running the code in the file
        return "it contains more than tensors and plain containers, or is damaged; no code in it was run"
    if isinstance(error, KeyError):
        return f"{text} is missing"
    return (text or type(error).__name__).splitlines()[0]


LONGEST_VALUE = 60  # characters


def short(value: object) -> str:
    """Return the repr of a value for an error message, shortened to LONGEST_VALUE characters."""
    text = repr(value[: LONGEST_VALUE + 1] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


LONGEST_NAME = 120  # bytes; file names contain up to two names, and most file systems allow 255 bytes
# Hidden files, paths, leading and trailing spaces, and the device names of Windows.
NO_NAME = re.compile(r"^\.|[/\\]|^\s|\s$|^$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def counted(count: int, word: str) -> str:
    """Return a number with its noun: 1 run, 1,200 runs."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def check_name(what: str, name: object) -> None:
    """Raise UserError unless files can be named after this task, expert, collection, split, benchmark or system.

    Such names come from checkpoints, downloaded folders, data and the command line. This check ensures that files named
    after them stay inside their folder.

    what: kind of the name, for the error.
    """
    is_name = isinstance(name, str) and name.isprintable() and not NO_NAME.search(name)
    if not is_name or len(str(name).encode()) > LONGEST_NAME:
        raise UserError(
            f"{what} {name!r}: cannot be part of a file's name; expected at most {LONGEST_NAME} bytes, without slashes "
            "or control characters, not starting with a dot, and not a name that Windows reserves (nul, con, aux, ...)"
        )


def check_choice(argument: str, value: str, choices: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the value of an argument. Raises UserError unless it is one of the choices."""
    if value not in choices:
        raise UserError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_choices(argument: str, values: Sequence[str], choices: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Return the values of an argument. Raises UserError unless each is one of the choices."""
    return tuple(check_choice(argument, value, choices) for value in values)


def is_in(module: str, packages: Sequence[str]) -> bool:
    """Return whether a module is one of the packages, or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages if package)


# Query id -> document id -> grade. Grades above 0 mean relevant. For a probe that predicts numbers, a grade is any
# number.
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Document:
    """A paper (title and abstract), a label (name and definition) or a query (no title)."""

    id: str
    title: str = ""
    text: str = ""

    @property
    def is_blank(self) -> bool:
        """Whether title and text are both blank. Evaluations never retrieve such a document."""
        return not (self.title.strip() or self.text.strip())


@dataclass(frozen=True, slots=True)
class Example:
    """A training example: a query with its documents, as rows of its task's document table.

    grades: grade of each positive; positives are sampled in proportion to their grades.
    not_negatives: rows that must not be negatives of the query: its positives, and the query itself if it is a
        document.
    """

    query: int
    positives: tuple[int, ...]
    grades: tuple[int, ...]
    hard_negatives: tuple[int, ...]
    not_negatives: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A task of the encoder.

    expert: name of the expert that serves the task, by default the task's name.
    instruction: text that precedes the task's inputs in instruction-tuned encoders (SciMult paper, table 1).
    """

    name: str
    expert: str = ""
    instruction: str = ""

    def __post_init__(self) -> None:
        check_name("task", self.name)
        if not self.expert:
            object.__setattr__(self, "expert", self.name)


@dataclass(frozen=True, slots=True)
class Collection:
    """A corpus with queries and relevance judgements, as a reader returns it.

    qrels: judgements of each split ("train", "dev", "test"). Grade 0 means "judged and not relevant"; in the train
    split, such a document is a hard negative. A judged document may be missing from the corpus, or have no text.
    Evaluations never retrieve such a document, and training leaves it out.
    """

    corpus: Mapping[str, Document]
    queries: Mapping[str, Document]
    qrels: Mapping[str, Qrels]

    @property
    def splits(self) -> Mapping[str, int]:
        """Number of queries in each split."""
        return {split: len(qrels) for split, qrels in self.qrels.items()}

    def judged(self, split: str) -> tuple[Mapping[str, Document], Qrels]:
        """Return the queries and judgements of a split. Raises UserError if the collection lacks one of the queries."""
        if unknown := next((query for query in self.qrels[split] if query not in self.queries), None):
            raise UserError(f"split {split}: the judgements contain query {unknown!r}, which is not in the collection")
        return {query: self.queries[query] for query in self.qrels[split]}, self.qrels[split]

    def fingerprint(self) -> str:
        """Return a hash of all texts and judgements.

        Equal data in memory have equal fingerprints on every machine. A StoredCollection with the same data has a
        different fingerprint.
        """
        digest = hashlib.blake2b(digest_size=8)
        for documents in (self.corpus, self.queries):
            for document in documents.values():
                digest.update(repr((document.id, document.title, document.text)).encode())
        digest.update(repr({split: dict(qrels) for split, qrels in self.qrels.items()}).encode())
        return digest.hexdigest()


@runtime_checkable
class Reader(Protocol):
    """A reader of one data format; datamodules/readers has one per format."""

    def read(self) -> Collection: ...


class CollectionWriter(Protocol):
    """Receiver of documents and judgements, one at a time.

    All documents come before the first query, and a query comes before its judgements.
    """

    def add_document(self, document: Document) -> None: ...

    def add_query(self, query: Document) -> None: ...

    def add_judgement(self, split: str, query: str, document: str, grade: int) -> None: ...


class Sink(CollectionWriter, Protocol):
    """Receiver of a streaming reader's documents and judgements. The reader can look up what it has added.

    documents, queries: ids received so far.
    keep: which of two different grades of a pair to keep, "first" or "highest"; if None, the second raises UserError. A
        second document or query with the same id always raises UserError.
    """

    keep: str | None

    @property
    def documents(self) -> Container[str]: ...

    @property
    def queries(self) -> Container[str]: ...

    def document(self, id: str) -> Document:
        """Return a document of the corpus. Call this only after the last document."""
        ...

    def has(self, split: str) -> bool:
        """Return whether the split has a judgement."""
        ...


def plain_protocol(name: str, split: str, exclude_query: bool) -> str:
    """Return the protocol id for ranking the whole corpus for all queries of a split."""
    return f"{name}/{split}" + ("/without-own" if exclude_query else "")


SIMILARITIES = ("dot", "cosine", "l2")  # values of Benchmark.similarity
WITHOUT_RELEVANT = ("skip", "zero", "error")  # values of Benchmark.without_relevant
LEARNS = ("class", "labels", "number")  # values of Probe.learns
LOSSES = ("squared_hinge", "hinge")  # values of Probe.loss


@dataclass
class Probe:
    """A linear model on frozen vectors, fitted on training papers and applied to the queries.

    learns: "class" (one per paper), "labels" (any number per paper) or "number". Classes and labels are the documents
        of the corpus. For numbers, the corpus has a single document, and its grade is the paper's number.
    loss: loss of a classifier. Regression always uses the absolute error.
    costs: values of the regularisation parameter C; three-fold cross-validation chooses one.
    samples: in few-shot learning, number of training papers (for "labels", per label); 0 uses all papers.
    draws: in few-shot learning, number of random draws of the training papers. Results are means over draws.
    """

    learns: str = "class"
    loss: str = "squared_hinge"
    costs: list[float] = field(default_factory=lambda: [10.0**power for power in range(-4, 3)])
    samples: int = 0
    draws: int = 1


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Queries of a collection, and how the expert of a task ranks documents for them.

    split: split of the collection; names of merged splits are joined by "+".
    protocol: id of all settings below. Scores with different ids are not comparable.
    metrics: metrics of this benchmark, the main metric first; if empty, the run's metrics.
    exclude_query: whether to leave the document with the query's id out of the ranking, for papers that are both
        queries and documents.
    candidates: documents to rank for each query; None ranks the whole corpus.
    first: documents to rank before all others, for each query.
    similarity: "dot", "cosine" or "l2"; "" uses the similarity of the model.
    without_relevant: treatment of queries without a relevant document: "skip" leaves them out of the means, "zero"
        scores them 0, "error" raises UserError.
    training: training papers and their judgements. If set, a linear probe is fitted on them and applied to the queries,
        instead of ranking documents.
    probe: settings of the linear probe.
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

    def __post_init__(self) -> None:
        check_name("benchmark", self.name)

    def without_blank(self) -> Benchmark:
        """Return the benchmark without blank documents. Relevant blank documents still count as not retrieved."""
        if self.training is not None:  # its documents are classes, and papers that the reader has checked
            return self
        corpus = {id: document for id, document in self.corpus.items() if not document.is_blank}
        if len(corpus) == len(self.corpus):
            return self

        def ranked(lists: Mapping[str, Sequence[str]] | None) -> Mapping[str, Sequence[str]] | None:
            return lists and {query: [id for id in ids if id in corpus] for query, ids in lists.items()}

        return replace(self, corpus=corpus, candidates=ranked(self.candidates), first=ranked(self.first))

    @property
    def encoded_documents(self) -> Mapping[str, Document]:
        """Documents to encode in addition to the queries: the corpus, or the training papers of the probe."""
        return self.corpus if self.training is None else self.training[0]

    def fingerprint(self) -> str:
        """Return a hash of texts, judgements and candidates. Equal data have equal fingerprints on every machine."""
        digest = hashlib.blake2b(digest_size=8)
        papers, classes = self.training or ({}, {})
        for documents in (self.corpus, self.queries, papers):
            for document in documents.values():
                digest.update(repr((document.id, document.title, document.text)).encode())
        for documents_by_query in (self.qrels, self.candidates or {}, self.first or {}, classes):
            for query, ids in documents_by_query.items():
                digest.update(repr((query, list(ids))).encode())
        for grades in (*self.qrels.values(), *classes.values()):
            digest.update(repr(list(grades.values())).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class MiningPool:
    """A collection from which hard negatives are mined: Q training queries and a corpus of M documents.

    name: name of the collection.
    corpus: M documents.
    queries: Q documents, the query of each training example.
    first_row: row of the first corpus document in the task's document table.
    first_example: number of the first query's example in the task's list of examples.
    document_of_query: corpus row of each query that is itself in the corpus, else -1, (Q,).
    positives: corpus rows of the positives of each query.
    held_out_positives: corpus rows that are relevant only in splits other than train. Use them in reports, never to
        choose negatives.
    judged_negatives: corpus rows with grade 0 in the train split.
    excluded: corpus rows of documents that are left out of training.
    """

    task: str
    name: str
    corpus: Sequence[Document]
    queries: Sequence[Document]
    first_row: int
    first_example: int
    document_of_query: np.ndarray
    positives: Ragged
    held_out_positives: Ragged
    judged_negatives: Ragged
    excluded: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


# Decisions of a judge on a mined document. Dropped documents are never negatives for the query.
LABELS = ("keep", "drop", "positive")
KEEP, DROP, POSITIVE = range(3)


@dataclass(frozen=True)
class MinedNegatives:
    """Mined hard negatives of n examples. Example i has negatives starts[i] to starts[i + 1], best first.

    starts: (n + 1,) int64.
    documents: rows of the task's document table, (j,) int32.
    ranks: position of each document in the miner's ranking, from 0, (j,) int32.
    scores: score that the miner gave each document, (j,) float32.
    removed: number of candidates that each filter removed.
    labels: decision of a judge on each document, an index of LABELS, (j,) int8; None keeps all as negatives.
    """

    starts: np.ndarray
    documents: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    removed: Mapping[str, int] = field(default_factory=dict)
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1
