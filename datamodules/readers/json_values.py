"""JSON of strangers: the objects of JSON lines, and the entries of files that are one big list or object.

A big file is never in memory as a whole: a window slides over its text.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.bad_lines import BadLines, Place
from datamodules.readers.json_window import Window, reason_of
from datamodules.readers.lines import lines, no_text, open_text, read
from datamodules.records import UserError


def parse(text: str) -> Any:
    """The JSON value. Raises UserError in the user's words."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(reason_of(error)) from error


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
        is_list = Window(stream, path).peek() == "["
    return entries(path, bad) if is_list else lines(path, bad)


def entries(path: Path, bad: BadLines, kind: str = "list") -> Iterator[Place]:
    """The entries of a file that is one JSON list, or the values of one that is an object ("object").

    An entry that is well bracketed but no JSON goes to the policy; damage between entries, after which it is not known
    where the next begins, raises UserError.
    """
    with open_text(path) as stream:
        window = Window(stream, path)
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
        window = Window(stream, path)
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


def _key(window: Window, what: str) -> str:
    key, text, reason = window.value(f"the key of {what}")
    if reason or not isinstance(key, str):
        raise UserError(f"{window.path}, line {window.line}: {what} has no key, got {text[:60]!r}")
    window.expect(":", f"a colon after the key {text[:60]}")
    return key


def _entries(window: Window, bad: BadLines | None, kind: str) -> Generator[Place, None, int]:
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
