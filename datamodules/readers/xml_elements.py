"""Read XML files that are larger than memory, one record at a time."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator
from pathlib import Path

from datamodules.readers.io import CHUNK, open_text, read_chunk
from datamodules.records import UserError, explained

MAX_DEPTH = 200  # maximum depth of elements; PubMed has about 15


def read_elements(path: Path, roots: Collection[str]) -> Iterator[ElementTree.Element]:
    """Yield the elements directly inside the root. Each is emptied when the next one is read.

    roots: possible tags of the root.
    Raises UserError if the root has another tag, or if the XML is damaged, nested too deeply or defines entities.
    """
    parser: ElementTree.XMLPullParser = ElementTree.XMLPullParser(["start", "end"])
    root: ElementTree.Element | None = None
    prolog, depth = "", 0
    damage = (ElementTree.ParseError, UnicodeEncodeError)  # the second one for bytes that are not UTF-8
    with open_text(path) as stream, explained(f"{path}: the XML file is damaged", *damage):
        while text := read_chunk(stream, path, 0, CHUNK):
            if root is None:
                prolog += text
                if len(prolog) > 2 * CHUNK:
                    raise UserError(f"{path}: expected an element within the first {CHUNK:,} characters")
                if "<!ENTITY" in prolog:  # nested entities may expand forever
                    raise UserError(f"{path}: defines XML entities, which this format does not have")
            parser.feed(text)
            events: Iterator[tuple[str, ElementTree.Element]] = parser.read_events()  # type: ignore[assignment]
            for event, element in events:
                if root is None:
                    root, prolog = element, ""
                    if root.tag not in roots:
                        raise UserError(f"{path}: expected {' or '.join(roots)}, got {root.tag[:60]}")
                depth += 1 if event == "start" else -1
                if depth > MAX_DEPTH:
                    raise UserError(f"{path}: more than {MAX_DEPTH} nested elements")
                if event == "end" and depth == 1:
                    yield element
                    root.clear()
        parser.close()
