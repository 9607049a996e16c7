"""Whether texts of an evaluation stand in the training data: by id, by title, and by nearly equal text.

id      the same id in another collection that numbers its documents alike
title   the same words in the title, whatever their case, accents, punctuation and spaces
text    the same text but for a few words: Jaccard similarity of its runs of three words of 0.7 or more, found by
        MinHash (Broder, 1997) with bands, and then computed exactly; queries of less than eight words must be equal
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from datamodules.records import Document

WAYS = ("id", "title", "text")
RUN = 3  # words of a shingle
BANDS, ROWS = 20, 5  # 20 bands of 5 hashes meet with probability 0.98 at similarity 0.7, and 0.04 at 0.3
THRESHOLD = 0.7
MIN_WORDS = 8  # shorter texts say too little
MIN_TITLE = 3  # words of a title that says something: "Introduction" does not

_draw = np.random.default_rng(20)
_FACTORS = _draw.integers(1, 2**61, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
_SUMMANDS = _draw.integers(0, 2**61, BANDS * ROWS, dtype=np.uint64)


class Overlap(NamedTuple):
    """A training document that is one of an evaluated set. similarity: 1 for ids and titles."""

    way: str
    name: str
    evaluated: Document
    trained: Document
    similarity: float


def normal(text: str) -> str:
    """Lower case, without accents and punctuation, one space between words."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return " ".join(re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c))))


def _words(document: Document) -> str:
    return normal(f"{document.title} {document.text}")


def _short_query(document: Document) -> str:
    """What a document without title is known by, if it is too short to be known by its shingles."""
    return "" if document.title else normal(document.text)


def shingles(document: Document) -> np.ndarray:
    """Hashes of the distinct runs of RUN words of a document's title and text: (n,) uint64, sorted; none if short."""
    words = _words(document).split()
    if len(words) < MIN_WORDS:
        return np.zeros(0, dtype=np.uint64)
    codes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    runs = np.zeros(len(codes) - RUN + 1, dtype=np.uint64)
    for i in range(RUN):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + codes[i : len(codes) - RUN + 1 + i]
    return np.unique(runs)


def signature(runs: np.ndarray) -> list[bytes]:
    """The bands of a MinHash signature: similar texts have one in common."""
    hashed = (runs[:, None] * _FACTORS + _SUMMANDS) >> np.uint64(20)
    bands = hashed.min(axis=0).reshape(BANDS, ROWS)
    return [bytes([i]) + band.tobytes() for i, band in enumerate(bands)]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class Index:
    """What is evaluated on, to be asked which of it a training document is. Training data, maybe large, pass by."""

    def __init__(self) -> None:
        self.documents: list[tuple[str, Document]] = []
        self.ways: dict[str, Sequence[str]] = {}
        self._ids: dict[str, list[int]] = defaultdict(list)
        self._titles: dict[str, list[int]] = defaultdict(list)
        self._short: dict[str, list[int]] = defaultdict(list)
        self._bands: dict[bytes, list[int]] = defaultdict(list)

    def add(self, name: str, documents: Iterable[Document], ways: Sequence[str] = WAYS) -> None:
        """A set of evaluated documents. ways: in which they are compared."""
        self.ways[name] = ways
        for document in documents:
            number = len(self.documents)
            self.documents.append((name, document))
            if "id" in ways:
                self._ids[document.id].append(number)
            title = normal(document.title)
            if "title" in ways and len(title.split()) >= MIN_TITLE:
                self._titles[title].append(number)
            runs = shingles(document) if "text" in ways else ()
            for band in signature(runs) if len(runs) else ():
                self._bands[band].append(number)
            if "text" in ways and not len(runs) and (words := _short_query(document)):
                self._short[words].append(number)

    def overlaps(self, trained: Document) -> Iterator[Overlap]:
        """What of the evaluated a training document is, each at most once for each way."""
        for way, numbers in (("id", self._ids.get(trained.id)), ("title", self._titles.get(normal(trained.title)))):
            for number in numbers or ():
                yield Overlap(way, *self.documents[number], trained, 1.0)
        runs = shingles(trained)
        if not len(runs):
            yield from (
                Overlap("text", *self.documents[n], trained, 1.0) for n in self._short.get(_short_query(trained), ())
            )
            return
        near = {number for band in signature(runs) for number in self._bands.get(band, ())}
        for number in sorted(near):
            name, evaluated = self.documents[number]
            found = similarity(shingles(evaluated), runs)
            if found >= THRESHOLD:
                yield Overlap("text", name, evaluated, trained, found)
