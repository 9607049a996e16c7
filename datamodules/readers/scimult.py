"""The evaluation data that the authors of SciMult published.

Source: Zhang et al., Pre-training Multi-task Contrastive Learning Models for Scientific Literature Understanding,
Findings of EMNLP 2023, section 4 and table A2 (yuzhimanhua/SciMult).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamodules.readers import fields
from datamodules.readers.bad_lines import QUARANTINED_TEXT, BadLines, Place
from datamodules.readers.beir import judgements
from datamodules.readers.json_values import as_object, records
from datamodules.readers.labels import read_labels
from datamodules.readers.lines import find_file
from datamodules.records import Collection, Document, UserError

DATASETS = {
    "classification_fine": ("CSConference", "ChemistryMeSH", "Geography", "Psychology"),
    "classification_coarse": ("MAG", "MeSH"),
    "link_prediction_retrieval": ("SciDocs", "PMCPatientsPPR"),
    "link_prediction_reranking": ("Recommendation",),
    "search": ("Search", "TRECCOVID_SciRepEval", "TRECCOVID_BEIR", "SciFact", "NFCorpus"),
    "pmc_patients": ("PMCPatientsPAR", "PMCPatientsPPR"),
}


class SciMultReader:
    """One data set of the folder that holds classification_fine, search and so on; all of it is the test split.

    classification_fine/D_label.json, D_papers_test.json (and classification_coarse)
        {"label", "name": [...], "definition"}, {"title", "abstract", "label": [id], or one id}
    link_prediction_retrieval/SciDocs_papers_test.json
        {"paper", "title", "abstract", "cite": [id], "co-cite": [id]}; `relation` says which of the two
    link_prediction_retrieval/PMCPatientsPPR_patients_test.json, PMCPatientsPPR_queries_test.json
        {"patient", "title", "abstract"}, {"title", "abstract", "patient": [id]}
    link_prediction_reranking/Recommendation_papers_test.json
        {"paper", "title", "abstract", "score": {id: grade}}; a paper with scores is a query
    search/D_papers_test.json, D_queries_test.json
        {"paper", "title", "abstract"}, {"query_id", "query", "score": {id: grade}}
    pmc_patients/DPAR_articles_test.json (DPPR_patients_test.json), D_queries_test.json
        {"article" or "patient", "title", "abstract"}, {"query", "title", "abstract"}; with the judgements of
        pmc_patients/PMCPatients/PAR/PAR_test_qrels.tsv

    All are JSON lines. Where each query has its own candidates (Recommendation, Search, TRECCOVID_SciRepEval), these
    are the documents with a grade, 0 included: what else is in the corpus is not to be ranked for it. A query without
    an id is named by its line. The labels whose names occur in a paper are in classification_fine/D_matched.json,
    {"candidate": [id]}, a line a paper. The folder scidocs is SciDocsReader's. Every file may end in .gz or .zst.
    on_error, quarantine: see BadLines.
    """

    TASKS = tuple(DATASETS)
    RELATIONS = ("cite", "co-cite")

    def __init__(
        self,
        folder: str,
        task: str,
        dataset: str,
        relation: str = "cite",
        on_error: str = "fail",
        quarantine: str | None = None,
    ):
        fields.allowed("task", [task], self.TASKS)
        fields.allowed(f"dataset (of {task})", [dataset], DATASETS[task])
        fields.allowed("relation", [relation], self.RELATIONS)
        BadLines(on_error)
        self.folder, self.task, self.dataset, self.relation = Path(folder), task, dataset, relation
        self.on_error, self.quarantine = on_error, quarantine

    def sources(self) -> list[Path]:
        """The files that it reads."""
        folder = self.folder / self.task
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder (expected {self.dataset}_papers_test.json or the like in it)")
        return sorted(path for path in folder.rglob("*") if path.is_file() and self._concerns(path.name))

    def _concerns(self, name: str) -> bool:
        return name.startswith((f"{self.dataset}_", f"{self.dataset.removeprefix('PMCPatients')}_test_qrels"))

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        with BadLines(self.on_error, self.quarantine) as bad:
            if self.task.startswith("classification"):
                collection = self._classification(bad)
            elif self.task == "pmc_patients":
                collection = self._pmc_patients(bad)
            elif self.dataset == "SciDocs":
                collection = self._papers(bad, lambda record: _linked(record, self.relation))
            elif self.dataset == "PMCPatientsPPR":
                patients = self._documents("patients", "patient", bad)
                collection = self._queries(bad, patients, _unnamed, lambda record: _linked(record, "patient"))
            elif self.task == "link_prediction_reranking":
                collection = self._papers(bad, _scored)
            else:
                collection = self._queries(bad, self._documents("papers", "paper", bad), _search, _scored)
        return fields.checked(collection, self.folder / self.task / self.dataset)

    def named_labels(self) -> dict[str, list[str]]:
        """Paper -> the labels whose names occur in it, as the authors found them (classification_fine alone)."""
        found = {}
        with BadLines("fail") as bad:
            for place in records(self.named_labels_file(), bad):
                with place:
                    found[f"test.{place.ordinal}"] = fields.identifiers(as_object(place), "candidate", required=True)
        return found

    def named_labels_file(self) -> Path:
        """Raises UserError if it is not there."""
        return self._file("matched")

    def _file(self, kind: str) -> Path:
        return find_file(self.folder / self.task, f"{self.dataset}_{kind}.json")

    def _documents(self, kind: str, key: str, bad: BadLines) -> dict[str, Document]:
        found: dict[str, Document] = {}
        for place in records(self._file(f"{kind}_test"), bad):
            with place:
                fields.add_new(found, fields.document(as_object(place), (key,)))
        return found

    def _queries(
        self,
        bad: BadLines,
        corpus: Mapping[str, Document],
        query_of: Callable[[Place], Document],
        judged_of: Callable[[Mapping[str, Any]], dict[str, int]],
        kind: str = "queries",
    ) -> Collection:
        """Queries with their own judgements, a line each."""
        queries: dict[str, Document] = {}
        qrels: dict[str, dict[str, int]] = {}
        for place in records(self._file(f"{kind}_test"), bad):
            with place:
                query, judged = query_of(place), judged_of(as_object(place))
                fields.all_known(list(judged), corpus, "the judged documents")
                if not judged:
                    raise UserError(f"query {query.id!r} has no judgement")
                fields.add_new(queries, query)
                qrels[query.id] = judged
        return Collection(corpus, queries, {"test": qrels})

    def _classification(self, bad: BadLines) -> Collection:
        labels = read_labels(self._file("label"), bad)
        return self._queries(bad, labels, _unnamed, _labelled, kind="papers")

    def _papers(self, bad: BadLines, judged_of: Callable[[Mapping[str, Any]], dict[str, int]]) -> Collection:
        """Papers that are corpus and queries; those without judgements are no queries."""
        corpus: dict[str, Document] = {}
        pending: list[tuple[Place, str, dict[str, int]]] = []
        path, num_lines = self._file("papers_test"), 0
        for place in records(path, bad):
            num_lines += 1
            with place:
                record = as_object(place)
                judged = judged_of(record)
                fields.add_new(corpus, fields.document(record, ("paper",)))
                if judged:
                    short = replace(place, text=place.text[:QUARANTINED_TEXT], value=None)
                    pending.append((short, fields.identifier(record, "paper"), judged))
        qrels = {}
        for place, paper, judged in pending:  # papers cite later lines too
            with place:
                fields.all_known(list(judged), corpus, "the judged documents")
                qrels[paper] = judged
        bad.end_of_file(path, num_lines)
        return Collection(corpus, {id: corpus[id] for id in qrels}, {"test": qrels})

    def _pmc_patients(self, bad: BadLines) -> Collection:
        task = self.dataset.removeprefix("PMCPatients")
        kind = {"PAR": "article", "PPR": "patient"}[task]
        corpus = self._documents(f"{kind}s", kind, bad)
        queries = self._documents("queries", "query", bad)
        path = find_file(self.folder / self.task, f"PMCPatients/{task}/{task}_test_qrels.tsv")
        homes = (self._file("queries_test").name, self._file(f"{kind}s_test").name)
        return Collection(corpus, queries, {"test": judgements(path, fields.Judgements(queries, corpus, bad, *homes))})


def _unnamed(place: Place) -> Document:
    return fields.document(as_object(place), (), id=f"test.{place.ordinal}")


def _search(place: Place) -> Document:
    record = as_object(place)
    words = fields.text(record, "query", required=True)
    if not words.strip():
        raise UserError("query is empty")
    return Document(fields.identifier(record, "query_id"), "", words)


def _linked(record: Mapping[str, Any], key: str) -> dict[str, int]:
    return dict.fromkeys(fields.identifiers(record, key, required=True), 1)


def _scored(record: Mapping[str, Any]) -> dict[str, int]:
    return fields.grades(record, "score")


def _labelled(record: Mapping[str, Any]) -> dict[str, int]:
    if isinstance(record.get("label"), list):
        return _linked(record, "label")
    return {fields.identifier(record, "label"): 1}
