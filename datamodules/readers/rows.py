"""Tables of a data set by split: JSON and parquet files of a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers.bad_lines import QUARANTINED_TEXT, BadLines, Place
from datamodules.readers.json_values import records
from datamodules.records import UserError

# What data sets call their splits. What is there for evaluation alone is a test split.
SPLIT_OF = {"train": "train", "validation": "dev", "val": "dev", "dev": "dev", "test": "test", "evaluation": "test"}

_file_name = re.compile(
    rf"(?P<split>{'|'.join(SPLIT_OF)})(-(?P<part>[0-9]+)-of-(?P<parts>[0-9]+))?\.(json|jsonl|parquet)(\.gz|\.zst)?"
)


def files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, in order: train.jsonl, or train-00000-of-00002.parquet with all its parts, and so on; or a
    folder of the split as the hub converts data sets, train/0000.parquet.

    Raises UserError if the folder has none, has two files for one split, or lacks parts.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (expected files such as train.jsonl or train.parquet in it)")
    found: dict[str, list[tuple[Path, int, int]]] = defaultdict(list)  # path, number of the part, parts
    for path in sorted(folder.iterdir()):
        if (match := _file_name.fullmatch(path.name)) and path.is_file():
            found[SPLIT_OF[match["split"]]].append((path, int(match["part"] or 0), int(match["parts"] or 1)))
        elif path.name in SPLIT_OF and (parts := sorted(path.glob("[0-9]*.parquet"))):
            numbers = [int(part.stem) if part.stem.isdecimal() else -1 for part in parts]
            found[SPLIT_OF[path.name]] += zip(parts, numbers, [len(parts)] * len(parts), strict=True)
    if not found:
        raise UserError(f"{folder}: holds no file of a split (such as train.jsonl, validation.json or test.parquet)")
    for split, files in found.items():
        expected, parts = {of for _, _, of in files}, {part for _, part, _ in files}
        if expected != {len(files)} or parts != set(range(len(files))):
            names = ", ".join(str(path.relative_to(folder)) for path, _, _ in files)
            raise UserError(f"{folder}: the {split} split must be one file, or all parts of one; found {names}")
    return {split: [path for path, _, _ in found[split]] for split in ("train", "dev", "test") if split in found}


def rows_of_files(paths: Iterable[Path], bad: BadLines) -> Iterator[Place]:
    for path in paths:
        yield from _of_parquet(path, bad) if path.suffix == ".parquet" else records(path, bad)


def _of_parquet(path: Path, bad: BadLines) -> Iterator[Place]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading parquet needs the package pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield _place(bad, path, number, row)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: the parquet file is damaged after row {number} ({error})") from error
    bad.end_of_file(path, number)


def load_hub(dataset: str, config: str | None) -> Mapping[str, Iterable[dict[str, Any]]]:
    """All splits of a data set, by its own names."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(f"dataset {dataset}: needs the package datasets: pip install datasets") from error
    try:
        return datasets.load_dataset(dataset, config)
    except Exception as error:  # its own of many kinds, pyarrow's, and those of the network
        reason = f"{error.__cause__}; {error}" if error.__cause__ else error
        raise UserError(f"dataset {dataset}, config {config}: cannot be loaded ({reason})") from error


def hub_splits(dataset: str, config: str | None) -> dict[str, Iterable[dict[str, Any]]]:
    """Split -> rows of a data set of the hub, or of a folder that `datasets` can load."""
    loaded = load_hub(dataset, config)
    known = [name for name in loaded if name in SPLIT_OF]
    found = {SPLIT_OF[name]: loaded[name] for name in known}
    if not found or len(found) < len(known):
        given, allowed = ", ".join(loaded), ", ".join(SPLIT_OF)
        raise UserError(
            f"dataset {dataset}, config {config}: splits {given}; allowed are {allowed}, one for each of ours"
        )
    return found


def rows_of_hub(name: str, rows: Iterable[dict[str, Any]], bad: BadLines) -> Iterator[Place]:
    number = 0
    for number, row in enumerate(rows, start=1):
        yield _place(bad, Path(name), number, row)
    bad.end_of_file(Path(name), number)


def _place(bad: BadLines, path: Path, number: int, row: Any) -> Place:
    return Place(bad, path, number, str(row)[:QUARANTINED_TEXT], number, row)
