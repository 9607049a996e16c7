"""Relations between two label spaces: weights[a, b] is the probability that a paper with label a also has label b.

A relation is estimated from papers with labels in both spaces, or read from a file. It is an array (a, b) float32, with
a labels in the first space and b labels in the second.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.batches import ContrastiveDataModule
from datamodules.co_annotation import known_annotations, train_positives
from datamodules.leakage import normal
from datamodules.ragged import Ragged
from datamodules.readers.io import read_lines
from datamodules.readers.rows import BadLines
from datamodules.records import Document, UserError, short
from datamodules.tasks import ClassificationDataModule, TaskDataModule

log = logging.getLogger(__name__)

MAX_PAIRS = 2**28  # maximum number of label pairs: 1 GiB


@dataclass(frozen=True)
class LabelSpace:
    """The labels of one collection of a classification task.

    name: TASK, or TASK/COLLECTION if the task has several collections, for messages.
    rows: row of each label in the task's document table, (n,), ascending and without gaps.
    labels: labels in the order of the rows.
    """

    name: str
    rows: np.ndarray
    labels: list[Document]

    @classmethod
    def of(cls, task: TaskDataModule, collection: str) -> LabelSpace:
        """Return the labels of a collection. Raises UserError if the task is not a classification."""
        if not isinstance(task, ClassificationDataModule):
            raise UserError(f"task {task.task.name} has no labels; expected a task of kind classification")
        part = next(part for part in task.parts if part.name == collection)
        shown = task.task.name if len(task.collections) == 1 else f"{task.task.name}/{collection}"
        return cls(shown, part.corpus_rows, list(part.collection.corpus.values()))

    def __len__(self) -> int:
        return len(self.labels)

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of labels, given as rows of the document table, and -1 for other rows."""
        positions = rows - self.rows[0]
        return np.where((positions >= 0) & (positions < len(self)), positions, -1)


def find_collection(data: ContrastiveDataModule, key: str, name: str) -> tuple[TaskDataModule, str]:
    """Return a task and the name of its collection, given as TASK or TASK/COLLECTION.

    A task with several collections needs the second form. key: option that has the name, for errors.
    """
    task_name, _, collection = name.partition("/")
    tasks = data.by_name
    if task_name not in tasks:
        raise UserError(f"{key}: unknown task {task_name!r}; expected one of {', '.join(tasks)}")
    names = list(tasks[task_name].collections)
    if collection not in ("", *names) or (not collection and len(names) > 1):
        problem = f"unknown collection {collection!r}" if collection else f"task {task_name} has several collections"
        raise UserError(f"{key}: {problem}; expected one of {', '.join(f'{task_name}/{choice}' for choice in names)}")
    return tasks[task_name], collection or names[0]


@dataclass(frozen=True)
class PartialAnnotation:
    """Papers of a source task, only some of which have labels of a target task.

    source, target: label spaces. Link prediction and search have no labels; if the source is one of them, both are the
        target's.
    known: for each row of the source's document table, the known labels as positions in the source label space.
    unlabelled: whether a row is a training query of the source without labels of the target, (rows,) bool.
    pairs: source labels and target labels of the n papers that have both. If the source has no labels, these are the
        target labels of n documents and of their queries.
    """

    source: LabelSpace
    target: LabelSpace
    known: Ragged
    unlabelled: np.ndarray
    pairs: tuple[Ragged, Ragged]

    @classmethod
    def of(
        cls, source: tuple[TaskDataModule, str], target: tuple[TaskDataModule, str], match: str
    ) -> PartialAnnotation:
        """Match the papers of two collections, each given as (task, name). match: see co_annotation.py."""
        table, collection = source
        space = LabelSpace.of(*target)
        annotations = known_annotations(table, target[0], match, target[1]).minus(space.rows[0])
        queries, positives = train_positives(table, collection)
        query_of_row = np.full(len(table.documents), -1, dtype=np.int64)
        query_of_row[queries] = np.arange(len(queries))
        unlabelled = (query_of_row >= 0) & (annotations.counts == 0)
        if isinstance(table, ClassificationDataModule):
            labels = LabelSpace.of(*source)
            known = positives.minus(labels.rows[0]).take(query_of_row)
            return cls(labels, space, known, unlabelled, _both(known.take(queries), annotations.take(queries)))
        labels_of_query = annotations.take(queries[positives.owners])
        return cls(space, space, annotations, unlabelled, _both(annotations.take(positives.values), labels_of_query))


def _both(first: Ragged, second: Ragged) -> tuple[Ragged, Ragged]:
    """Keep the positions at which both lists are non-empty."""
    kept = np.flatnonzero((first.counts > 0) & (second.counts > 0))
    return first.take(kept), second.take(kept)


def relation_of(papers: PartialAnnotation, relation: str, smoothing: float = 1.0) -> np.ndarray:
    """Return the relation from source labels to target labels, (a, b).

    relation: "estimated", "same" for labels with the same name, or a file.

    Raises UserError if the relation cannot be estimated, or is too large for memory.
    """
    first, second = papers.source, papers.target
    if len(first) * len(second) > MAX_PAIRS:
        raise UserError(
            f"{first.name} has {len(first):,} labels and {second.name} has {len(second):,}; a relation can have at "
            f"most {MAX_PAIRS:,} pairs of labels"
        )
    if relation == "same":
        return same_names(first, second)
    if relation != "estimated":
        return read_relation(Path(relation), first, second)
    if not (count := len(papers.pairs[0].counts)):
        raise UserError(
            "relation: cannot be estimated, because no paper has labels of both in the train splits; choose another "
            "way to match papers, or set relation to a file"
        )
    log.info("relation from %s to %s: estimated from %d papers or links", first.name, second.name, count)
    return estimated(*papers.pairs, (len(first), len(second)), smoothing)


def estimated(first: Ragged, second: Ragged, sizes: tuple[int, int], smoothing: float = 1.0) -> np.ndarray:
    """Estimate a relation, (a, b), from n papers with labels in both spaces.

    weights[a, b] = (n_ab + smoothing n_b / n) / (n_a + smoothing), where n_a, n_b and n_ab count the papers with label
    a, label b, and both. A label without papers gets the average weights, n_b / n.

    first, second: labels of each paper, n lists of positions.
    sizes: number of labels in each of the two spaces.
    smoothing: number of average papers to add to the papers of each label.
    """
    papers = len(first.counts)
    related = second.take(first.owners)  # labels in the second space, for each label in the first
    weights = np.zeros(sizes, dtype=np.float32)  # (a, b)
    np.add.at(weights, (first.values[related.owners], related.values), 1.0)
    average = np.bincount(second.values, minlength=sizes[1]) / max(papers, 1)  # (b,)
    total = np.bincount(first.values, minlength=sizes[0]) + smoothing  # (a,)
    weights += (smoothing * average).astype(np.float32)
    weights /= np.maximum(total, 1e-9).astype(np.float32)[:, None]
    return weights


def same_names(first: LabelSpace, second: LabelSpace) -> np.ndarray:
    """Relate labels with the same name, ignoring case and punctuation. If a label has no name, its id is used."""
    columns: dict[str, list[int]] = {}
    for column, label in enumerate(second.labels):
        columns.setdefault(_name(label), []).append(column)
    weights = np.zeros((len(first), len(second)), dtype=np.float32)
    for row, label in enumerate(first.labels):
        weights[row, columns.get(_name(label), [])] = 1.0
    if not weights.any():
        raise UserError(f"relation: no label of {first.name} has the same name as a label of {second.name}")
    return weights


def _name(label: Document) -> str:
    return normal(label.title) or label.id


def read_relation(path: Path, first: LabelSpace, second: LabelSpace) -> np.ndarray:
    """Read a relation from lines with a label in the first space, a label in the second, and a weight from 0 to 1.

    Tabs separate the columns. Labels are ids or names. Pairs that are not in the file have weight 0.
    The first line may be a header.

    Raises UserError with file and line for unknown labels, invalid weights and repeated pairs.
    """
    weights = np.full((len(first), len(second)), np.nan, dtype=np.float32)
    spaces = [(space, _positions(space)) for space in (first, second)]
    with BadLines() as bad:
        for index, line in enumerate(read_lines(path, bad)):
            with line:
                columns = [column.strip() for column in line.text.split("\t")]
                if len(columns) != 3:
                    raise UserError(f"expected two labels and a weight, separated by tabs, got {short(line.text)}")
                weight = _number(columns[2])
                if index == 0 and weight is None and not _are_labels(columns, spaces):
                    continue  # the header
                if weight is None or not 0 <= weight <= 1:
                    raise UserError(f"expected a weight from 0 to 1, got {short(columns[2])}")
                row, column = (_position(label, *space) for label, space in zip(columns, spaces, strict=False))
                if not np.isnan(weights[row, column]):
                    raise UserError(f"the pair {columns[0]!r} and {columns[1]!r} is in the file twice")
                weights[row, column] = weight
    weights = np.nan_to_num(weights)
    if not weights.any():
        raise UserError(f"{path}: contains no pair of labels with a weight above 0")
    if missing := int((weights.sum(1) == 0).sum()):
        log.warning("%s: %d of %d labels of %s are not related to any label", path, missing, len(first), first.name)
    return weights


def _are_labels(columns: Sequence[str], spaces: Sequence[tuple[LabelSpace, dict[str, int]]]) -> bool:
    return all(label in positions for label, (_, positions) in zip(columns, spaces, strict=False))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _positions(space: LabelSpace) -> dict[str, int]:
    """Return the position of each label by name and by id, or -1 for a name that several labels have.

    If a label's name is another label's id, the id wins.
    """
    positions: dict[str, int] = {}
    for position, label in enumerate(space.labels):
        if name := label.title.strip():
            positions[name] = -1 if name in positions else position
    return positions | {label.id: position for position, label in enumerate(space.labels)}


def _position(label: str, space: LabelSpace, positions: dict[str, int]) -> int:
    if label not in positions:
        near = difflib.get_close_matches(label, list(positions), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; expected the id or the name of a label"
        raise UserError(f"{label!r} is not a label of {space.name}{hint}")
    if positions[label] < 0:
        raise UserError(f"{label!r} is the name of several labels of {space.name}; use an id")
    return positions[label]


def distributions(weights: np.ndarray) -> np.ndarray:
    """Return p(b | a): each label's weights divided by their sum, or zeros for an unrelated label."""
    return weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float32).tiny)


def most_related(weights: np.ndarray, count: int) -> Ragged:
    """Return, for each label in the first space, up to `count` related labels by descending weight."""
    columns = np.argsort(-weights, axis=1, kind="stable")[:, :count]
    return Ragged.of([row[weights[a, row] > 0] for a, row in enumerate(columns)])
