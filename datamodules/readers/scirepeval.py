"""SciRepEval: citation triplets, searches with candidates, and classification.

Source: Singh et al., SciRepEval: A Multi-Format Benchmark for Scientific Document Representations, EMNLP 2023
(allenai/scirepeval on the Hugging Face hub).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import REQUIRED, option
from datamodules.readers.checks import check_id
from datamodules.readers.collecting import LineReader, add_grades, add_repeated, check_collection
from datamodules.readers.io import find_path
from datamodules.readers.json_files import as_object
from datamodules.readers.labels import read_labels
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.readers.tables import files_by_split, load_hub_splits, read_hub_table, read_tables
from datamodules.records import Collection, Document, UserError, prefixed, short
from datamodules.text import TEXT_KEYS

ID_KEYS = ("doc_id", "corpus_id", "paper_id")

Documents = dict[str, Document]
Grades = dict[str, dict[str, int]]  # judgements of one split


@dataclass
class SciRepEvalReader(LineReader):
    """Reader of one config of SciRepEval, from a folder of files or from the hub.

    A paper is {"doc_id" or "corpus_id", "title", "abstract"}. The view decides what a row contains:

    "citations"  {"query": paper, "pos": paper, "neg": paper}, as in cite_prediction. A paper that is a positive in one
                 row and a negative in another, for the same query, counts as positive.
    "search"     {"query": text or paper, "doc_id": of the query, "candidates": [paper with "score"]}, as in search,
                 same_author, relish, nfcorpus, trec_covid. Candidates may also be an object of lists, or lists in the
                 row itself ("doc_id", "title", "abstract", "score"). Score 0 means judged and not relevant.
    "labels"     a paper with a label or a list of labels: fos (labels_text), mesh_descriptors (descriptor). The corpus
                 is the label space.
    """

    view: str = option(REQUIRED, "content of a row", choices=("citations", "search", "labels"))
    folder: str | None = option(
        None,
        "folder with train.jsonl, validation.jsonl and test.jsonl (or evaluation.jsonl), or .json or .parquet files, "
        "whole or in parts (train-00000-of-00002.parquet). Give either the folder, or dataset and config",
    )
    dataset: str | None = option(None, "name on the hub, such as allenai/scirepeval")
    config: str | None = option(None, "config of the data set, such as cite_prediction")
    label_key: str = option("label", "key with the labels, for the view labels")
    labels: str | None = option(
        None, "file with names for the labels (see read_labels). By default, the labels are names"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.folder is None) == (self.dataset is None):
            raise UserError("SciRepEvalReader: expected either folder or dataset (with config)")

    def sources(self) -> list[Path]:
        """Return the files to read, or an empty list for data on the hub."""
        if self.folder is None:
            return []
        return [*self._labels_file(), *(path for paths in files_by_split(Path(self.folder)).values() for path in paths)]

    def _labels_file(self) -> list[Path]:
        return [find_path(Path(self.labels))] if self.view == "labels" and self.labels else []

    def collect(self, bad: BadLines) -> Collection:
        add = {"citations": _add_triplet, "search": _add_search, "labels": self._add_labelled_paper}[self.view]
        corpus: Documents = {}
        queries: Documents = {}
        qrels: dict[str, Grades] = {}
        for path in self._labels_file():
            corpus = read_labels(path, bad)
        for split, rows in self._splits(bad):
            qrels[split] = {}
            for row in rows:
                with row:
                    add(as_object(row), f"{split}.{row.ordinal}", corpus, queries, qrels[split])
        return check_collection(Collection(corpus, queries, qrels), self.folder or f"{self.dataset}/{self.config}")

    def _splits(self, bad: BadLines) -> Iterator[tuple[str, Iterator[Row]]]:
        if self.folder is not None:
            for split, paths in files_by_split(Path(self.folder)).items():
                yield split, read_tables(paths, bad)
        else:
            for split, records in load_hub_splits(self.dataset or "", self.config).items():
                yield split, read_hub_table(f"{self.dataset}/{self.config}/{split}", records, bad)

    def _add_labelled_paper(
        self, record: Record, id: str, corpus: Documents, queries: Documents, qrels: Grades
    ) -> None:
        paper = record.document(*ID_KEYS)
        value = record.get(self.label_key)
        if value is None:
            raise record.missing(self.label_key)
        values = value if isinstance(value, list) else [value]
        labels = list(dict.fromkeys(check_id(label, self.label_key) for label in values))
        if not labels:
            raise UserError(f"{self.label_key} is empty")
        if self.labels:
            record.judged(labels, corpus)
        elif number := next((label for label in labels if not label.strip() or label.lstrip("-").isdigit()), None):
            raise UserError(f"{self.label_key}: {number!r} is not a name; set `labels` to a file of names")
        add_repeated(queries, [paper])
        add_grades(qrels, paper.id, dict.fromkeys(labels, 1))
        if not self.labels:
            corpus.update({label: Document(label, label) for label in labels})


def evaluation_files(folder: Path) -> list[Path]:
    """Return the files of the split "evaluation", our test split. Raises UserError if there are none."""
    splits = files_by_split(folder)
    if "test" not in splits:
        raise UserError(
            f"{folder}: contains no file of the split 'evaluation' (such as evaluation.jsonl or test.parquet)"
        )
    return splits["test"]


def read_texts(folder: Path, bad: BadLines) -> tuple[Documents, Documents]:
    """Return the queries and papers of the split "evaluation", which SciRepEval's own program also embeds.

    Their judgements are in another data set.
    """
    queries: Documents = {}
    papers: Documents = {}
    for row in read_tables(evaluation_files(folder), bad):
        with row:
            record = as_object(row)
            if "query" not in record:
                add_repeated(papers, [record.document(*ID_KEYS)])
                continue
            query = _read_query(record, f"test.{row.ordinal}")
            _check_same(queries, query)
            add_repeated(papers, [candidate.document(*ID_KEYS, may_be_blank=True) for candidate in _candidates(record)])
            queries[query.id] = query
    return queries, papers


def _add_triplet(record: Record, id: str, corpus: Documents, queries: Documents, qrels: Grades) -> None:
    query, positive, negative = (_read_paper(record, key) for key in ("query", "pos", "neg"))
    if positive.id in (query.id, negative.id):
        raise UserError(f"pos: {positive.id!r} is also the query or the negative")
    if negative.id == query.id:
        raise UserError(f"neg: {negative.id!r} is also the query")
    _check_same(queries, query)
    add_repeated(corpus, [positive, negative])
    queries[query.id] = query
    grades = qrels.setdefault(query.id, {})
    grades.setdefault(negative.id, 0)
    grades[positive.id] = 1


def _add_search(record: Record, id: str, corpus: Documents, queries: Documents, qrels: Grades) -> None:
    query = _read_query(record, id)
    papers, grades = list[Document](), dict[str, int]()
    for number, candidate in enumerate(_candidates(record), start=1):
        with prefixed(f"candidate {number}: "):
            papers.append(candidate.document(*ID_KEYS, may_be_blank=True))
            score = candidate.grade("score")
        if grades.setdefault(papers[-1].id, score) != score:
            raise UserError(f"candidate {number}: {papers[-1].id!r} has two scores")
    if not papers:
        raise UserError("candidates is empty")
    _check_same(queries, query)
    add_repeated(corpus, papers)
    add_grades(qrels, query.id, grades)
    queries[query.id] = query


def _read_query(record: Record, new_id: str) -> Document:
    """Return a query, which is a paper or a text. new_id: id to use for a text."""
    if isinstance(record.get("query"), dict):
        return _read_paper(record, "query")
    text = record.words("query")
    key = next((key for key in ("query_id", *ID_KEYS) if isinstance(record.get(key), str | int)), "")
    return Document(check_id(record[key], key) if key else new_id, "", text)


def _read_paper(record: Record, key: str) -> Document:
    """Return the paper under a key of a record. Errors start with the key."""
    paper = record.object(key)
    with prefixed(f"{key}: "):
        return paper.document(*ID_KEYS)


def _check_same(queries: Mapping[str, Document], query: Document) -> None:
    if queries.get(query.id, query) != query:
        raise UserError(f"query {query.id!r} has a different text on an earlier line")


def _candidates(record: Record) -> list[Record]:
    """Return the candidates as a list of records. `datasets` may turn such a list into an object of lists."""
    candidates = record.get("candidates")
    if candidates is None and isinstance(record.get("doc_id"), list):
        candidates = {key: record[key] for key in (*ID_KEYS, "title", *TEXT_KEYS, "score") if key in record}
    if isinstance(candidates, dict):
        columns = list(candidates.values())
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise UserError("candidates: expected lists of equal length")
        candidates = [dict(zip(candidates, values, strict=True)) for values in zip(*columns, strict=True)]
    if not isinstance(candidates, list) or not all(isinstance(candidate, dict) for candidate in candidates):
        raise UserError(f"candidates must be a list of objects, got {short(candidates)}")
    return [Record.of(record.row, candidate) for candidate in candidates]
