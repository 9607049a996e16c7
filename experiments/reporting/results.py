"""What the model reached: beside BM25, beside its own start, beside the paper, and query by query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.reporting.charts import NUM_TONES, intervals
from experiments.reporting.html import Html, join, missing, scrolling, section, table, tag
from experiments.reporting.run_files import CONFIG, FIGURES, RunFiles
from experiments.reporting.source import Source

PAPER_SYSTEMS = ("BM25", "SPECTER 2.0", "SciMult", "DPR (SciMult")  # those of its tables that are shown
TONES = {"bm25": 1, "untrained": 7, "start": 7, "trained": 0, "encoder": 0}


def results(run: RunFiles) -> Html:
    """The final table, how far it is beyond chance, and the tables of `make eval`."""
    name, figures = "results.json" if run.results else "baselines.json", run.at(FIGURES)
    parts: list[Any] = [] if run.results else [_unfinished(run)]
    files = []
    if content := run.at(name):
        parts.append(tag("div", _table(content), _picture(content), class_="beside"))
        files.append(name)
    if "differences" in figures and figures["differences"].value:
        parts += _beyond_chance(figures)
    for path, other in run.evaluations.items():
        parts += [tag("h3", "Evaluation ", tag("code", path.split("/")[1])), _table(other, figures["paper"][path])]
        files.append(path)
    return section("results", "Results", *parts, files=[*files, FIGURES])


def _unfinished(run: RunFiles) -> Html:
    reached, wanted = run.at(FIGURES)["last_step"], run.at(CONFIG)["trainer"]["max_steps"]
    told = ("No results yet: training has reached step ", reached.figure(","), " of ", wanted.figure(","))
    return missing(*told, ". The same command goes on with it.")


def _metrics(of: Source, content: Source) -> Sequence[str]:
    return of.value.get("metrics") or content.value["metrics"]


def _picture(content: Source) -> Html:
    """The main metric of each benchmark, one dot a system."""
    rows = []
    for benchmark, of in content["benchmarks"]:
        metric = _metrics(of, content)[0]
        dots = []
        for number, (system, means) in enumerate(of["systems"]):
            mean = means[metric]
            told = mean.told(f"{system}: {mean.value:.4f}", "title")
            dots.append((system, TONES.get(system, (2 + number) % NUM_TONES), mean.value, told))
        rows.append((f"{benchmark}, {metric}", dots))
    return intervals("Each benchmark's main metric", rows, 1.0)


def _table(content: Source, paper: Source | None = None) -> Html:
    """A block for each benchmark, a row for each system; blocks of the same metrics share a table.

    paper: what the paper has under the same protocols, from report.json.
    """
    tables: dict[tuple[str, ...], list[Html]] = {}
    for benchmark, of in content["benchmarks"]:
        metrics = tuple(_metrics(of, content))
        rows = tables.setdefault(metrics, [])
        where = of.value.get("protocol") or f"{of.value['task']}, {of.value['split']}"
        rows.append(_across(metrics, "group", benchmark, tag("small", f" {where}: ", _sizes(of), class_="note")))
        for system, means in of["systems"]:
            rows.append(_row(system, means, metrics, "best" if system in ("trained", "encoder") else None))
        if paper and benchmark in paper:
            rows += _paper_rows(paper[benchmark], metrics)
    return tag("div", *(_framed(metrics, rows) for metrics, rows in tables.items()))


def _across(metrics: Sequence[str], class_: str, *words: Any) -> Html:
    """A row that is one cell, whose words stay in sight where the table scrolls."""
    cell = tag("th", tag("span", *words, class_="sticky"), colspan=len(metrics) + 1, scope="rowgroup")
    return tag("tr", cell, class_=class_)


def _sizes(of: Source) -> Html:
    return join((join([of[key].figure(","), f" {key}"]) for key in ("queries", "documents")), ", ")


def _row(system: str | Html, means: Source, metrics: Sequence[str], class_: str | None) -> Html:
    cells = (means[metric].figure(".4f") if metric in means else "–" for metric in metrics)
    return tag("tr", tag("th", system, scope="row"), *(tag("td", cell) for cell in cells), class_=class_)


def _paper_rows(found: Source, metrics: Sequence[str]) -> list[Html]:
    """The paper's figures; not where it measured on other data, whatever they are called."""
    if "systems" not in found:
        return [_across(metrics, "paper", "The paper's figures are of other data: ", _sizes(found["sizes"]))]
    return [
        _row(join([tag("cite", system), " (paper)"]), means, metrics, "paper")
        for system, means in found["systems"]
        if system.startswith(PAPER_SYSTEMS)
    ]


def _framed(metrics: Sequence[str], rows: Sequence[Html]) -> Html:
    head = tag("thead", tag("tr", tag("th", "system", scope="col"), *(tag("th", m, scope="col") for m in metrics)))
    caption = tag("caption", "Means over queries; the highest is best.")
    return scrolling(tag("table", caption, head, tag("tbody", *rows)), "Results")


def _beyond_chance(figures: Source) -> list[Html]:
    """The trained encoder against the others, with intervals and tests."""
    rows = []
    for name, against in figures["differences"]:
        for system, of in against:
            low, high = of["low"].figure("+.4f"), of["high"].figure("+.4f")
            counts = join((of[key].figure(",") for key in ("wins", "ties", "losses")), " / ")
            first = f"{name}, against {system}"
            difference, p = of["difference"].figure("+.4f"), of["p_holm"].figure(".4f")
            rows.append([first, difference, join([low, " to ", high]), p, counts])
    interval = join([figures["level"].figure(".0%"), " interval"])
    head = ("benchmark", "difference", interval, "p (Holm)", "won / tied / lost")
    note = (
        "Query by query, in each benchmark's main metric: interval by a paired bootstrap over queries, p by a paired "
        "randomisation test, corrected for the number of rows. Seeds of training vary too: make compare takes several."
    )
    title = tag("h3", "Is it more than chance?")
    return [title, table(head, rows, "The trained encoder's lead"), tag("p", note, class_="note")]
