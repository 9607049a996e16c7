"""Histograms of margins as an SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_modules.mining.report import TaskReport
from lightning_modules.svg import box, document, text

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
