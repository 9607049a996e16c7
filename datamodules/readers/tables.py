"""Read tables, one or more per split, from JSON and parquet files in a folder or from a data set on the hub."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.readers.checks import SPLIT_NAMES, SPLITS
from datamodules.readers.io import check_folder
from datamodules.readers.json_files import read_records
from datamodules.readers.rows import BadLines, Row
from datamodules.records import UserError

FILE_NAME = re.compile(
    rf"(?P<split>{'|'.join(SPLIT_NAMES)})(-(?P<part>[0-9]+)-of-(?P<parts>[0-9]+))?\.(parquet|jsonl?(\.gz|\.zst)?)"
)


class _Part(NamedTuple):
    path: Path
    number: int
    num_parts: int


def files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split, in order.

    A split is one file (train.jsonl), several parts (train-00000-of-00002.parquet, ...), or a folder as in the hub's
    conversions (train/0000.parquet, ...). Raises UserError if there is no split, or if a split has two files or lacks
    parts.
    """
    check_folder(folder, "files such as train.jsonl or train.parquet")
    parts: dict[str, list[_Part]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if (match := FILE_NAME.fullmatch(path.name)) and path.is_file():
            parts[SPLIT_NAMES[match["split"]]].append(_Part(path, int(match["part"] or 0), int(match["parts"] or 1)))
        elif path.name in SPLIT_NAMES and (files := sorted(path.glob("[0-9]*.parquet"))):
            numbers = [int(file.stem) if file.stem.isdecimal() else -1 for file in files]
            parts[SPLIT_NAMES[path.name]] += map(_Part, files, numbers, [len(files)] * len(files))
    if not parts:
        raise UserError(f"{folder}: contains no file of a split (such as train.jsonl, validation.json or test.parquet)")
    for split, split_parts in parts.items():
        num_parts = {part.num_parts for part in split_parts}
        if num_parts != {len(split_parts)} or {part.number for part in split_parts} != set(range(len(split_parts))):
            names = ", ".join(str(part.path.relative_to(folder)) for part in split_parts)
            raise UserError(f"{folder}: the {split} split must be one file, or all parts of one file, got {names}")
    return {split: [part.path for part in parts[split]] for split in SPLITS if split in parts}


def read_tables(paths: Iterable[Path], bad: BadLines) -> Iterator[Row]:
    """Yield the rows of parquet files, and the records of JSON files. Raises UserError for damaged files."""
    for path in paths:
        yield from _read_parquet(path, bad) if path.suffix == ".parquet" else read_records(path, bad)


def _read_parquet(path: Path, bad: BadLines) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield _table_row(bad, path, number, record)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the parquet file is damaged after row {number} ({error})") from error
    bad.end_of_file(path, number)


def load_hub(dataset: str, config: str | None) -> Mapping[str, Iterable[dict[str, Any]]]:
    """Return all splits of a data set on the Hugging Face hub, under their original names."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"dataset {dataset}: needs the package datasets: pip install datasets") from error
    try:
        return datasets.load_dataset(dataset, config)
    except Exception as error:  # errors of datasets, pyarrow and the network have no common base class
        reason = f"{error.__cause__}; {error}" if error.__cause__ else error
        raise UserError(f"dataset {dataset}, config {config}: cannot be loaded ({reason})") from error


def load_hub_splits(dataset: str, config: str | None) -> dict[str, Iterable[dict[str, Any]]]:
    """Return the rows of train, dev and test from a data set on the hub, or from a folder that `datasets` can load."""
    loaded = load_hub(dataset, config)
    known = [name for name in loaded if name in SPLIT_NAMES]
    splits = {SPLIT_NAMES[name]: loaded[name] for name in known}
    if not splits or len(splits) < len(known):
        raise UserError(
            f"dataset {dataset}, config {config}: expected splits named {', '.join(SPLIT_NAMES)}, at most one for each "
            f"of {', '.join(SPLITS)}, got {', '.join(loaded)}"
        )
    return splits


def read_hub_table(name: str, records: Iterable[dict[str, Any]], bad: BadLines) -> Iterator[Row]:
    """Yield the rows of a table. name: name of the table in errors, instead of a path."""
    number = 0
    for number, record in enumerate(records, start=1):
        yield _table_row(bad, Path(name), number, record)
    bad.end_of_file(Path(name), number)


def _table_row(bad: BadLines, path: Path, number: int, record: Any) -> Row:
    return Row(bad, path, number, str(record), number, record)
