"""Print foreign text, such as titles, names and file contents, without letting it control the terminal.

Imports only the standard library, so that every process can use it.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO

# ECMA-48: control sequences (colours, cursor), control strings with their terminator (titles, links), and the escapes
# of two or three characters.
ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
LINE_BREAKS = re.compile(r"[\n\v\f\x85\u2028\u2029]|\r\n?")
# All other control characters, and characters that change the direction of text.
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: object, line_break: str = " ") -> str:
    """Return text for a terminal: on one line, without escape sequences and control characters.

    line_break: what to write instead of a line break.
    """
    text = LINE_BREAKS.sub("\n", ESCAPES.sub("", str(text)))
    text = CONTROLS.sub("", text).replace("\t", " ").replace("\n", line_break)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may contain lone surrogates


def say(text: object, stream: TextIO | None = None, line_break: str = "\n") -> None:
    """Print text to stdout, or to another stream."""
    print(plain(text, line_break), file=stream or sys.stdout, flush=True)


class PlainFormatter(logging.Formatter):
    """Formats only the message. Further lines are indented, so that a title or name cannot imitate a log line."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), line_break="\n  ")
