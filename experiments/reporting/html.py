"""HTML as strings that are safe by construction: what is not Html is escaped where it is put in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

VOID = ("br", "hr", "img", "line", "circle", "rect", "path", "polyline", "meta")


class Html(str):
    """Markup that is finished."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Attributes have _ for -, and class_ is class; those that are None or False are left out."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID and not children:
        return Html(f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Any], between: str = "") -> Html:
    return Html(between.join(child if isinstance(child, Html) else escape(str(child)) for child in children))


def shown(value: Any, form: str = ".3f") -> str:
    """A figure as people read it: form as of str.format, with a true minus. What is no number stays as it is."""
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return format(value, form).replace("-", "−") if math.isfinite(value) else str(value)


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "", class_: str | None = None) -> Html:
    """A table whose rows each begin with their name; it scrolls within itself where the page is narrower."""
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = tag("tbody", *(table_row(row) for row in rows))
    told = (tag("caption", caption),) if caption else ()
    return scrolling(tag("table", *told, top, body, class_=class_), caption or "table")


def scrolling(table: Html, label: str) -> Html:
    return tag("div", table, class_="wide", tabindex="0", role="region", aria_label=label)


def table_row(cells: Sequence[Any], class_: str | None = None) -> Html:
    first, *others = cells
    return tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others), class_=class_)


def missing(*words: Any) -> Html:
    """A line in the place of what is not there."""
    return tag("p", *words, class_="missing")


def section(id: str, title: str, *children: Any, files: Sequence[str] = ()) -> Html:
    """A part of the page. files: what its figures were read from."""
    read = ()
    if files:
        names = join((tag("code", name) for name in files), ", ")
        read = (tag("p", "Read from ", names, class_="source"),)
    return tag("section", tag("h2", title, id=f"{id}-title"), *children, *read, id=id, aria_labelledby=f"{id}-title")
