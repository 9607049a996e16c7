"""Tables in all formats. Other programs read them back: a Markdown parser, pylatexenc, csv and json."""

import csv
import io
import json
import logging
import math
import re
import sys

import pytest
from markdown_it import MarkdownIt
from pylatexenc.latex2text import LatexNodes2Text

from experiments.shared import console
from experiments.shared.plain import plain
from experiments.shared.table_formats import Column, Table, escape_latex, print_tables
from tests.experiments.shared.test_plain import HOSTILE, is_safe

HOSTILE_TEXTS = [
    HOSTILE,
    r"a | b \ c _d_ *e* **f** `g` # $h$ & % {i} ~j~ ^k < l > [m](n) ![o](p) <script> &lt; \| \\",
    "https://example.org www.example.org",
    "[red] at the start of a row",
    "* at the start of a row",
    "- 1, -2, (-.5) and state-of-the-art -- --flag",
    "\\",
    "",
]


def table_of(texts) -> Table:
    table = Table([Column("text"), Column("x_1 | y", ".2f", "highest")], title=f"title {HOSTILE_TEXTS[1]}")
    for i, text in enumerate(texts):
        table.add(text, i / 3)
    return table


def printed(capsys, format, table, records=()):
    print_tables(format, [table], records)
    return capsys.readouterr().out


def test_markdown_shows_text_as_it_is(capsys):
    output = printed(capsys, "markdown", table_of(HOSTILE_TEXTS))
    assert is_safe(output)
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(output)
    inline = [token for token in tokens if token.type == "inline"]
    assert "".join(child.content for child in inline[0].children) == f"title {HOSTILE_TEXTS[1]}"
    cells = ["".join(child.content for child in token.children) for token in inline[1:]]
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "text_special", "strong_open", "strong_close"}
    assert cells == ["text", "x_1 | y"] + [
        cell for i, text in enumerate(HOSTILE_TEXTS) for cell in (" ".join(plain(text).split("\n")), f"{i / 3:.2f}")
    ]


def test_addresses_in_markdown_are_not_links(capsys):
    """GitHub makes links of bare addresses, and of words that start with www."""
    output = printed(capsys, "markdown", table_of(HOSTILE_TEXTS))
    assert not re.search(r"\w://|www\.", output)


def test_latex_shows_text_as_it_is(capsys):
    output = printed(capsys, "latex", table_of(HOSTILE_TEXTS))
    assert is_safe(output)
    body = output.split("\\midrule\n")[1].split("\\bottomrule")[0]
    rows = body.removesuffix(" \\\\\n").split(" \\\\\n")
    assert len(rows) == len(HOSTILE_TEXTS)
    for i, (row, text) in enumerate(zip(rows, HOSTILE_TEXTS, strict=True)):
        assert not row.startswith(("[", "*"))
        cells = re.split(r"(?<!\\)&", row)
        assert len(cells) == 2
        read = LatexNodes2Text(math_mode="text", keep_comments=True).latex_to_text(cells[0])
        assert read.replace("\u02c6", "^").strip() == plain(text).strip(), text
        assert f"{i / 3:.2f}" in cells[1]
    title = output.splitlines()[0]
    assert title.startswith("% title")


def test_minus_signs_in_latex_are_true_ones():
    assert escape_latex("+0.01 -0.02") == "+0.01 $-$0.02"
    assert escape_latex("BERT-2 state-of-the-art") == "BERT-2 state-of-the-art"


RECORDS = [
    {"system": HOSTILE_TEXTS[1] + ',"', "ndcg@10": 0.1 + 0.2, "count": 3, "tasks": ["a", "b"], "done": True},
    {"system": "b\nc", "ndcg@10": math.nan, "further": 1e-300},
]


def test_csv_has_every_digit_and_every_column(capsys):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, "csv", table_of([]), RECORDS)), strict=True))
    assert [*rows[0]] == ["system", "ndcg@10", "count", "tasks", "done", "further"]
    assert rows[0]["system"] == RECORDS[0]["system"]
    assert float(rows[0]["ndcg@10"]) == 0.1 + 0.2
    assert (rows[0]["count"], rows[0]["done"], json.loads(rows[0]["tasks"])) == ("3", "true", ["a", "b"])
    assert (rows[1]["system"], rows[1]["ndcg@10"], float(rows[1]["further"])) == ("b c", "", 1e-300)


def test_json_has_numbers_as_numbers_and_texts_unchanged(capsys):
    records = [*RECORDS, {"system": HOSTILE}, {"system": "half \udc80 a character"}]
    output = printed(capsys, "json", table_of([]), records)
    assert is_safe(output)
    assert json.loads(output) == [records[0], records[1] | {"ndcg@10": None}, *records[2:]]


def bold(table: Table) -> list[list[int]]:
    """Return the columns that are bold in each row of the Markdown, as a terminal's table marks the same cells."""
    return [[i for i, (_, is_best) in enumerate(texts) if is_best] for _, texts in table.texts()]


def test_best_number_of_each_column_and_group_is_marked():
    table = Table([Column("system"), Column("up", ".2f", "highest"), Column("down", ".2f", "lowest"), Column("x", "d")])
    table.add("theirs", 0.5, 3, 1, group="a")
    table.add("ours", 0.4, 3.001, 2, group="a")
    table.add("third", None, math.nan, 3, group="a")
    table.add("theirs", 0.7, -1, 1, group="b")
    table.add("ours", 0.701, -2, 2, group="b")
    table.add("alone", 0.9, 9, 9, group="c")
    assert bold(table) == [[1, 2], [2], [], [1], [1, 2], []]


@pytest.mark.parametrize(("format", "mark"), [("markdown", "**0.50**"), ("latex", r"\textbf{0.50}")])
def test_marks_are_bold_in_markdown_and_latex(capsys, format, mark):
    table = Table([Column("up", ".2f", "highest")])
    for value in (0.5, 0.25):
        table.add(value)
    output = printed(capsys, format, table)
    assert output.count(mark) == 1
    assert "0.25" in output.replace(mark, "")


def test_marks_are_bold_on_a_terminal(capsys, monkeypatch):
    terminal = console.PlainConsole(force_terminal=True, width=80)
    monkeypatch.setattr("experiments.shared.table_formats.table_console", lambda: terminal)
    table = Table([Column("up", ".2f", "highest")])
    for value in (0.5, 0.25):
        table.add(value)
    output = printed(capsys, "table", table)
    assert re.search(r"\x1b\[1m *0\.50", output)
    assert not re.search(r"\x1b\[1m *0\.25", output)


def test_narrow_screens_leave_out_columns_by_rank_and_cut_nothing(capsys, monkeypatch):
    table = Table([Column("name"), Column("note", folds=True), Column("b", rank=1), Column("c", rank=2)])
    table.add("a" * 30, "words " * 20, "b" * 10, "c" * 10)
    shown = {}
    for width in (70, 82, 95, 400):
        monkeypatch.setattr("experiments.shared.table_formats.table_console", lambda: console.PlainConsole(width=400))
        table.pipe_width = width
        shown[width] = output = printed(capsys, "table", table)
        assert "a" * 30 in output
        assert max(map(len, output.splitlines())) <= width
    assert {width: [x in output for x in ("b" * 10, "c" * 10)] for width, output in shown.items()} == {
        70: [False, False],
        82: [True, False],
        95: [True, True],
        400: [True, True],
    }


def test_columns_of_a_table_that_does_not_fit_are_folded_and_not_cut(capsys):
    """The terminal cut off the last columns of wide tables, such as the counts of `make data` at 80 characters."""
    table = Table([Column("folder"), *(Column(name, ",d") for name in ("documents", "queries"))], pipe_width=60)
    table.add("classification_computer_science", 12_345_678, 12_345)
    table.add("  published", "12,345,678 (+0.0%)", "12,345 (+0.0%)")
    lines = printed(capsys, "table", table).splitlines()
    assert max(map(len, lines)) <= 60
    cells = [
        "".join(cell.split())
        for cell in map("".join, zip(*(row.split("│") for row in lines if "│" in row), strict=True))
    ]
    assert cells[1:4] == [
        "classification_computer_sciencepublished",
        "12,345,67812,345,678(+0.0%)",
        "12,34512,345(+0.0%)",
    ]


def test_numbers_are_aligned_to_the_right(capsys):
    """Rich aligned them to the left, because their columns are never cut."""
    table = Table([Column("name"), Column("steps", ",d"), Column("mean", ".2f", "highest")])
    table.add("宽 characters", 5, 0.5)
    table.add("a", 12_000, 10.25)
    rows = printed(capsys, "table", table).splitlines()[3:5]
    assert rows == ["│ 宽 characters │      5 │  0.50 │", "│ a             │ 12,000 │ 10.25 │"]


def test_log_lines_leave_stdout_to_the_table(capsys, monkeypatch):
    def command(_):
        logging.getLogger("x").info("before")
        console.log_to_stderr()
        logging.getLogger("x").info("after")

    monkeypatch.setattr(sys, "argv", ["command"])
    console.entry_point(command)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("before\n", "after\n")
