"""Turn documents into inputs of an encoder: title [SEP] text, tokens, chunks. Also finds label names in texts.

    paper   title [SEP] abstract
    label   name [SEP] definition
    query   query

The tokenizer adds the outer [CLS] and [SEP]. Token types are all 0, as in the SciMult paper (section 3.1).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from datamodules.records import Document, short

log = logging.getLogger(__name__)

TEXT_KEYS = ("text", "abstract")  # keys for a paper's text, of which the first non-blank one is read
# Keys of the text in other layouts: OpenAlex, PubMed, arXiv, bulk data of Semantic Scholar, Pyserini, ...
OTHER_TEXT_KEYS = {"summary", "description", "body", "content", "contents", "passage", "fulltext", "full_text", "tldr"}
LONG_TEXT = 80  # characters; longer strings are probably texts


def text_key(record: Mapping[str, Any], preferred: str = TEXT_KEYS[0]) -> str:
    """Return the key of a paper's text: the preferred key, or another of TEXT_KEYS if that one is missing or blank.

    A preferred key outside TEXT_KEYS, such as "definition", has no alternatives.
    """
    keys = dict.fromkeys((preferred, *TEXT_KEYS)) if preferred in TEXT_KEYS else (preferred,)
    return next((key for key in keys if not _is_blank(record.get(key))), preferred)


def unread_key(record: Mapping[str, Any]) -> str | None:
    """Return a key that contains the text in other layouts, but is not read here, or None."""
    for key, value in record.items():
        name = str(key).lower()
        is_text = name in OTHER_TEXT_KEYS or name.startswith("abstract") or name.endswith("abstract")
        if is_text and key not in TEXT_KEYS and not _is_blank(value) and not isinstance(value, bool | int | float):
            return str(key)
    return None


def _is_blank(value: Any) -> bool:
    return value is None or value in ({}, []) or (isinstance(value, str) and not value.strip())


def as_documents(items: Sequence[Any]) -> list[Document]:
    """Convert strings, mappings and Documents to Documents.

    items: strings (texts without titles), Documents, or mappings with a title and a text (or abstract, if the text is
        missing or blank). Other keys are ignored, and None counts as missing. If an ignored key probably contains the
        text, a warning names it.

    Raises TypeError with the index and the content of an invalid item.
    """
    if isinstance(items, str | Mapping | Document):
        raise TypeError(f"documents: expected a list, got one {_describe(items)}")
    documents = [_as_document(f"documents[{i}]", item) for i, item in enumerate(items)]
    without_text = (i for i, document in enumerate(documents) if not document.text.strip())
    unread = ((i, key) for i in without_text if isinstance(items[i], Mapping) and (key := unread_key(items[i])))
    for i, key in unread:
        log.warning("documents[%d]: %s is not read; the text is expected as %s", i, key, " or ".join(TEXT_KEYS))
        break
    return documents


def _as_document(where: str, item: Any) -> Document:
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        return Document("", "", item)
    if not isinstance(item, Mapping):
        expected = "a text, a dict with title and text (or abstract), or a Document"
        raise TypeError(f"{where}: expected {expected}, got {_describe(item)}")
    body = text_key(item)
    title, text = ("" if item.get(key) is None else item[key] for key in ("title", body))
    for key, value in (("title", title), (body, text)):
        if not isinstance(value, str):
            raise TypeError(f"{where}: {key}: expected a text, got {_describe(value)}")
    if not (title.strip() or text.strip()):
        keys = ", ".join(map(str, item)) or "no keys"
        raise TypeError(f"{where}: expected a non-empty title, text or abstract, got {keys}")
    return Document(str(item.get("id", "")), title, text)


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {short(value)}"


def input_text(document: Document, separator: str) -> str:
    """Return the text of a document, with the tokenizer's separator between title and text.

    Segments of a query may be separated by tabs or a literal "[SEP]". Both become the separator.
    """
    title, text = document.title.strip(), document.text.strip()
    if not title:
        text = text.replace("\t", f" {separator} ").replace("[SEP]", separator)
    return f" {separator} ".join(segment for segment in (title, text) if segment)


def token_ids(texts: Sequence[str], tokenizer, max_length: int) -> list[list[int]]:
    """Return the token ids of each text, with special tokens, truncated to max_length, without padding."""
    if not texts:
        return []
    return tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]


def length_sorted_chunks(
    lengths: Sequence[int], token_budget: int, most_texts: int | None = None
) -> Iterator[list[int]]:
    """Yield chunks of text indices, shortest texts first, of at most token_budget tokens and most_texts texts each.

    A text that exceeds the budget gets its own chunk. Texts of equal length keep their order.
    """
    chunk: list[int] = []
    size = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunk and (size + lengths[index] > token_budget or len(chunk) == most_texts):
            yield chunk
            chunk, size = [], 0
        chunk.append(index)
        size += lengths[index]
    if chunk:
        yield chunk


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


class NameMatcher:
    """Find the names (titles) of labels in papers, as whole words, ignoring case, spacing and punctuation.

    A trie of words finds all names in one pass over a paper, no matter how many names exist.
    """

    END = ""  # key of the labels whose names end at a node; cannot clash with a word, because words are not empty

    def __init__(self, labels: Mapping[str, Document]):
        self.root: dict = {}
        for id, label in labels.items():
            node = self.root
            for word in words(label.title):
                node = node.setdefault(word, {})
            if node is not self.root:
                node.setdefault(self.END, []).append(id)

    def labels_in(self, document: Document) -> list[str]:
        """Return the distinct ids of the labels whose names occur in a document, in order of appearance."""
        text = words(input_text(document, " "))
        labels: dict[str, None] = {}
        for start, word in enumerate(text):
            node, position = self.root.get(word), start
            while node is not None:
                labels.update(dict.fromkeys(node.get(self.END, ())))
                position += 1
                node = node.get(text[position]) if position < len(text) else None
        return list(labels)

    def match(self, documents: Iterable[Document]) -> dict[str, list[str]]:
        """Return the ids of the labels named in each document, by document id."""
        return {document.id: self.labels_in(document) for document in documents}
