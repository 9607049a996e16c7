"""The evaluation data published by the authors of SciMult.

Source: Zhang et al., Pre-training Multi-task Contrastive Learning Models for Scientific Literature Understanding,
Findings of EMNLP 2023, section 4 and table A2 (yuzhimanhua/SciMult).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import REQUIRED, option
from datamodules.readers.beir import read_qrels
from datamodules.readers.collecting import FolderReader, Judgements, add_document, add_documents, check_collection
from datamodules.readers.io import check_folder
from datamodules.readers.json_files import as_object, read_records
from datamodules.readers.labels import read_labels
from datamodules.readers.rows import BadLines, Record
from datamodules.records import Collection, Document, UserError, check_choice

DATASETS = {
    "classification_fine": ("CSConference", "ChemistryMeSH", "Geography", "Psychology"),
    "classification_coarse": ("MAG", "MeSH"),
    "link_prediction_retrieval": ("SciDocs", "PMCPatientsPPR"),
    "link_prediction_reranking": ("Recommendation",),
    "search": ("Search", "TRECCOVID_SciRepEval", "TRECCOVID_BEIR", "SciFact", "NFCorpus"),
    "pmc_patients": ("PMCPatientsPAR", "PMCPatientsPPR"),
}

QueryOf = Callable[[Record, str], Document]  # (record, id to use if the record has none) -> query
GradesOf = Callable[[Record], dict[str, int]]  # record -> grades of a query's documents


@dataclass
class SciMultReader(FolderReader):
    """Reader of one data set from the folder with classification_fine, search and so on. All data are the test split.

    classification_fine/D_label.json, D_papers_test.json (and classification_coarse)
        {"label", "name": [...], "definition"}, {"title", "abstract", "label": [id], or one id}
    link_prediction_retrieval/SciDocs_papers_test.json
        {"paper", "title", "abstract", "cite": [id], "co-cite": [id]}
    link_prediction_retrieval/PMCPatientsPPR_patients_test.json, PMCPatientsPPR_queries_test.json
        {"patient", "title", "abstract"}, {"title", "abstract", "patient": [id]}
    link_prediction_reranking/Recommendation_papers_test.json
        {"paper", "title", "abstract", "score": {id: grade}}; a paper with scores is a query
    search/D_papers_test.json, D_queries_test.json
        {"paper", "title", "abstract"}, {"query_id", "query", "score": {id: grade}}
    pmc_patients/DPAR_articles_test.json (DPPR_patients_test.json), D_queries_test.json
        {"article" or "patient", "title", "abstract"}, {"query", "title", "abstract"}; with the judgements of
        pmc_patients/PMCPatients/PAR/PAR_test_qrels.tsv

    All files are JSON lines, and may be compressed as .gz or .zst. A query without an id is named after its line.
    Queries of Recommendation, Search and TRECCOVID_SciRepEval have their own candidates: the documents with a grade,
    including 0. Do not rank other documents for these queries. classification_fine/D_matched.json lists the labels
    whose names occur in each paper, {"candidate": [id]} per line. The folder scidocs is read by SciDocsReader.
    """

    task: str = option(REQUIRED, "folder of the data set, such as search", choices=tuple(DATASETS))
    dataset: str = option(REQUIRED, "name of the data set (D above), such as SciFact")
    relation: str = option("cite", "links of SciDocs", choices=("cite", "co-cite"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(f"dataset (of {self.task})", self.dataset, DATASETS[self.task])

    def sources(self) -> list[Path]:
        folder = self.root / self.task
        check_folder(folder, f"files such as {self.dataset}_papers_test.json")
        prefixes = (f"{self.dataset}_", f"{self.dataset.removeprefix('PMCPatients')}_test_qrels")
        return sorted(path for path in folder.rglob("*") if path.is_file() and path.name.startswith(prefixes))

    def collect(self, bad: BadLines) -> Collection:
        if self.task.startswith("classification"):
            labels = read_labels(self._file("label"), bad)
            collection = self._read_queries(bad, labels, _unnamed_query, _label_grades, kind="papers")
        elif self.task == "pmc_patients":
            collection = self._read_pmc_patients(bad)
        elif self.dataset == "SciDocs":
            collection = self._read_linked_papers(bad, lambda record: _link_grades(record, self.relation))
        elif self.dataset == "PMCPatientsPPR":
            patients = self._read_documents("patients", "patient", bad)
            collection = self._read_queries(
                bad, patients, _unnamed_query, lambda record: _link_grades(record, "patient")
            )
        elif self.task == "link_prediction_reranking":
            collection = self._read_linked_papers(bad, lambda record: record.grades("score"))
        else:
            papers = self._read_documents("papers", "paper", bad)
            collection = self._read_queries(bad, papers, _search_query, lambda record: record.grades("score"))
        return check_collection(collection, self.root / self.task / self.dataset)

    def named_labels(self) -> dict[str, list[str]]:
        """Return the labels whose names occur in each paper, as the authors matched them (classification_fine only)."""
        labels = {}
        with BadLines("fail") as bad:
            for row in read_records(self.named_labels_file(), bad):
                with row:
                    labels[f"test.{row.ordinal}"] = as_object(row).ids("candidate", required=True)
        return labels

    def named_labels_file(self) -> Path:
        """Return the file of matched labels. Raises UserError if it is missing."""
        return self._file("matched")

    def _file(self, kind: str) -> Path:
        return self.find(f"{self.task}/{self.dataset}_{kind}.json")

    def _read_documents(self, kind: str, key: str, bad: BadLines) -> dict[str, Document]:
        documents: dict[str, Document] = {}
        rows = read_records(self._file(f"{kind}_test"), bad)
        add_documents(documents, rows, key, may_be_blank=key != "query")
        return documents

    def _read_queries(
        self,
        bad: BadLines,
        corpus: Mapping[str, Document],
        query_of: QueryOf,
        grades_of: GradesOf,
        kind: str = "queries",
    ) -> Collection:
        """Return a collection from a file with one query and its judgements per line."""
        queries: dict[str, Document] = {}
        qrels: dict[str, dict[str, int]] = {}
        for row in read_records(self._file(f"{kind}_test"), bad):
            with row:
                record = as_object(row)
                query, grades = query_of(record, f"test.{row.ordinal}"), grades_of(record)
                if not grades:
                    raise UserError(f"query {query.id!r} has no judgements")
                add_document(queries, query)
                bad.gaps.add_judgements(row.path, grades, corpus)
                qrels[query.id] = grades
        return Collection(corpus, queries, {"test": qrels})

    def _read_linked_papers(self, bad: BadLines, grades_of: GradesOf) -> Collection:
        """Return a collection whose queries are the papers of the corpus that have judgements."""
        corpus: dict[str, Document] = {}
        qrels: dict[str, dict[str, int]] = {}
        path = self._file("papers_test")
        for row in read_records(path, bad):
            with row:
                record = as_object(row)
                grades = grades_of(record)
                paper = record.document("paper", may_be_blank=True)
                add_document(corpus, paper)
                if grades:
                    qrels[paper.id] = grades
        for grades in qrels.values():  # papers also cite papers in later lines
            bad.gaps.add_judgements(path, grades, corpus)
        return Collection(corpus, {id: corpus[id] for id in qrels}, {"test": qrels})

    def _read_pmc_patients(self, bad: BadLines) -> Collection:
        task = self.dataset.removeprefix("PMCPatients")
        kind = {"PAR": "article", "PPR": "patient"}[task]
        corpus = self._read_documents(f"{kind}s", kind, bad)
        queries = self._read_documents("queries", "query", bad)
        path = self.find(f"{self.task}/PMCPatients/{task}/{task}_test_qrels.tsv")
        qrels = read_qrels(Judgements(path, queries, corpus, bad, self._file("queries_test").name))
        return Collection(corpus, queries, {"test": qrels})


def _unnamed_query(record: Record, id: str) -> Document:
    return record.document(id=id)


def _search_query(record: Record, _: str) -> Document:
    return Document(record.id("query_id"), "", record.words("query"))


def _link_grades(record: Record, key: str) -> dict[str, int]:
    return dict.fromkeys(record.ids(key, required=True), 1)


def _label_grades(record: Record) -> dict[str, int]:
    if isinstance(record.get("label"), list):
        return _link_grades(record, "label")
    return {record.id("label"): 1}
