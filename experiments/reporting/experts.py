"""What experts and gradients did, as diagnostics logged it."""

from __future__ import annotations

import itertools

from experiments.reporting.charts import lines
from experiments.reporting.html import Html, missing, scrolling, section, tag
from experiments.reporting.run_files import RunFiles
from experiments.reporting.training import of_tasks


def experts(run: RunFiles) -> Html:
    """Transplant matrix, cosines of gradients, distances of experts."""
    title = "Experts and gradients"
    if not any(key.startswith("diag/") for key in run.keys):
        switch = tag("code", "diagnostics.every_n_steps=100")
        told = missing("Not looked at in this run. ", switch, " turns it on; it costs a few steps each time.")
        return section("experts", title, told)
    cosines = [(f"{a} and {b}", f"diag/{a}/gradient_cosine/{b}") for a, b in itertools.permutations(run.tasks, 2)]
    cosines = [(label, key) for label, key in cosines if key in run.keys]
    distances = [key for key in run.keys if key.startswith("diag/experts/") and key.endswith("/distance")]
    distances = [(key.split("/")[2].replace("-", " and "), key) for key in distances]
    charts = [
        lines("Cosine of gradients", [run.series(key, label, tone) for tone, (label, key) in enumerate(cosines)]),
        lines(
            "Distance of experts",
            [run.series(key, label, tone) for tone, (label, key) in enumerate(distances)],
            zero=True,
        ),
        lines("Norm of gradients", of_tasks(run, "diag", "gradient_norm"), zero=True),
        lines("Negatives that still teach", of_tasks(run, "diag", "effective_negatives"), ".1f", zero=True),
        lines("Masked documents", of_tasks(run, "diag", "masked_share"), ".2%", zero=True),
        lines("Mean cosine of texts", of_tasks(run, "diag", "mean_cosine")),
    ]
    note = (
        "A cosine below zero: two tasks pull the shared parameters in opposite directions. Distance: of two experts' "
        "parameters, over the length of their mean; copies have none. Mean cosine of texts: near one all vectors point "
        "one way."
    )
    shown = (*_transplants(run), tag("div", *charts, class_="charts"), tag("p", note, class_="note"))
    return section("experts", title, *shown, files=["metrics.jsonl"])


def _transplants(run: RunFiles) -> list[Html]:
    """The last transplant matrix: each task's loss with the expert of each."""
    steps = [step for step, row in run.metrics.items() if any("/transplant/" in key for key in row)]
    rows = [row for task in run.tasks if (row := _row(run, steps[-1], task))] if steps else []
    if not rows:
        return []
    head = tag("thead", tag("tr", tag("th", "loss of"), *(tag("th", task, scope="col") for task in run.tasks)))
    told = "Each task's loss (rows) with the expert of each (columns; its own is framed), at "
    step = run.row(steps[-1]).told(f"step {steps[-1]}")
    words = tag("span", told, step, "; the more colour, the worse than its own.", class_="sticky")
    matrix = tag("table", tag("caption", words), head, tag("tbody", *rows), class_="heat")
    return [tag("h3", "Whose expert does it need?"), scrolling(matrix, "Transplant matrix")]


def _row(run: RunFiles, step: int, task: str) -> Html | None:
    """A task's losses; None where no other expert was tried. An expert that both tasks share has no cell of its own."""
    logged = run.row(step)
    losses = {t: logged[key] for t in run.tasks if (key := f"diag/{task}/transplant/{t}") in logged}
    if task not in losses or len(losses) < 2:
        return None
    own, worst = losses[task].value, max(loss.value for loss in losses.values())
    cells = []
    for other in run.tasks:
        share, told = 0.0, "="
        if other in losses:
            share, told = max(0.0, losses[other].value - own) / max(worst - own, 1e-12), losses[other].figure()
        cells.append(tag("td", told, style=f"--share:{share:.3f}", class_="own" if other == task else None))
    return tag("tr", tag("th", task, scope="row"), *cells)
