"""Read JSON lines, and JSON lists and objects that are larger than memory.

ijson also reads such files, but it stops at the first invalid entry, and does not report the line. This code reports
the line and, with on_error="skip", continues after the entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from datamodules.readers import io
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.records import UserError, prefixed, short

MAX_WHOLE = 2**28  # maximum number of characters of a file that is read as a whole


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the first line and the content of each JSON value in a file. Raises UserError if a value is invalid."""
    with io.open_text(path) as stream:
        window = _JsonWindow(stream, path)
        while window.peek():
            number = window.line
            value, _, reason = window.next_value("a value")
            if reason:
                raise UserError(f"{path}, line {number}: {reason}")
            yield number, value


def is_list(path: Path) -> bool:
    """Return whether a file is one JSON list, according to its first character."""
    with io.open_text(path) as stream:
        return _JsonWindow(stream, path).peek() == "["


def read_records(path: Path, bad: BadLines) -> Iterator[Row]:
    """Yield the lines of a JSON lines file, or the entries of a file that is one JSON list.

    Raises UserError like `read_entries`.
    """
    return read_entries(path, bad) if is_list(path) else io.read_lines(path, bad)


def read_entries(path: Path, bad: BadLines, kind: str = "list") -> Iterator[Row]:
    """Yield the entries of a file with one JSON list, or the values of one JSON object (kind "object").

    An invalid entry with matching brackets is reported as bad. Damage between entries raises UserError, because the
    start of the next entry is then unknown.
    """
    with io.open_text(path) as stream:
        window = _JsonWindow(stream, path)
        yield from _entries(window, bad, kind)
        window.end(kind)
    bad.end_of_file(path, window.num_entries)


def read_lists(path: Path, bad: BadLines) -> Iterator[tuple[int, Row]]:
    """Yield (number of the list, entry) for a file with one JSON list of lists. The first list has number 0.

    Bad entries and damage are handled as in `read_entries`.
    """
    with io.open_text(path) as stream:
        window = _JsonWindow(stream, path)
        for number, _ in window.items("list", "list", "a JSON list of lists"):
            for row in _entries(window, bad):
                yield number - 1, row
        window.end("list")
    bad.end_of_file(path, window.num_entries)


def read_members(
    path: Path, bad: BadLines, keys: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, Row]]:
    """Yield (key, entry) for the entries of the lists under `keys`, in a file that is one JSON object.

    Other members are skipped. Bad entries and damage are handled as in `read_entries`. Raises UserError if a key is
    missing.

    optional: further keys, which may be missing. A value that is not a list counts as one entry.
    """
    seen = set[str]()
    with io.open_text(path) as stream:
        window = _JsonWindow(stream, path)
        for _, key in window.items("object", "member"):
            seen.add(key)
            if key in keys or (key in optional and window.peek() == "["):
                for row in _entries(window, bad):
                    yield key, row
            elif key in optional:
                if entry := _entry(window, bad, 1, key):
                    yield key, entry
            else:
                window.skip(key)
        window.end("object")
    if missing := [key for key in keys if key not in seen]:
        raise UserError(f"{path}: the JSON object lacks the key {missing[0]}")
    bad.end_of_file(path, window.num_entries)


def read_whole_json(path: Path) -> Any:
    """Return the only JSON value in a small file. Raises UserError if it is invalid."""
    with io.open_text(path) as stream:
        text = io.read_chunk(stream, path, 0, MAX_WHOLE + 1)
    if len(text) > MAX_WHOLE:
        raise UserError(f"{path}: longer than {MAX_WHOLE:,} characters")
    with prefixed(f"{path}: "):
        return _parse(text)


def as_object(row: Row, expected: str = "") -> Record:
    """Return the JSON object of a row. Raises UserError if the row is not a JSON object.

    expected: description of the object for the error, such as " with id and title".
    """
    value = _parse(row.text) if row.entry is None else row.value
    if not isinstance(value, dict):
        raise UserError(f"expected an object{expected}, got {short(row.text)}")
    return Record.of(row, value)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(_json_error(error)) from error


def _json_error(error: Exception, start: int = 0) -> str:
    """Describe an error of the JSON decoder. start: index at which the value begins."""
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg} at column {error.pos - start + 1})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "contains a number that is too long"  # Python converts at most 4,300 digits


def _entries(window: _JsonWindow, bad: BadLines, kind: str = "list") -> Iterator[Row]:
    """Yield the valid entries of the list or object at the window's position."""
    for number, _ in window.items(kind):
        if row := _entry(window, bad, number):
            yield row


def _entry(window: _JsonWindow, bad: BadLines, count: int, what: str = "") -> Row | None:
    """Return the value at the window's position as a row. If it is invalid, report it as bad and return None.

    count: number of the entry. what: name of the entry in errors, by default its number.
    """
    window.num_entries += 1
    window.peek()
    number = window.line
    value, text, reason = window.next_value(what or f"entry {count}")
    row = Row(bad, window.path, number, text, count, value)
    if reason := io.not_text(text) or reason:
        bad.report(row, reason)
        return None
    return row


class _JsonWindow:
    """A window that slides over the text of a JSON file, for the standard decoder to read one value after another.

    text: current part of the file. position: index of the next character. line: line number of that character, from 1.
    num_entries: number of entries read so far, including bad ones.
    """

    DECODER = json.JSONDecoder()
    SPACE: Any = re.compile(r"[ \t\r\n]*")  # this and WORD always match
    # A bracket, or a string up to its end or the end of the window. Possessive quantifiers make an unterminated string
    # cost linear time.
    BRACKET = re.compile(r'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>"|\\?\Z)', re.DOTALL)
    WORD: Any = re.compile(r"[^,:\[\]{}\"\s]*")

    def __init__(self, stream: TextIO, path: Path):
        self.stream, self.path = stream, path
        self.text, self.position, self.line, self.ended = "", 0, 1, False
        self.num_entries = 0

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            self._move(self.SPACE.match(self.text, self.position).end())
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self._slide()

    def expect(self, character: str, what: str) -> None:
        """Move past a character. Raises UserError if the next character is another one. what: its name in the error."""
        if self.peek() != character:
            self._refuse(what)
        self._move(self.position + 1)

    def items(self, kind: str, item: str = "entry", what: str = "") -> Iterator[tuple[int, str]]:
        """Yield the number and the key ("" in a list) of each item of a list or object. The caller reads the value.

        kind: "list" or "object". item: name of an item in errors. what: name of the list or object in errors.
        """
        opening, closing = {"list": ("[", "]"), "object": ("{", "}")}[kind]
        self.expect(opening, what or f"a JSON {kind}")
        number, key = 0, ""
        while self.peek() != closing or number:
            number += 1
            if kind == "object":
                key = self._key(f"{item} {number}")
            yield number, key
            if self.peek() == closing:
                break
            self.expect(",", f"a comma after {key[:60] or f'{item} {number}'}")
        self.expect(closing, f"the closing {closing}")

    def _key(self, what: str) -> str:
        key, text, reason = self.next_value(f"the key of {what}")
        if reason or not isinstance(key, str):
            raise UserError(f"{self.path}, line {self.line}: {what} has no key, got {short(text)}")
        self.expect(":", f"a colon after the key {text[:60]}")
        return key

    def skip(self, what: str) -> None:
        """Move past a value, which may be larger than memory. what: name of the value in errors."""
        if self.peek() not in ("[", "{"):
            self.next_value(what)
            return
        for number, _ in self.items("list" if self.peek() == "[" else "object"):
            self.next_value(f"entry {number}")

    def end(self, kind: str) -> None:
        """Raise UserError unless the file ends here. kind: content of the file, "list" or "object"."""
        if self.peek():
            raise UserError(f"{self.path}, line {self.line}: unexpected text after the JSON {kind}")

    def next_value(self, what: str) -> tuple[Any, str, str]:
        """Return the next value, its text, and why it is invalid, or "".

        Raises UserError if the value does not end within MAX_LINE characters.
        """
        first = self.peek()
        while True:
            value, end, reason = self._decode(first)
            if end is not None:
                text = self.text[self.position : end]
                if not text:
                    self._refuse(f"a value for {what}")
                self._move(end)
                return value, text, reason
            if self.ended:
                raise UserError(f"{self.path}, line {self.line}: the file ends inside {what}")
            if len(self.text) - self.position > io.MAX_LINE:
                raise UserError(f"{self.path}, line {self.line}: {what} does not end within {io.MAX_LINE:,} characters")
            self._slide()

    def _slide(self) -> None:
        """Drop the text before the position, and at least double the rest, so that long entries take linear time."""
        rest = self.text[self.position :]
        chunk = io.read_chunk(self.stream, self.path, self.line, max(io.CHUNK, len(rest)))
        self.text, self.position, self.ended = rest + chunk, 0, not chunk

    def _move(self, end: int) -> None:
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def _refuse(self, what: str) -> NoReturn:
        actual = f"got {self.text[self.position : self.position + 40]!r}" if self.peek() else "but the file ends"
        raise UserError(f"{self.path}, line {self.line}: expected {what}, {actual}")

    def _decode(self, first: str) -> tuple[Any, int | None, str]:
        """Return the value at the position, its end (None if it is outside the window), and its error."""
        try:
            if first in ('"', "{", "["):
                return *self.DECODER.raw_decode(self.text, self.position), ""
            # A number has no closing bracket, so the window may end inside 1.5e7, after 1.5 or 1.5e.
            end = self._find_end(first)
            word = self.text[self.position : end]
            return json.loads(word) if end is not None and word else None, end, ""
        except (ValueError, RecursionError) as error:
            return None, self._find_end(first), _json_error(error, self.position if first in ('"', "{", "[") else 0)

    def _find_end(self, first: str) -> int | None:
        """Find the end of a value by matching brackets and quotes. Return None if the end is outside the window."""
        if first not in ('"', "{", "["):
            end = self.WORD.match(self.text, self.position).end()
            return end if end < len(self.text) or self.ended else None
        depth = 0
        for token in self.BRACKET.finditer(self.text, self.position):
            if token[0][0] == '"':
                if token["end"] != '"':
                    return None
            else:
                depth += 1 if token[0] in "{[" else -1
            if depth == 0:
                return token.end()
        return None
