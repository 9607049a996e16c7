"""Text that is not ours is printed as it is: no markup, no escape sequences, no forged lines."""

import ast
import logging
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.table import Table

from experiments import audit, compare, data, dry_run, find, import_papers, index, merge, mteb, reproduce, runs, sweep
from experiments.build.suite import BenchmarkConfig
from experiments.results import result_tables
from experiments.results.results import BenchmarkTable, Cost, SystemResult
from experiments.shared import console
from experiments.shared.plain import PlainFormatter, plain
from experiments.shared.progress import Progress
from experiments.shared.table_formats import print_tables

ROOT = Path(__file__).parents[3]
HOSTILE = (
    "[/INST] [bmim] [red]x[/red] :smile: [link=file:///etc]y[/link] \x1b[31mred\x1b[0m \x1b]0;window\x07"
    "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\ \x9b2Jc1 \x1b(Bset\x00\x08\r\u202eleft two\nlines"
)
PRINTED = "[/INST] [bmim] [red]x[/red] :smile: [link=file:///etc]y[/link] red here c1 set left two lines"


def is_safe(text: str) -> bool:
    """Whether nothing in printed text controls the terminal, judged by Unicode's categories."""
    return not [c for c in text if c != "\n" and (unicodedata.category(c) in ("Cc", "Cs") or "\u202a" <= c <= "\u202e")]


def test_plain_text_keeps_what_is_printable():
    assert plain(HOSTILE) == PRINTED
    assert plain("half \udc80 a character") == "half \\udc80 a character"  # not logged, as xdist cannot send it
    assert plain("Größe 中文 👩‍🔬 a\tb") == "Größe 中文 👩‍🔬 a b"
    for line_break in ("\n", "\r\n", "\r", "\v", "\f", "\x85", "\u2028", "\u2029"):
        assert plain(f"a{line_break}b") == "a b"
        assert plain(f"a{line_break}b", "|") == "a|b"


def test_no_sequence_survives_however_it_is_nested():
    random = np.random.default_rng(0)
    pieces = ["\x1b", "[", "31m", "]0;", "\x07", "\\", "\x9b", "\x9c", "\x90", "x", "\n", "\r", "\u202e", "\x1b[", "("]
    for _ in range(2000):
        assert is_safe(plain("".join(random.choice(pieces, 12))))


def test_log_lines_cannot_be_forged():
    record = logging.LogRecord("", logging.INFO, "", 0, "title: %s", ("a\x1b[2J\nerror: all is lost",), None)
    assert PlainFormatter().format(record) == "title: a\n  error: all is lost"


def test_errors_are_printed_safely(capsys, monkeypatch):
    def fail(_):
        raise console.UserError("no such task: \x1b[1m[/INST]\nerror: forged")

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit):
        console.entry_point(fail)
    assert capsys.readouterr().err == "error: no such task: [/INST]\n  error: forged\n"


def test_progress_of_a_file_with_a_hostile_name(monkeypatch, capsys, caplog):
    terminal = console.PlainConsole(force_terminal=True, width=400)
    monkeypatch.setattr("experiments.shared.progress.table_console", lambda: terminal)
    caplog.set_level("INFO", logger="experiments.shared.progress")
    with Progress(HOSTILE) as progress:
        progress.say(HOSTILE)
        progress.bar.refresh()
    assert f"{PRINTED}: {PRINTED}" in capsys.readouterr().out


def result(name: str) -> dict[str, BenchmarkTable]:
    cost = Cost(texts=1, tokens=1, texts_per_second=1.0, devices=1, device_seconds=1.0, memory_mb=1, money=1.0)
    system = SystemResult(metrics={name: 0.5}, device=name, cost=cost, seconds={"encode": 1.0}, precision=name)
    table = BenchmarkTable(task=name, protocol=name, metrics=[name], systems={name: system})
    return {name: table, f"other {name}": table}


def comparison(name: str) -> dict:
    figures = dict.fromkeys(("mean_a", "mean_b", "difference", "low", "high", "p", "p_holm"), 0.01)
    counts = dict.fromkeys(("queries", "wins", "ties", "losses"), 1) | {"spread_a": None, "spread_b": None}
    document = {"text": name, "grade": 1}
    example = {"A": 0.1, "B": 0.2, "text": name, "first_A": document, "first_B": None, "relevant": [document]}
    compared = {name: {"metric": name, **figures, **counts, "examples": {name: [example]}}}
    return {"A": [name], "B": [name], "level": 0.95, "benchmarks": compared, "left_out": {name: name}}


def search_result(name: str, folder: Path) -> find.SearchResult:
    papers = folder / "papers.jsonl"
    papers.write_text('{"id": "1", "title": "a [/INST] b", "text": "c"}\n', encoding="utf-8")
    metadata = {"input": str(papers), "on_error": "fail"}
    return find.SearchResult(np.array([[0, 1]]), np.array([[0.5, 0.4]]), ["1", name], metadata)


def prediction(name: str):
    cost = SimpleNamespace(batches=1, seconds=1, tokens=1, queries=1, documents=1, flops=1)
    return SimpleNamespace(tasks={name: cost}, ceiling=1)


def trial_row(name: str) -> dict:
    return {"trial": 0, "parameters": {name: name}, "state": name, "value": None, "reason": name, "step": 1}


def a_sweep(name: str):
    parameters = [SimpleNamespace(name=name)]
    return SimpleNamespace(name=name, experiment=name, metric=name, parameters=parameters)


def recipe_output(name: str):
    stamp = {"counts": dict.fromkeys(data.COUNTS, 1), "without": [name]}
    spec = SimpleNamespace(expected={}, note=name)
    return SimpleNamespace(folder=Path(name.replace("/", "")), spec=spec, stamp=lambda: stamp)


def cell(name: str):
    column = SimpleNamespace(protocol=name, metric=name)
    paper = SimpleNamespace(mark=name)
    return SimpleNamespace(table=name, column=column, paper=paper, ours=None, verdict=name, remark=name, difference=0.0)


def listed_run(name: str) -> runs.ListedRun:
    record = dict.fromkeys(("run", "mean", "metric", "BM25", "device hours", *runs.SPEED_COLUMNS, "last logged"), name)
    record |= {"steps": 1, "max_steps": 2, "complete": False}
    return runs.ListedRun({name: {"x": 1}}, {f"{name}.x": name}, record, name)


# For each table of a command: a call that puts the text into all cells, headings and titles that are not ours.
TABLES = {
    "audit._show": lambda t, _: audit._show(
        {"evaluated": {t: {"documents": 1, "overlaps": {}, "examples": [t]}}},
    ),
    "data._report": lambda t, _: data._report(Path(t), SimpleNamespace(then=t), [recipe_output(t)]),
    "dry_run._show_tasks": lambda t, _: dry_run._show_tasks(SimpleNamespace(experiment=t, scale=t), prediction(t)),
    "find._show": lambda t, folder: find._show(t, search_result(t, folder)),
    "import_papers._report": lambda t, folder: import_papers._report(
        Path(t), {"papers": 1, "records": 1, "left_out": {t: 1}}, {t: import_papers.Counts(1, t, {}, {}, {t: 1})}
    ),
    "index._show": lambda t, folder: index._show(
        [{"nprobe": 1, "recall": 1.0}], 1, SimpleNamespace(kind=t, bits=t), folder
    ),
    "mteb._show": lambda t, _: mteb._show(
        SimpleNamespace(task_of=lambda data: t),
        [SimpleNamespace(metadata=SimpleNamespace(name=t, type=t, main_score=t))],
        {t: 0.5},
        t,
    ),
    "reproduce._show": lambda t, _: reproduce._show([cell(t)], t),
    "sweep._show": lambda t, _: sweep._show(a_sweep(t), [trial_row(t)]),
    "compare._show": lambda t, _: compare._show(comparison(t), "table", always_examples=True),
    "merge._show": lambda t, _: merge._show(
        {"metric": t, "dev": [{"name": t}], "tried": [{"weights": t, "mean": 0.5, "scores": {t: 0.5}}], "chosen": t}
    ),
    "results.result_tables._result_table": lambda t, _: print_tables(
        "table", result_tables.result_tables(result(t), [t], t), []
    ),
    "results.result_tables.cost_tables": lambda t, _: print_tables("table", result_tables.cost_tables(result(t)), []),
    "results.result_tables.suite_table": lambda t, _: print_tables(
        "table", [result_tables.suite_table({t: BenchmarkConfig(protocol=t, metrics=[t], note=t)})], []
    ),
    "runs.table_of": lambda t, _: print_tables("table", [runs.table_of([listed_run(t)], t)], []),
}


def test_all_tables_are_printed_in_one_place():
    """Benches print figures of this machine only."""
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        if path.parent.name != "bench" and path.name != "table_formats.py":
            assert "rich.table" not in path.read_text(encoding="utf-8"), f"{path}: use a Table of table_formats"


@pytest.mark.parametrize("name", TABLES)
def test_tables_print_titles_and_names_as_they_are(name, capsys, tmp_path, caplog):
    TABLES[name](HOSTILE, tmp_path)
    printed = capsys.readouterr().out
    assert is_safe(printed)
    for word in ("[/INST]", "[bmim]", "[red]x[/red]", ":smile:", "[link=file:///etc]y[/link]", "c1"):
        word = word.replace("/", "") if name == "data._report" else word  # there, a name is a folder's
        assert word in "".join(printed.split())  # a title is wrapped


def test_tables_on_a_terminal_hold_no_sequence_of_the_data(monkeypatch, capsys, tmp_path):
    """On a terminal, Rich's own styles are sequences, so compare with the same table without the hostile part."""
    monkeypatch.setattr(console, "table_console", lambda: console.PlainConsole(force_terminal=True, width=200))
    grid = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    grid.add_row(HOSTILE)
    same = Table(PRINTED, title=PRINTED, caption=PRINTED)
    same.add_row(PRINTED)
    console.table_console().print(grid, HOSTILE)
    hostile = capsys.readouterr().out
    console.table_console().print(same, PRINTED)
    assert hostile == capsys.readouterr().out


def test_settings_are_shown_as_they_were_typed(capsys):
    """`tasks=[search]` is a style tag in Rich's markup."""
    config = {"experiment": "no such experiment", "scale": "sample", "tasks": ["search"]}
    record = listed_run("x").record | {"run": "runs/[v2]"}
    listed = runs.ListedRun(config, runs.differences(config), record, None)
    print_tables("table", [runs.table_of([listed], "a title")], [])
    printed = capsys.readouterr().out
    assert " tasks=[search] " in printed
    assert " runs/[v2] " in printed


def test_only_these_modules_print():
    """All other modules use say(), table_console() or a logger."""
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {getattr(node.func, "id", "") for node in ast.walk(tree) if isinstance(node, ast.Call)}
        imported = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert "print" not in calls or path.name == "plain.py", f"{path} prints; use say()"
        assert not imported & {"rich.print", "rich.get_console"}, path
        assert "rich.console.Console" not in imported or path.name == "console.py", f"{path}: use table_console()"
