"""Gaps in data sets that are not damage: blank documents, texts under other keys, judged documents outside the corpus.

Published data sets have them (a document of TREC-COVID is empty, and ArguAna judges five documents that it does not
have). They are counted during reading, and logged as warnings at the end.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.readers.checks import first_ids
from datamodules.records import Document, UserError, counted
from datamodules.text import LONG_TEXT, TEXT_KEYS, unread_key

log = logging.getLogger(__name__)


@dataclass
class _Gaps:
    """Counts of the gaps in one file.

    documents, with_text, blank: number of documents, of those with a text, and of those with neither title nor text.
    unread: for each key that is known to contain texts but is not read, the number of documents without other text.
    long: for each key that is not read, the number of documents with a long string.
    judgements: number of judgements.
    missing: number of judgements for each document outside the corpus.
    """

    documents: int = 0
    with_text: int = 0
    blank: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    long: Counter[str] = field(default_factory=Counter)
    judgements: int = 0
    missing: Counter[str] = field(default_factory=Counter)


class Gaps:
    """The gaps of all files of one `read()`."""

    def __init__(self) -> None:
        self.by_file: dict[Path, _Gaps] = {}

    def add_document(self, path: Path, document: Document, record: Mapping[str, Any]) -> None:
        """Count a document. record: object that the document was read from."""
        gaps = self.by_file.setdefault(path, _Gaps())
        gaps.documents += 1
        if document.text.strip():
            gaps.with_text += 1
            return
        gaps.blank += not document.title.strip()
        if key := unread_key(record):
            gaps.unread[key] += 1
        elif not gaps.with_text:
            gaps.long.update(key for key, value in record.items() if _is_long(value) and value != document.title)

    def add_judgements(self, path: Path, documents: Iterable[str], corpus: Container[str]) -> None:
        """Count judged documents, and those that are not in the corpus."""
        gaps = self.by_file.setdefault(path, _Gaps())
        for document in documents:
            gaps.judgements += 1
            if document not in corpus:
                gaps.missing[document] += 1

    def report(self) -> None:
        """Log a warning for each kind of gap in each file.

        Raises UserError if no document of a file has a title or text, or if all judged documents are missing. In these
        cases, the file has another format, or belongs to another corpus.
        """
        for path, gaps in self.by_file.items():
            if gaps.blank and gaps.blank == gaps.documents:
                raise UserError(f"{path}: no document has a title or a text")
            if gaps.missing and gaps.missing.total() == gaps.judgements:
                ids = first_ids(list(gaps.missing))
                raise UserError(f"{path}: none of the judged documents is in the corpus: {ids}")
            self._warn(path, gaps)

    def _warn(self, path: Path, gaps: _Gaps) -> None:
        expected = " or ".join(TEXT_KEYS)
        for key, count in gaps.unread.items():
            log.warning(
                "%s: %s without a text have %s, which is not read; the text of a paper is expected as %s",
                *(path, counted(count, "document"), key, expected),
            )
        if gaps.long and not gaps.with_text:
            key, count = gaps.long.most_common(1)[0]
            log.warning(
                "%s: no document has a text, but %d of %d have a long string as %s, which is not read; the text of a "
                "paper is expected as %s",
                *(path, count, gaps.documents, key, expected),
            )
        if gaps.blank:
            log.warning(
                "%s: %s without title and text; an evaluation never finds them, and training leaves them out",
                *(path, counted(gaps.blank, "document")),
            )
        if gaps.missing:
            log.warning(
                "%s: %d of %d judgements are for documents that are not in the corpus (%s, first %r); an "
                "evaluation counts them as not found, and training leaves them out",
                *(path, gaps.missing.total(), gaps.judgements, counted(len(gaps.missing), "document")),
                next(iter(gaps.missing)),
            )


def _is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= LONG_TEXT and " " in value.strip()
