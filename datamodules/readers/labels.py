"""Label files: ids, names and definitions of labels, as documents."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from datamodules.readers.checks import BadLines, Record, Row, add_document
from datamodules.readers.io import CHUNK, SUFFIXES, as_object, open_text, read_chunk, read_lines, read_records
from datamodules.records import Document, UserError


def read_labels(path: Path, bad: BadLines) -> dict[str, Document]:
    """Return the labels of a file. The title of a label is its first name, and the text its definition.

    .json, .jsonl (MICoL, SciMult)   {"label": id, "name": [name, synonym, ...], "definition": ...} per line; name may
                                     be a string, and "combined_text" may replace name and definition
    .xml (MeSH: desc2022.xml)        descriptors, whose scope notes are the definitions
    other (MAPLE)                    id <tab> name <tab> synonym ... per line
    """
    labels: dict[str, Document] = {}
    if _has_suffix(path, "xml"):
        for label in _read_mesh(path):
            add_document(labels, label)
    else:
        is_json = _has_suffix(path, "json", "jsonl")
        for row in read_records(path, bad) if is_json else read_lines(path, bad):
            with row:
                add_document(labels, _from_object(row) if is_json else _from_columns(row))
    if not labels:
        raise UserError(f"{path}: contains no labels")
    return labels


def _has_suffix(path: Path, *suffixes: str) -> bool:
    return any(path.name.endswith(f".{suffix}{compression}") for suffix in suffixes for compression in SUFFIXES)


def _from_object(row: Row) -> Document:
    record = as_object(row, " with label, name and definition")
    name = record.get("name")
    if isinstance(name, list):
        name = name[0] if name else None
    body = "definition" if "definition" in record or name is not None else "combined_text"
    return Record.of(row, record, name=name).document("label", title="name", body=body)


def _from_columns(row: Row) -> Document:
    columns = [column.strip() for column in row.text.split("\t")]
    if len(columns) < 2 or not columns[0] or not columns[1]:
        raise UserError(f"expected a label and its name, separated by a tab, got {row.text[:60]!r}")
    return Document(columns[0], columns[1])


def _read_mesh(path: Path) -> Iterator[Document]:
    """Yield the descriptors of a MeSH file, one at a time, because the file is about 300 MB."""
    parser = ElementTree.XMLPullParser(["start", "end"])
    root = None
    with open_text(path) as stream:
        try:
            while text := read_chunk(stream, path, 0, CHUNK):
                parser.feed(text)
                for event, element in parser.read_events():
                    root = element if root is None else root
                    if event == "end" and element.tag == "DescriptorRecord":
                        yield _from_descriptor(path, element)
                        root.clear()
            parser.close()
        except (ElementTree.ParseError, UnicodeEncodeError) as error:  # the latter for bytes that are not UTF-8
            raise UserError(f"{path}: the XML file is damaged ({error})") from error


def _from_descriptor(path: Path, record: ElementTree.Element) -> Document:
    def text(element: str) -> str:
        return " ".join((record.findtext(element) or "").split())

    id, name = text("DescriptorUI"), text("DescriptorName/String")
    if not (id and name):
        raise UserError(f"{path}: expected descriptors with DescriptorUI and DescriptorName, got {id or 'none'}")
    return Document(id, name, text("ConceptList/Concept[@PreferredConceptYN='Y']/ScopeNote"))
