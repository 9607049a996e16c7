"""Report how hard mined negatives are, how many look like positives, and how many are new."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.files import read_json, write_json
from datamodules.ragged import Ragged
from datamodules.records import MinedNegatives, UserError, reason
from lightning_modules.mining.filters import pair_keys
from lightning_modules.pictures import BLUE, RED, box, document, text

if TYPE_CHECKING:  # both import torch, which commands that only read reports do not need
    from lightning_modules.mining.mined import Mined
    from lightning_modules.mining.relabel import Relabelled

NUM_BINS = 24
WIDTH, HEIGHT, GAP = 420, 160, 46  # size of a histogram and the space below it, in pixels
# Meaning of each figure, logged as mine/<task>/<name>. Shares are between 0 and 1.
FIGURES = {
    "negatives": "mean number of negatives per query",
    "without": "share of queries without mined negatives (they use the data's)",
    "false_negative_rate": "share above the positive or judged relevant in other splits; an estimate",
    "revealed": "  judged relevant in other splits",
    "above_positive": "  above the positive",
    "candidates_above": "share of candidates above the positive, before the margins",
    "margin_p10": "score of the positive minus score of the negative: 10th percentile",
    "margin_p50": "  median; hard if near 0",
    "margin_p90": "  90th percentile",
    "duplicates": "share with the same text as another negative of the query",
    "dropped": "share of the mined documents that the judge dropped",
    "turned": "share of the mined documents that the judge turned into positives",
    "distinct": "distinct documents per negative; low if many queries share few documents",
    "age": "steps since the previous mining",
    "kept": "share that was also mined the previous time",
}


@dataclass(frozen=True)
class TaskReport:
    """Report on one task.

    values: name in FIGURES -> figure.
    histogram: counts (NUM_BINS,) and edges (NUM_BINS + 1,) of the margins; both empty without an encoder.
    removed: filter -> number of candidates that it removed.
    relabelled: decisions of the judge, if there is one. If so, `values` only describe the negatives that it kept.
    """

    values: Mapping[str, float]
    histogram: tuple[np.ndarray, np.ndarray]
    removed: Mapping[str, int]
    relabelled: Relabelled | None = None


def report(mined: Mined, step: int, previous: MinedNegatives | None = None, previous_step: int = 0) -> TaskReport:
    """Return the report on a task. previous: negatives in use until now, mined at previous_step."""
    all_mined, mined = mined.negatives, mined.kept()
    negatives = mined.negatives
    counts, total = np.diff(negatives.starts), len(negatives.documents)
    above = np.nan_to_num(mined.margins, nan=np.inf) < 0
    values = {"negatives": total / len(negatives), "without": float((counts == 0).mean())}
    if total:
        values |= {
            "false_negative_rate": float((above | mined.held_out).mean()),
            "revealed": float(mined.held_out.mean()),
            "duplicates": 1 - len(_pairs(negatives.starts, mined.texts)) / total,
            "distinct": len(np.unique(negatives.documents)) / total,
        }
    margins = mined.margins[np.isfinite(mined.margins)]
    histogram = (np.zeros(0, dtype=np.int64), np.zeros(0))
    if len(margins):
        candidates_above = mined.num_above / mined.num_candidates
        values |= {"above_positive": float(above.mean()), "candidates_above": candidates_above}
        values |= {f"margin_p{percent}": float(np.percentile(margins, percent)) for percent in (10, 50, 90)}
        histogram = np.histogram(margins, NUM_BINS)
    if mined.relabelled is not None:
        decisions = mined.relabelled.counts
        values["dropped"], values["turned"] = (decisions[x] / sum(decisions.values()) for x in ("drop", "positive"))
    if previous is not None and total:
        before = _pairs(previous.starts, np.asarray(previous.documents))
        now = _pairs(all_mined.starts, all_mined.documents)
        values |= {"age": float(step - previous_step), "kept": float(np.isin(now, before).mean())}
    return TaskReport(values, histogram, negatives.removed, mined.relabelled)


def reports_of(mined: Mapping[str, Mined], step: int, previous: Any = None) -> dict[str, TaskReport]:
    """Return the report on each task. previous: HardNegativeStore that was in use until now, if any."""
    tasks, since = (previous.tasks, previous.meta["step"]) if previous else ({}, 0)
    return {task: report(result, step, tasks.get(task), since) for task, result in mined.items()}


def _pairs(starts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the distinct (query, value) pairs, encoded as integers."""
    return np.unique(pair_keys(Ragged(starts, values).owners, values))


def check_false_negatives(reports: Mapping[str, Mapping[str, float]], stop_at: float | None) -> None:
    """Raise UserError if a task's false_negative_rate is above stop_at. reports: task -> values of its report."""
    for task, values in reports.items():
        rate = values.get("false_negative_rate", 0.0)
        if stop_at is not None and rate > stop_at:
            raise UserError(
                f"{task}: {rate:.1%} of the mined hard negatives look like positives, more than stop_at, "
                f"{stop_at:.1%} (above the positive: {values.get('above_positive', 0):.1%}, judged relevant in other "
                f"splits: {values['revealed']:.1%}). Raise relative_margin or first_rank, compare with "
                "positive=lowest, or mine later (first_step)"
            )


def table(reports: Mapping[str, TaskReport]) -> list[str]:
    """Return the lines of a text table, with a column per task and the meaning of each figure."""
    names = [name for name in FIGURES if any(name in task.values for task in reports.values())]
    width = max(8, *(len(task) for task in reports)) + 2
    lines = [f"{'':24}" + "".join(f"{task:>{width}}" for task in reports)]
    for name in names:
        cells = (task.values.get(name, math.nan) for task in reports.values())
        lines.append(f"{name:24}" + "".join(f"{_format(x):>{width}}" for x in cells) + f"   {FIGURES[name]}".rstrip())
    lines.append("candidates removed by each filter, in this order:")
    for name in dict.fromkeys(name for task in reports.values() for name in task.removed):
        cells = (task.removed.get(name, 0) for task in reports.values())
        lines.append(f"  {name:22}" + "".join(f"{count:>{width}}" for count in cells))
    for task, each in reports.items():
        lines += _relabelled_lines(task, each.relabelled) if each.relabelled else []
    return lines


def _relabelled_lines(task: str, relabelled: Relabelled) -> list[str]:
    counts = ", ".join(f"{label} {count:,}" for label, count in relabelled.counts.items())
    lines = [f"{task}, decisions of {relabelled.judge['judge'].rpartition('.')[2]}: {counts}"]
    for example in relabelled.examples:
        score = "" if example["score"] is None else f" ({example['score']:.3f})"
        lines.append(f"  {example['label']}{score}: {example['query_text']!r} / {example['title']!r}")
    return lines


def _format(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "<0.0001" if 0 < value < 5e-5 else f"{round(value, 4) + 0.0:.4f}".rstrip("0").rstrip(".")


def metrics(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the figures of each task under their log keys."""
    return {f"mine/{task}/{name}": value for task, each in values.items() for name, value in each.items()}


def histograms(reports: Mapping[str, TaskReport]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the histograms of the margins under their log keys, for tasks with margins."""
    return {f"mine/{task}/margins": each.histogram for task, each in reports.items() if len(each.histogram[0])}


def write_report(folder: Path, reports: Mapping[str, TaskReport], title: str) -> None:
    """Write report.svg and then report.json, which marks the mining as finished."""
    (folder / "report.svg").write_text(svg(reports, title), encoding="utf-8")
    content = {
        task: {
            "values": dict(each.values),
            "taken": dict(each.removed),
            "histogram": {"counts": each.histogram[0].tolist(), "edges": each.histogram[1].tolist()},
        }
        | ({"relabelled": each.relabelled._asdict()} if each.relabelled else {})
        for task, each in reports.items()
    }
    write_json(folder / "report.json", content)


def read_values(path: Path) -> dict[str, dict[str, float]]:
    """Return the figures of each task in a report.json."""
    tasks = read_json(path)
    try:
        values = {task: {name: float(value) for name, value in each["values"].items()} for task, each in tasks.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: damaged, expected the figures of each task ({reason(error)})") from error
    if not all(values.values()):
        raise UserError(f"{path}: damaged, a task has no figures")
    return values


def svg(reports: Mapping[str, TaskReport], title: str) -> str:
    """Draw a histogram of the margins per task. Bars below 0, where the negative scores higher, are red."""
    parts = [text(10, 20, title, "bold")]
    for number, (task, each) in enumerate(reports.items()):
        parts += _histogram(each, task, top=40 + number * (HEIGHT + GAP))
    return document(WIDTH + 20, 40 + len(reports) * (HEIGHT + GAP), parts)


def _histogram(task_report: TaskReport, task: str, top: float) -> list[str]:
    if not task_report.values["negatives"]:
        return [text(10, top + 12, f"{task}: no negatives are left")]
    rate = task_report.values["false_negative_rate"]
    counts, edges = task_report.histogram
    title = f"{task}: score of the positive minus score of the negative (look like positives: {rate:.1%})"
    parts, bottom = [text(10, top + 12, title)], top + HEIGHT
    if not len(counts):
        return [*parts, text(10, top + 40, "no scores: mined without an encoder")]
    bar = WIDTH / len(counts)
    for i, count in enumerate(counts.tolist()):
        height = (HEIGHT - 24) * count / max(1, counts.max())
        colour = RED if edges[i + 1] <= 0 else BLUE
        parts.append(box(10 + i * bar, bottom - height, bar - 1, height, colour))
    parts.append(text(10, bottom + 14, f"{edges[0]:.3g}"))
    parts.append(text(10 + WIDTH, bottom + 14, f"{edges[-1]:.3g}", anchor="end"))
    return parts
