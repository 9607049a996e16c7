"""Files of papers: find them, recognise their formats, and read them as one stream of papers."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.papers import arxiv, bibtex, columns, csl, openalex, pubmed, ris, semantic_scholar
from datamodules.papers.paper_record import Paper
from datamodules.readers.io import numbered_lines, read_lines, suffix_of
from datamodules.readers.json_files import as_object, is_list, read_entries, read_values
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.readers.tables import read_tables
from datamodules.records import UserError, check_choice

log = logging.getLogger(__name__)
PAGES = ("results", "data", "items")  # keys under which pages of an API list their records


def json_rows(path: Path, bad: BadLines) -> Iterator[Row]:
    """Yield the records of JSON lines, a JSON list, or pages of an API (objects with a list of records)."""
    if is_list(path):
        return read_entries(path, bad)
    lines = (line.strip() for _, line in numbered_lines(path))
    lines = (line for line in lines if line.strip("\ufeff"))
    first, second = next(lines, ""), next(lines, "")
    value = _parsed(first)
    is_page = value is not None and _page(value) is not None
    spans_lines = value is None and second != "" and not second.startswith("{")
    return _page_rows(path, bad) if is_page or spans_lines else read_lines(path, bad)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _page(value: Any) -> list[Any] | None:
    """Return the records of a page: {"results": [...]}, {"data": [...]}, {"items": [...]} or {"message": ...}."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("message"), dict):  # Crossref
        page = _page(value["message"])
        return [value["message"]] if page is None else page
    return next((value[key] for key in PAGES if isinstance(value.get(key), list)), None)


def _page_rows(path: Path, bad: BadLines) -> Iterator[Row]:
    count = 0
    for line, value in read_values(path):
        page = _page(value)
        for entry in [value] if page is None else page:
            count += 1
            yield Row(bad, path, line, json.dumps(entry), count, entry)
    bad.end_of_file(path, count)


@dataclass(frozen=True)
class Format:
    """A file format for papers.

    suffixes: file suffixes, without .gz or .zst.
    rows: function that yields the records of a file.
    paper: function that turns a record into a paper, or into None if it is not one.
    recognises: function that returns whether a JSON record has this format; None if the suffix decides.
    """

    suffixes: tuple[str, ...]
    rows: Callable[[Path, BadLines], Iterator[Row]]
    paper: Callable[..., Paper | None]
    recognises: Callable[[Record], bool] | None = None


JSON = (".json", ".jsonl", ".ndjson")
FORMATS = {
    "openalex": Format(JSON, json_rows, openalex.paper, openalex.recognises),
    "semantic_scholar": Format(JSON, json_rows, semantic_scholar.paper, semantic_scholar.recognises),
    "zotero": Format(JSON, json_rows, csl.zotero_paper, csl.is_zotero),
    "crossref": Format(JSON, json_rows, csl.crossref_paper, csl.is_crossref),
    "arxiv": Format(JSON, json_rows, arxiv.paper, arxiv.recognises),
    "csl": Format(JSON, json_rows, csl.csl_paper, csl.is_csl),
    "json": Format(JSON, json_rows, columns.paper, lambda record: True),
    "pubmed": Format((".xml",), pubmed.rows, pubmed.paper),
    "bibtex": Format((".bib", ".bibtex"), bibtex.rows, bibtex.paper),
    "ris": Format((".ris",), ris.rows, ris.paper),
    "csv": Format((".csv", ".tsv"), columns.csv_rows, columns.paper),
    "parquet": Format((".parquet",), lambda path, bad: read_tables([path], bad), columns.paper),
    "excel": Format((".xlsx", ".xlsm"), columns.excel_rows, columns.paper),
}
TABLES = ("json", "csv", "parquet", "excel")  # formats with named columns
IMPORTED, QUARANTINE = "papers.jsonl", ".quarantine.jsonl"  # names of files that an import writes
KNOWN_SUFFIXES = {suffix for format in FORMATS.values() for suffix in format.suffixes}


def files_of(source: Path) -> list[Path]:
    """Return a file, or all files below a folder that may contain papers. Raises UserError if there are none.

    Files without a suffix are included if they are compressed, because OpenAlex's snapshot has names like part_000.gz.
    If the folder is the output of an import, only its papers.jsonl is returned. Outputs of imports inside the folder
    are skipped.
    """
    if os.path.isfile(source):  # unlike Path.is_file, this accepts names that are too long to exist
        return [source]
    if not os.path.isdir(source):
        raise UserError(f"{source}: no such file or folder")
    if _is_import(source):
        return [source / IMPORTED]
    suffixes = {path: suffix_of(path) for path in _visible(source)}
    files = [path for path, suffix in suffixes.items() if suffix in KNOWN_SUFFIXES or (not suffix and path.suffix)]
    if not files:
        raise UserError(
            f"{source}: contains no files of papers ({', '.join(sorted(KNOWN_SUFFIXES))}; plain, .gz or .zst)"
        )
    return files


def warn_of_unread(source: Path, files: Sequence[Path]) -> None:
    """Log how many files of a folder are not read, by suffix, and which outputs of imports are skipped.

    files: files that are read.
    """
    if not os.path.isdir(source) or _is_import(source):
        return
    if imports := _imports_in(source):
        log.warning("%s: not read, because these are outputs of imports: %s", source, ", ".join(map(str, imports)))
    unread = Counter(path.suffix.lower() or path.name for path in set(_visible(source)) - set(files))
    if unread:
        shown = ", ".join(f"{count:,} x {suffix}" for suffix, count in unread.most_common(8))
        log.warning("%s: not read, because of an unknown suffix: %s", source, shown)


def _is_import(folder: Path) -> bool:
    return (folder / "import.json").is_file() and (folder / IMPORTED).is_file()


def _imports_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("import.json") if _is_import(path.parent))


def _visible(folder: Path) -> list[Path]:
    """Return the files below a folder, except outputs of imports and hidden files, which a killed import may leave."""
    imports = set(_imports_in(folder))
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and not path.name.endswith(QUARANTINE)
        and imports.isdisjoint(path.parents)
        and path.is_file()
    )


def format_of(path: Path) -> str:
    """Recognise a file's format by its suffix and first record. Raises UserError if the format is unknown."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    suffix = suffix_of(path)
    for name, format in FORMATS.items():
        if suffix in format.suffixes and format.recognises is None:
            return name
    if suffix and suffix not in JSON:
        raise UserError(
            f"{path}: unknown format; expected one of {', '.join(sorted(KNOWN_SUFFIXES))} (plain, .gz or .zst)"
        )
    for row in json_rows(path, BadLines("skip", os.devnull)):
        try:
            record = as_object(row)
        except UserError:
            continue  # will be reported when the file is read
        return next(name for name, format in FORMATS.items() if format.recognises and format.recognises(record))
    raise UserError(f"{path}: contains no JSON objects")


def read_papers(
    files: Sequence[Path], bad: BadLines, format: str = "", names: Mapping[str, str] | None = None
) -> Iterator[Paper | None]:
    """Yield the paper of each record, or None if the record is not a paper, such as a note in Zotero.

    format: one of FORMATS, for all files; by default, the format of each file is recognised.
    names: names of table columns, if they differ from the usual ones.
    """
    for path in files:
        name = check_choice("format", format, list(FORMATS)) if format else format_of(path)
        make, must_check_columns, count = FORMATS[name].paper, name in TABLES, 0
        if name in TABLES:
            make = functools.partial(make, columns=names or {})
        for row in FORMATS[name].rows(path, bad):
            count += 1
            papers, record = [], None  # no paper if the row is bad
            with row:
                is_null = row.entry is not None and row.value is None  # an API answers null for an unknown id
                record = None if is_null else as_object(row)
                papers.append(None if record is None else make(record))
            if must_check_columns and record is not None:
                columns.check_columns(path, record, names or {})
                must_check_columns = False
            yield from papers
        if not count:
            log.warning("%s: no record could be read as %s; if the file has another format, set format", path, name)
