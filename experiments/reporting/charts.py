"""Charts as SVG that the page's style colours: no script, no fonts, and text of the size of the page's.

A chart is as wide as a phone; several stand side by side where there is room. Numbers on axes have the class "tick".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.reporting.html import Html, join, shown, tag
from experiments.reporting.source import Source

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 10, 26
MOST_POINTS, MOST_MARKS, FEW_POINTS = 400, 60, 5
NUM_TONES = 8  # colours of the style


@dataclass(frozen=True)
class Series:
    """A line: its name, and where its values at some steps stand. tone: number of its colour."""

    label: str
    steps: Sequence[int]
    values: Sequence[Source]
    tone: int


@dataclass(frozen=True)
class Axis:
    """A scale of values on pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers on it."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def span(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """From the lowest to the highest with a little room; zero: from 0 on."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if zero:
        low = min(0.0, low)
    if low == high:
        low, high = (0.0, 1.0) if zero and low == 0 else (low - 0.5, high + 0.5)
    room = 0.05 * (high - low)
    return (low - room if low < 0 else max(0.0, low - room)), high + room


def frame(title: str, *marks: Any, legend: Any = "", below: Any = "", size: tuple[int, int], told: str) -> Html:
    """A figure: its caption and legend, the drawing, and what stands below. told: what the drawing shows, in words."""
    drawing = tag("svg", *marks, viewBox=f"0 0 {size[0]} {size[1]}", role="img", aria_label=told)
    return tag("figure", tag("figcaption", title), legend, drawing, below)


def grid(x: Axis, y: Axis, form: str) -> Html:
    """Steps across and values upwards, with ticks and horizontal lines. form: of the values."""
    marks = []
    for value in y.ticks(4):
        at = f"{y(value):.1f}"
        marks.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        label = f"{tick(100 * value)}%" if form.endswith("%") else tick(value)
        marks.append(tag("text", label, x=x.start - 5, y=at, dy="0.32em", text_anchor="end", class_="tick"))
    marks.append(tag("text", "step", x=0, y=y.start + 17, class_="tick"))
    for value in x.ticks(4):
        label = tick(value)
        marks.append(tag("text", label, x=f"{x(value):.1f}", y=y.start + 17, text_anchor="middle", class_="tick"))
    return join(marks)


def tick(value: float) -> str:
    if abs(value) >= 1000:
        return shown(value / 1000, ".4g") + "k"
    return shown(0.0 if abs(value) < 1e-12 else value, ".4g")


def lines(title: str, series: Sequence[Series], form: str = ".3f", zero: bool = False) -> Html:
    """Values over steps, and in the legend the last of each."""
    series = [thinned(one) for one in series if len(one.steps)]
    if not series:
        return Html("")
    y = Axis(*span([v.value for one in series for v in one.values], zero), HEIGHT - BOTTOM, TOP)
    x = Axis(0, max(1, *(one.steps[-1] for one in series)), LEFT, WIDTH - RIGHT)
    marks = [grid(x, y, form)]
    if y.low < 0:
        marks.append(tag("line", x1=x.start, x2=x.end, y1=f"{y(0):.1f}", y2=f"{y(0):.1f}", class_="axis"))
    for one in series:
        pairs = zip(one.steps, one.values, strict=True)
        points = [(x(s), y(v.value), s, v) for s, v in pairs if math.isfinite(v.value)]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        marks.append(tag("polyline", points=line, class_=f"line s{one.tone}"))
        for px, py, step, value in points if len(points) <= MOST_MARKS else ():
            told = value.told(f"{one.label}, step {step}: {shown(value.value, form)}", "title")
            kind = "dot" if len(points) <= FEW_POINTS else "mark"
            marks.append(tag("circle", told, cx=f"{px:.1f}", cy=f"{py:.1f}", r=3.2, class_=f"{kind} s{one.tone}"))
    key = [(one.label, one.tone, one.values[-1].figure(form)) for one in series]
    told = f"{title}, over steps: {', '.join(one.label for one in series)}"
    return frame(title, *marks, legend=legend(key), size=(WIDTH, HEIGHT), told=told)


def legend(entries: Sequence[tuple[str, int, Any]]) -> Html:
    """Names with their colour, and a figure or nothing after each."""
    return tag(
        "ul",
        *(tag("li", tag("i", class_=f"s{tone}"), label, " ", value) for label, tone, value in entries),
        class_="legend",
    )


def thinned(one: Series) -> Series:
    """At most MOST_POINTS of its points, the last among them."""
    every = math.ceil(len(one.steps) / MOST_POINTS)
    kept = slice((len(one.steps) - 1) % every, None, every)
    return Series(one.label, one.steps[kept], one.values[kept], one.tone)


def histogram(title: str, counts: Sequence[int], edges: Sequence[float]) -> Html:
    """Bars; those below 0 in another colour, with a line at 0."""
    height = 130
    x = Axis(*_around_zero(edges), RIGHT, WIDTH - RIGHT)
    y = Axis(0, max(1, *counts), height - BOTTOM, 8)
    bars = [
        tag("rect", x=f"{x(low):.1f}", y=f"{y(count):.1f}", width=f"{max(0.5, x(high) - x(low) - 1):.1f}",
            height=f"{y(0) - y(count):.1f}", class_="bad" if high <= 0 else "good")
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]  # fmt: skip
    zero = tag("line", x1=f"{x(0):.1f}", x2=f"{x(0):.1f}", y1=4, y2=y(0), class_="axis")
    ticks = [
        tag("text", tick(value), x=f"{x(value):.1f}", y=height - 9, text_anchor="middle", class_="tick")
        for value in x.ticks(5)
    ]
    return frame(title, *bars, zero, *ticks, size=(WIDTH, height), told=f"Histogram: {title}")


def _around_zero(edges: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, edges[0]), max(0.0, edges[-1])
    return (low, high) if low < high else (low, low + 1)


def scatter(title: str, points: np.ndarray, tones: Sequence[int], titles: Sequence[Html], below: Any = "") -> Html:
    """Points (n, 2), at most 1 from the middle, in the colours of tones. titles: a <title> for each."""
    size = 320
    across = Axis(-1.04, 1.04, 6, size - 6)
    dots = [
        tag("circle", told, cx=f"{across(px):.1f}", cy=f"{across(-py):.1f}", r=3.2, class_=f"dot s{tone}")
        for (px, py), tone, told in zip(points.tolist(), tones, titles, strict=True)
    ]
    return frame(title, *dots, below=below, size=(size, size), told=f"Map of papers: {title}")


def intervals(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, int, float, Html]]]], high: float) -> Html:
    """Dots on a line for each row: (its name, (label, tone, value, <title>)...), on an axis from 0 to high."""
    step, left = 44, 12
    height = len(rows) * step + 24
    x = Axis(0, high, left, WIDTH - left)
    marks = []
    for value in x.ticks(5):
        at = f"{x(value):.1f}"
        marks.append(tag("line", x1=at, x2=at, y1=4, y2=height - 22, class_="grid"))
        marks.append(tag("text", tick(value), x=at, y=height - 7, text_anchor="middle", class_="tick"))
    for number, (name, dots) in enumerate(rows):
        y = number * step + 30
        marks.append(tag("text", name, x=left, y=y - 12, class_="name"))
        marks.append(tag("line", x1=left, x2=WIDTH - left, y1=y, y2=y, class_="grid"))
        marks += [tag("circle", told, cx=f"{x(v):.1f}", cy=y, r=6, class_=f"dot s{tone}") for _, tone, v, told in dots]
    entries = {label: (label, tone, "") for _, dots in rows for label, tone, _, _ in dots}
    return frame(title, *marks, legend=legend(list(entries.values())), size=(WIDTH, height), told=title)
