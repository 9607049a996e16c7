"""OpenAlex: works from the API or the snapshot (docs.openalex.org, the Work object)."""

from __future__ import annotations

from typing import Any

from datamodules.papers.paper_record import (
    Label,
    Paper,
    doi_names,
    label,
    labels_of,
    objects,
    optional_id,
    without_tags,
    year_of,
)
from datamodules.readers.rows import Record
from datamodules.records import UserError, short

PREFIX = "https://openalex.org/"


def recognises(record: Record) -> bool:
    return str(record.get("id")).startswith(f"{PREFIX}W") or "abstract_inverted_index" in record


def paper(record: Record) -> Paper:
    topics = objects(record, "topics")
    concepts = objects(record, "concepts") if not topics else []  # works of 2023 and earlier have no topics
    keywords = objects(record, "keywords")
    names = [keyword.get("display_name") or keyword.get("keyword") for keyword in keywords]
    title = record.text("title") or record.text("display_name")
    return Paper(
        id=record.id("id").removeprefix(PREFIX),
        title=without_tags(title),
        abstract=without_tags(_abstract(record.get("abstract_inverted_index"))),
        year=year_of(record.get("publication_year")),
        labels={
            "topics": [_label(topic) for topic in topics or concepts],
            "fields": [_label(topic.object("field")) for topic in topics if topic.get("field")],
            "mesh": [label(heading, "descriptor_ui", "descriptor_name") for heading in objects(record, "mesh")],
            "keywords": labels_of(names, "keywords"),
        },
        references=[id.removeprefix(PREFIX) for id in record.ids("referenced_works")],
        names=doi_names(optional_id(record, "doi")),
    )


def _label(record: Record) -> Label:
    id = record.id("id").removeprefix(PREFIX)
    return label(Record(record, id=id.replace("/", "")), "id", "display_name")


def _abstract(index: Any) -> str:
    """Return the text of an inverted index, {word: [positions]}."""
    if index is None:
        return ""
    if not isinstance(index, dict):
        raise UserError(f"abstract_inverted_index must be an object, got {short(index)}")
    words = []
    for word, positions in index.items():
        if not isinstance(positions, list) or not all(type(position) is int for position in positions):
            raise UserError(f"abstract_inverted_index: {short(word)} must have a list of positions")
        words += [(position, word) for position in positions]
    return " ".join(word for _, word in sorted(words))
