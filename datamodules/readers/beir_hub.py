"""BEIR data sets on the Hugging Face hub: corpus, queries and judgements as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from datamodules.options import REQUIRED, option
from datamodules.readers.collecting import SinkReader, check_collection
from datamodules.readers.json_files import as_object
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.readers.tables import load_hub, load_hub_splits, read_hub_table
from datamodules.records import Collection, Sink, UserError


@dataclass
class BeirHubReader(SinkReader):
    """Reader of a data set on the hub, or of a folder that `datasets` can load. Needs `pip install datasets`."""

    dataset: str = option(
        REQUIRED, 'name such as BeIR/scifact. Its configs "corpus" and "queries" have rows {"_id", "title", "text"}'
    )
    qrels: str | None = option(
        None,
        'data set of the judgements, such as BeIR/scifact-qrels, with rows {"query-id", "corpus-id", "score"}. By '
        'default the config "default" of the data set (as in mteb/scifact)',
    )

    def collect(self, bad: BadLines) -> Collection:
        return check_collection(super().collect(bad), self.dataset)

    def write(self, sink: Sink, bad: BadLines) -> None:
        for config, add in (("corpus", sink.add_document), ("queries", sink.add_query)):
            for row in self._read_config(config, bad):
                with row:
                    add(as_object(row).document("_id", "id", body="text", may_be_blank=config == "corpus"))
        tables = load_hub_splits(self.qrels, None) if self.qrels else load_hub_splits(self.dataset, "default")
        for split, records in tables.items():
            name = f"{self.qrels or self.dataset}/{split}"
            for row in read_hub_table(name, records, bad):
                with row:
                    self._add_judgement(as_object(row), split, sink)
            if not sink.has(split):
                raise UserError(f"{name}: the split is empty")

    def _read_config(self, config: str, bad: BadLines) -> Iterator[Row]:
        for split, records in load_hub(self.dataset, config).items():
            yield from read_hub_table(f"{self.dataset}/{config}/{split}", records, bad)

    def _add_judgement(self, record: Record, split: str, sink: Sink) -> None:
        query, document = record.id("query-id"), record.id("corpus-id")
        if query not in sink.queries:
            raise UserError(f"query-id: {query!r} is not in the data set")
        sink.add_judgement(split, query, document, record.grade("score"))
        record.judged((document,), sink.documents)
