"""From a reader to a folder of store.py: once, and found again while its files are the same."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from datamodules.cache import only_one, unfinished
from datamodules.readers.gathered import pour
from datamodules.records import Collection, Sink, UserError
from datamodules.store import ROWS, StoredCollection
from datamodules.conversion import write

log = logging.getLogger(__name__)

VERSION = 3  # of the store's layout: another one is converted anew


@runtime_checkable
class FileReader(Protocol):
    """A reader of files, whose collection can be kept: it is the same while its arguments and files are."""

    def sources(self) -> list[Path]:
        """The files that it reads; none where that is not known, as for data of the hub."""
        ...

    def read(self) -> Collection: ...


@runtime_checkable
class StreamingReader(FileReader, Protocol):
    """A reader whose data need not be in memory at once."""

    def stream(self, sink: Sink) -> None:
        """All documents, then each query and its judgements."""
        ...


def describe(reader: FileReader) -> str:
    """A reader's class and attributes, but where bad lines go: they differ where its data may differ."""
    settings = {name: value for name, value in vars(reader).items() if name != "quarantine" and name[0] != "_"}
    shown = ", ".join(f"{name}={_absolute(value)!r}" for name, value in sorted(settings.items()))
    return f"{type(reader).__module__}.{type(reader).__qualname__}({shown})"


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(inner) for key, inner in value.items()}
    return str(value.resolve()) if isinstance(value, Path) else value


def stored(reader: FileReader, cache: Path) -> StoredCollection:
    """The reader's collection from the cache, converted first if it is not there.

    It is found again by the reader's description, and its files' names, sizes and times.
    """
    description = describe(reader)
    key = hashlib.blake2b(digest_size=10)
    key.update(repr((VERSION, ROWS, description)).encode())
    for source in reader.sources():
        status = source.stat()
        key.update(repr((str(source.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode())
    folder = cache / key.hexdigest()
    if not (folder / "meta.json").is_file():
        with only_one(folder):
            if not (folder / "meta.json").is_file():
                _convert(reader, folder, description)
                return StoredCollection(folder)
    found = StoredCollection(folder)
    _check_sizes(found)
    for warning in found.meta["warnings"]:
        log.warning("%s (said when it was converted into %s)", warning, folder)
    return found


def _check_sizes(collection: StoredCollection) -> None:
    """Raise UserError if a file is missing or has another size than when it was written.

    The fingerprint is not computed again: every rank would read the whole corpus at every start.
    """
    for name, size in collection.meta.get("files", {}).items():
        path = collection.folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            found = "no such file" if actual is None else f"{actual}"
            raise UserError(
                f"{path}: expected {size} bytes, found {found}; delete {path.parent}, and it is converted again"
            )


def _convert(reader: FileReader, folder: Path, description: str) -> None:
    log.info("converting %s (once) into %s", description, folder)
    with unfinished(folder) as new, _warnings() as warnings:
        streams = isinstance(reader, StreamingReader)
        meta = write(reader.stream if streams else lambda sink: pour(reader.read(), sink), new)
        meta |= {"version": VERSION, "reader": description, "warnings": warnings}
        meta["sources"] = [str(source) for source in reader.sources()]
        meta["files"] = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        (new / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What reading warns of, such as lines that are left out: to be said again where the conversion is used."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    readers = logging.getLogger(__package__)
    readers.addHandler(handler)
    try:
        yield said
    finally:
        readers.removeHandler(handler)
