"""Which reader a folder is for, by its files, where none is named."""

from __future__ import annotations

from pathlib import Path

from datamodules.readers import fields
from datamodules.readers.beir import BeirReader
from datamodules.readers.jsonl import JsonlReader
from datamodules.readers.lines import find_file
from datamodules.records import UserError

LAYOUTS = "corpus.jsonl, queries.jsonl and qrels/ (BEIR), or corpus.jsonl and train.jsonl (JSON lines)"
NAME_IT = "A reader that is named reads it as its own format: _target_ (docs/data.md)"


def reader_of(folder: str | Path) -> type[BeirReader] | type[JsonlReader]:
    """The reader of a folder in BEIR layout, or of our own JSON lines.

    Raises UserError if there is no such folder, or if it is in neither layout or in both.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (expected {LAYOUTS} in it)")
    beir = (folder / "qrels").is_dir() or find_file(folder, "queries.jsonl", required=False)
    names = [f"{split}.{ending}" for split in fields.SPLITS for ending in ("jsonl", "json")]
    ours = find_file(folder, *names, required=False)
    if beir and ours:
        raise UserError(
            f"{folder}: holds {ours.name}, and queries.jsonl or qrels/ too: which of them counts? {NAME_IT}"
        )
    if not (beir or ours):
        raise UserError(f"{folder}: expected {LAYOUTS} in it. {NAME_IT}")
    return BeirReader if beir else JsonlReader
