"""DPR's training files: one JSON list of questions with their positive and negative passages.

Source: Karpukhin et al., Dense Passage Retrieval, 2020; the README of facebookresearch/DPR describes the layout.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import option
from datamodules.readers.checks import SPLITS, content_id
from datamodules.readers.collecting import LineReader, add_repeated, check_collection
from datamodules.readers.io import find_path
from datamodules.readers.json_files import as_object, read_records
from datamodules.readers.rows import BadLines, Record
from datamodules.records import Collection, Document, UserError, prefixed, short
from datamodules.text import text_key

log = logging.getLogger(__name__)

POSITIVES = "positive_ctxs"
NEGATIVES = ("hard_negative_ctxs", "negative_ctxs")


@dataclass
class DprReader(LineReader):
    """Reader of files such as biencoder-nq-train.json, one file per split. At least one split is needed.

    An entry is {"question": ..., "answers": [...], "positive_ctxs": [...], "negative_ctxs": [...],
    "hard_negative_ctxs": [...]}; a passage is {"title": ..., "text": ..., "passage_id" or "psg_id": ...}. Its score is
    not used. A passage without an id gets one from its text.

    The corpus has all passages of all files. Entries of a split with the same question are joined; a passage that is a
    positive of one of them is a positive. Questions without a positive are left out, as in DPR, and a warning counts
    them. Files may be compressed as .gz or .zst, and may be JSON lines. Files are never held in memory.
    """

    train: str | None = option(None, "file of the train split")
    dev: str | None = option(None, "file of the dev split")
    test: str | None = option(None, "file of the test split")
    negatives: list[str] | None = option(
        None,
        "lists whose passages get grade 0 and become hard negatives in training, by default both. A passage that is "
        "also a positive is not a negative",
        choices=NEGATIVES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._files():
            raise UserError("DprReader: expected a file for at least one of train, dev and test")

    def _files(self) -> dict[str, str]:
        return {split: file for split in SPLITS if (file := getattr(self, split))}

    def sources(self) -> list[Path]:
        """Return the files to read."""
        return [find_path(Path(file)) for file in self._files().values()]

    def collect(self, bad: BadLines) -> Collection:
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        files = zip(self._files(), self.sources(), strict=True)
        qrels = {split: self._read_split(split, path, corpus, queries, bad) for split, path in files}
        return check_collection(Collection(corpus, queries, qrels), ", ".join(self._files().values()))

    def _read_split(
        self, split: str, path: Path, corpus: dict[str, Document], queries: dict[str, Document], bad: BadLines
    ) -> dict[str, dict[str, int]]:
        """Add the passages and questions of a split, and return the judgements."""
        qrels: dict[str, dict[str, int]] = {}
        left_out, negatives = 0, NEGATIVES if self.negatives is None else self.negatives
        ids: dict[str, str] = {}  # by question
        for row in read_records(path, bad):
            with row:
                record = as_object(row, " with question and positive_ctxs")
                query = Document(f"{split}.{row.ordinal}", "", record.words("question"))
                passages = {key: _read_passages(record, key) for key in (POSITIVES, *NEGATIVES)}
                add_repeated(corpus, [passage for group in passages.values() for passage in group])
                if not passages[POSITIVES]:
                    left_out += 1
                    continue
                id = ids.setdefault(query.text, query.id)
                grades = {passage.id: 0 for key in negatives for passage in passages[key]} | qrels.get(id, {})
                qrels[id] = grades | {passage.id: 1 for passage in passages[POSITIVES]}
                queries.setdefault(id, query)
        if left_out:
            log.warning("%s: left out %d questions without a positive passage", path, left_out)
        return qrels


def _read_passages(record: Record, key: str) -> list[Document]:
    passages = []
    for number, passage in enumerate(record.array(key, required=key == POSITIVES), start=1):
        if not isinstance(passage, dict):
            raise UserError(f"{key}: expected objects with title and text, got {short(passage)}")
        with prefixed(f"{key}, passage {number}: "):
            passage = Record.of(record.row, passage)
            id = content_id(passage.text("title"), passage.text(text_key(passage)))
            if passage.get("passage_id") is not None or passage.get("psg_id") is not None:
                id = passage.id("passage_id", "psg_id")
            passages.append(passage.document(body="text", id=id, may_be_blank=True))
    return passages
