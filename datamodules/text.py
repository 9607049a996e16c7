"""The only place where title, separator and text become the input of an encoder (paper, section 3.1).

    paper   title [SEP] abstract
    label   name [SEP] definition
    query   query

The tokenizer adds the outer [CLS] and [SEP]. Token types stay 0, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from datamodules.records import Document, Tokens

BODIES = ("text", "abstract")  # keys of a paper's text, the first that it has


def as_documents(items: Sequence[Any]) -> list[Document]:
    """What a caller has as documents: a string (a text without title), a mapping with title and text (or abstract), or
    a Document.

    Of a mapping, other keys are not read, and None is no text. Raises TypeError naming the item and what came.
    """
    if isinstance(items, str | Mapping | Document):
        raise TypeError(f"documents: got one {_named(items)}, expected a list of them")
    return [_as_document(f"documents[{i}]", item) for i, item in enumerate(items)]


def _as_document(where: str, item: Any) -> Document:
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        return Document("", "", item)
    if not isinstance(item, Mapping):
        allowed = "a text, a dict with title and text (or abstract), or a Document"
        raise TypeError(f"{where}: got {_named(item)}, expected {allowed}")
    body = next((key for key in BODIES if item.get(key) is not None), BODIES[0])
    title, text = ("" if item.get(key) is None else item[key] for key in ("title", body))
    for key, value in (("title", title), (body, text)):
        if not isinstance(value, str):
            raise TypeError(f"{where}: {key}: got {_named(value)}, expected a text")
    if not (title.strip() or text.strip()):
        raise TypeError(
            f"{where}: has neither title nor text nor abstract, but {', '.join(map(str, item)) or 'no key'}"
        )
    return Document(str(item.get("id", "")), title, text)


def _named(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def input_text(document: Document, separator: str) -> str:
    """The text of a document with the tokenizer's separator between title and text.

    A query in several segments has tabs or a literal "[SEP]" between them: both become the separator.
    """
    title, text = document.title.strip(), document.text.strip()
    if not title:
        text = text.replace("\t", f" {separator} ").replace("[SEP]", separator)
    return f" {separator} ".join(part for part in (title, text) if part)


def token_ids(texts: Sequence[str], tokenizer, max_length: int) -> list[list[int]]:
    """Token ids of each text with special tokens, cut at max_length tokens, not padded."""
    if not texts:
        return []
    return tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]


def length_sorted_chunks(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of the texts, shortest first, in chunks whose padded size (texts x longest) is at most token_budget.

    A text longer than the budget is a chunk of its own. Sorting is stable: equal lengths keep their order.
    """
    chunk: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunk and (len(chunk) + 1) * lengths[index] > token_budget:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def pad(sequences: Iterable[Sequence[int] | np.ndarray], pad_id: int) -> Tokens:
    """Token ids of b texts as (b, L) tensors, L the longest of them."""
    rows = list(sequences)
    lengths = np.array([len(row) for row in rows])
    input_ids = np.full((len(rows), lengths.max()), pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row
    mask = np.arange(input_ids.shape[1]) < lengths[:, None]
    return Tokens(torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64)))
