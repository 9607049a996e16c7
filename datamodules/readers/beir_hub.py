"""BEIR data sets on the Hugging Face hub: corpus, queries and judgements as tables."""

from __future__ import annotations

from collections.abc import Iterator

from datamodules.readers.collecting import check_collection, read_into_memory
from datamodules.readers.json_files import as_object
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.readers.tables import load_hub, load_hub_splits, read_hub_table
from datamodules.records import Collection, Sink, UserError, check_choice


class BeirHubReader:
    """Reader of a data set on the hub, or of a folder that `datasets` can load. Needs `pip install datasets`.

    dataset: name such as BeIR/scifact. Its configs "corpus" and "queries" have rows {"_id", "title", "text"}.
    qrels: data set of the judgements, such as BeIR/scifact-qrels, with rows {"query-id", "corpus-id", "score"}. By
        default the config "default" of the data set (as in mteb/scifact).
    on_error, quarantine: see BadLines.
    """

    def __init__(self, dataset: str, qrels: str | None = None, on_error: str = "fail", quarantine: str | None = None):
        self.dataset, self.qrels = dataset, qrels
        self.on_error, self.quarantine = check_choice("on_error", on_error, BadLines.POLICIES), quarantine

    def read(self) -> Collection:
        """Read and check the data set. Raises UserError with table, row and reason."""
        return check_collection(read_into_memory(self._stream), self.dataset)

    def _stream(self, sink: Sink) -> None:
        with BadLines(self.on_error, self.quarantine) as bad:
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
