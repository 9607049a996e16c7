"""Pieces of SVG files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def document(width: float, height: float, parts: Iterable[str]) -> str:
    """A whole file, on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, shown: str, weight: str = "normal", anchor: str = "start") -> str:
    """Characters that XML does not have are shown as U+FFFD."""
    shown = escape(NO_XML.sub("\ufffd", shown))
    return f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}">{shown}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    """more: further attributes."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{more}/>'
