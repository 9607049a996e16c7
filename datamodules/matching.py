"""Which labels are named in a paper: names of one or more words, found as whole words in title and abstract.

An automaton over words: one pass over a paper finds all names, whatever their number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from datamodules.records import Document
from datamodules.text import input_text

_word = re.compile(r"\w+")
_END = ""  # where a name ends in the automaton; no word is empty


def words(text: str) -> list[str]:
    return _word.findall(text.lower())


class NameMatcher:
    """Finds the names (titles) of labels, in any case and spacing, however they are punctuated."""

    def __init__(self, labels: Mapping[str, Document]):
        self.root: dict = {}
        for id, label in labels.items():
            node = self.root
            for word in words(label.title):
                node = node.setdefault(word, {})
            if node is not self.root:
                node.setdefault(_END, []).append(id)

    def labels_in(self, document: Document) -> list[str]:
        """The labels whose names occur in a document, each once, in the order in which they begin."""
        text = words(input_text(document, " "))
        found: dict[str, None] = {}
        for start, word in enumerate(text):
            node, place = self.root.get(word), start
            while node is not None:
                found.update(dict.fromkeys(node.get(_END, ())))
                place += 1
                node = node.get(text[place]) if place < len(text) else None
        return list(found)

    def of_all(self, documents: Iterable[Document]) -> dict[str, list[str]]:
        """Document id -> the labels that are named in it."""
        return {document.id: self.labels_in(document) for document in documents}
