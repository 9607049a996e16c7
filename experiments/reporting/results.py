"""What the model reached: beside BM25, beside its own start, and query by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.charts import NUM_TONES, intervals
from experiments.reporting.html import Html, below, figure, join, missing, pointer, scrolling, section, table, tag
from experiments.reporting.run_files import FIGURES, RunFiles

PAPER_SYSTEMS = ("BM25", "SPECTER 2.0", "SciMult", "DPR (SciMult")  # those of its tables that are shown
TONES = {"bm25": 1, "untrained": 7, "start": 7, "trained": 0, "encoder": 0}


def results(run: RunFiles) -> Html:
    """The final table, how far it is beyond chance, and the tables of `make eval`."""
    name = "results.json" if run.results else "baselines.json"
    parts: list[Any] = [] if run.results else [_unfinished(run)]
    files = []
    if content := run.json(name):
        parts += [tag("div", _table(content, name, {}), _picture(content, name), class_="beside"), *_beyond_chance(run)]
        files.append(name)
    for path, other in run.evaluations.items():
        paper = run.figures["paper"][path]
        parts += [tag("h3", "Evaluation ", tag("code", path.split("/")[1])), _table(other, path, paper)]
        files.append(path)
    return section("results", "Results", *parts, files=[*files, FIGURES])


def _unfinished(run: RunFiles) -> Html:
    reached = figure(run.last_step, pointer(FIGURES, "last_step"), ",")
    wanted = figure(run.config["trainer"]["max_steps"], pointer("config.yaml", "trainer", "max_steps"), ",")
    return missing(
        "No results yet: training has reached step ", reached, " of ", wanted, ". Its command goes on with it."
    )


def _metrics(of: Mapping[str, Any], content: Mapping[str, Any]) -> Sequence[str]:
    return of.get("metrics") or content["metrics"]


def _picture(content: Mapping[str, Any], name: str) -> Html:
    """The main metric of each benchmark, one dot a system."""
    rows = []
    for benchmark, of in content["benchmarks"].items():
        metric = _metrics(of, content)[0]
        dots = []
        for number, (system, means) in enumerate(of["systems"].items()):
            source = pointer(name, "benchmarks", benchmark, "systems", system, metric)
            told = tag("title", f"{system}: {means[metric]:.4f}", data_source=source)
            dots.append((system, TONES.get(system, (2 + number) % NUM_TONES), means[metric], told))
        rows.append((f"{benchmark}, {metric}", dots))
    return intervals("Each benchmark's main metric", rows, 1.0)


def _table(content: Mapping[str, Any], name: str, paper: Mapping[str, Any]) -> Html:
    """A block for each benchmark, a row for each system; blocks of the same metrics share a table.

    paper: what the paper has under the same protocols, from report.json.
    """
    tables: dict[tuple[str, ...], list[Html]] = {}
    for benchmark, of in content["benchmarks"].items():
        metrics = tuple(_metrics(of, content))
        rows = tables.setdefault(metrics, [])
        where = of.get("protocol") or f"{of['task']}, {of['split']}"
        sizes = _sizes(of, pointer(name, "benchmarks", benchmark))
        told = tag("span", benchmark, tag("small", f" {where}: ", sizes, class_="note"), class_="sticky")
        rows.append(tag("tr", tag("th", told, colspan=len(metrics) + 1, scope="rowgroup"), class_="group"))
        for system, means in of["systems"].items():
            best = "best" if system in ("trained", "encoder") else None
            rows.append(_row(system, means, metrics, pointer(name, "benchmarks", benchmark, "systems", system), best))
        if benchmark in paper:
            rows += _paper_rows(paper[benchmark], metrics, pointer(FIGURES, "paper", name, benchmark))
    return tag("div", *(_framed(metrics, rows) for metrics, rows in tables.items()))


def _sizes(of: Mapping[str, Any], source: str) -> Html:
    counted = (join([figure(of[key], below(source, key), ","), f" {key}"]) for key in ("queries", "documents"))
    return join(counted, ", ")


def _row(
    system: str | Html, means: Mapping[str, float], metrics: Sequence[str], source: str, class_: str | None
) -> Html:
    cells = (figure(means.get(metric), below(source, metric), ".4f") for metric in metrics)
    return tag("tr", tag("th", system, scope="row"), *(tag("td", cell) for cell in cells), class_=class_)


def _paper_rows(found: Mapping[str, Any], metrics: Sequence[str], source: str) -> list[Html]:
    """The paper's figures; not where it measured on other data, whatever they are called."""
    if "systems" not in found:
        sizes = _sizes(found["sizes"], below(source, "sizes"))
        told = tag("span", "The paper's figures are of other data: ", sizes, class_="sticky")
        return [tag("tr", tag("th", told, colspan=len(metrics) + 1, scope="row"), class_="paper")]
    return [
        _row(join([tag("cite", system), " (paper)"]), means, metrics, below(source, "systems", system), "paper")
        for system, means in found["systems"].items()
        if system.startswith(PAPER_SYSTEMS)
    ]


def _framed(metrics: Sequence[str], rows: Sequence[Html]) -> Html:
    head = tag("thead", tag("tr", tag("th", "system", scope="col"), *(tag("th", m, scope="col") for m in metrics)))
    caption = tag("caption", "Means over queries; the highest is best.")
    return scrolling(tag("table", caption, head, tag("tbody", *rows)), "Results")


def _beyond_chance(run: RunFiles) -> list[Html]:
    """The trained encoder against the others, with intervals and tests."""
    found = run.figures.get("differences", {})
    if not found:
        return []
    level = figure(run.figures["level"], pointer(FIGURES, "level"), ".0%")
    rows = []
    for name, against in found.items():
        for system, of in against.items():

            def at(key: str, form: str, name: str = name, system: str = system, of: Mapping[str, Any] = of) -> Html:
                return figure(of[key], pointer(FIGURES, "differences", name, system, key), form)

            rows.append(
                [
                    join([name, ", against ", system]),
                    join([at("difference", "+.4f")]),
                    join([at("low", "+.4f"), " to ", at("high", "+.4f")]),
                    at("p_holm", ".4f"),
                    join([at("wins", ","), " / ", at("ties", ","), " / ", at("losses", ",")]),
                ]
            )
    head = ("benchmark", "difference", join([level, " interval"]), "p (Holm)", "won / tied / lost")
    note = tag(
        "p",
        "Query by query, in each benchmark's main metric: interval by a paired bootstrap over queries, p by a paired "
        "randomisation test, corrected for the number of rows. Seeds of training vary too: make compare takes several.",
        class_="note",
    )
    return [tag("h3", "Is it more than chance?"), table(head, rows, "The trained encoder's lead"), note]
