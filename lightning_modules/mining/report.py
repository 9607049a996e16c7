"""What a mining came to: are these negatives, are they hard, and how fresh are they?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.records import MinedNegatives, UserError
from lightning_modules.mining.filters import owners
from lightning_modules.mining.mine import Mined
from lightning_modules.pictures import box, document, text

NUM_BINS = 24
MEANS = {  # what is told beside the figures
    "negatives": "of a query, in the mean",
    "without": "share of the queries with none",
    "false_negative_rate": "share that score above their positive, or that other splits judge relevant",
    "revealed": "  of it: judged relevant by other splits",
    "above_positive": "  of it: above the positive",
    "candidates_above": "share of the candidates above the positive, before the margins",
    "margin_p10": "score of the positive less the negative's: a tenth are below",
    "margin_p50": "  half are below; near 0 is hard",
    "margin_p90": "  nine tenths are below",
    "duplicates": "share that read as another one of the same query",
    "distinct": "different documents for each negative; low: a few serve many queries",
    "age": "steps since the former mining",
    "kept": "share that were in the former one",
}


@dataclass(frozen=True)
class TaskReport:
    """Of one task.

    values: what is logged as mine/<task>/<name>; shares are from 0 to 1.
        negatives                a query, in the mean
        without                  share of the queries that have none (theirs are drawn from the data's)
        false_negative_rate      share of the negatives that score above their positive, or that other splits judge
                                 relevant: an estimate, and no more
        revealed, above_positive the two parts of it
        candidates_above         share of the candidates, before the margins, that score above the positive: what would
                                 come in without them
        margin_p10, _p50, _p90   quantiles of the positive's score minus the negative's
        duplicates               share of the negatives that read as another one of the same query
        distinct                 different documents for each negative; low where a few serve many queries
        age, kept                steps since the former mining, and share of the negatives that were in it already
    histogram: counts of the margins, and the (NUM_BINS + 1) edges; empty where no model scored them.
    taken: filter -> candidates that it took.
    """

    values: Mapping[str, float]
    histogram: tuple[np.ndarray, np.ndarray]
    taken: Mapping[str, int]


def report(mined: Mined, step: int, former: MinedNegatives | None = None, former_step: int = 0) -> TaskReport:
    """A task's report. former: what held before, mined at former_step."""
    negatives = mined.negatives
    counts, total = np.diff(negatives.starts), len(negatives.documents)
    above = np.nan_to_num(mined.margins, nan=np.inf) < 0
    values = {
        "negatives": total / len(negatives),
        "without": float((counts == 0).mean()),
        "false_negative_rate": float((above | mined.revealed).mean()),
        "revealed": float(mined.revealed.mean()),
        "duplicates": 1 - len(_pairs(negatives.starts, mined.texts)) / total,
        "distinct": len(np.unique(negatives.documents)) / total,
    }
    margins = mined.margins[np.isfinite(mined.margins)]
    histogram = (np.zeros(0, dtype=np.int64), np.zeros(0))
    if len(margins):
        values |= {"above_positive": float(above.mean()), "candidates_above": mined.above / mined.candidates}
        values |= {f"margin_p{part}": float(np.percentile(margins, part)) for part in (10, 50, 90)}
        histogram = np.histogram(margins, NUM_BINS)
    if former is not None:
        before = _pairs(former.starts, np.asarray(former.documents))
        now = _pairs(negatives.starts, negatives.documents)
        values |= {"age": float(step - former_step), "kept": float(np.isin(now, before).mean())}
    return TaskReport(values, histogram, negatives.taken)


def _pairs(starts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Distinct (query, number) pairs, each as one number."""
    return np.unique(owners((starts, numbers)) * (1 << 32) + numbers.astype(np.int64))


def table(reports: Mapping[str, TaskReport]) -> list[str]:
    """Lines of text: a column for each task, and what each line means."""
    names = [name for name in MEANS if any(name in task.values for task in reports.values())]
    width = max(8, *(len(task) for task in reports)) + 2
    lines = [f"{'':24}" + "".join(f"{task:>{width}}" for task in reports)]
    for name in names:
        cells = (task.values.get(name, math.nan) for task in reports.values())
        lines.append(f"{name:24}" + "".join(f"{_shown(x):>{width}}" for x in cells) + f"   {MEANS[name]}".rstrip())
    lines.append("candidates that were taken out (the filters of docs/training.md), one after the other:")
    for name in dict.fromkeys(name for task in reports.values() for name in task.taken):
        cells = (task.taken.get(name, 0) for task in reports.values())
        lines.append(f"  {name:22}" + "".join(f"{count:>{width}}" for count in cells))
    return lines


def _shown(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "<0.0001" if 0 < value < 5e-5 else f"{round(value, 4) + 0.0:.4f}".rstrip("0").rstrip(".")


def logged(reports: Mapping[str, TaskReport]) -> dict[str, float]:
    """As metrics of loggers."""
    return {f"mine/{task}/{name}": x for task, found in reports.items() for name, x in found.values.items()}


def histograms(reports: Mapping[str, TaskReport]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> counts and edges, of the tasks that a model scored."""
    return {f"mine/{task}/margins": found.histogram for task, found in reports.items() if len(found.histogram[0])}


def plain(reports: Mapping[str, TaskReport]) -> dict[str, Any]:
    """For JSON."""
    return {
        task: {
            "values": dict(found.values),
            "taken": dict(found.taken),
            "histogram": {"counts": found.histogram[0].tolist(), "edges": found.histogram[1].tolist()},
        }
        for task, found in reports.items()
    }


def gate(reports: Mapping[str, Mapping[str, float]], stop_at: float | None) -> None:
    """Raise UserError if a task's estimated rate of false negatives is above stop_at. reports: task -> its values."""
    for task, found in reports.items():
        rate = found["false_negative_rate"]
        if stop_at is not None and rate > stop_at:
            raise UserError(
                f"{task}: {rate:.1%} of the mined hard negatives look like positives (above their positive: "
                f"{found.get('above_positive', 0):.1%}, judged relevant by other splits: "
                f"{found['revealed']:.1%}), and mining.stop_at is {stop_at:.1%}. Set mining.relative_margin or "
                "raise it, leave out more of the nearest (mining.first_rank), compare with the lowest positive "
                "(mining.positive=lowest), or mine later "
                "(mining.first_step)"
            )


WIDTH, HEIGHT, GAP = 420, 160, 46


def svg(reports: Mapping[str, TaskReport], title: str) -> str:
    """One histogram below the other: margins above 0 are blue, and below 0, where the negative looks better, red."""
    parts = [text(10, 20, title, "bold")]
    for number, (task, found) in enumerate(reports.items()):
        parts += _histogram(found, task, top=40 + number * (HEIGHT + GAP))
    return document(WIDTH + 20, 40 + len(reports) * (HEIGHT + GAP), parts)


def write_svg(path: Path, reports: Mapping[str, TaskReport], title: str) -> None:
    path.write_text(svg(reports, title), encoding="utf-8")


def _histogram(found: TaskReport, task: str, top: float) -> list[str]:
    rate = found.values["false_negative_rate"]
    counts, edges = found.histogram
    told = f"{task}: score of the positive minus the negative's (look like positives: {rate:.1%})"
    parts, bottom = [text(10, top + 12, told)], top + HEIGHT
    if not len(counts):
        return [*parts, text(10, top + 40, "no model scored them")]
    bar = WIDTH / len(counts)
    for i, count in enumerate(counts.tolist()):
        height = (HEIGHT - 24) * count / max(1, counts.max())
        colour = "#c0392b" if edges[i + 1] <= 0 else "#2e6da4"
        parts.append(box(10 + i * bar, bottom - height, bar - 1, height, colour))
    parts.append(text(10, bottom + 14, f"{edges[0]:.3g}"))
    parts.append(text(10 + WIDTH, bottom + 14, f"{edges[-1]:.3g}", anchor="end"))
    return parts
