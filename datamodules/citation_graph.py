"""Citation graph of a link-prediction task, and random walks on it.

The links are the training links, or come from a file. Links of other splits are left out, because positions or walks
would reveal them to the encoder. Directions are ignored: a walk moves to any neighbour with the same probability.

    P = D^-1 A      probability of a step from one paper to another; D: degrees, A: links

Shapes: n rows of the task's document table, e links, k steps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.examples import first_of_same_text
from datamodules.readers.io import read_lines
from datamodules.readers.rows import BadLines, Row
from datamodules.records import UserError, counted, short
from datamodules.store import StoredCollection

if TYPE_CHECKING:
    from datamodules.tasks import Part, TaskDataModule

log = logging.getLogger(__name__)


class CitationGraph:
    """An undirected graph whose nodes are rows of a document table.

    pairs: rows of the two papers of each link, (e, 2). Order, repetitions and self-links are ignored.
    num_rows: number of rows of the table, n.
    node_of: node of each row, (n,); by default the row itself. A query whose text differs from its paper's text has a
        row of its own, but shares the paper's node.
    """

    def __init__(self, pairs: np.ndarray, num_rows: int, node_of: np.ndarray | None = None):
        pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        self.num_rows = num_rows
        self.node_of = np.arange(num_rows) if node_of is None else np.asarray(node_of, dtype=np.int64)
        pairs = self.node_of[pairs]
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        both = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)  # sorted by node, then by neighbour
        self.sources, self.neighbours = both[:, 0], both[:, 1]  # (2e,) each
        self.degrees = np.bincount(self.sources, minlength=num_rows)  # (n,)
        self.starts = np.concatenate([[0], np.cumsum(self.degrees)])

    @property
    def num_links(self) -> int:
        return len(self.neighbours) // 2

    def __contains__(self, row: int) -> bool:
        """Return whether the paper of a row has any links."""
        return bool(self.degrees[self.node_of[row]])

    def neighbours_of(self, row: int) -> np.ndarray:
        """Return the rows that are linked to the paper of a row, in ascending order."""
        node = self.node_of[row]
        return self.neighbours[self.starts[node] : self.starts[node + 1]]

    def visits(self, row: int, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the rows that a walk from a row can reach after each of 1, ..., `steps` steps, with probabilities.

        Rows are in ascending order. Returns to the start are included. A paper without links has empty lists.
        """
        rows: np.ndarray = np.array([self.node_of[row]])
        probabilities: np.ndarray = np.ones(1)
        visited = []
        for _ in range(steps):
            counts = self.degrees[rows]
            before = np.cumsum(counts) - counts
            links = np.arange(counts.sum()) + np.repeat(self.starts[rows] - before, counts)
            shares = np.repeat(probabilities / np.maximum(counts, 1), counts)
            rows, column = np.unique(self.neighbours[links], return_inverse=True)
            probabilities = np.bincount(column, weights=shares, minlength=len(rows))
            visited.append((rows, probabilities))
        return visited

    def walks(self, row: int, steps: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Sample `count` random walks from a row, and return their rows after each step, (steps, count).

        The paper must have a link.
        """
        at = np.full(count, self.node_of[row])
        visited = np.empty((steps, count), dtype=np.int64)
        for step in range(steps):
            link = (rng.random(count) * self.degrees[at]).astype(np.int64)
            at = visited[step] = self.neighbours[self.starts[at] + link]
        return visited

    def reachability(self, anchors: np.ndarray, steps: int) -> np.ndarray:
        """Return the mean probability, over 1 to `steps` steps, that a walk from each row is at each anchor.

        anchors: rows, (a,). Shape of the result: (n, a), float32. Rows of papers without links are 0.
        """
        reached = np.zeros((self.num_rows, len(anchors)), dtype=np.float32)
        for column, anchor in enumerate(anchors):
            at: np.ndarray = np.zeros(self.num_rows)
            at[self.node_of[anchor]] = 1.0
            total = np.zeros(self.num_rows)
            for _ in range(steps):  # P^t e_anchor
                at = np.bincount(self.sources, weights=at[self.neighbours], minlength=self.num_rows)
                at = at / np.maximum(self.degrees, 1)
                total += at
            reached[:, column] = total / steps
        return reached[self.node_of]

    def most_reached(self, count: int, steps: int) -> np.ndarray:
        """Return the `count` nodes that walks of `steps` steps from all papers visit most, most visited first.

        Papers without links are never returned. Ties go to the lower row.
        """
        at: np.ndarray = (self.degrees > 0).astype(np.float64)
        total = np.zeros(self.num_rows)
        for _ in range(steps):  # 1^T P^t
            leaving = at / np.maximum(self.degrees, 1)
            at = np.bincount(self.neighbours, weights=leaving[self.sources], minlength=self.num_rows)
            total += at
        # Rounded, because the order of summation changes the last bits.
        order = np.argsort(-np.round(total, 9), kind="stable")[:count]
        return order[self.degrees[order] > 0]


def positions(graph: CitationGraph, count: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of papers with links, (r,), and their positions, (r, count) float32 (ULTRA-DP, arXiv 2310.14845).

    The anchors are the `count` most visited papers. A position is the reachability of each anchor, divided by its
    standard deviation over the anchors. If fewer papers have links, the last columns are 0.

    steps: maximum number of steps of a walk.
    """
    anchors = graph.most_reached(count, steps)
    rows = np.flatnonzero(graph.degrees[graph.node_of])
    reached = graph.reachability(anchors, steps)[rows]
    deviation = reached.std(1, keepdims=True)
    scaled = reached / np.where(deviation > 1e-7, deviation, 1)  # a single anchor has deviation 0
    return rows, np.pad(scaled, ((0, 0), (0, count - len(anchors))))


def graph_of(task: TaskDataModule, file: str | Path | None = None) -> CitationGraph:
    """Return the citation graph of a link-prediction task, whose data must be set up.

    file: pairs of ids, one per line, separated by a space or tab; by default, the training links are used. Links that
        are only in the dev or test split are left out.

    Raises UserError for any other kind of task, or if the file names a paper that is not in the corpus.
    """
    name = task.task.name
    if not task.queries_are_documents:
        raise UserError(f"task {name}: has no citation graph; expected a task of kind link_prediction")
    node_of = np.arange(len(task.documents))
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    for table, offset in task.examples.parts:
        queries, papers = np.asarray(table.queries), np.asarray(table.document_of_query)
        nodes = np.where(papers < 0, queries, papers)
        node_of[queries + offset] = nodes + offset
        linked = table.judged(np.asarray(table.grades) > 0)
        pairs.append(np.stack([nodes[linked.owners], linked.values], axis=1).astype(np.int64) + offset)
    if file is not None:
        pairs = [_pairs_of_file(task, Path(file))]
    graph = CitationGraph(np.concatenate(pairs), len(node_of), node_of)
    if not graph.num_links:
        raise UserError(f"task {name}: the citation graph has no links between papers of the corpus")
    linked_papers = int((graph.degrees > 0).sum())
    log.info("citation graph of %s: %d links between %d papers", name, graph.num_links, linked_papers)
    return graph


def _pairs_of_file(task: TaskDataModule, path: Path) -> np.ndarray:
    """Return the rows of the links in a file, (e, 2).

    Links that are only in the dev or test split are left out, and so are papers that are left out of training.
    """
    rows_by_id = [_rows_by_id(part) for part in task.parts]
    held_out = _held_out(task)
    pairs: list[tuple[int, int]] = []
    missing: dict[str, Row] = {}  # id -> first line that names it
    num_held_out = num_between = 0
    for line, one, other in _id_pairs(path):
        for id in (one, other):
            if not any(id in rows for rows in rows_by_id):
                missing.setdefault(id, line)
        links = [(rows[one], rows[other]) for rows in rows_by_id if one in rows and other in rows]
        if frozenset((one, other)) in held_out:
            num_held_out += 1
        else:
            pairs += links
            num_between += not links
    if missing:
        id, line = next(iter(missing.items()))
        raise UserError(
            f"{line}: paper {id!r} is not in the corpus of task {task.task.name} ({len(missing)} papers are missing in "
            "total); add them to the corpus, or remove their lines"
        )
    if num_held_out:
        log.warning("%s: left out %s of the dev or test split", path, counted(num_held_out, "link"))
    if num_between:
        log.warning("%s: left out %s between papers of different collections", path, counted(num_between, "link"))
    rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    is_left_out = np.isin(rows, task.stripped).any(1)
    if is_left_out.any():
        count = counted(int(is_left_out.sum()), "link")
        log.warning("%s: left out %s of papers that are left out of training", path, count)
    return rows[~is_left_out]


def _rows_by_id(part: Part) -> dict[str, int]:
    """Return the row of each paper. As in training, papers with the same text have the row of the first one."""
    collection = part.collection
    if isinstance(collection, StoredCollection):
        first: np.ndarray = collection.array("first")
    else:
        first = first_of_same_text(list(collection.corpus.values()))
    return dict(zip(collection.corpus, (first + part.first_row).tolist(), strict=True))


def _id_pairs(path: Path) -> Iterator[tuple[Row, str, str]]:
    for row in read_lines(path, BadLines()):
        ids = [id.strip() for id in (row.text.split("\t") if "\t" in row.text else row.text.split())]
        if len(ids) != 2 or not all(ids):
            raise UserError(f"{row}: expected two ids separated by a space or tab, got {short(row.text)}")
        yield row, ids[0], ids[1]


def _held_out(task: TaskDataModule) -> set[frozenset[str]]:
    """Return the pairs of ids that have a positive grade only in splits other than train."""
    linked: dict[bool, set[frozenset[str]]] = {True: set(), False: set()}  # is it the train split? -> linked pairs
    for collection in task.collections.values():
        for split in collection.splits:
            for query, grades in collection.judged(split)[1].items():
                pairs = (frozenset((query, document)) for document, grade in grades.items() if grade > 0)
                linked[split == "train"].update(pairs)
    return linked[False] - linked[True]
