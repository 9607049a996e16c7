"""Small files of a run, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from datamodules.records import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write beside the file and rename: who is killed while writing leaves the file as it was."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2))


def read_json(path: Path) -> Any:
    """The content of a file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Delete it to have it made again.") from error
