"""BEIR's sets as the Hugging Face hub has them: corpus, queries and judgements as tables."""

from __future__ import annotations

from collections.abc import Iterator

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines, Place
from datamodules.readers.gathered import gathered
from datamodules.readers.json_values import as_object
from datamodules.readers.rows import hub_splits, load_hub, rows_of_hub
from datamodules.records import Collection, Sink, UserError


class BeirHubReader:
    """A data set of the hub, or a folder that `datasets` can load.

    dataset: BeIR/scifact, with the configs "corpus" and "queries" of {"_id", "title", "text"}
    qrels: BeIR/scifact-qrels, of {"query-id", "corpus-id", "score"}; if not given, the config "default" of the data set
    (mteb/scifact)

    Needs `pip install datasets`. on_error, quarantine: see BadLines.
    """

    def __init__(self, dataset: str, qrels: str | None = None, on_error: str = "fail", quarantine: str | None = None):
        self.dataset, self.qrels = dataset, qrels
        self.on_error, self.quarantine = on_error, quarantine
        BadLines(on_error)

    def read(self) -> Collection:
        """Raises UserError naming the table, the row and what is wrong with it."""
        return fields.checked(gathered(self._stream), self.dataset)

    def _stream(self, sink: Sink) -> None:
        with BadLines(self.on_error, self.quarantine) as bad:
            for config, add in (("corpus", sink.add_document), ("queries", sink.add_query)):
                for place in self._rows(config, bad):
                    with place:
                        add(fields.document(as_object(place), ("_id", "id"), body="text"))
            tables = hub_splits(self.qrels, None) if self.qrels else hub_splits(self.dataset, "default")
            for split, rows in tables.items():
                name = f"{self.qrels or self.dataset}/{split}"
                for place in rows_of_hub(name, rows, bad):
                    with place:
                        self._judge(as_object(place), split, sink)
                if not sink.has(split):
                    raise UserError(f"{name}: the split is empty")

    def _rows(self, config: str, bad: BadLines) -> Iterator[Place]:
        for split, rows in load_hub(self.dataset, config).items():
            yield from rows_of_hub(f"{self.dataset}/{config}/{split}", rows, bad)

    def _judge(self, record: dict, split: str, sink: Sink) -> None:
        query, document = (fields.identifier(record, key) for key in ("query-id", "corpus-id"))
        for key, id, known in (("query-id", query, sink.queries), ("corpus-id", document, sink.documents)):
            if id not in known:
                raise UserError(f"{key}: {id!r} is not in the data set")
        sink.add_judgement(split, query, document, fields.grade(record.get("score")))
