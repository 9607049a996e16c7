"""Readers, one file per format. Each turns its format into a Collection."""

from __future__ import annotations

from pathlib import Path

from datamodules.readers.beir import BeirReader
from datamodules.readers.checks import SPLITS
from datamodules.readers.io import find_file
from datamodules.readers.jsonl import JsonlReader
from datamodules.records import UserError

LAYOUTS = "corpus.jsonl, queries.jsonl and qrels/ (BEIR), or corpus.jsonl and train.jsonl (JSON lines)"
HINT = "To read it as a particular format, name the reader (docs/data.md)"


def reader_class_of(folder: str | Path) -> type[BeirReader] | type[JsonlReader]:
    """Return the reader for a folder, BEIR or our own JSON lines, by the names of its files.

    Raises UserError if there is no such folder, or if it has neither layout or both.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (expected {LAYOUTS} in it)")
    beir = (folder / "qrels").is_dir() or find_file(folder, "queries.jsonl", required=False)
    names = [f"{split}.{suffix}" for split in SPLITS for suffix in ("jsonl", "json")]
    jsonl = find_file(folder, *names, required=False)
    if beir and jsonl:
        raise UserError(
            f"{folder}: has files of two layouts, {jsonl.name} (JSON lines) and queries.jsonl or qrels/ (BEIR). {HINT}"
        )
    if not (beir or jsonl):
        raise UserError(f"{folder}: expected {LAYOUTS} in it. {HINT}")
    return BeirReader if beir else JsonlReader
