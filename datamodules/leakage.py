"""Find evaluation texts in the training data: by id, by title, and by nearly equal text.

id      equal ids, for collections that share a numbering of documents
title   equal words in the title, ignoring case, accents, punctuation and spaces
text    a Jaccard similarity of at least 0.7 between the sets of three-word shingles. MinHash with bands (Broder, 1997)
        proposes candidates, which are then compared exactly. Queries of fewer than eight words must be equal.
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
RUN = 3  # words in a shingle
# Probability that texts share a band of 5 hashes: 0.97 at similarity 0.7, 0.05 at similarity 0.3.
BANDS, BAND_SIZE = 20, 5
THRESHOLD = 0.7  # texts with at least this similarity count as the same
MIN_WORDS = 8  # shorter texts have too few shingles
MIN_TITLE = 3  # words; shorter titles, such as "Introduction", are not specific enough

_rng = np.random.default_rng(20)
_FACTORS = _rng.integers(1, 2**61, BANDS * BAND_SIZE, dtype=np.uint64) | np.uint64(1)
_SUMMANDS = _rng.integers(0, 2**61, BANDS * BAND_SIZE, dtype=np.uint64)


class Overlap(NamedTuple):
    """A training document that is also an evaluation document.

    way: "id", "title" or "text".
    name: name of the evaluated set.
    similarity: similarity of the two texts; 1 for equal ids and titles.
    """

    way: str
    name: str
    evaluated: Document
    trained: Document
    similarity: float


def normal(text: str) -> str:
    """Return a text in lower case, without accents and punctuation, with single spaces."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return " ".join(re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c))))


def _short_query(document: Document) -> str:
    """To compare short queries, return the normalised text of a document without a title, or "" if it has a title."""
    return "" if document.title else normal(document.text)


def shingles(document: Document) -> np.ndarray:
    """Return the sorted hashes of the distinct shingles in title and text, (n,) uint64; empty for short documents."""
    words = normal(f"{document.title} {document.text}").split()
    if len(words) < MIN_WORDS:
        return np.zeros(0, dtype=np.uint64)
    codes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    runs = np.zeros(len(codes) - RUN + 1, dtype=np.uint64)
    for i in range(RUN):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + codes[i : len(codes) - RUN + 1 + i]
    return np.unique(runs)


def signature(runs: np.ndarray) -> list[bytes]:
    """Return the bands of a MinHash signature. Similar texts are likely to share a band."""
    hashed = (runs[:, None] * _FACTORS + _SUMMANDS) >> np.uint64(20)
    bands = hashed.min(axis=0).reshape(BANDS, BAND_SIZE)
    return [bytes([i]) + band.tobytes() for i, band in enumerate(bands)]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Jaccard similarity of two sorted sets."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class Index:
    """Index of the evaluation documents. Training documents, of which there may be many, are looked up one by one."""

    def __init__(self) -> None:
        self.documents: list[tuple[str, Document]] = []
        self.ways: dict[str, Sequence[str]] = {}
        self._ids: dict[str, list[int]] = defaultdict(list)
        self._titles: dict[str, list[int]] = defaultdict(list)
        self._short: dict[str, list[int]] = defaultdict(list)
        self._bands: dict[bytes, list[int]] = defaultdict(list)

    def add(self, name: str, documents: Iterable[Document], ways: Sequence[str] = WAYS) -> None:
        """Add a set of evaluation documents. ways: matching methods."""
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
            for band in signature(np.asarray(runs)) if len(runs) else ():
                self._bands[band].append(number)
            if "text" in ways and not len(runs) and (words := _short_query(document)):
                self._short[words].append(number)

    def overlaps(self, trained: Document) -> Iterator[Overlap]:
        """Yield the evaluation documents that match a training document, each at most once per method."""
        for way, numbers in (("id", self._ids.get(trained.id)), ("title", self._titles.get(normal(trained.title)))):
            for number in numbers or ():
                yield Overlap(way, *self.documents[number], trained, 1.0)
        runs = shingles(trained)
        if not len(runs):
            for number in self._short.get(_short_query(trained), ()):
                yield Overlap("text", *self.documents[number], trained, 1.0)
            return
        near = {number for band in signature(runs) for number in self._bands.get(band, ())}
        for number in sorted(near):
            name, evaluated = self.documents[number]
            score = similarity(shingles(evaluated), runs)
            if score >= THRESHOLD:
                yield Overlap("text", name, evaluated, trained, score)
