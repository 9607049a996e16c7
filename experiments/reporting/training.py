"""How the training went: curves for each task, and mined hard negatives."""

from __future__ import annotations

from experiments.reporting.charts import Series, histogram, lines
from experiments.reporting.html import Html, join, missing, section, table, tag
from experiments.reporting.run_files import RunFiles

MINED = {  # what the table of minings shows -> its heading and form
    "negatives": ("a query", ".1f"),
    "false_negative_rate": ("look like positives", ".1%"),
    "margin_p50": ("median margin", ".3g"),
    "without": ("queries without", ".1%"),
    "distinct": ("distinct", ".1%"),
    "kept": ("kept from before", ".1%"),
    "age": ("steps since", ",.0f"),
}


def of_tasks(run: RunFiles, before: str, after: str) -> list[Series]:
    """A line for each task: of the names BEFORE/TASK/AFTER."""
    return [run.series(f"{before}/{task}/{after}", task, tone) for tone, task in enumerate(run.tasks)]


def curves(run: RunFiles) -> Html:
    """Loss and accuracy of each task, dev metrics of each benchmark, learning rate and speed."""
    if not run.metrics:
        return section("curves", "Training", missing("Nothing was logged yet: metrics.jsonl is not there or empty."))
    first = run.config["evaluation"]["metrics"][0]
    dev = [key for key in run.keys if key.startswith("val/") and key.endswith(f"/{first}")]
    charts = [
        lines("Loss in training", of_tasks(run, "train", "loss"), zero=True),
        lines("Accuracy in training", of_tasks(run, "train", "accuracy")),
        lines(f"{first} on dev", [run.series(key, key.split("/")[1], tone) for tone, key in enumerate(dev)]),
        lines("Temperature", of_tasks(run, "train", "temperature"), ".4f"),
        lines("Weight of the task", of_tasks(run, "train", "weight")),
        lines("Learning rate", [run.series("train/lr", "of the last group", 0)], ".2g", zero=True),
        lines("Tokens in a second", [run.series("train/tokens_per_second", "on all ranks", 5)], ",.0f", zero=True),
    ]
    note = "The number in a legend is the last one. Accuracy: the positive scores above all negatives of the batch."
    shown = tag("div", *charts, class_="charts")
    return section("curves", "Training", shown, tag("p", note, class_="note"), files=["metrics.jsonl"])


def mining(run: RunFiles) -> Html:
    """Each mining's margins, and whether what was mined still looks negative."""
    if not run.rounds:
        switch = tag("code", "mining.every_n_steps=500")
        return section("mining", "Hard negatives", missing("None were mined. ", switch, " mines them in training."))
    overview = [
        lines("Look like positives", of_tasks(run, "mine", "false_negative_rate"), ".1%", zero=True),
        lines("Median margin", of_tasks(run, "mine", "margin_p50")),
    ]
    last = run.rounds[next(reversed(run.rounds))]
    margins = [
        histogram(f"Margins, {task}", found.value["histogram"]["counts"], found.value["histogram"]["edges"])
        for task, found in last
        if found.value["histogram"]["counts"]
    ]
    note = (
        "Margins of the last mining: score of the positive minus the negative's. Below zero, in red, the negative "
        "looks better than the positive."
    )
    return section(
        "mining",
        "Hard negatives",
        *(tag("div", *charts, class_="charts") for charts in (overview, margins)),
        tag("p", note, class_="note"),
        _minings(run),
        files=["metrics.jsonl", *run.rounds],
    )


def _minings(run: RunFiles) -> Html:
    rows = []
    for path, tasks in run.rounds.items():
        step = int(path.split("/")[1].removeprefix("step-"))
        for task, found in tasks:
            values = found["values"]
            cells = (values[key].figure(form) if key in values else "–" for key, (_, form) in MINED.items())
            rows.append([join([task, tag("small", f" step {step}", data_source=path, class_="note")]), *cells])
    return table(("task and mining", *(heading for heading, _ in MINED.values())), rows, "What was mined")
