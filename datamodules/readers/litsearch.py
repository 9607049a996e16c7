"""LitSearch: questions about literature, and the papers that answer them.

Source: Ajith et al., LitSearch: A Retrieval Benchmark for Scientific Literature Search, EMNLP 2024
(princeton-nlp/LitSearch on the Hugging Face hub).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamodules.readers.collecting import FolderReader, add_document, add_documents, check_collection
from datamodules.readers.io import check_folder, suffix_of
from datamodules.readers.json_files import as_object
from datamodules.readers.rows import BadLines
from datamodules.readers.tables import read_tables
from datamodules.records import Collection, Document, UserError


@dataclass
class LitSearchReader(FolderReader):
    """Reader of the LitSearch data set. All data are the test split.

    folder/query/full*.parquet          one file with rows {"query": text, "corpusids": [id], ...}
    folder/corpus_clean/full*.parquet   rows {"corpusid": id, "title", "abstract", ...}

    Files may also be .jsonl, plain, .gz or .zst. The id of a query is its row number.
    """

    def sources(self) -> list[Path]:
        return [*self._files("query"), *self._files("corpus_clean")]

    def _files(self, config: str) -> list[Path]:
        folder = self.root / config
        check_folder(folder, "full-00000-of-00001.parquet")
        paths = sorted(folder.glob("full*"))
        files = [path for path in paths if path.suffix == ".parquet" or suffix_of(path) == ".jsonl"]
        if not files:
            raise UserError(f"{folder}: contains no file of the split 'full' (such as full-00000-of-00001.parquet)")
        return files

    def collect(self, bad: BadLines) -> Collection:
        corpus: dict[str, Document] = {}
        add_documents(corpus, read_tables(self._files("corpus_clean"), bad), "corpusid", may_be_blank=True)
        queries: dict[str, Document] = {}
        qrels: dict[str, dict[str, int]] = {}
        for row in read_tables(self._files("query"), bad):
            with row:
                record = as_object(row)
                query = Document(f"test.{row.ordinal}", "", record.words("query"))
                answers = record.ids("corpusids", required=True)
                if not answers:
                    raise UserError("corpusids is empty")
                add_document(queries, query)
                record.judged(answers, corpus)
                qrels[query.id] = dict.fromkeys(answers, 1)
        return check_collection(Collection(corpus, queries, {"test": qrels}), self.folder)
