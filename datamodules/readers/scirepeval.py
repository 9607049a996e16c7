"""SciRepEval: citation triplets, searches with their candidates, and classification.

Source: Singh et al., SciRepEval: A Multi-Format Benchmark for Scientific Document Representations, EMNLP 2023
(allenai/scirepeval on the Hugging Face hub).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines, Place
from datamodules.readers.json_values import as_object
from datamodules.readers.labels import read_labels
from datamodules.readers.lines import find_file
from datamodules.readers.rows import files_by_split, hub_splits, rows_of_files, rows_of_hub
from datamodules.records import Collection, Document, UserError

IDS = ("doc_id", "corpus_id", "paper_id")


class SciRepEvalReader:
    """One config of SciRepEval, from a folder of its files or from the hub: give `folder`, or `dataset` and `config`.

    folder/train.jsonl, validation.jsonl, test.jsonl (or evaluation)   in .json, .jsonl or .parquet, whole or in parts
                                                                       (train-00000-of-00002.parquet)
    dataset: allenai/scirepeval      config: cite_prediction

    view: what a row is.
    "citations"  {"query": paper, "pos": paper, "neg": paper}, as in cite_prediction. A negative that is a positive of
                 the same query in another row is no negative.
    "search"     {"query": text or paper, "doc_id": of the query, "candidates": [paper with "score"]}, as in search,
                 same_author, relish, nfcorpus, trec_covid. Candidates may be an object of lists, also in the row itself
                 ("doc_id", "title", "abstract", "score": lists). Score 0: judged and not relevant.
    "labels"     a paper with its label or list of labels under `label_key`: fos (labels_text), mesh_descriptors
                 (descriptor). The corpus is the label space, from the file that `labels` names (see read_labels), or
                 else the labels themselves, if they are words.

    A paper is {"doc_id" or "corpus_id", "title", "abstract"}. on_error, quarantine: see BadLines.
    """

    VIEWS = ("citations", "search", "labels")

    def __init__(
        self,
        view: str,
        folder: str | None = None,
        dataset: str | None = None,
        config: str | None = None,
        label_key: str = "label",
        labels: str | None = None,
        on_error: str = "fail",
        quarantine: str | None = None,
    ):
        fields.allowed("view", [view], self.VIEWS)
        BadLines(on_error)
        if (folder is None) == (dataset is None):
            raise UserError("SciRepEvalReader: expected either folder or dataset (with config)")
        self.view, self.folder, self.dataset, self.config = view, folder, dataset, config
        self.label_key, self.labels = label_key, labels
        self.on_error, self.quarantine = on_error, quarantine

    def sources(self) -> list[Path]:
        """The files that it reads; none if they are the hub's."""
        if self.folder is None:
            return []
        return [*self._labels_file(), *(path for paths in files_by_split(Path(self.folder)).values() for path in paths)]

    def _labels_file(self) -> list[Path]:
        path = Path(self.labels or "")
        return [find_file(path.parent, path.name)] if self.view == "labels" and self.labels else []

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        add = {"citations": _add_triplet, "search": _add_search, "labels": self._add_labelled}[self.view]
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        qrels: dict[str, dict[str, dict[str, int]]] = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            for path in self._labels_file():
                corpus = read_labels(path, bad)
            for split, places in self._splits(bad):
                qrels[split] = {}
                for place in places:
                    with place:
                        add(as_object(place), f"{split}.{place.ordinal}", corpus, queries, qrels[split])
        return fields.checked(Collection(corpus, queries, qrels), self.folder or f"{self.dataset}/{self.config}")

    def _splits(self, bad: BadLines) -> Iterator[tuple[str, Iterator[Place]]]:
        if self.folder is not None:
            for split, paths in files_by_split(Path(self.folder)).items():
                yield split, rows_of_files(paths, bad)
        else:
            for split, rows in hub_splits(self.dataset, self.config).items():
                yield split, rows_of_hub(f"{self.dataset}/{self.config}/{split}", rows, bad)

    def _add_labelled(self, record, id: str, corpus, queries, qrels) -> None:
        paper = fields.document(record, IDS)
        value = record.get(self.label_key)
        if value is None:
            raise UserError(f"{self.label_key} is missing (keys here: {', '.join(record)})")
        values = value if isinstance(value, list) else [value]
        labels = list(dict.fromkeys(fields.as_identifier(one, self.label_key) for one in values))
        if not labels:
            raise UserError(f"{self.label_key} is empty")
        if self.labels:
            fields.all_known(labels, corpus, self.label_key)
        elif number := next((label for label in labels if not label.strip() or label.lstrip("-").isdigit()), None):
            raise UserError(f"{self.label_key}: {number!r} is no name; give the file of names as the argument labels")
        fields.add_same(queries, [paper])
        fields.judge(qrels, paper.id, dict.fromkeys(labels, 1))
        if not self.labels:
            corpus.update({label: Document(label, label) for label in labels})


def read_texts(folder: Path, bad: BadLines) -> tuple[dict[str, Document], dict[str, Document]]:
    """Queries and papers by id that SciRepEval's own program embeds of a config: those of the split "evaluation".

    Judgements are not read; they are in another data set.
    """
    queries: dict[str, Document] = {}
    papers: dict[str, Document] = {}
    splits = files_by_split(folder)
    if "test" not in splits:
        raise UserError(f"{folder}: has no file of the split evaluation (evaluation.jsonl or test.jsonl, or .parquet)")
    for place in rows_of_files(splits["test"], bad):
        with place:
            record = as_object(place)
            if "query" not in record:
                fields.add_same(papers, [fields.document(record, IDS)])
                continue
            query = _query(record, f"test.{place.ordinal}")
            _check_same(queries, query)
            fields.add_same(papers, [fields.document(candidate, IDS) for candidate in _candidates(record)])
            queries[query.id] = query
    return queries, papers


def _add_triplet(record: Mapping[str, Any], id: str, corpus, queries, qrels) -> None:
    query, positive, negative = (
        _of(record, key, lambda paper: fields.document(paper, IDS)) for key in ("query", "pos", "neg")
    )
    if positive.id in (query.id, negative.id):
        raise UserError(f"pos: {positive.id!r} is the query or the negative too")
    _check_same(queries, query)
    fields.add_same(corpus, [positive, negative])
    queries[query.id] = query
    judged = qrels.setdefault(query.id, {})
    judged.setdefault(negative.id, 0)
    judged[positive.id] = 1


def _add_search(record: Mapping[str, Any], id: str, corpus, queries, qrels) -> None:
    query = _query(record, id)
    papers, judged = [], {}
    for number, candidate in enumerate(_candidates(record), start=1):
        try:
            papers.append(fields.document(candidate, IDS))
            score = fields.grade(candidate.get("score"))
        except UserError as error:
            raise UserError(f"candidate {number}: {error}") from error
        if judged.setdefault(papers[-1].id, score) != score:
            raise UserError(f"candidate {number}: {papers[-1].id!r} has two scores")
    if not papers:
        raise UserError("candidates is empty")
    _check_same(queries, query)
    fields.add_same(corpus, papers)
    fields.judge(qrels, query.id, judged)
    queries[query.id] = query


def _query(record: Mapping[str, Any], id: str) -> Document:
    """A paper, or words. id: of words that have none."""
    if isinstance(record.get("query"), dict):
        return _of(record, "query", lambda paper: fields.document(paper, IDS))
    words = fields.text(record, "query", required=True)
    if not words.strip():
        raise UserError("query is empty")
    given = next((record[key] for key in ("query_id", *IDS) if isinstance(record.get(key), str | int)), id)
    return Document(fields.as_identifier(given, "doc_id"), "", words)


def _of(record: Mapping[str, Any], key: str, read) -> Document:
    """What `read` makes of an object inside of the record; its errors name the key."""
    inner = fields.nested(record, key)
    try:
        return read(inner)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _check_same(queries: Mapping[str, Document], query: Document) -> None:
    if queries.get(query.id, query) != query:
        raise UserError(f"query {query.id!r} has another text here than before")


def _candidates(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The candidates as objects: `datasets` gives a list of objects as an object of lists."""
    candidates = record.get("candidates")
    if candidates is None and isinstance(record.get("doc_id"), list):
        candidates = {key: record[key] for key in ("doc_id", "title", "abstract", "score") if key in record}
    if isinstance(candidates, dict):
        columns = list(candidates.values())
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise UserError("candidates: expected lists of equal length")
        candidates = [dict(zip(candidates, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(candidates, list) or not all(isinstance(one, dict) for one in candidates):
        raise UserError(f"candidates must be a list of objects, got {str(candidates)[:60]!r}")
    return candidates
