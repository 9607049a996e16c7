"""PMC-Patients: articles that are relevant to a patient (PAR), and similar patients (PPR).

Source: Zhao et al., A large-scale dataset of patient summaries for retrieval-based clinical decision support systems,
Scientific Data 2023 (pmc-patients/PMC-Patients; the ReCDS benchmark on Figshare and the Hugging Face hub).
"""

from __future__ import annotations

from pathlib import Path

from datamodules.readers.beir import read_qrels
from datamodules.readers.collecting import Judgements, add_document, check_collection
from datamodules.readers.io import find_file, find_split_files, warn_of_unread_files
from datamodules.readers.json_files import as_object, read_records
from datamodules.readers.rows import BadLines
from datamodules.records import Collection, Document, check_choice


class PmcPatientsReader:
    """Reader of the ReCDS benchmark.

    folder/queries/train_queries.jsonl   {"_id", "text"} per line; dev_queries.jsonl and test_queries.jsonl likewise
    folder/PAR/corpus.jsonl              {"_id", "title", "text"} per line (or PAR_corpus.jsonl); PPR likewise
    folder/PAR/qrels_train.tsv           a header, then query-id <tab> corpus-id <tab> score, 1 or 2 (or
                                         PAR_train_qrels.tsv); dev and test likewise

    Splits with qrels are read; there must be at least one. Every file may be compressed as .gz or .zst.

    task: "PAR" or "PPR". In PPR, queries of the train split are documents of the corpus.
    on_error, quarantine: see BadLines.
    """

    TASKS = ("PAR", "PPR")

    def __init__(self, folder: str, task: str, on_error: str = "fail", quarantine: str | None = None):
        self.folder, self.task = Path(folder), check_choice("task", task, self.TASKS)
        self.on_error, self.quarantine = check_choice("on_error", on_error, BadLines.POLICIES), quarantine

    def sources(self) -> list[Path]:
        """Return the files to read."""
        splits = self._split_files()
        queries = [find_file(self.folder, f"queries/{split}_queries.jsonl") for split in splits]
        return [self._corpus_file(), *queries, *splits.values()]

    def _corpus_file(self) -> Path:
        return find_file(self.folder, f"{self.task}/corpus.jsonl", f"{self.task}/{self.task}_corpus.jsonl")

    def _split_files(self) -> dict[str, Path]:
        return find_split_files(self.folder, f"{self.task}/qrels_SPLIT.tsv", f"{self.task}/{self.task}_SPLIT_qrels.tsv")

    def read(self) -> Collection:
        """Read and check the folder. Raises UserError with file, line and reason."""
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        qrels = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            _read_documents(self._corpus_file(), corpus, bad)
            splits = self._split_files()
            warn_of_unread_files(self.folder / self.task, "*qrels*", splits.values())
            for split, qrels_path in splits.items():
                queries_path = find_file(self.folder, f"queries/{split}_queries.jsonl")
                _read_documents(queries_path, queries, bad)
                qrels[split] = read_qrels(Judgements(qrels_path, queries, corpus, bad, queries_path.name))
        return check_collection(Collection(corpus, queries, qrels), self.folder / self.task)


def _read_documents(path: Path, documents: dict[str, Document], bad: BadLines) -> None:
    """Add the documents of a file."""
    for row in read_records(path, bad):
        with row:
            add_document(documents, as_object(row).document("_id", body="text", may_be_blank=True))
