"""PMC-Patients: articles that are relevant to a patient (PAR), and similar patients (PPR).

Source: Zhao et al., A large-scale dataset of patient summaries for retrieval-based clinical decision support systems,
Scientific Data 2023 (pmc-patients/PMC-Patients; the ReCDS benchmark on Figshare and the Hugging Face hub).
"""

from __future__ import annotations

from pathlib import Path

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.beir import judgements
from datamodules.readers.json_values import as_object, records
from datamodules.readers.lines import find_file
from datamodules.records import Collection, Document


class PmcPatientsReader:
    """The folder of the ReCDS benchmark.

    folder/queries/train_queries.jsonl   {"_id", "text"} a line; dev_queries.jsonl and test_queries.jsonl the same
    folder/PAR/corpus.jsonl              {"_id", "title", "text"} a line (or PAR_corpus.jsonl); PPR the same
    folder/PAR/qrels_train.tsv           a header, then query-id <tab> corpus-id <tab> score, 1 or 2 (or
                                         PAR_train_qrels.tsv); dev and test the same

    task: "PAR" or "PPR". In PPR, queries of the train split are documents of the corpus. A split is read if it has
    qrels; at least one must. Every file may end in .gz or .zst. on_error, quarantine: see BadLines.
    """

    TASKS = ("PAR", "PPR")

    def __init__(self, folder: str, task: str, on_error: str = "fail", quarantine: str | None = None):
        fields.allowed("task", [task], self.TASKS)
        BadLines(on_error)
        self.folder, self.task = Path(folder), task
        self.on_error, self.quarantine = on_error, quarantine

    def sources(self) -> list[Path]:
        """The files that it reads."""
        splits = self._splits()
        queries = [find_file(self.folder, f"queries/{split}_queries.jsonl") for split in splits]
        return [self._corpus(), *queries, *splits.values()]

    def _corpus(self) -> Path:
        return find_file(self.folder, f"{self.task}/corpus.jsonl", f"{self.task}/{self.task}_corpus.jsonl")

    def _splits(self) -> dict[str, Path]:
        names = {s: (f"{self.task}/qrels_{s}.tsv", f"{self.task}/{self.task}_{s}_qrels.tsv") for s in fields.SPLITS}
        found = {split: find_file(self.folder, *both, required=False) for split, both in names.items()}
        return {split: path for split, path in found.items() if path}

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        qrels = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            path = self._corpus()
            _add(path, corpus, bad)
            for split, qrels_path in self._splits().items():
                file = find_file(self.folder, f"queries/{split}_queries.jsonl")
                _add(file, queries, bad)
                found = fields.Judgements(queries, corpus, bad, file.name, path.name)
                qrels[split] = judgements(qrels_path, found)
        return fields.checked(Collection(corpus, queries, qrels), self.folder / self.task)


def _add(path: Path, documents: dict[str, Document], bad: BadLines) -> None:
    for place in records(path, bad):
        with place:
            fields.add_new(documents, fields.document(as_object(place), ("_id",), body="text"))
