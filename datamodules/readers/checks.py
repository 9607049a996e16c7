"""Checks of what files contain: the policy for bad lines, the fields of records, and whole collections."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datamodules.readers.gaps import Gaps
from datamodules.records import Collection, CollectionWriter, Document, Qrels, Sink, UserError, check_name
from datamodules.text import text_key

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
# Names of splits in published data sets, in order of preference. A split "evaluation" is used as the test split.
SPLIT_NAMES = {
    **{"train": "train", "training": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev"},
    **{"development": "dev", "test": "test", "evaluation": "test"},
}
MAX_GRADE = 10**9
QUARANTINED_TEXT = 2000  # characters
# Lone surrogates are not text. Bytes that are not UTF-8 are decoded to lone surrogates.
SURROGATES = re.compile("[\ud800-\udfff]")

JudgementTarget = Callable[[str, str, int], None]  # receives query id, document id and grade


# --- bad lines ---


@dataclass(slots=True)
class Row:
    """A line of a file, an entry of a JSON list or object, or a row of a table, with its location.

    A UserError inside `with row:` goes to the policy for bad lines.

    number: line number, from 1.
    text: the line or entry as in the file.
    entry: number of the entry or row, from 1; None for a plain line.
    value: the parsed entry or row; `as_object` parses a plain line.
    """

    bad: BadLines
    path: Path
    number: int
    text: str
    entry: int | None = None
    value: Any = None

    @property
    def ordinal(self) -> int:
        """Number of the line or entry in its file, counting bad ones. Used as the name of records without an id."""
        return self.number if self.entry is None else self.entry

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}" + ("" if self.entry is None else f", entry {self.entry}")

    def __enter__(self) -> Row:
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, UserError):
            return False
        self.bad.report(self, str(error), error)
        return True


class BadLines:
    """The policy for bad lines during one `read()`, used as `with BadLines(...) as bad:`.

    on_error: "fail" raises UserError at the first bad line. "skip" leaves bad lines out, appends them to the quarantine
        file, and warns about their number at the end. If more than half of a file's lines are bad, "skip" raises too,
        because the file is probably in another format.
    quarantine: file for skipped lines, by default quarantine.jsonl. Each line is a JSON object with file, line, reason
        and text (the first 2,000 characters).

    gaps: what the files lack although they are not damaged; its warnings are logged at the end.
    """

    POLICIES = ("fail", "skip")

    def __init__(self, on_error: str = "fail", quarantine: str | None = None):
        self.fails = check_choice("on_error", on_error, self.POLICIES) == "fail"
        self.quarantine = Path(quarantine or "quarantine.jsonl")
        self.by_file: Counter[Path] = Counter()
        self.by_reason: Counter[str] = Counter()
        self.gaps = Gaps()
        self._file: TextIO | None = None

    def report(self, row: Row, reason: str, cause: Exception | None = None) -> None:
        """Handle a bad line. Raises UserError under "fail", and if the quarantine file cannot be written."""
        if self.fails:
            raise UserError(f"{row}: {reason}") from cause
        self.by_file[row.path] += 1
        self.by_reason[_without_details(reason)] += 1
        record = {
            "file": str(row.path),
            "line": row.number,
            "reason": reason if row.entry is None else f"entry {row.entry}: {reason}",
            "text": row.text[:QUARANTINED_TEXT],
        }
        try:
            if self._file is None:
                self.quarantine.parent.mkdir(parents=True, exist_ok=True)
                # Bytes that are not UTF-8 are surrogates in the text; they are written as JSON escapes.
                self._file = open(self.quarantine, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.quarantine}: cannot write the quarantine file ({error.strerror})") from error

    def end_of_file(self, path: Path, num_lines: int) -> None:
        """Raise UserError if more than half of the file's lines are bad."""
        bad = self.by_file[path]
        if bad * 2 > num_lines:
            raise UserError(
                f"{path}: {bad} of {num_lines} lines are bad, more than half ({self.summary()}). "
                f"Is the file in this reader's format? The bad lines are in {self.quarantine}"
            )

    def summary(self) -> str:
        """Return the most frequent reasons with their counts."""
        return "; ".join(f"{count} x {reason}" for reason, count in self.by_reason.most_common(8))

    def __enter__(self) -> BadLines:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._file is not None:
            self._file.close()
            total = self.by_reason.total()
            count = "1 bad line" if total == 1 else f"{total} bad lines"
            log.warning("left out %s, saved in %s: %s", count, self.quarantine, self.summary())
        if kind is None:
            self.gaps.report()


def _without_details(reason: str) -> str:
    """Replace quoted values, numbers and parentheses, which differ from line to line, by dots."""
    return re.sub(r"'.*'|\".*\"|\(.*\)|[0-9]+", "...", reason, flags=re.DOTALL)


# --- arguments of readers ---


def check_choice(argument: str, value: str, choices: Sequence[str]) -> str:
    """Return the value of an argument. Raises UserError unless it is one of the choices."""
    if value not in choices:
        raise UserError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def check_choices(argument: str, values: Sequence[str], choices: Sequence[str]) -> tuple[str, ...]:
    """Return the values of an argument. Raises UserError unless each is one of the choices."""
    return tuple(check_choice(argument, value, choices) for value in values)


# --- fields of records ---


def check_text(value: str, key: str) -> str:
    """Return a string. Raises UserError unless it is valid Unicode. key: its key in the record, for the error."""
    if not value.isascii() and (match := SURROGATES.search(value)):
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:
            raise UserError(f"{key} is not UTF-8 (byte 0x{code & 0xFF:02x} at character {match.start() + 1})")
        raise UserError(f"{key} contains half of a surrogate pair, which is not valid text")
    return value


def check_id(value: Any, key: str) -> str:
    """Return an id as a string. Raises UserError unless it is a string or an integer."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return str(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{key} must be an id, a non-empty string or an integer, got {_short(value)}")
    return check_text(value, key)


def check_grade(value: Any, key: str = "score") -> int:
    """Return a whole number, given as a number (1, 1.0) or a string ("1", "1.0"). Raises UserError otherwise."""
    if isinstance(value, str) and len(value) < 20 and (match := re.fullmatch(r"([+-]?[0-9]+)(\.0*)?", value)):
        value = int(match[1])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_GRADE:
        raise UserError(f"the {key} must be an integer, got {_short(value)}")
    return value


class Record(dict[str, Any]):
    """A JSON object or a row of a table. Its methods return checked values, and raise UserError for wrong ones.

    row: row of the file that the object is from, or is a part of. It counts the gaps of documents.
    """

    row: Row | None = None

    @classmethod
    def of(cls, row: Row | None, values: Mapping[str, Any], **more: Any) -> Record:
        """Return a record of a row. more: values that replace others."""
        record = cls(values, **more)
        record.row = row
        return record

    def text(self, key: str, required: bool = False) -> str:
        """Return a string. A missing key or null is an empty string, unless it is required."""
        value = self.get(key)
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            raise self._wrong_type(key, "a string")
        return check_text(value, key)

    def words(self, key: str) -> str:
        """Return a string that is not blank."""
        text = self.text(key, required=True)
        if not text.strip():
            raise UserError(f"{key} is empty")
        return text

    def id(self, *keys: str) -> str:
        """Return the id under the first key that exists, a string or an integer."""
        for key in keys:
            if self.get(key) is not None:
                return check_id(self[key], key)
        raise self.missing(" or ".join(keys))

    def array(self, key: str, required: bool = False) -> list[Any]:
        """Return a list. A missing key or null is an empty list, unless it is required."""
        value = self.get(key)
        if value is None and not required:
            return []
        if not isinstance(value, list):
            raise self._wrong_type(key, "a list")
        return value

    def ids(self, key: str, required: bool = False) -> list[str]:
        """Return a list of ids without duplicates."""
        return list(dict.fromkeys(check_id(value, key) for value in self.array(key, required)))

    def grade(self, key: str) -> int:
        """Return a whole number."""
        return check_grade(self.get(key), key)

    def grades(self, key: str) -> dict[str, int]:
        """Return an object that maps ids to scores."""
        value = self.get(key)
        if not isinstance(value, dict):
            raise UserError(f"{key} must be an object of ids and scores, got {_short(value)}")
        return {check_id(document, key): check_grade(score) for document, score in value.items()}

    def object(self, key: str) -> Record:
        """Return an object inside the record."""
        if not isinstance(self.get(key), dict):
            raise UserError(f"{key} must be an object, got {_short(self.get(key))} ({self._keys()})")
        return Record.of(self.row, self[key])

    def document(
        self, *id_keys: str, title: str = "title", body: str = "abstract", id: str = "", may_be_blank: bool = False
    ) -> Document:
        """Return the record as a document.

        id_keys: keys that may hold the id.
        title, body: keys of the title and of the text (see text_key). One of the two may be blank.
        id: id of a record that has none.
        may_be_blank: whether both may be blank, for documents to search in. A record without both keys is an error.
        """
        id = id or self.id(*id_keys)
        key = text_key(self, body)
        document = Document(id, self.text(title), self.text(key))
        if document.is_blank and not (may_be_blank and (title in self or key in self)):
            raise UserError(f"document {id!r} has neither {title} nor {body} ({self._keys()})")
        if self.row is not None:
            self.row.bad.gaps.add_document(self.row.path, document, self)
        return document

    def judged(self, documents: Sequence[str], corpus: Container[str]) -> None:
        """Count judged documents, and those that are not in the corpus."""
        if self.row is not None:
            self.row.bad.gaps.add_judgements(self.row.path, documents, corpus)

    def missing(self, key: str) -> UserError:
        """Return the error for a missing key."""
        return UserError(f"{key} is missing ({self._keys()})")

    def _wrong_type(self, key: str, expected: str) -> UserError:
        return UserError(f"{key} must be {expected}, got {_short(self[key])}") if key in self else self.missing(key)

    def _keys(self) -> str:
        return f"keys here: {', '.join(map(str, self))[:200] or 'none'}"


# --- ids and splits for files without them ---


def content_id(title: str, body: str) -> str:
    """Return an id for a document that has none. Equal texts have equal ids."""
    return hashlib.blake2b(repr((title, body)).encode(), digest_size=8).hexdigest()


def stable_hash(text: str) -> int:
    """Return a hash from 0 to 2**64 - 1, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(
    id: str, dev_percent: int, test_percent: int, year: int | None = None, train_until: int | None = None
) -> str:
    """Return the split of a paper, chosen by a hash of its id.

    train_until: last year of the training papers. Later papers form the test split, and test_percent is ignored.
    """
    percent = stable_hash(id) % 100
    if train_until is not None and year is not None and year > train_until:
        return "test"
    if percent < dev_percent:
        return "dev"
    return "test" if train_until is None and percent < dev_percent + test_percent else "train"


# --- collections; all functions raise UserError ---


def add_id(values: dict[str, Any], id: str, value: Any) -> None:
    """Add a value under an id that may occur only once."""
    if id in values:
        raise UserError(f"duplicate id {id!r}: an earlier line has it too")
    values[id] = value


def add_document(documents: dict[str, Document], document: Document) -> None:
    """Add a document whose id may occur only once."""
    add_id(documents, document.id, document)


def add_repeated(documents: dict[str, Document], new: Sequence[Document]) -> None:
    """Add all documents of a line, or none. Lines may repeat a document."""
    added: dict[str, Document] = {}
    for document in new:
        earlier = documents.get(document.id) or added.setdefault(document.id, document)
        if earlier != document:
            raise UserError(f"document {document.id!r} has a different text on an earlier line")
    documents.update(added)


def add_grades(qrels: dict[str, dict[str, int]], query: str, grades: Mapping[str, int]) -> None:
    """Add all judgements of a query, or none if one conflicts."""
    merged = dict(qrels.get(query, {}))
    for document, grade in grades.items():
        _add_grade(merged, query, document, grade)
    qrels[query] = merged


def _add_grade(grades: dict[str, int], query: str, document: str, grade: int) -> None:
    if (earlier := grades.setdefault(document, grade)) != grade:
        raise UserError(f"query {query!r} and document {document!r} have score {grade} here and {earlier} earlier")


def check_known(ids: Sequence[str], corpus: Container[str], key: str) -> None:
    """Check that all ids of a record's list are in the corpus. key: key of the list, for the error."""
    unknown = [id for id in ids if id not in corpus]
    if unknown:
        raise UserError(f"{key}: {len(unknown)} of {len(ids)} ids are not in the corpus, first {unknown[0]!r}")


class Judgements:
    """The judgements of one split, collected line by line from a file of its own.

    path: the file. queries, corpus: known ids. A judged document may be missing from the corpus (see Gaps).
    query_file: name of the file with the queries, for errors.
    target: function that receives the judgements, instead of `qrels`.

    Under "fail", `finish` reports all unknown queries together. Under "skip", each of them is a bad line.
    """

    def __init__(
        self,
        path: Path,
        queries: Container[str],
        corpus: Container[str],
        bad: BadLines,
        query_file: str,
        target: JudgementTarget | None = None,
    ):
        self.path, self.queries, self.corpus, self.query_file = path, queries, corpus, query_file
        self.bad, self.target = bad, target or self._keep
        self.qrels: dict[str, dict[str, int]] = {}
        self.unknown: list[str] = []

    def add(self, query: str, document: str, grade: int) -> None:
        if query in self.queries:
            self.target(query, document, grade)
            self.bad.gaps.add_judgements(self.path, (document,), self.corpus)
        elif self.bad.fails:
            self.unknown.append(query)
        else:
            raise UserError(f"the query id {query!r} is not in {self.query_file}")

    def _keep(self, query: str, document: str, grade: int) -> None:
        _add_grade(self.qrels.setdefault(query, {}), query, document, grade)

    def finish(self) -> Qrels:
        """Return all judgements. Raises UserError if there were unknown queries."""
        if self.unknown:
            distinct = list(dict.fromkeys(self.unknown))
            first = ", ".join(map(repr, distinct[:5])) + (", ..." if len(distinct) > 5 else "")
            raise UserError(
                f"{self.path}: {len(self.unknown)} lines have {len(distinct)} query ids that are not in "
                f"{self.query_file}: {first}"
            )
        return self.qrels


class MemorySink:
    """A sink in memory. A second grade for a pair is an error of its own line, whatever keep_first says."""

    def __init__(self) -> None:
        self.keep_first = False
        self.documents: dict[str, Document] = {}
        self.queries: dict[str, Document] = {}
        self.qrels: dict[str, dict[str, dict[str, int]]] = {}

    def add_document(self, document: Document) -> None:
        add_document(self.documents, document)

    def add_query(self, query: Document) -> None:
        add_document(self.queries, query)

    def add_judgement(self, split: str, query: str, document: str, grade: int) -> None:
        _add_grade(self.qrels.setdefault(split, {}).setdefault(query, {}), query, document, grade)

    def document(self, id: str) -> Document:
        return self.documents[id]

    def has(self, split: str) -> bool:
        return split in self.qrels


def read_into_memory(stream: Callable[[Sink], None]) -> Collection:
    """Return everything that a reader streams as a collection."""
    sink = MemorySink()
    stream(sink)
    return Collection(sink.documents, sink.queries, sink.qrels)


def stream_collection(collection: Collection, sink: CollectionWriter) -> None:
    """Write a collection to a sink."""
    for document in collection.corpus.values():
        sink.add_document(document)
    for query in collection.queries.values():
        sink.add_query(query)
    for split, qrels in collection.qrels.items():
        for query_id, grades in qrels.items():
            for document_id, grade in grades.items():
                sink.add_judgement(split, query_id, document_id, grade)


def check_collection(collection: Collection, source: Path | str) -> Collection:
    """Return a collection that has documents, and judgements in each of its splits."""
    if not collection.corpus:
        raise UserError(f"{source}: contains no documents")
    if not collection.qrels:
        raise UserError(f"{source}: contains no splits")
    for split, qrels in collection.qrels.items():
        check_name(f"{source}: split", split)
        if not qrels:
            raise UserError(f"{source}: the {split} split is empty")
    return collection


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
