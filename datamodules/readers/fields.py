"""What readers take out of records: texts, ids, grades, documents and judgements, each checked. All raise UserError."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from datamodules.readers.bad_lines import BadLines
from datamodules.readers.lines import SURROGATES
from datamodules.records import Collection, Document, Qrels, UserError

SPLITS = ("train", "dev", "test")
MAX_GRADE = 10**9


def text(record: Mapping[str, Any], key: str, required: bool = False) -> str:
    """A text; a missing key and null are the empty text, unless it is required."""
    value = record.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        if key not in record:
            raise UserError(f"{key} is missing ({_keys(record)})")
        raise UserError(f"{key} must be a string, got {_short(value)}")
    return as_text(value, key)


def as_text(value: str, key: str) -> str:
    if not value.isascii() and SURROGATES.search(value):
        raise UserError(f"{key} holds half of a surrogate pair, which is no text")
    return value


def identifier(record: Mapping[str, Any], *keys: str) -> str:
    """The first of the keys that the record has; ids may be strings or integers."""
    for key in keys:
        if record.get(key) is not None:
            return as_identifier(record[key], key)
    raise UserError(f"{' or '.join(keys)} is missing ({_keys(record)})")


def as_identifier(value: Any, key: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return str(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{key} must be an id, a string that is not empty or an integer, got {_short(value)}")
    return as_text(value, key)


def listed(record: Mapping[str, Any], key: str, required: bool = False) -> list[Any]:
    """A list; a missing key and null are the empty list, unless it is required."""
    value = record.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list):
        if key not in record:
            raise UserError(f"{key} is missing ({_keys(record)})")
        raise UserError(f"{key} must be a list, got {_short(value)}")
    return value


def identifiers(record: Mapping[str, Any], key: str, required: bool = False) -> list[str]:
    """A list of ids, each once."""
    values = listed(record, key, required)
    return list(dict.fromkeys(as_identifier(value, key) for value in values))


def grade(value: Any, key: str = "score") -> int:
    """A whole number, as a number (1, 1.0) or in writing ("1")."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+", value) and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_GRADE:
        raise UserError(f"the {key} must be an integer, got {_short(value)}")
    return value


def grades(record: Mapping[str, Any], key: str) -> dict[str, int]:
    """An object of ids with their scores."""
    value = record.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{key} must be an object of ids and scores, got {_short(value)}")
    return {as_identifier(document, key): grade(score) for document, score in value.items()}


def document(
    record: Mapping[str, Any], id_keys: Sequence[str], title: str = "title", body: str = "abstract", id: str = ""
) -> Document:
    """The record as a document. id: of a record that has none."""
    found = id or identifier(record, *id_keys)
    result = Document(found, text(record, title), text(record, body))
    if not (result.title.strip() or result.text.strip()):
        raise UserError(f"document {found!r} has neither {title} nor {body} ({_keys(record)})")
    return result


def content_id(title: str, body: str) -> str:
    """The id of a document that has none: equal for equal texts."""
    return hashlib.blake2b(repr((title, body)).encode(), digest_size=8).hexdigest()


def nested(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object inside of the record."""
    if not isinstance(record.get(key), dict):
        raise UserError(f"{key} must be an object, got {_short(record.get(key))} ({_keys(record)})")
    return record[key]


def hashed(text: str) -> int:
    """The same on any machine, from 0 to 2**64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(id: str, dev_percent: int, test_percent: int, year: int | None = None, train_until: int | None = None):
    """A paper's split: by a hash of its id, or, with train_until, test for later years and else by the hash."""
    percent = hashed(id) % 100
    if train_until is not None and year > train_until:
        return "test"
    if percent < dev_percent:
        return "dev"
    return "test" if train_until is None and percent < dev_percent + test_percent else "train"


def allowed(argument: str, values: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """An argument of a reader, each of its values one of the choices."""
    for value in values:
        if value not in choices:
            raise UserError(f"{argument}: got {value!r}, allowed are {', '.join(choices)}")
    return tuple(values)


def add_new(documents: dict[str, Document], new: Document) -> None:
    """Into a corpus of which each line is one document."""
    if new.id in documents:
        raise UserError(f"the id {new.id!r} stands on an earlier line too")
    documents[new.id] = new


def add_same(documents: dict[str, Document], new: Sequence[Document]) -> None:
    """Into a corpus that is gathered from lines which repeat documents: all of them or none."""
    seen: dict[str, Document] = {}
    for one in new:
        before = documents.get(one.id) or seen.setdefault(one.id, one)
        if before != one:
            raise UserError(f"document {one.id!r} has another text here than before")
    documents.update(seen)


def judge(qrels: dict[str, dict[str, int]], query: str, judged: Mapping[str, int]) -> None:
    """Add a query's judgements, all or none of them."""
    before = qrels.get(query, {})
    for id, score in judged.items():
        if before.get(id, score) != score:
            raise UserError(f"query {query!r} and document {id!r} have score {score} here and {before[id]} above")
    qrels[query] = before | judged


class Judgements:
    """The judgements of one split, as they are read.

    homes: where queries and documents should be. Under "fail", ids that are in neither are told together at the end, to
    show how many they are; under "skip", each is a bad line. put: where judgements go instead of qrels.
    """

    def __init__(self, queries: Container[str], corpus: Container[str], bad: BadLines, *homes: str, put=None):
        self.known = (("query", queries, homes[0]), ("document", corpus, homes[1]))
        self.bad, self.put = bad, put or self._keep
        self.qrels: dict[str, dict[str, int]] = {}
        self.unknown: dict[str, list[str]] = {"query": [], "document": []}

    def add(self, query: str, document: str, grade: int) -> None:
        for (kind, known, home), id in zip(self.known, (query, document), strict=True):
            if id not in known:
                if not self.bad.fails:
                    raise UserError(f"the {kind} id {id!r} is not in {home}")
                self.unknown[kind].append(id)
                return
        self.put(query, document, grade)

    def _keep(self, query: str, document: str, grade: int) -> None:
        before = self.qrels.setdefault(query, {}).setdefault(document, grade)
        if before != grade:
            pair = f"query {query!r} and document {document!r}"
            raise UserError(f"{pair} have score {grade} here and {before} above")

    def finished(self, path: Any) -> Qrels:
        """Raises UserError if ids were unknown."""
        for kind, _, home in self.known:
            if ids := self.unknown[kind]:
                distinct = list(dict.fromkeys(ids))
                first = ", ".join(map(repr, distinct[:5])) + (", ..." if len(distinct) > 5 else "")
                raise UserError(
                    f"{path}: {len(ids)} lines name {len(distinct)} {kind} ids that are not in {home}: {first}"
                )
        return self.qrels


def all_known(ids: Sequence[str], corpus: Container[str], key: str) -> None:
    """For ids that a record names itself."""
    unknown = [id for id in ids if id not in corpus]
    if unknown:
        raise UserError(f"{key}: {len(unknown)} of {len(ids)} ids are not in the corpus, first {unknown[0]!r}")


def checked(collection: Collection, source: Any) -> Collection:
    """The collection, if it has documents, and judgements in each of its splits."""
    if not collection.corpus:
        raise UserError(f"{source}: holds no document")
    if not collection.qrels:
        raise UserError(f"{source}: holds no split")
    for split, qrels in collection.qrels.items():
        if not qrels:
            raise UserError(f"{source}: the split is empty ({split})")
    return collection


def _keys(record: Mapping[str, Any]) -> str:
    return f"keys here: {', '.join(map(str, record))[:200] or 'none'}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
