"""Print tables of results. A command builds the rows, and this module prints them for a screen or another program."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import rich.table
from rich.cells import cell_len
from rich.text import Text

from datamodules.options import option
from experiments.shared.console import UNCUT, PlainConsole, log_to_stderr, table_console
from experiments.shared.plain import plain, say

Format = Literal["table", "markdown", "latex", "csv", "json"]
Cell = str | float | None

PIPE_WIDTH = 160  # width in a file or pipe, for a table whose columns may be left out
FOLDED_WIDTH = 32  # minimum width of a folding column; columns are left out to keep it
NARROWEST = 5  # minimum width of a folding column; other columns are folded to keep it
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~$&#!]|(?<=:)/|(?<=www)\.)")  # the last two would create links
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "{}$&#_%"}
    | {character: f"{{{character}}}" for character in "[]*"}  # \\[ and \\* mean something at the start of a row
    | {character: f"${character}$" for character in "<>|"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}"}
)


def format_option() -> Any:
    """Return the option for the format of a command's tables."""
    return option(
        "table",
        "format of the tables: table for the screen; or markdown, latex, csv or json, with nothing else on stdout. "
        "csv and json have one row per result, all columns and all digits",
    )


def reserve_stdout(format: Format) -> None:
    """Send log lines to stderr, unless the tables are for the screen."""
    if format != "table":
        log_to_stderr()


@dataclass(frozen=True)
class Column:
    """A column of a table.

    form: format specification of the numbers, which are right-aligned; None for a column of text.
    best: which number is printed in bold.
    rank: 0 if always shown; otherwise, a narrow screen leaves out the columns with the highest rank first.
    folds: whether a narrow screen folds the text. Other columns are only folded if the table would not fit.
    """

    heading: str
    form: str | None = None
    best: Literal["highest", "lowest"] | None = None
    rank: int = 0
    folds: bool = False

    def text(self, cell: Cell) -> str:
        if cell is None or isinstance(cell, str):
            return cell or ""
        return format(cell, self.form or "") if math.isfinite(cell) else ""


@dataclass(frozen=True)
class Row:
    """Cells, one per column. group: rows of the same group compete for the best number in a column."""

    cells: Sequence[Cell]
    group: Hashable = None
    ends_section: bool = False


@dataclass
class Table:
    """A table for people to read.

    pipe_width: number of characters in a file or pipe; by default, no column is left out.
    """

    columns: Sequence[Column]
    title: str = ""
    rows: list[Row] = field(default_factory=list)
    pipe_width: int = UNCUT

    def add(self, *cells: Cell, group: Hashable = None, ends_section: bool = False) -> None:
        self.rows.append(Row(cells, group, ends_section))

    def texts(self) -> Iterator[tuple[Row, list[tuple[str, bool]]]]:
        """Yield each row with its texts, and for each text whether it is the best in its column and group.

        Numbers that print the same are equally good. A number without competitors is not marked.
        """
        rivals: dict[tuple[int, Hashable], list[float]] = defaultdict(list)
        for row in self.rows:
            for i, cell in enumerate(row.cells):
                if self.columns[i].best and not isinstance(cell, str) and cell is not None and math.isfinite(cell):
                    rivals[i, row.group].append(cell)
        best = {
            (i, group): self.columns[i].text((max if self.columns[i].best == "highest" else min)(numbers))
            for (i, group), numbers in rivals.items()
            if len(numbers) > 1
        }
        for row in self.rows:
            texts = [column.text(cell) for column, cell in zip(self.columns, row.cells, strict=True)]
            yield row, [(text, text != "" and best.get((i, row.group)) == text) for i, text in enumerate(texts)]


def print_tables(format: Format, tables: Sequence[Table], records: Sequence[Mapping[str, Any]]) -> None:
    """Print tables to stdout as plain text, Markdown or LaTeX, or print the same results as CSV or JSON.

    records: key -> value for each result, with unformatted numbers.
    """
    if format in ("markdown", "latex"):
        say("\n\n".join(map(as_markdown if format == "markdown" else _latex, tables)))
    elif format == "csv":
        say(_csv(records))
    elif format == "json":
        say(json.dumps([{key: _finite(value) for key, value in record.items()} for record in records], indent=1))
    else:
        for table in tables:
            print_table(table)


def print_table(table: Table) -> None:
    """Print a table for the screen."""
    console = table_console()
    if not console.is_terminal:
        console = PlainConsole(width=table.pipe_width)
    rows = list(table.texts())
    widths = [max(cell_len(plain(text)) for text in texts) for texts in _columns(table, rows)]
    shown = _columns_that_fit(table, widths, console.width)
    narrowest = [min(widths[i], NARROWEST) if table.columns[i].folds else widths[i] for i in shown]
    fits = sum(narrowest) + 3 * len(shown) + 1 <= console.width
    grid = rich.table.Table()
    for i in shown:
        column, folds = table.columns[i], table.columns[i].folds or not fits
        grid.add_column(
            column.heading,
            justify="left" if column.form is None else "right",
            no_wrap=not folds,
            overflow="fold",  # with "ignore", Rich would not align numbers to the right
            min_width=None if folds else widths[i],
        )
    for row, texts in rows:
        cells = [Text(plain(text), "bold" if is_best else "") for text, is_best in texts]
        grid.add_row(*(cells[i] for i in shown), end_section=row.ends_section)
    if table.title:
        console.print(table.title, style="italic", soft_wrap=True)
    console.print(grid)


def _columns_that_fit(table: Table, widths: Sequence[int], limit: int) -> list[int]:
    """Return the columns to show in at most `limit` characters. widths: width of each column's longest text."""
    shown = list(range(len(widths)))
    least = [min(width, FOLDED_WIDTH) if table.columns[i].folds else width for i, width in enumerate(widths)]
    for i in sorted(shown, key=lambda i: -table.columns[i].rank):
        if table.columns[i].rank and sum(least[j] + 3 for j in shown) + 1 > limit:
            shown.remove(i)
    return shown


def _columns(table: Table, rows: Sequence[tuple[Row, list[tuple[str, bool]]]]) -> list[list[str]]:
    """Return the heading and the texts of each column."""
    return [[column.heading, *(texts[i][0] for _, texts in rows)] for i, column in enumerate(table.columns)]


def as_markdown(table: Table) -> str:
    """Return a table as Markdown."""
    head = [escape_markdown(column.heading) for column in table.columns]
    lines = [head, ["---" if column.form is None else "---:" for column in table.columns]]
    for _, texts in table.texts():
        escaped = [(escape_markdown(text), is_best) for text, is_best in texts]
        lines.append([f"**{text}**" if is_best else text for text, is_best in escaped])
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{escape_markdown(table.title)}\n\n{grid}" if table.title else grid


def _latex(table: Table) -> str:
    """Return a table as LaTeX, which needs the package booktabs."""
    lines = [f"% {plain(table.title)}"] if table.title else []
    lines.append(rf"\begin{{tabular}}{{{''.join('l' if c.form is None else 'r' for c in table.columns)}}}")
    lines += [r"\toprule", _latex_row([escape_latex(column.heading) for column in table.columns]), r"\midrule"]
    for row, texts in table.texts():
        escaped = [(escape_latex(text), is_best) for text, is_best in texts]
        lines.append(_latex_row([rf"\textbf{{{text}}}" if is_best else text for text, is_best in escaped]))
        if row.ends_section and row is not table.rows[-1]:
            lines.append(r"\midrule")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text as Markdown. Cells are escaped."""
    return as_markdown(Table([Column(heading) for heading in headings], rows=[Row(cells) for cells in rows]))


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, on one line."""
    return MARKDOWN.sub(r"\\\1", plain(text))


def escape_latex(text: str) -> str:
    """Escape text so that LaTeX shows it unchanged, on one line, with proper minus signs."""
    text = plain(text).translate(LATEX).replace("--", "-{}-")
    return re.sub(r"(?<![^\s(])-(?=[\d.])", "$-$", text)


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.writer(file := io.StringIO(), lineterminator="\n")
    writer.writerow(map(plain, names))
    writer.writerows([_csv_cell(record.get(name)) for name in names] for record in records)
    return file.getvalue().rstrip("\n")


def _csv_cell(value: Any) -> Any:
    """Return a cell on one line. Lists and booleans are as in JSON, and numbers that are not finite are empty."""
    if isinstance(value, str):
        return plain(value)
    return json.dumps(value) if isinstance(value, bool | list | dict) else _finite(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
