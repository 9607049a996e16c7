"""Readers, one file per format. Each reader turns its format into a Collection."""

from __future__ import annotations

from pathlib import Path

from datamodules.readers.beir import BeirReader
from datamodules.readers.io import check_folder, find_optional_file, find_split_files
from datamodules.readers.jsonl import JsonlReader
from datamodules.records import UserError

LAYOUTS = "corpus.jsonl, queries.jsonl and qrels/ (BEIR), or corpus.jsonl and train.jsonl (JSON lines)"
HINT = "To choose the format yourself, name the reader (docs/data.md)"
IMPORT = "Libraries and dumps of papers are imported first (docs/import.md)"


def reader_class_of(folder: str | Path) -> type[BeirReader] | type[JsonlReader]:
    """Return the reader for a folder, which is in BEIR layout or our own JSON lines, by the names of its files.

    Raises UserError if the folder does not exist, or has neither layout, or both.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; expected a folder with {LAYOUTS}. {IMPORT}")
    check_folder(folder, LAYOUTS)
    beir = (folder / "qrels").is_dir() or find_optional_file(folder, "queries.jsonl")
    jsonl = next(iter(find_split_files(folder, "SPLIT.jsonl", "SPLIT.json").values()), None)
    if beir and jsonl:
        raise UserError(
            f"{folder}: has files of two layouts, {jsonl.name} (JSON lines) and queries.jsonl or qrels/ (BEIR). {HINT}"
        )
    if not (beir or jsonl):
        raise UserError(f"{folder}: unknown layout; expected {LAYOUTS}. {HINT}. {IMPORT}")
    return BeirReader if beir else JsonlReader
