"""A window that slides over the text of a JSON file; json's own decoder takes one value after the other out of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn, TextIO

from datamodules.readers.lines import MAX_LINE, read
from datamodules.records import UserError

CHUNK = 2**20  # characters

_decoder = json.JSONDecoder()
_space = re.compile(r"[ \t\r\n]*")
# A bracket, or a string: whole, or as far as the text goes. Possessive, so that a bad string is no work to reject.
_bracket = re.compile(r'[\[\]{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>"|\\?\Z)', re.DOTALL)
_word = re.compile(r"[^,:\[\]{}\"\s]*")


def reason_of(error: Exception, start: int = 0) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON ({error.msg} at column {error.pos - start + 1})"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return "holds a number that is too long"  # Python's limit of 4,300 digits


class Window:
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
            return None, self._extent(first), reason_of(error, self.position if first in ('"', "{", "[") else 0)

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
