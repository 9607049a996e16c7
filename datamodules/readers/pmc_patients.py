"""PMC-Patients: articles that are relevant to a patient (PAR), and similar patients (PPR).

Source: Zhao et al., A large-scale dataset of patient summaries for retrieval-based clinical decision support systems,
Scientific Data 2023 (pmc-patients/PMC-Patients; the ReCDS benchmark on Figshare and the Hugging Face hub).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamodules.options import REQUIRED, option
from datamodules.readers.beir import read_qrels
from datamodules.readers.collecting import FolderReader, Judgements, add_documents, check_collection
from datamodules.readers.io import find_split_files, warn_of_unread_files
from datamodules.readers.json_files import read_records
from datamodules.readers.rows import BadLines
from datamodules.records import Collection, Document


@dataclass
class PmcPatientsReader(FolderReader):
    """Reader of the ReCDS benchmark.

    folder/queries/train_queries.jsonl   {"_id", "text"} per line; dev_queries.jsonl and test_queries.jsonl likewise
    folder/PAR/corpus.jsonl              {"_id", "title", "text"} per line (or PAR_corpus.jsonl); PPR likewise
    folder/PAR/qrels_train.tsv           a header, then query-id <tab> corpus-id <tab> score, 1 or 2 (or
                                         PAR_train_qrels.tsv); dev and test likewise

    All splits with qrels are read, and there must be at least one. Every file may be compressed as .gz or .zst.
    """

    TASKS = ("PAR", "PPR")

    task: str = option(REQUIRED, "task; in PPR, queries of the train split are documents of the corpus", choices=TASKS)

    def sources(self) -> list[Path]:
        splits = self._split_files()
        return [self._corpus_file(), *map(self._queries_file, splits), *splits.values()]

    def _corpus_file(self) -> Path:
        return self.find(f"{self.task}/corpus.jsonl", f"{self.task}/{self.task}_corpus.jsonl")

    def _queries_file(self, split: str) -> Path:
        return self.find(f"queries/{split}_queries.jsonl")

    def _split_files(self) -> dict[str, Path]:
        return find_split_files(self.root, f"{self.task}/qrels_SPLIT.tsv", f"{self.task}/{self.task}_SPLIT_qrels.tsv")

    def collect(self, bad: BadLines) -> Collection:
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        qrels = {}
        add_documents(corpus, read_records(self._corpus_file(), bad), "_id", body="text", may_be_blank=True)
        splits = self._split_files()
        warn_of_unread_files(self.root / self.task, "*qrels*", splits.values())
        for split, path in splits.items():
            queries_path = self._queries_file(split)
            add_documents(queries, read_records(queries_path, bad), "_id", body="text", may_be_blank=True)
            qrels[split] = read_qrels(Judgements(path, queries, corpus, bad, queries_path.name))
        return check_collection(Collection(corpus, queries, qrels), self.root / self.task)
