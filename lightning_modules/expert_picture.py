"""How tasks and experts get along, as diagnostics measured it: matrices as an SVG file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_modules.svg import box, document, text

LABEL, CELL, HEIGHT, GAP = 120, 110, 30, 66
RED, BLUE, GREY = "#c0392b", "#2e6da4", "#999"
Cells = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Matrix:
    """told: what it shows. names: of rows and columns. values: (row, column) -> figure, not of every pair.

    shades: (row, column) -> from -1, red, to 1, blue; one that is not finite is grey.
    """

    told: str
    names: Sequence[str]
    values: Cells
    shades: Cells


def write_svg(
    path: Path, values: Mapping[str, float], tasks: Sequence[str], experts: Sequence[str], title: str
) -> bool:
    """Draw what there is. values: of Diagnostics, without diag/. Returns whether there was anything to draw."""
    found = [transplants(values, tasks), cosines(values, tasks), distances(values, experts)]
    found = [matrix for matrix in found if matrix.values]
    if found:
        path.write_text(svg(found, title), encoding="utf-8")
    return bool(found)


def transplants(values: Mapping[str, float], tasks: Sequence[str]) -> Matrix:
    """Each task's loss with the expert of each; none of a task that no other expert serves differently."""
    losses = {(a, b): values[key] for a in tasks for b in tasks if (key := f"{a}/transplant/{b}") in values}
    several = {a for a, b in losses if a != b}
    losses = {pair: loss for pair, loss in losses.items() if pair[0] in several}
    shades = {}
    for task in several:
        row = {b: loss for (a, b), loss in losses.items() if a == task}
        own = row[task]
        worst = max((loss for loss in row.values() if math.isfinite(loss)), default=own)
        # Without a finite loss of its own there is nothing to compare with.
        shades |= {
            (task, b): -max(0.0, loss - own) / max(worst - own, 1e-12) if math.isfinite(loss - own) else math.nan
            for b, loss in row.items()
        }
    return Matrix("loss of a task (row) with the expert of a task (column); red is worse", tasks, losses, shades)


def cosines(values: Mapping[str, float], tasks: Sequence[str]) -> Matrix:
    found = _both_ways(values, tasks, "{0}/gradient_cosine/{1}")
    return Matrix("cosine of two tasks' gradients; red is a conflict", tasks, found, found)


def distances(values: Mapping[str, float], experts: Sequence[str]) -> Matrix:
    found = _both_ways(values, experts, "experts/{0}-{1}/distance")
    most = max([value for value in found.values() if math.isfinite(value)] + [1e-12])
    shades = {pair: value / most for pair, value in found.items()}
    return Matrix("distance of two experts, over the length of their mean", experts, found, shades)


def _both_ways(values: Mapping[str, float], names: Sequence[str], key: str) -> dict[tuple[str, str], float]:
    """What is logged of a pair in one order, in both."""
    pairs = {(a, b): values[key.format(a, b)] for a in names for b in names if key.format(a, b) in values}
    return pairs | {(b, a): value for (a, b), value in pairs.items()}


def svg(matrices: Sequence[Matrix], title: str) -> str:
    """One matrix below the other."""
    parts, top = [text(10, 20, title, "bold")], 40.0
    for matrix in matrices:
        parts += _drawn(matrix, top)
        top += GAP + HEIGHT * len(matrix.names)
    most = max(len(matrix.names) for matrix in matrices)
    return document(max(LABEL + CELL * most + 20, 520), top, parts)


def _drawn(matrix: Matrix, top: float) -> list[str]:
    parts, first = [text(10, top + 12, matrix.told)], top + 36
    for i, name in enumerate(matrix.names):
        parts.append(text(LABEL + CELL * (i + 0.5), first - 6, name, anchor="middle"))
        parts.append(text(LABEL - 8, first + HEIGHT * (i + 0.65), name, anchor="end"))
    for (row, column), value in matrix.values.items():
        x, y = LABEL + CELL * matrix.names.index(column), first + HEIGHT * matrix.names.index(row)
        shade = matrix.shades[row, column]
        colour, strength = (RED if shade < 0 else BLUE, min(1.0, abs(shade))) if math.isfinite(shade) else (GREY, 0.5)
        parts.append(box(x, y, CELL, HEIGHT, colour, f' fill-opacity="{0.7 * strength:.2f}" stroke="#ccc"'))
        parts.append(text(x + CELL / 2, y + HEIGHT * 0.65, f"{value:.3f}", anchor="middle"))
    return parts
