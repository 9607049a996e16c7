"""JSON of strangers: the objects of JSON lines, and the entries of files that are one big list or object.

A big file is never in memory as a whole: a window slides over its text, and json's own decoder takes one entry after
the other out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from datamodules.readers.bad_lines import BadLines, Place
from datamodules.readers.lines import MAX_LINE, lines, no_text, open_text, read
from datamodules.records import UserError

CHUNK = 2**20  # characters

_decoder = json.JSONDecoder()
_space = re.compile(r"[ \t\r\n]*")
# A bracket, or a string: whole, or as far as the text goes. Possessive, so that a bad string is no work to reject.
_bracket = re.compile(r'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>"|\\?\Z)', re.DOTALL)
_word = re.compile(r"[^,:\[\]{}\"\s]*")


def parse(text: str) -> Any:
    """The JSON value. Raises UserError in the user's words."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(_reason(error)) from error


def _reason(error: Exception, start: int = 0) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON ({error.msg} at column {error.pos - start + 1})"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return "holds a number that is too long"  # Python's limit of 4,300 digits


def whole(path: Path) -> Any:
    """The JSON value that a file is, if it is small. Raises UserError naming it."""
    with open_text(path) as stream:
        text = read(stream, path, 0, -1)
    try:
        return parse(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def as_object(place: Place, expected: str = "") -> dict[str, Any]:
    """The JSON object of a line or an entry. Raises UserError."""
    value = parse(place.text) if place.entry is None else place.value
    if not isinstance(value, dict):
        raise UserError(f"expected an object{expected}, got {place.text[:60]!r}")
    return value


def records(path: Path, bad: BadLines) -> Iterator[Place]:
    """The lines of a file of JSON lines, or the entries of a file that is one JSON list. Raises as `entries` does."""
    with open_text(path) as stream:
        is_list = _Window(stream, path).peek() == "["
    return entries(path, bad) if is_list else lines(path, bad)


def entries(path: Path, bad: BadLines, kind: str = "list") -> Iterator[Place]:
    """The entries of a file that is one JSON list, or the values of one that is an object ("object").

    An entry that is well bracketed but no JSON goes to the policy; damage between entries, after which it is not known
    where the next begins, raises UserError.
    """
    with open_text(path) as stream:
        window = _Window(stream, path)
        count = yield from _entries(window, bad, kind)
        if window.peek():
            raise UserError(f"{path}, line {window.line}: the file goes on after the JSON {kind}")
    bad.end_of_file(path, count)


def members(path: Path, bad: BadLines, keys: Sequence[str]) -> Iterator[tuple[str, Place]]:
    """Key and entry of the lists that some members of a file's one object are; what else it has is passed over.

    Bad entries and damage are as in `entries`. Raises UserError if a member is not there.
    """
    total, seen = 0, set()
    with open_text(path) as stream:
        window = _Window(stream, path)
        window.expect("{", "a JSON object")
        while window.peek() != "}" or seen:
            seen.add(key := _key(window, "a member of the object"))
            if key in keys or window.peek() in ("[", "{"):
                wanted = bad if key in keys else None
                kind = "object" if wanted is None and window.peek() == "{" else "list"
                for place in _entries(window, wanted, kind):
                    total += 1
                    yield key, place
            else:
                window.value(key)
            if window.peek() == "}":
                break
            window.expect(",", f"a comma after {key}")
        window.expect("}", "the closing }")
        if window.peek():
            raise UserError(f"{path}, line {window.line}: the file goes on after the JSON object")
    if missing := [key for key in keys if key not in seen]:
        raise UserError(f"{path}: the object has no {missing[0]}")
    bad.end_of_file(path, total + bad.by_file[path])


def _key(window: _Window, what: str) -> str:
    key, text, reason = window.value(f"the key of {what}")
    if reason or not isinstance(key, str):
        raise UserError(f"{window.path}, line {window.line}: {what} has no key, got {text[:60]!r}")
    window.expect(":", f"a colon after the key {text[:60]}")
    return key


def _entries(window: _Window, bad: BadLines | None, kind: str) -> Generator[Place, None, int]:
    """The entries of the list or object that begins at the window; returns their number. bad: none to pass over all."""
    opening, closing = {"list": "[]", "object": "{}"}[kind]
    count = 0
    window.expect(opening, f"a JSON {kind}")
    while window.peek() != closing or count:
        count += 1
        if kind == "object":
            _key(window, f"entry {count}")
        window.peek()
        number = window.line
        value, text, reason = window.value(f"entry {count}")
        if bad is not None:
            place = Place(bad, window.path, number, text, count, value)
            if reason := no_text(text) or reason:
                bad.report(place, reason)
            else:
                yield place
        if window.peek() == closing:
            break
        window.expect(",", f"a comma after entry {count}")
    window.expect(closing, f"the closing {closing}")
    return count


class _Window:
    """The part of a text that is being read. line: of its current position, from 1."""

    def __init__(self, stream: TextIO, path: Path):
        self.stream, self.path = stream, path
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def more(self) -> None:
        """Slide: drop what was read, and double what is left, so that long entries stay linear work."""
        rest = self.text[self.position :]
        chunk = read(self.stream, self.path, self.line, max(CHUNK, len(rest)))
        self.text, self.position, self.ended = rest + chunk, 0, not chunk

    def move(self, end: int) -> None:
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            self.move(_space.match(self.text, self.position).end())
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self.more()

    def expect(self, character: str, what: str) -> None:
        if self.peek() != character:
            self.refuse(what)
        self.move(self.position + 1)

    def refuse(self, what: str) -> NoReturn:
        got = f"got {self.text[self.position : self.position + 40]!r}" if self.peek() else "the file ends"
        raise UserError(f"{self.path}, line {self.line}: expected {what}, {got}")

    def value(self, what: str) -> tuple[Any, str, str]:
        """The next JSON value, its text, and why it is none (empty if it is one).

        Raises UserError if it does not end, or ends nowhere near.
        """
        first = self.peek()
        while True:
            value, end, reason = self._decoded(first)
            if end is not None:
                text = self.text[self.position : end]
                if not text:
                    self.refuse(f"a value for {what}")
                self.move(end)
                return value, text, reason
            if self.ended:
                raise UserError(f"{self.path}, line {self.line}: the file ends inside {what}")
            if len(self.text) - self.position > MAX_LINE:
                raise UserError(f"{self.path}, line {self.line}: {what} has no end within {MAX_LINE:,} characters")
            self.more()

    def _decoded(self, first: str) -> tuple[Any, int | None, str]:
        """Value, end and reason of what stands at the position; no end if it goes on after the window."""
        try:
            if first in ('"', "{", "["):
                return *_decoder.raw_decode(self.text, self.position), ""
            # A number has no end of its own: of 1.5e7, a window may hold 1.5, or 1.5e.
            end = self._extent(first)
            word = self.text[self.position : end]
            return json.loads(word) if end is not None and word else None, end, ""
        except (ValueError, RecursionError) as error:
            return None, self._extent(first), _reason(error, self.position if first in ('"', "{", "[") else 0)

    def _extent(self, first: str) -> int | None:
        """Where the value ends by its brackets and quotes; None if the window ends before."""
        if first not in ('"', "{", "["):
            end = _word.match(self.text, self.position).end()
            return end if end < len(self.text) or self.ended else None
        depth = 0
        for token in _bracket.finditer(self.text, self.position):
            if token[0][0] == '"':
                if token["end"] != '"':
                    return None
            else:
                depth += 1 if token[0] in "{[" else -1
            if depth == 0:
                return token.end()
        return None
