"""Label files: ids, names and definitions of labels, as documents."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from datamodules.readers.collecting import add_document
from datamodules.readers.io import read_lines, suffix_of
from datamodules.readers.json_files import as_object, read_records
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.readers.xml_elements import read_elements
from datamodules.records import Document, UserError, prefixed, short


def read_labels(path: Path, bad: BadLines) -> dict[str, Document]:
    """Return the labels of a file. A label's title is its first name, and its text is the definition.

    .json, .jsonl (MICoL, SciMult)   {"label": id, "name": [name, synonym, ...], "definition": ...} per line; name may
                                     be a string, and "combined_text" may replace name and definition
    .xml (MeSH: desc2022.xml)        descriptors, with scope notes as definitions
    other (MAPLE)                    id <tab> name <tab> synonym ... per line
    """
    labels: dict[str, Document] = {}
    if suffix_of(path) == ".xml":
        for descriptor in read_elements(path, ["DescriptorRecordSet"]):
            with prefixed(f"{path}: "):
                add_document(labels, _from_descriptor(descriptor))
    else:
        is_json = suffix_of(path) in (".json", ".jsonl")
        for row in read_records(path, bad) if is_json else read_lines(path, bad):
            with row:
                add_document(labels, _from_object(row) if is_json else _from_columns(row))
    if not labels:
        raise UserError(f"{path}: contains no labels")
    return labels


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
        raise UserError(f"expected a label and its name, separated by a tab, got {short(row.text)}")
    return Document(columns[0], columns[1])


def _from_descriptor(record: ElementTree.Element) -> Document:
    def text(element: str) -> str:
        return " ".join((record.findtext(element) or "").split())

    id, name = text("DescriptorUI"), text("DescriptorName/String")
    if not (id and name):
        raise UserError(f"expected descriptors with DescriptorUI and DescriptorName, got {id or 'none'}")
    return Document(id, name, text("ConceptList/Concept[@PreferredConceptYN='Y']/ScopeNote"))
