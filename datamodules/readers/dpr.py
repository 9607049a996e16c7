"""The training files of DPR: one JSON list of questions with their positive and negative passages.

Source: Karpukhin et al., Dense Passage Retrieval, 2020; the README of facebookresearch/DPR describes the layout.
"""

from __future__ import annotations

import logging
from pathlib import Path

from datamodules.readers.checks import SPLITS, content_id
from datamodules.readers.collecting import add_repeated, check_collection
from datamodules.readers.io import find_path
from datamodules.readers.json_files import as_object, read_records
from datamodules.readers.rows import BadLines, Record
from datamodules.records import Collection, Document, UserError, check_choice, check_choices, prefixed, short
from datamodules.text import text_key

log = logging.getLogger(__name__)

POSITIVES = "positive_ctxs"
NEGATIVES = ("hard_negative_ctxs", "negative_ctxs")


class DprReader:
    """Reader of files such as biencoder-nq-train.json, one for each split. At least one split is needed.

    An entry is {"question": ..., "answers": [...], "positive_ctxs": [...], "negative_ctxs": [...],
    "hard_negative_ctxs": [...]}; a passage is {"title": ..., "text": ..., "passage_id" or "psg_id": ...}, and its score
    is not used. A passage without an id gets one from its text.

    The corpus has all passages of all files. Questions without a positive are left out, as in DPR, and a warning counts
    them. Files may be compressed as .gz or .zst, and may be JSON lines. No file is held in memory.

    train, dev, test: file of the split.
    negatives: lists whose passages get grade 0, and so become hard negatives in training: "hard_negative_ctxs",
        "negative_ctxs", or by default both. A passage that is also a positive is not a negative.
    on_error, quarantine: see BadLines.
    """

    def __init__(
        self,
        train: str | None = None,
        dev: str | None = None,
        test: str | None = None,
        negatives: list[str] | None = None,
        on_error: str = "fail",
        quarantine: str | None = None,
    ):
        self.files = {split: Path(file) for split, file in zip(SPLITS, (train, dev, test), strict=True) if file}
        if not self.files:
            raise UserError("DprReader: expected a file for at least one of train, dev and test")
        self.negatives = NEGATIVES if negatives is None else check_choices("negatives", negatives, NEGATIVES)
        self.on_error, self.quarantine = check_choice("on_error", on_error, BadLines.POLICIES), quarantine

    def sources(self) -> list[Path]:
        """Return the files to read."""
        return [find_path(path) for path in self.files.values()]

    def read(self) -> Collection:
        """Read and check all files. Raises UserError with file, entry and reason."""
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            qrels = {split: self._read_split(split, corpus, queries, bad) for split in self.files}
        return check_collection(Collection(corpus, queries, qrels), ", ".join(map(str, self.files.values())))

    def _read_split(
        self, split: str, corpus: dict[str, Document], queries: dict[str, Document], bad: BadLines
    ) -> dict[str, dict[str, int]]:
        """Add the passages and questions of a split, and return its judgements."""
        path, left_out = self.files[split], 0
        qrels: dict[str, dict[str, int]] = {}
        for row in read_records(find_path(path), bad):
            with row:
                record = as_object(row, " with question and positive_ctxs")
                query = Document(f"{split}.{row.ordinal}", "", record.words("question"))
                passages = {key: _read_passages(record, key) for key in (POSITIVES, *NEGATIVES)}
                add_repeated(corpus, [passage for group in passages.values() for passage in group])
                if not passages[POSITIVES]:
                    left_out += 1
                    continue
                negatives = {passage.id: 0 for key in self.negatives for passage in passages[key]}
                qrels[query.id] = negatives | {passage.id: 1 for passage in passages[POSITIVES]}
                queries[query.id] = query
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
