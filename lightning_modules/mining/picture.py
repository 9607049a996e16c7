"""Histograms of margins as an SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from lightning_modules.mining.report import TaskReport

WIDTH, HEIGHT, GAP = 420, 160, 46


def svg(reports: Mapping[str, TaskReport], title: str) -> str:
    """One histogram below the other: margins above 0 are blue, and below 0, where the negative looks better, red."""
    parts = [_text(10, 20, title, "bold")]
    for number, (task, found) in enumerate(reports.items()):
        parts += _histogram(found, task, top=40 + number * (HEIGHT + GAP))
    height = 40 + len(reports) * (HEIGHT + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 20}" height="{height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def write_svg(path: Path, reports: Mapping[str, TaskReport], title: str) -> None:
    path.write_text(svg(reports, title), encoding="utf-8")


def _text(x: float, y: float, text: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}">{escape(text)}</text>'


def _histogram(found: TaskReport, task: str, top: float) -> list[str]:
    rate = found.values["false_negative_rate"]
    counts, edges = found.histogram
    told = f"{task}: score of the positive minus the negative's (look like positives: {rate:.1%})"
    parts, bottom = [_text(10, top + 12, told)], top + HEIGHT
    if not len(counts):
        return [*parts, _text(10, top + 40, "no model scored them")]
    bar = WIDTH / len(counts)
    for i, count in enumerate(counts.tolist()):
        height = (HEIGHT - 24) * count / max(1, counts.max())
        colour = "#c0392b" if edges[i + 1] <= 0 else "#2e6da4"
        parts.append(
            f'<rect x="{10 + i * bar:.1f}" y="{bottom - height:.1f}" width="{bar - 1:.1f}" height="{height:.1f}" '
            f'fill="{colour}"/>'
        )
    parts.append(_text(10, bottom + 14, f"{edges[0]:.3g}"))
    parts.append(_text(10 + WIDTH, bottom + 14, f"{edges[-1]:.3g}", anchor="end"))
    return parts
