"""Collect the results of a study from the results.json of its jobs, and write them as a page with a plot.

study.json has every number and its origin. The page and the plot are made from study.json alone.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datamodules.records import UserError
from experiments.config.study_file import Study
from experiments.results.comparison import MeasuredSystem, aligned_values, incomparable, open_systems
from experiments.results.interference import (
    check_transplants,
    gradient_cosines,
    interference,
    interference_table,
    with_interval,
)
from experiments.results.results import BenchmarkTable
from experiments.run.jobs import is_complete, seconds_of
from experiments.shared.plain import plain
from experiments.shared.table_formats import Column, Table, as_markdown, escape_markdown
from lightning_modules.pictures import BLUE, GREY, RED, box, document, text
from lightning_modules.retrieval.significance import bootstrap_interval, holm, mean_difference_p

TRAINED_ON, HELD_OUT, TRANSPLANTED = "trained on", "held out", "other expert"
SIGNIFICANT = 0.05
LABEL, PLOT, ROW, HEAD = 150, 420, 18, 46  # widths and heights of the plot, in pixels

Content = Mapping[str, Any]
Seeds = Mapping[int | None, MeasuredSystem]  # seed -> the system trained with it
Groups = Mapping[tuple[str, str], list[str]]  # (group, task or benchmark) -> benchmarks


def collect(study: Study) -> dict[str, Any]:
    """Return the content of study.json, from all complete jobs."""
    systems = {arm: seeds for arm in study.arms if (seeds := _systems(study, arm))}
    if not systems:
        raise UserError("no job of the study is complete, so there is nothing to show")
    tables = {name: table for seeds in systems.values() for s in seeds.values() for name, table in s.benchmarks.items()}
    incomplete, transplants = list(_incomplete(study)), study.settings.transplants
    _check_names("held_out", study.settings.held_out, tables)
    if not incomplete:  # until then, an unknown name may belong to an incomplete arm
        _check_names("transplants", [*transplants, *transplants.values()], tables)
    benchmarks = _benchmarks(study, tables, [system for seeds in systems.values() for system in seeds.values()])
    check_transplants(transplants, benchmarks)
    arms = {arm: _arm(study, arm, seeds, benchmarks) for arm, seeds in systems.items()}
    start = study.settings.start if study.settings.start in systems else ""
    pairs = [(arm, start) for arm in systems if arm != start] if start else []
    means = groups_of(benchmarks)
    single = {(HELD_OUT, name): [name] for name, each in benchmarks.items() if each["group"] == HELD_OUT}
    return {
        "study": study.name,
        "title": study.settings.title,
        "values": dict(study.settings.values),
        "start": start,
        "benchmarks": benchmarks,
        "arms": arms,
        "gains": [row for a, b in pairs for row in _compare(a, b, systems, benchmarks, means)],
        "held_out": [row for a, b in pairs for row in _compare(a, b, systems, benchmarks, single)],
        "tests": _tests(study, systems, benchmarks, means),
        "interference": [
            row
            for arm, seeds in systems.items()
            for row in interference(arm, arms[arm]["runs"], list(seeds.values()), transplants, benchmarks)
        ],
        "incomplete": incomplete,
    }


def _check_names(key: str, names: Sequence[str], tables: Mapping[str, BenchmarkTable]) -> None:
    """Raise UserError for a benchmark that no arm was evaluated on. key: setting that names the benchmarks."""
    if unknown := set(names) - set(tables):
        raise UserError(
            f"{key}: no arm was evaluated on {', '.join(sorted(unknown))}; expected names of {', '.join(tables)}"
        )


def _benchmarks(
    study: Study, tables: Mapping[str, BenchmarkTable], systems: Sequence[MeasuredSystem]
) -> dict[str, dict[str, Any]]:
    """Describe each benchmark. Raises UserError if two systems were evaluated on different data."""
    for name in tables:
        if reason := incomparable([system for system in systems if name in system.benchmarks], name):
            raise UserError(f"{name}: arms cannot be compared ({reason}); evaluate them again on the same data")
    return {
        name: {
            "task": table.task,
            "group": _group(study, name),
            "metric": next(system for system in systems if name in system.benchmarks).main_metric(name),
            **{key: getattr(table, key) for key in ("queries", "documents", "protocol", "data")},
        }
        for name, table in tables.items()
    }


def _incomplete(study: Study) -> Iterator[str]:
    """Yield the arms without results, and the arms with missing seeds, with these seeds."""
    for arm in study.arms:
        jobs = study.jobs_of(arm)
        missing = [job for job in jobs if not is_complete(study.folder, job)]
        if missing == jobs:
            yield arm
        elif missing:
            yield f"{arm} (seed {' '.join(str(job.seed) for job in missing)})"


def _group(study: Study, benchmark: str) -> str:
    if benchmark in study.settings.transplants:
        return TRANSPLANTED
    return HELD_OUT if benchmark in study.settings.held_out else TRAINED_ON


def _systems(study: Study, arm: str) -> Seeds:
    """Return the evaluated model of each complete seed of an arm."""
    jobs = [job for job in study.jobs_of(arm) if is_complete(study.folder, job)]
    systems = open_systems(f"arms.{arm}", [str(job.output) for job in jobs])
    return {job.seed: system for job, system in zip(jobs, systems, strict=True)}


def _arm(study: Study, arm: str, systems: Seeds, benchmarks: Content) -> dict[str, Any]:
    runs = []
    for job in study.jobs_of(arm):
        if job.seed not in systems:
            continue
        system = systems[job.seed]
        results = {name: table.systems[system.system] for name, table in system.benchmarks.items()}
        runs.append(
            {
                "seed": job.seed,
                "results": str(system.folder.relative_to(study.folder) / "results.json"),
                "values": {
                    name: results[name].metrics[each["metric"]] for name, each in benchmarks.items() if name in results
                },
                "cosines": gradient_cosines(study.folder / job.name),
                "seconds": seconds_of(study.folder, job),
                "devices": sorted({result.device for result in results.values()} - {None}),
            }
        )
    return {"about": study.arms[arm].about, "commands": _commands(study, arm), "runs": runs}


def _commands(study: Study, arm: str) -> list[str]:
    """Return an arm's commands as written in the file, or the model it evaluates, without folders of this machine."""
    return [f"eval model={study.arms[arm].model}"] if study.arms[arm].model else list(study.arms[arm].commands)


def groups_of(benchmarks: Content) -> Groups:
    """Return (group, task) -> its benchmarks; the task "all" has those of every task."""
    groups: dict[tuple[str, str], list[str]] = {}
    for group in (TRAINED_ON, HELD_OUT):
        names = [name for name, each in benchmarks.items() if each["group"] == group]
        for task in dict.fromkeys(benchmarks[name]["task"] for name in names):
            groups[group, task] = [name for name in names if benchmarks[name]["task"] == task]
        if names and len({benchmarks[name]["task"] for name in names}) > 1:
            groups[group, "all"] = names
    return groups


def _tests(study: Study, systems: Mapping[str, Seeds], benchmarks: Content, groups: Groups) -> list[dict[str, Any]]:
    """Compare the pairs of arms named in the study's file, and correct p for the number of tests (Holm)."""
    rows = [
        row
        for a, b, *tasks in study.settings.compare
        if {a, b} <= systems.keys()
        for row in _compare(a, b, systems, benchmarks, groups)
        if not tasks or row["task"] in tasks
    ]
    return [row | {"p_holm": p} for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)]


def _compare(
    arm: str, other: str, systems: Mapping[str, Seeds], benchmarks: Content, groups: Groups
) -> Iterator[dict[str, Any]]:
    """Compare two arms on each group of benchmarks that both have: difference of the means, its interval, and p.

    Only seeds that both arms have are used, or all seeds if they share none.
    """
    common = [seed for seed in systems[arm] if seed in systems[other]]
    a, b = ([seeds[seed] for seed in common or seeds] for seeds in (systems[arm], systems[other]))
    values = {
        name: aligned_values(a, b, name, each["metric"])[:2]
        for name, each in benchmarks.items()
        if all(name in system.benchmarks for system in (*a, *b))
    }
    for (group, task), names in groups.items():
        if not values.keys() >= set(names):
            continue
        pairs = [values[name] for name in names]
        low, high = bootstrap_interval(pairs, paired_seeds=bool(common))
        mean = statistics.fmean(float(x.mean() - y.mean()) for x, y in pairs)
        row = {"a": arm, "b": other, "group": group, "task": task, "difference": mean, "low": low, "high": high}
        yield row | {"seeds": [len(a), len(b)], "p": mean_difference_p(pairs)}


def tables(content: Content) -> dict[str, Table]:
    """Return heading -> table. All values are in points."""
    result = {"Arms": _arm_table(content)}
    groups = groups_of(content["benchmarks"])
    for group in dict.fromkeys(group for group, _ in groups):
        means = {f"{task} ({len(names)})": names for (g, task), names in groups.items() if g == group}
        result[f"Means over benchmarks: {group}"] = _value_table(content, means)
    if content["gains"]:
        result[f"Gain over {content['start']}"] = _difference_table(content["gains"])
    if content["held_out"]:
        result[FORGETTING] = _forgetting_table(content)
    if content["tests"]:
        result["Comparisons"] = _difference_table(content["tests"])
    if content["interference"]:
        result[INTERFERENCE] = interference_table(content["interference"])
    shown = {name: each for name, each in content["benchmarks"].items() if each["group"] != TRANSPLANTED}
    for task in dict.fromkeys(each["task"] for each in shown.values()):
        single = {name: [name] for name, each in shown.items() if each["task"] == task}
        result[f"Each benchmark: {task}"] = _value_table(content, single)
    return result | {"Benchmarks": _benchmark_table(content["benchmarks"])}


def records(content: Content) -> list[dict[str, Any]]:
    """Return a row for each arm, seed and benchmark, with the value between 0 and 1."""
    return [
        {"arm": arm, "seed": run["seed"], "benchmark": name, **content["benchmarks"][name], "value": value}
        for arm, each in content["arms"].items()
        for run in each["runs"]
        for name, value in run["values"].items()
    ]


def page(content: Content, plot: str) -> str:
    """Return the page in Markdown. plot: path of the plot, relative to the page."""
    metrics = ", ".join(dict.fromkeys(each["metric"] for each in content["benchmarks"].values()))
    lines = [
        f"# {escape_markdown(content['title'])}",
        "",
        f"{metrics} in points (100 is best). {_about_seeds(content)}",
    ]
    for heading, table in tables(content).items():
        lines += ["", f"## {heading}", "", as_markdown(table)]
        if heading == "Arms" and content["incomplete"]:
            lines += ["", f"**Not complete:** {', '.join(content['incomplete'])}."]
        elif heading.startswith("Gain"):
            lines += ["", INTERVALS, "", f"![Gain over {content['start']} with 95 % intervals]({plot})"]
        elif heading in NOTES:
            lines += ["", NOTES[heading]]
    commands = [f"{arm}: {command}" for arm, each in content["arms"].items() for command in each["commands"]]
    values = [f"{{{name}}} = {text}" for name, text in content["values"].items()]
    lines += ["", "## Commands", "", *(f"    {plain(line)}" for line in [*commands, *values])]
    return "\n".join([*lines, ""])


INTERVALS = (
    "In brackets: 95 % intervals from a bootstrap in which each benchmark weighs the same. Arms are compared on "
    "the seeds that both have, and both get the same draws of queries and of these seeds."
)
FORGETTING, INTERFERENCE = "Held out: the worst of each arm", "Interference of tasks"
NOTES = {
    FORGETTING: "The held-out benchmark with the lowest difference from the start, and the task with the lowest mean "
    "over such benchmarks. The arm that loses most comes first.",
    "Comparisons": f"\\* p < {SIGNIFICANT} in a paired randomisation test over queries, corrected for all differences "
    "of the table (Holm).",
    INTERFERENCE: "A cosine below 0 means that the gradients of two tasks conflict in the parameters that they share. "
    "The experts are compared on the test sets of the first task.",
}


def _about_seeds(content: Content) -> str:
    seeds = {len(arm["runs"]) for arm in content["arms"].values() if arm["runs"][0]["seed"] is not None}
    if max(seeds, default=1) == 1:
        return "One seed, so differences between trainings are not covered."
    single = " Arms that are trained once have none, and their intervals cover other queries, not other trainings."
    return "± is the standard deviation over seeds." + (single if 1 in seeds else "")


def _arm_table(content: Content) -> Table:
    table = Table([*map(Column, ("arm", "what it is", "seeds")), Column("minutes per seed", ".1f"), Column("device")])
    for name, arm in content["arms"].items():
        seeds = [str(run["seed"]) for run in arm["runs"] if run["seed"] is not None]
        minutes = statistics.fmean(sum(run["seconds"]) for run in arm["runs"]) / 60
        devices = dict.fromkeys(device for run in arm["runs"] for device in run["devices"])
        table.add(name, arm["about"], " ".join(seeds) or "none", minutes, ", ".join(devices))
    return table


def _benchmark_table(benchmarks: Content) -> Table:
    table = Table([*map(Column, ("benchmark", "task", "")), Column("queries", ",d"), Column("documents", ",d")])
    for name, each in benchmarks.items():
        table.add(name, each["task"], each["group"], each["queries"], each["documents"])
    return table


class Mean(float):
    """A mean over seeds, shown with its standard deviation."""

    deviation: float

    def __new__(cls, values: Sequence[float]) -> Mean:
        mean = super().__new__(cls, statistics.fmean(values))
        mean.deviation = statistics.stdev(values)
        return mean

    def __format__(self, form: str) -> str:
        return f"{float(self):{form}} ± {self.deviation:{form}}"


def _value_table(content: Content, columns: Mapping[str, Sequence[str]]) -> Table:
    """Return a table with the mean over each column's benchmarks, and its standard deviation over seeds."""
    table = Table([Column("arm"), *(Column(heading, ".1f", best="highest") for heading in columns)])
    for name, arm in content["arms"].items():
        seeds = [_means_of_seeds(arm["runs"], names) for names in columns.values()]
        table.add(name, *(Mean(values) if len(values) > 1 else values[0] if values else None for values in seeds))
    return table


def _means_of_seeds(runs: Sequence[Content], names: Sequence[str]) -> list[float]:
    """Return each seed's mean over benchmarks, in points, or [] if the arm lacks one of the benchmarks."""
    if not all(name in run["values"] for run in runs for name in names):
        return []
    return [100 * statistics.fmean(run["values"][name] for name in names) for run in runs]


def _difference_table(rows: Sequence[Content]) -> Table:
    """Return a table with one row per pair of arms and group of benchmarks, and one column per task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = Table([*map(Column, ("arms", "benchmarks")), *(Column(task, "") for task in tasks)])
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        star = " *" if row.get("p_holm", 1) < SIGNIFICANT else ""
        cells[f"{row['a']} − {row['b']}", row["group"]][row["task"]] = with_interval(row) + star
    for names, by_task in cells.items():
        table.add(*names, *(by_task.get(task) for task in tasks))
    return table


def _forgetting_table(content: Content) -> Table:
    """Return a table of arms, worst first, with the task and the benchmark that fell most from the start."""
    number = Column("difference", "")
    table = Table([Column("arm"), Column("worst benchmark"), number, Column("worst task"), number])
    worst = []
    for arm in content["arms"]:
        singles = [row for row in content["held_out"] if row["a"] == arm]
        tasks = [
            row for row in content["gains"] if (row["a"], row["group"]) == (arm, HELD_OUT) and row["task"] != "all"
        ]
        if singles and tasks:
            worst.append([min(rows, key=lambda row: row["difference"]) for rows in (singles, tasks)])
    for rows in sorted(worst, key=lambda rows: rows[0]["difference"]):
        table.add(rows[0]["a"], *(cell for row in rows for cell in (row["task"], with_interval(row))))
    return table


def plot_of(content: Content) -> str:
    """Return an SVG with each arm's gain over the start and its interval, and one panel per group of benchmarks."""
    rows = content["gains"]
    groups = list(dict.fromkeys((row["group"], row["task"]) for row in rows))
    arms = list(dict.fromkeys(row["a"] for row in rows))
    low = min([0.0, *(row["low"] for row in rows)])
    high = max([0.0, *(row["high"] for row in rows)])
    scale = PLOT / max(high - low, 1e-9)
    height = HEAD + ROW * len(arms)
    elements = []
    for number, (group, task) in enumerate(groups):
        top = number * height
        elements.append(text(10, top + 20, f"{task}, {group}: gain over {content['start']} in points", "bold"))
        elements.append(box(LABEL - low * scale, top + 28, 1, ROW * len(arms) + 4, GREY))
        by_arm = {row["a"]: row for row in rows if (row["group"], row["task"]) == (group, task)}
        for line, arm in enumerate(arms):
            if arm in by_arm:
                elements += _interval(by_arm[arm], top + 32 + ROW * line, low, scale)
    return document(LABEL + PLOT + 60, len(groups) * height + 10, elements)


def _interval(row: Content, y: float, low: float, scale: float) -> list[str]:
    """Draw an arm's gain with its interval. low: value at the left edge of the plot. scale: pixels per unit."""
    start, end, at = (LABEL + (row[key] - low) * scale for key in ("low", "high", "difference"))
    colour = BLUE if row["low"] > 0 else RED if row["high"] < 0 else GREY
    return [
        text(LABEL - 8, y + 10, row["a"], anchor="end"),
        box(start, y + 5, max(end - start, 1), 2, colour),
        box(at - 3, y + 2, 6, 8, colour),
        text(LABEL + PLOT + 10, y + 10, f"{100 * row['difference']:+.1f}"),
    ]
