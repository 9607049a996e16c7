"""SVG pictures: elements of a file, and matrices of the values that Diagnostics measures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2
LABEL_WIDTH, CELL_WIDTH, CELL_HEIGHT, GAP = 120, 110, 30, 66
RED, BLUE, GREY = "#c0392b", "#2e6da4", "#999"


def document(width: float, height: float, elements: Iterable[str]) -> str:
    """Return the content of an SVG file with a white background."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(elements)
        + "\n</svg>\n"
    )


def text(x: float, y: float, content: str, weight: str = "normal", anchor: str = "start") -> str:
    """Return a text element. Characters that XML does not allow are replaced by U+FFFD."""
    content = escape(NOT_IN_XML.sub("\ufffd", content))
    return f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}">{content}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, attributes: str = "") -> str:
    """Return a rectangle. attributes: additional attributes, with a leading space."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{attributes}/>'


@dataclass(frozen=True)
class Matrix:
    """A matrix of numbers in coloured cells.

    names: names of the rows and of the columns.
    values: (row, column) -> number; other cells are empty.
    shades: (row, column) -> shade from -1 (red) to 1 (blue); grey if not finite.
    """

    caption: str
    names: Sequence[str]
    values: Mapping[tuple[str, str], float]
    shades: Mapping[tuple[str, str], float]


def write_expert_picture(
    path: Path, values: Mapping[str, float], tasks: Sequence[str], experts: Sequence[str], title: str
) -> bool:
    """Draw the matrices of tasks and experts. Return whether there was anything to draw.

    values: values logged by Diagnostics, without the prefix diag/.
    """
    matrices = [transplants(values, tasks), cosines(values, tasks), distances(values, experts)]
    matrices = [matrix for matrix in matrices if matrix.values]
    if matrices:
        path.write_text(draw(matrices, title), encoding="utf-8")
    return bool(matrices)


def transplants(values: Mapping[str, float], tasks: Sequence[str]) -> Matrix:
    """Return the loss of each task with the expert of every task. Tasks with only one expert have no row."""
    losses = {(a, b): values[key] for a in tasks for b in tasks if (key := f"{a}/transplant/{b}") in values}
    tried = {a for a, b in losses if a != b and (a, a) in losses}
    losses = {pair: loss for pair, loss in losses.items() if pair[0] in tried}
    shades: dict[tuple[str, str], float] = {}
    for task in tried:
        row = {b: loss for (a, b), loss in losses.items() if a == task}
        best = row[task]  # with the task's own expert
        worst = max((loss for loss in row.values() if math.isfinite(loss)), default=best)
        shades |= {
            (task, b): -max(0.0, loss - best) / max(worst - best, 1e-12) if math.isfinite(loss - best) else math.nan
            for b, loss in row.items()
        }
    return Matrix("loss of a task (row) with the expert of a task (column); red is worse", tasks, losses, shades)


def cosines(values: Mapping[str, float], tasks: Sequence[str]) -> Matrix:
    pairs = _symmetric(values, tasks, "{0}/gradient_cosine/{1}")
    return Matrix("cosine of two tasks' gradients; red is a conflict", tasks, pairs, pairs)


def distances(values: Mapping[str, float], experts: Sequence[str]) -> Matrix:
    pairs = _symmetric(values, experts, "experts/{0}-{1}/distance")
    largest = max([value for value in pairs.values() if math.isfinite(value)] + [1e-12])
    shades = {pair: value / largest for pair, value in pairs.items()}
    return Matrix("distance of two experts, relative to the norm of their mean", experts, pairs, shades)


def _symmetric(values: Mapping[str, float], names: Sequence[str], key: str) -> dict[tuple[str, str], float]:
    """Return the values of all pairs in both orders, because they are only logged in one."""
    pairs = {(a, b): values[key.format(a, b)] for a in names for b in names if key.format(a, b) in values}
    return pairs | {(b, a): value for (a, b), value in pairs.items()}


def draw(matrices: Sequence[Matrix], title: str) -> str:
    """Return the content of an SVG file with the matrices stacked vertically."""
    elements, top = [text(10, 20, title, "bold")], 40.0
    for matrix in matrices:
        elements += _draw_matrix(matrix, top)
        top += GAP + CELL_HEIGHT * len(matrix.names)
    num_columns = max(len(matrix.names) for matrix in matrices)
    return document(max(LABEL_WIDTH + CELL_WIDTH * num_columns + 20, 520), top, elements)


def _draw_matrix(matrix: Matrix, top: float) -> list[str]:
    elements, first_row = [text(10, top + 12, matrix.caption)], top + 36
    for i, name in enumerate(matrix.names):
        elements.append(text(LABEL_WIDTH + CELL_WIDTH * (i + 0.5), first_row - 6, name, anchor="middle"))
        elements.append(text(LABEL_WIDTH - 8, first_row + CELL_HEIGHT * (i + 0.65), name, anchor="end"))
    for (row, column), value in matrix.values.items():
        x = LABEL_WIDTH + CELL_WIDTH * matrix.names.index(column)
        y = first_row + CELL_HEIGHT * matrix.names.index(row)
        shade = matrix.shades[row, column]
        colour, strength = (RED if shade < 0 else BLUE, min(1.0, abs(shade))) if math.isfinite(shade) else (GREY, 0.5)
        attributes = f' fill-opacity="{0.7 * strength:.2f}" stroke="#ccc"'
        elements.append(box(x, y, CELL_WIDTH, CELL_HEIGHT, colour, attributes))
        elements.append(text(x + CELL_WIDTH / 2, y + CELL_HEIGHT * 0.65, f"{value:.3f}", anchor="middle"))
    return elements
