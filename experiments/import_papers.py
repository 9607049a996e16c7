"""Import papers from a library or a dump: python -m experiments.import_papers FILE output=FOLDER [key=value ...]"""

from __future__ import annotations

import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from datamodules.files import expanded, write_json
from datamodules.options import option
from datamodules.papers.columns import COLUMNS, parse_columns
from datamodules.papers.formats import FORMATS, IMPORTED, QUARANTINE, files_of, format_of, read_papers, warn_of_unread
from datamodules.papers.library import EmptyLibrary, Library, library_in, with_counts
from datamodules.papers.paper_record import LABEL_KINDS, Paper
from datamodules.papers.splits import Splits
from datamodules.papers.views import VIEW_OF_KIND, VIEWS, EmptyView, ViewOptions
from datamodules.readers.beir import BeirWriter
from datamodules.readers.checks import SPLITS
from datamodules.readers.rows import BadLines
from datamodules.records import UserError, counted, prefixed
from experiments.config.arguments import named_values, parse
from experiments.shared.console import entry_point, relative_path
from experiments.shared.output import whole_folder
from experiments.shared.progress import Progress
from experiments.shared.table_formats import Column, Table, print_table

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ImportOptions:
    """Turn a library or a dump of papers into training data, with one folder for each task that the papers can serve.

    The output has papers.jsonl with all papers, import.json with the counts, and the folders classification,
    link_prediction and search in BEIR layout.
    """

    input: tuple[str, ...] = option(help="files and folders, separated by spaces or commas", positional=True)
    output: Path = option(help="new folder for the data")
    format: Literal["", *FORMATS] = option("", "format of all files; by default, each file's format is detected")
    columns: tuple[str, ...] = option((), f"columns of a table, NAME:COLUMN; NAME is one of {', '.join(COLUMNS)}")
    split: str = option(
        "80/10/10",
        "percentages of train, dev and test; or the last year of train (2015), or of train and dev (2015/2018); or "
        "given, for files with a column split",
    )
    labels: tuple[Literal[*LABEL_KINDS], ...] = option(
        (), "kinds of labels; by default the first kind that the papers have"
    )
    min_papers: int = option(5, "minimum number of papers per label", minimum=1)
    definitions: str = option("", "file with definitions of labels: MeSH's desc2026.xml, JSON lines, or id <tab> name")
    search: str = option("title", "queries: title (finds its abstract), keywords (find their paper), or a file")
    on_error: Literal["fail", "skip"] = option(
        "skip", "what to do with a bad record: stop, or save it in OUTPUT.quarantine.jsonl"
    )


@dataclass
class Counts:
    """The counts of a folder. problem: reason why the folder was not created."""

    documents: int = 0
    kind: str = ""
    queries: Mapping[str, int] = field(default_factory=dict)
    pairs: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""


def main(arguments: Sequence[str]) -> None:
    options = parse(ImportOptions, arguments)
    named = named_values("columns", options.columns, "NAME:COLUMN, such as title:Titel")
    splits, columns = Splits(options.split), parse_columns(named)
    views = ViewOptions(options.labels, options.min_papers, options.definitions, options.search)
    files = _files(options.input)
    formats = Counter(options.format or format_of(path) for path in files)
    with whole_folder(options.output) as folder:
        quarantine = options.output.with_name(options.output.name + QUARANTINE)
        quarantine.unlink(missing_ok=True)
        with BadLines(options.on_error, str(quarantine)) as bad, library_in(splits, folder) as library:
            with Progress("reading", "records", brief=True) as progress:
                papers = read_papers(files, bad, options.format, columns)
                _read(library, _advancing(papers, progress), ", ".join(options.input))
            if num_bad := bad.by_reason.total():  # any later bad records are from a file of queries
                library.left_out[f"bad records, in {relative_path(quarantine)}"] = num_bad
            counts = {kind: _write(library, view, views, bad, folder / kind) for kind, view in VIEW_OF_KIND.items()}
            library.write(folder / IMPORTED)
            summary = {
                "input": [str(path) for path in files],
                "formats": dict(formats),
                "options": {key: value for key, value in asdict(options).items() if key not in ("input", "output")},
                "records": library.num_records + num_bad,
                "papers": len(library),
                "left_out": dict(library.left_out),
                "tasks": {kind: asdict(count) for kind, count in counts.items()},
            }
            write_json(folder / "import.json", summary)
    _report(options.output, summary, counts)


def _files(texts: Sequence[str]) -> list[Path]:
    """Return the files of papers. Each text is a path (commas allowed), or several paths separated by commas."""
    sources = [source for text in texts for source in ([text] if os.path.exists(text) else text.split(","))]
    paths = [expanded(source, "input") for source in sources if source]
    files: dict[Path, None] = {}
    with prefixed("input: "):
        for path in paths:
            files |= dict.fromkeys(new := files_of(path))
            warn_of_unread(path, new)
    return list(files)


def _read(library: Library, papers: Iterable[Paper | None], source: str) -> None:
    try:
        library.read(papers)
    except EmptyLibrary as error:
        raise UserError(f"input: {source}: {error}") from error


def _advancing(papers: Iterable[Paper | None], progress: Progress) -> Iterator[Paper | None]:
    for number, paper in enumerate(papers, start=1):
        if number % 1000 == 0:
            progress.advance(1000)
        yield paper


def _write(library: Library, view_name: str, options: ViewOptions, bad: BadLines, folder: Path) -> Counts:
    """Write the folder of a task, if the library can serve it."""
    try:
        view = VIEWS[view_name](library, options, bad)
    except EmptyView as error:
        return Counts(problem=str(error))
    with BeirWriter(folder) as writer:
        view.stream(writer)
    return Counts(view.num_documents, view.kind, view.queries, view.pairs, dict(view.left_out))


def _report(output: Path, summary: Mapping, counts: Mapping[str, Counts]) -> None:
    """Print what was created, what was left out and why, and the next command."""
    numbers = [Column(f"{split} queries", ",d", folds=True) for split in SPLITS]
    columns = [Column("task"), Column("corpus", "", folds=True), *numbers, Column("pairs", ",d", folds=True)]
    papers = counted(summary["papers"], "paper")
    title = f"{papers} from {counted(summary['records'], 'record')}, in {relative_path(output)}"
    table = Table([*columns, Column("left out", folds=True)], title)
    table.add("(all)", papers, *[None] * 4, with_counts(summary["left_out"]))
    for kind, count in counts.items():
        if count.problem:
            table.add(kind, *[None] * 5, f"not created: {count.problem}")
            continue
        queries = (count.queries.get(split, 0) for split in SPLITS)
        corpus, pairs = counted(count.documents, count.kind), sum(count.pairs.values())
        table.add(kind, corpus, *queries, pairs, with_counts(count.left_out))
    print_table(table)
    if created := [kind for kind, count in counts.items() if not count.problem]:
        data = [shlex.quote(f"task.{kind}.data={relative_path(output)}") for kind in created]
        filled = {split for kind in created for split, number in counts[kind].queries.items() if number}
        if "test" not in filled:  # a small library may have none
            data.append(f"evaluation.split={'dev' if 'dev' in filled else 'train'}")
        log.info("Next: make train EXP=moe 'tasks=[%s]' %s", ",".join(created), " ".join(data))
    else:
        raise UserError(
            f"input: these papers cannot serve any task; all papers are in {relative_path(output) / IMPORTED}"
        )


if __name__ == "__main__":
    entry_point(main)
