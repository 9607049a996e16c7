"""LitSearch: questions about literature, and the papers that answer them.

Source: Ajith et al., LitSearch: A Retrieval Benchmark for Scientific Literature Search, EMNLP 2024
(princeton-nlp/LitSearch on the Hugging Face hub).
"""

from __future__ import annotations

from pathlib import Path

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.json_values import as_object
from datamodules.readers.rows import rows_of_files
from datamodules.records import Collection, Document, UserError

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")


class LitSearchReader:
    """The folder of the data set; all of it is the test split.

    folder/query/full*.parquet          one file, {"query": text, "corpusids": [id], ...} a row
    folder/corpus_clean/full*.parquet   {"corpusid": id, "title", "abstract", ...} a row

    Or .jsonl, plain, .gz or .zst. A query is named by its row. on_error, quarantine: see BadLines.
    """

    def __init__(self, folder: str, on_error: str = "fail", quarantine: str | None = None):
        BadLines(on_error)
        self.folder, self.on_error, self.quarantine = Path(folder), on_error, quarantine

    def sources(self) -> list[Path]:
        """The files that it reads."""
        return [*self._files("query"), *self._files("corpus_clean")]

    def _files(self, config: str) -> list[Path]:
        home = self.folder / config
        found = sorted(path for path in home.glob("full*") if path.name.endswith(ENDINGS))
        if not home.is_dir():
            raise UserError(f"{home}: no such folder (expected full-00000-of-00001.parquet in it)")
        if not found:
            raise UserError(f"{home}: has no file of the split full (such as full-00000-of-00001.parquet)")
        return found

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        qrels: dict[str, dict[str, int]] = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            for place in rows_of_files(self._files("corpus_clean"), bad):
                with place:
                    fields.add_new(corpus, fields.document(as_object(place), ("corpusid",)))
            for place in rows_of_files(self._files("query"), bad):
                with place:
                    record = as_object(place)
                    words = fields.text(record, "query", required=True)
                    answers = fields.identifiers(record, "corpusids", required=True)
                    fields.all_known(answers, corpus, "corpusids")
                    if not words.strip() or not answers:
                        raise UserError("query or corpusids is empty")
                    query = Document(f"test.{place.ordinal}", "", words)
                    fields.add_new(queries, query)
                    qrels[query.id] = dict.fromkeys(answers, 1)
        return fields.checked(Collection(corpus, queries, {"test": qrels}), self.folder)
