"""Match the papers of two tasks, and look up a paper's annotations in the other task.

    title   equal words in the title, ignoring case, accents and punctuation. If the title has fewer than MIN_TITLE
            words, the words of the text must be equal, too
    text    equal words in title and text
    id      equal ids, for collections that share a numbering of papers

Only train splits count. Labels and search queries are not papers, so they never match.
"""

from __future__ import annotations

import numpy as np

from datamodules.leakage import MIN_TITLE, normal
from datamodules.ragged import Ragged
from datamodules.readers.checks import stable_hash
from datamodules.records import Document, check_choice
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule, TaskDataModule

MATCHES = ("title", "text", "id")


def paper_keys(task: TaskDataModule, match: str = "title") -> np.ndarray:
    """Return a key for each row of a task's document table, (rows,) uint64. Equal papers have equal keys; other texts
    have 0.

    match: how to compare papers, one of MATCHES.
    """
    check_choice("match", match, MATCHES)
    in_corpus = task.corpus_rows()
    is_paper = ~in_corpus if isinstance(task, ClassificationDataModule) else in_corpus
    if isinstance(task, LinkPredictionDataModule):
        is_paper[:] = True
    documents = (document for part in task.documents.sequences for document in part)
    keys = (_key(d, match) if paper else 0 for d, paper in zip(documents, is_paper.tolist(), strict=True))
    return np.fromiter(keys, dtype=np.uint64, count=len(is_paper))


def _key(document: Document, match: str) -> int:
    if match == "id":
        words = document.id
    else:
        words = normal(document.title)
        if match == "text" or len(words.split()) < MIN_TITLE:
            words = f"{words}\n{normal(document.text)}".strip()
    return stable_hash(words) if words else 0


def train_positives(task: TaskDataModule, collection: str = "") -> tuple[np.ndarray, Ragged]:
    """Return the row of each training query, (n,), and the rows of its positives, n lists.

    collection: name of the collection whose queries to return; by default, all collections.
    """
    queries, lists = [], []
    for name, _, table, offset in task.parts:
        if collection in ("", name):
            queries.append(np.asarray(table.queries, dtype=np.int64) + offset)
            positives = table.judged(np.asarray(table.grades) > 0)
            lists.append((positives.counts, positives.values.astype(np.int64) + offset))
    counts, rows = (np.concatenate(parts) for parts in zip(*lists, strict=True))
    return np.concatenate(queries), Ragged.of_counts(counts, rows)


def known_annotations(
    papers: TaskDataModule, task: TaskDataModule, match: str = "title", collection: str = ""
) -> Ragged:
    """Return the training positives, such as labels, that each paper of one task has in another task.

    papers: task whose document table contains the papers; the result has one list per row.
    task: task that annotates papers. The lists contain distinct rows of its document table, in ascending order. A
        search task annotates a paper with the queries that it answers.
    match: how to compare papers, one of MATCHES.
    collection: collection of `task` to take annotations from; by default, all collections.
    """
    keys = paper_keys(task, match)
    queries, positives = train_positives(task, collection)
    pair = queries[positives.owners], positives.values
    annotated, values = reversed(pair) if isinstance(task, SearchDataModule) else pair
    pairs = np.stack([keys[annotated], values.astype(np.uint64)])
    annotated, values = np.unique(pairs[:, pairs[0] > 0], axis=1)
    distinct, first = np.unique(annotated, return_index=True)
    wanted = paper_keys(papers, match)
    position = np.searchsorted(distinct, wanted)
    annotations = Ragged(np.append(first, len(values)), values.astype(np.int64))
    is_annotated = np.isin(wanted, distinct)
    return annotations.take(np.where(is_annotated, position, -1))
