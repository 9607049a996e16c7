"""How the training went: curves for each task, mined hard negatives, and what experts and gradients did."""

from __future__ import annotations

from experiments.reporting.charts import NUM_TONES, Series, histogram, lines
from experiments.reporting.html import Html, figure, join, missing, pointer, scrolling, section, table, tag
from experiments.reporting.run_files import RunFiles


def of_tasks(run: RunFiles, before: str, after: str) -> list[Series]:
    """A line for each task: of the names BEFORE/TASK/AFTER."""
    named = [(task, f"{before}/{task}/{after}") for task in run.tasks]
    return [run.series(key, task, tone % NUM_TONES) for tone, (task, key) in enumerate(named) if key in run.keys]


def curves(run: RunFiles) -> Html:
    """Loss and accuracy of each task, dev metrics of each benchmark, learning rate and speed."""
    first = run.config.get("evaluation", {}).get("metrics", ["ndcg@10"])[0]
    dev = [key for key in run.keys if key.startswith("val/") and key.endswith(f"/{first}")]
    charts = [
        lines("Loss in training", of_tasks(run, "train", "loss"), zero=True),
        lines("Accuracy in training", of_tasks(run, "train", "accuracy")),
        lines(f"{first} on dev", [run.series(key, key.split("/")[1], i % NUM_TONES) for i, key in enumerate(dev)]),
        lines("Temperature", of_tasks(run, "train", "temperature"), ".4f"),
        lines("Weight of the task", of_tasks(run, "train", "weight")),
        lines("Learning rate", [run.series("train/lr", "of the last group", 0)], ".2g", zero=True),
        lines("Tokens in a second", [run.series("train/tokens_per_second", "on all ranks", 5)], ",.0f", zero=True),
    ]
    if not run.metrics:
        return section("curves", "Training", missing("Nothing was logged yet: metrics.jsonl is not there or empty."))
    note = tag("p", "The number in a legend is the last one. Accuracy: the positive scores above all negatives of the "
               "batch.", class_="note")  # fmt: skip
    return section("curves", "Training", tag("div", *charts, class_="charts"), note, files=["metrics.jsonl"])


MINED = {
    "negatives": ("a query", ".1f"),
    "false_negative_rate": ("look like positives", ".1%"),
    "margin_p50": ("median margin", ".3g"),
    "without": ("queries without", ".1%"),
    "distinct": ("distinct", ".1%"),
    "kept": ("kept from before", ".1%"),
    "age": ("steps since", ",.0f"),
}


def mining(run: RunFiles) -> Html:
    """Each mining's margins, and whether what was mined still looks negative."""
    if not run.rounds:
        switch = tag("code", "mining.every_n_steps=500")
        return section("mining", "Hard negatives", missing("None were mined. ", switch, " mines them in training."))
    overview = lines("Look like positives", of_tasks(run, "mine", "false_negative_rate"), ".1%", zero=True)
    margins = lines("Median margin", of_tasks(run, "mine", "margin_p50"))
    rows, pictures = [], []
    for path, tasks in run.rounds.items():
        step = int(path.split("/")[1].removeprefix("step-"))
        for task, found in tasks.items():
            values = found["values"]
            cells = (
                figure(values.get(key), pointer(path, task, "values", key), form) if key in values else "–"
                for key, (_, form) in MINED.items()
            )
            rows.append([join([task, tag("small", f" step {step}", data_source=path, class_="note")]), *cells])
    last = next(reversed(run.rounds))
    for task, found in run.rounds[last].items():
        if found["histogram"]["counts"]:
            pictures.append(histogram(f"Margins, {task}", found["histogram"]["counts"], found["histogram"]["edges"]))
    note = tag("p", "Margins of the last mining: score of the positive minus the negative's. Below zero, in red, the "
               "negative looks better than the positive.", class_="note")  # fmt: skip
    head = ("task and mining", *(words for words, _ in MINED.values()))
    return section(
        "mining",
        "Hard negatives",
        tag("div", overview, margins, class_="charts"),
        tag("div", *pictures, class_="charts"),
        note,
        table(head, rows, "What was mined"),
        files=["metrics.jsonl", *run.rounds],
    )


def experts(run: RunFiles) -> Html:
    """Transplant matrix, gradient cosines, expert distances: what diagnostics logged."""
    title = "Experts and gradients"
    if not any(key.startswith("diag/") for key in run.keys):
        off = ("Not looked at in this run. ", tag("code", "diagnostics.every_n_steps=100"),
               " turns it on; it costs a few steps each time.")  # fmt: skip
        return section("experts", title, missing(*off))
    pairs = [(one, other) for i, one in enumerate(run.tasks) for other in run.tasks[:i]]
    named = [(f"{a} and {b}", f"diag/{x}/gradient_cosine/{y}") for a, b in pairs for x, y in ((a, b), (b, a))]
    cosines = [(label, key) for label, key in named if key in run.keys]
    distances = [key for key in run.keys if key.startswith("diag/experts/") and key.endswith("/distance")]
    charts = [
        lines("Cosine of gradients", [run.series(key, label, i % NUM_TONES) for i, (label, key) in enumerate(cosines)]),
        lines(
            "Distance of experts",
            [
                run.series(key, key.split("/")[2].replace("-", " and "), i % NUM_TONES)
                for i, key in enumerate(distances)
            ],
            zero=True,
        ),
        lines("Norm of gradients", of_tasks(run, "diag", "gradient_norm"), zero=True),
        lines("Negatives that still teach", of_tasks(run, "diag", "effective_negatives"), ".1f", zero=True),
        lines("Masked documents", of_tasks(run, "diag", "masked_share"), ".2%", zero=True),
        lines("Mean cosine of texts", of_tasks(run, "diag", "mean_cosine")),
    ]
    notes = tag(
        "p",
        "A cosine below zero: two tasks pull the shared parameters in opposite directions. Distance: of two experts' "
        "parameters, over the length of their mean; copies have none. Mean cosine of texts: near one all vectors point "
        "one way.",
        class_="note",
    )
    return section("experts", title, *transplants(run), tag("div", *charts, class_="charts"), notes,
                   files=["metrics.jsonl"])  # fmt: skip


def transplants(run: RunFiles) -> list[Html]:
    """The last transplant matrix: each task's loss with the expert of each."""
    steps = [step for step, row in run.metrics.items() if any("/transplant/" in key for key in row)]
    if not steps:
        return []
    step, row = steps[-1], run.metrics[steps[-1]]
    rows = []
    for task in run.tasks:
        losses = {other: row.get(f"diag/{task}/transplant/{other}") for other in run.tasks}
        own = losses[task]
        known = [loss for loss in losses.values() if loss is not None]
        if own is None or len(known) < 2:
            continue
        cells = [tag("th", task, scope="row")]
        for other, loss in losses.items():
            share = 0.0 if loss is None or max(known) <= own else max(0.0, (loss - own) / (max(known) - own))
            source = pointer("metrics.jsonl", f"diag/{task}/transplant/{other}", step=step)
            cell = "=" if loss is None else figure(loss, source, ".3f")
            cells.append(tag("td", cell, style=f"--share:{share:.3f}", class_="own" if other == task else None))
        rows.append(tag("tr", *cells))
    if not rows:
        return []
    head = tag("thead", tag("tr", tag("th", "loss of"), *(tag("th", f"with {t}", scope="col") for t in run.tasks)))
    at = tag("span", f"step {step}", data_source=pointer("metrics.jsonl", step=step))
    caption = tag("caption", "Each task's loss with its own expert (framed) and with those of the others, at ", at,
                  "; the more colour, the worse than its own.")  # fmt: skip
    matrix = tag("table", caption, head, tag("tbody", *rows), class_="heat")
    return [tag("h3", "Whose expert does it need?"), scrolling(matrix, "Transplant matrix")]
