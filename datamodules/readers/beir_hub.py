"""BEIR data sets on the Hugging Face hub: corpus, queries and judgements as tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamodules.options import REQUIRED, option
from datamodules.readers.collecting import Judgements, LineReader, add_documents, check_collection
from datamodules.readers.json_files import as_object
from datamodules.readers.rows import BadLines
from datamodules.readers.tables import load_hub, load_hub_splits, read_hub_table
from datamodules.records import Collection, Document


@dataclass
class BeirHubReader(LineReader):
    """Reader of a data set on the hub, or of a folder that `datasets` can load. Needs `pip install datasets`."""

    dataset: str = option(
        REQUIRED, 'name, such as BeIR/scifact. The configs "corpus" and "queries" have rows {"_id", "title", "text"}'
    )
    qrels: str | None = option(
        None,
        'data set of the judgements, such as BeIR/scifact-qrels, with rows {"query-id", "corpus-id", "score"}. By '
        'default the config "default" of the data set (as in mteb/scifact)',
    )

    def collect(self, bad: BadLines) -> Collection:
        corpus, queries = self._read_documents("corpus", bad), self._read_documents("queries", bad)
        tables = load_hub_splits(self.qrels, None) if self.qrels else load_hub_splits(self.dataset, "default")
        qrels = {}
        for split, records in tables.items():
            name = f"{self.qrels or self.dataset}/{split}"
            judgements = Judgements(Path(name), queries, corpus, bad, f"{self.dataset}/queries")
            for row in read_hub_table(name, records, bad):
                with row:
                    record = as_object(row)
                    judgements.add(record.id("query-id"), record.id("corpus-id"), record.grade("score"))
            qrels[split] = judgements.finish()
        return check_collection(Collection(corpus, queries, qrels), self.dataset)

    def _read_documents(self, config: str, bad: BadLines) -> dict[str, Document]:
        documents: dict[str, Document] = {}
        for split, records in load_hub(self.dataset, config).items():
            rows = read_hub_table(f"{self.dataset}/{config}/{split}", records, bad)
            add_documents(documents, rows, "_id", "id", body="text", may_be_blank=config == "corpus")
        return documents
