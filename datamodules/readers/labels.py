"""Label spaces: the ids, names and definitions of labels, as documents."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines, Place
from datamodules.readers.json_values import as_object, records
from datamodules.readers.lines import SUFFIXES, lines, open_text, read
from datamodules.records import Document, UserError

CHUNK = 2**20  # characters


def read_labels(path: Path, bad: BadLines) -> dict[str, Document]:
    """A label's document has its first name as title and its definition as text.

    A file in .json or .jsonl (MICoL, SciMult): {"label": id, "name": [name, synonym, ...], "definition": ...} a line;
    the name may be a string, and "combined_text" stands in for a name and a definition. A file in .xml: MeSH's
    descriptors (desc2022.xml), with their scope notes as definitions. Any other (MAPLE): id <tab> name <tab> synonym
    ... a line.
    """
    found: dict[str, Document] = {}
    if _is(path, "xml"):
        for label in _of_mesh(path):
            fields.add_new(found, label)
    else:
        is_json = _is(path, "json", "jsonl")
        for place in records(path, bad) if is_json else lines(path, bad):
            with place:
                fields.add_new(found, _of_object(place) if is_json else _of_columns(place))
    if not found:
        raise UserError(f"{path}: holds no label")
    return found


def _is(path: Path, *kinds: str) -> bool:
    return any(path.name.endswith(f".{kind}{suffix}") for kind in kinds for suffix in SUFFIXES)


def _of_object(place: Place) -> Document:
    record = as_object(place, " with label, name and definition")
    name = record.get("name")
    if isinstance(name, list):
        name = name[0] if name else None
    body = "definition" if "definition" in record or name is not None else "combined_text"
    return fields.document({**record, "name": name}, ("label",), title="name", body=body)


def _of_columns(place: Place) -> Document:
    columns = [column.strip() for column in place.text.split("\t")]
    if len(columns) < 2 or not columns[0] or not columns[1]:
        raise UserError(f"expected a label and its name between tabs, got {place.text[:60]!r}")
    return Document(columns[0], columns[1])


def _of_mesh(path: Path) -> Iterator[Document]:
    """One descriptor after the other, of which the file (300 MB) holds one alone in memory."""
    parser = ElementTree.XMLPullParser(["start", "end"])
    root = None
    with open_text(path) as stream:
        try:
            while text := read(stream, path, 0, CHUNK):
                parser.feed(text)
                for event, element in parser.read_events():
                    root = element if root is None else root
                    if event == "end" and element.tag == "DescriptorRecord":
                        yield _descriptor(path, element)
                        root.clear()
            parser.close()
        except (ElementTree.ParseError, UnicodeEncodeError) as error:  # the latter: bytes that are no UTF-8
            raise UserError(f"{path}: the XML file is damaged ({error})") from error


def _descriptor(path: Path, record: ElementTree.Element) -> Document:
    def text(place: str) -> str:
        return " ".join((record.findtext(place) or "").split())

    id, name = text("DescriptorUI"), text("DescriptorName/String")
    if not (id and name):
        raise UserError(f"{path}: expected descriptors with DescriptorUI and DescriptorName, got {id or 'none'}")
    return Document(id, name, text("ConceptList/Concept[@PreferredConceptYN='Y']/ScopeNote"))
