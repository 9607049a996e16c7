"""The training files of DPR: one JSON list of questions with their positive and negative passages.

Source: Karpukhin et al., Dense Passage Retrieval, 2020; the layout is described in the README of facebookresearch/DPR.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.json_values import as_object, records
from datamodules.readers.lines import find_file
from datamodules.records import Collection, Document, UserError

log = logging.getLogger(__name__)

POSITIVES = "positive_ctxs"
NEGATIVES = ("hard_negative_ctxs", "negative_ctxs")


class DprReader:
    """Files such as biencoder-nq-train.json, one for each split; at least one.

    An entry is {"question": ..., "answers": [...], "positive_ctxs": [...], "negative_ctxs": [...],
    "hard_negative_ctxs": [...]}, a passage {"title": ..., "text": ..., "passage_id": ...} (or "psg_id"; its score is
    not used). A passage without an id gets one from its text.

    The corpus is all passages of all files. negatives: which of the two lists are judged as not relevant, and so hard
    negatives in training (both if not given); passages of the other stay in the corpus. A passage among the positives
    is no negative. Questions without a positive are left out, as DPR does, and counted in a warning.

    Files may end in .gz or .zst, and may be JSON lines; a file is never in memory as a whole. on_error, quarantine: see
    BadLines.
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
        self.files = {s: Path(f) for s, f in zip(fields.SPLITS, (train, dev, test), strict=True) if f}
        if not self.files:
            raise UserError("DprReader: expected a file for at least one of train, dev and test")
        self.negatives = NEGATIVES if negatives is None else fields.allowed("negatives", negatives, NEGATIVES)
        self.on_error, self.quarantine = on_error, quarantine
        BadLines(on_error)

    def sources(self) -> list[Path]:
        """The files that it reads."""
        return [find_file(path.parent, path.name) for path in self.files.values()]

    def read(self) -> Collection:
        """Raises UserError naming the file, the entry and what is wrong with it."""
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        qrels: dict[str, dict[str, dict[str, int]]] = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            for split, path in self.files.items():
                qrels[split], left_out = {}, 0
                for place in records(find_file(path.parent, path.name), bad):
                    with place:
                        record = as_object(place, " with question and positive_ctxs")
                        query = Document(f"{split}.{place.ordinal}", "", fields.text(record, "question", required=True))
                        if not query.text.strip():
                            raise UserError("question is empty")
                        passages = {key: _passages(record, key) for key in (POSITIVES, *NEGATIVES)}
                        fields.add_same(corpus, [passage for some in passages.values() for passage in some])
                        if not passages[POSITIVES]:
                            left_out += 1
                            continue
                        judged = {passage.id: 0 for key in self.negatives for passage in passages[key]}
                        qrels[split][query.id] = judged | {passage.id: 1 for passage in passages[POSITIVES]}
                        queries[query.id] = query
                if left_out:
                    log.warning("%s: %d questions have no positive passage and are left out", path, left_out)
        return fields.checked(Collection(corpus, queries, qrels), ", ".join(map(str, self.files.values())))


def _passages(record: Mapping[str, Any], key: str) -> list[Document]:
    found = []
    for number, passage in enumerate(fields.listed(record, key, required=key == POSITIVES), start=1):
        if not isinstance(passage, dict):
            raise UserError(f"{key}: expected objects with title and text, got {str(passage)[:60]!r}")
        try:
            id = fields.content_id(fields.text(passage, "title"), fields.text(passage, "text"))
            if passage.get("passage_id") is not None or passage.get("psg_id") is not None:
                id = fields.identifier(passage, "passage_id", "psg_id")
            found.append(fields.document(passage, (), body="text", id=id))
        except UserError as error:
            raise UserError(f"{key}, passage {number}: {error}") from error
    return found
