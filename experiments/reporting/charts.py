"""Charts as SVG elements in the page's own colours.

A chart is as wide as a phone; several share a row if there is room. Coordinates are in pixels, and y grows downwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from experiments.reporting.run_files import Source

WIDTH, HEIGHT = 340, 190
CHARACTER = 6.6  # width of a digit in the style sheet's font
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 10, 26
MAX_POINTS, MAX_MARKS, FEW_POINTS = 400, 60, 5
NUM_COLOURS = 8  # classes s0, s1, ... of the style sheet


@dataclass(frozen=True)
class Series:
    """One line of a chart: values over steps. colour: number of a colour in the style sheet."""

    label: str
    steps: Sequence[int]
    values: Sequence[Source]
    colour: int


@dataclass(frozen=True)
class Axis:
    """Map values from low to high onto pixels from start to end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Return round values along the axis: at least two, at most about `most`."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        ticks = [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return ticks if len(ticks) > 1 else self.ticks(2 * most)


@dataclass(frozen=True)
class LegendEntry:
    """A name with its colour, and the last value of its line. form: a format specification."""

    label: str
    colour: int
    value: Source | None = None
    form: str = ".3f"


@dataclass(frozen=True)
class Chart:
    """A figure. description: text for screen readers. shapes: SVG elements; later ones cover earlier ones."""

    title: str
    width: float
    height: float
    description: str
    shapes: Sequence[Markup]
    legend: Sequence[LegendEntry] = ()


def _rule(x1: float, x2: float, y1: float, y2: float, style: str = "grid") -> Markup:
    """Return a straight line."""
    line = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" class="{}"/>')
    return line.format(x1, x2, y1, y2, style)


def _label(text: str, x: float, y: float, anchor: str = "middle", style: str = "tick") -> Markup:
    label = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>')
    return label.format(x, y, anchor, style, text)


def _dot(
    x: float, y: float, colour: int, title: str, source: Source, style: str = "dot", radius: float = 3.2
) -> Markup:
    """Return a point. title: its tooltip."""
    dot = '<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{} s{}"><title data-source="{}">{}</title></circle>'
    return Markup(dot).format(x, y, radius, style, colour, source.location, title)


def line_chart(title: str, series: Sequence[Series], form: str = ".3f", zero: bool = False) -> Chart | None:
    """Return a chart of values over steps, or None if there are none. The legend shows the last value of each line.

    zero: whether the y axis starts at 0.
    """
    series = [_thin(line) for line in series if len(line.steps)]
    if not series:
        return None
    y = Axis(*value_range([v.value for line in series for v in line.values], zero), HEIGHT - BOTTOM, TOP)
    texts = {value: f"{tick_text(100 * value)}%" if form.endswith("%") else tick_text(value) for value in y.ticks(4)}
    left = max(LEFT, 8 + CHARACTER * max(map(len, texts.values()), default=0))
    x = Axis(0, max(1, *(line.steps[-1] for line in series)), left, WIDTH - RIGHT)
    shapes, dots = _grid(x, y, texts), []
    if y.low < 0:
        shapes.append(_rule(x.start, x.end, y(0), y(0), "axis"))
    for line in series:
        points = [(s, v) for s, v in zip(line.steps, line.values, strict=True) if math.isfinite(v.value)]
        coordinates = " ".join(f"{x(step):.1f},{y(value.value):.1f}" for step, value in points)
        shapes.append(Markup('<polyline points="{}" class="line s{}"/>').format(coordinates, line.colour))
        style = "dot" if len(points) <= FEW_POINTS else "mark"
        for step, value in points if len(points) <= MAX_MARKS else ():
            text = f"{line.label}, step {step}: {format_number(value.value, form)}"
            dots.append(_dot(x(step), y(value.value), line.colour, text, value, style))
    legend = [LegendEntry(line.label, line.colour, line.values[-1], form) for line in series]
    description = f"{title}, over steps: {', '.join(line.label for line in series)}"
    return Chart(title, WIDTH, HEIGHT, description, [*shapes, *dots], legend)


def histogram(title: str, counts: Sequence[int], edges: Sequence[float]) -> Chart:
    """Return a chart of bars. Bars below 0 have another colour, and a line marks 0."""
    height = 130
    low, high = min(0.0, edges[0]), max(0.0, edges[-1])
    x = Axis(low, high if low < high else low + 1, RIGHT, WIDTH - RIGHT)
    y = Axis(0, max(1, *counts), height - BOTTOM, 8)
    bar = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}"/>')
    bars = [
        bar.format(x(a), y(count), max(0.5, x(b) - x(a) - 1), y(0) - y(count), "bad" if b <= 0 else "good")
        for count, a, b in zip(counts, edges, edges[1:], strict=False)
    ]
    labels = [_label(tick_text(value), x(value), height - 9) for value in x.ticks(5)]
    zero = _rule(x(0), x(0), 4, y(0), "axis")
    return Chart(title, WIDTH, height, f"Histogram: {title}", [zero, *bars, *labels])


def scatter(title: str, points: np.ndarray, colours: Sequence[int], titles: Sequence[Source]) -> Chart:
    """Return a map of points (n, 2), which are at most 1 from the centre. titles: name of each point."""
    size = 320
    axis = Axis(-1.04, 1.04, 6, size - 6)
    dots = [
        _dot(axis(px), axis(-py), colour, str(title.value), title)
        for (px, py), colour, title in zip(points.tolist(), colours, titles, strict=True)
    ]
    return Chart(title, size, size, f"Map of papers: {title}", dots)


def dot_rows(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, int, Source]]]]) -> Chart:
    """Return a chart with a line from 0 to 1 for each row, and a dot on it for each system.

    rows: (name, [(system, colour, value)]).
    """
    spacing, left = 44, 12
    height = len(rows) * spacing + 24
    x = Axis(0, 1.0, left, WIDTH - left)
    shapes = [_rule(x(value), x(value), 4, height - 22) for value in x.ticks(5)]
    shapes += [_label(tick_text(value), x(value), height - 7) for value in x.ticks(5)]
    systems = {}
    for number, (name, values) in enumerate(rows):
        y = number * spacing + 30
        shapes += [_label(name, left, y - 12, "start", "name"), _rule(left, WIDTH - left, y, y)]
        for system, colour, value in values:
            shapes.append(_dot(x(value.value), y, colour, f"{system}: {value.value:.4f}", value, radius=6))
            systems[system] = LegendEntry(system, colour)
    return Chart(title, WIDTH, height, title, shapes, list(systems.values()))


def value_range(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """Return the lowest and the highest finite value, with a small margin."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if zero:
        low = min(0.0, low)
    if low == high:
        low, high = (0.0, 1.0) if zero and low == 0 else (low - 0.5, high + 0.5)
    room = 0.05 * (high - low)
    return (low - room if low < 0 else max(0.0, low - room)), high + room


def format_number(value: Any, form: str = ".3f") -> str:
    """Format a number with a proper minus sign. NaN and None become a dash; other values are unchanged.

    form: a format specification.
    """
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return format(value, form).replace("-", "−") if math.isfinite(value) else str(value)


def tick_text(value: float) -> str:
    """Format a number on an axis, with k for thousands."""
    if abs(value) >= 1000:
        return format_number(value / 1000, ".4g") + "k"
    text = format_number(0.0 if abs(value) < 1e-12 else value, ".4g")
    return re.sub(r"e(.)0+(?=\d)", r"e\1", text)  # 1.5e-5


def _grid(x: Axis, y: Axis, texts: Mapping[float, str]) -> list[Markup]:
    """Return horizontal lines with their values, and the steps below. texts: value and label of each line."""
    rules = [_rule(x.start, x.end, y(value), y(value)) for value in texts]
    values = [_label(text, x.start - 5, y(value) + 4, "end") for value, text in texts.items()]
    steps = [_label(tick_text(value), x(value), y.start + 17) for value in x.ticks(4)]
    return [*rules, *values, _label("step", 0, y.start + 17, "start"), *steps]


def _thin(line: Series) -> Series:
    """Keep at most MAX_POINTS points of a line, including the last."""
    every = math.ceil(len(line.steps) / MAX_POINTS)
    kept = slice((len(line.steps) - 1) % every, None, every)
    return Series(line.label, line.steps[kept], line.values[kept], line.colour)
