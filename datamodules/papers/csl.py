"""Libraries and works in JSON: Zotero (API and Better BibTeX), CSL JSON, and Crossref's works."""

from __future__ import annotations

import re
from typing import Any

from datamodules.papers.paper_record import (
    Paper,
    doi_names,
    labels_of,
    objects,
    optional_id,
    split_list,
    without_tags,
    year_of,
)
from datamodules.readers.checks import check_text
from datamodules.readers.rows import Record
from datamodules.records import UserError, short

NOT_PAPERS = ("attachment", "note", "annotation")  # item types of Zotero


def is_zotero(record: Record) -> bool:
    return "itemType" in record or (isinstance(record.get("data"), dict) and "itemType" in record["data"])


def is_crossref(record: Record) -> bool:
    return "DOI" in record and (isinstance(record.get("title"), list) or "reference-count" in record)


def is_csl(record: Record) -> bool:
    return "id" in record and "type" in record and ("issued" in record or "title" in record)


def zotero_paper(record: Record) -> Paper | None:
    key = optional_id(record, "key")
    item = record.object("data") if "data" in record else record
    if item.get("itemType") in NOT_PAPERS:
        return None
    tags = (tag.get("tag") if isinstance(tag, dict) else tag for tag in item.array("tags"))
    return Paper(
        id=optional_id(item, "citationKey") or optional_id(item, "key") or optional_id(item, "itemKey") or key,
        title=without_tags(item.text("title")),
        abstract=without_tags(item.text("abstractNote")),
        year=year_of(item.get("date")),
        labels={"keywords": labels_of(tags, "tags")},
        references=_related(item),
        names=[*doi_names(item.get("DOI")), *(f"item:{item[name]}" for name in ("key", "itemKey") if item.get(name))],
    )


def _related(item: Record) -> list[str]:
    """Return the keys of the items that the user marked as related, which are the links of a Zotero library."""
    relations = item.get("relations")
    related = relations.get("dc:relation", []) if isinstance(relations, dict) else []
    urls = related if isinstance(related, list) else [related]
    return [f"item:{url.rpartition('/')[2]}" for url in urls if isinstance(url, str)]


def crossref_paper(record: Record) -> Paper:
    title = ": ".join(_strings(record, "title")[:1] + _strings(record, "subtitle")[:1])
    return Paper(
        id=record.id("DOI").lower(),
        title=without_tags(title),
        abstract=without_tags(record.text("abstract")),
        year=_issued(record),
        labels={"fields": labels_of(_strings(record, "subject"), "subject")},
        references=[name for cited in objects(record, "reference") for name in doi_names(cited.get("DOI"))],
        names=doi_names(record["DOI"]),
    )


def csl_paper(record: Record) -> Paper:
    keywords = record.text("keyword")
    return Paper(
        id=record.id("id"),
        title=without_tags(record.text("title")),
        abstract=without_tags(record.text("abstract")),
        year=_issued(record),
        labels={"keywords": labels_of(split_list(keywords, ";,"), "keyword")},
        names=doi_names(record.get("DOI")),
    )


def _strings(record: Record, key: str) -> list[str]:
    """Return the list of strings under a key. A single string counts as a list."""
    value = record.get(key)
    values = [value] if isinstance(value, str) else record.array(key)
    if not all(isinstance(text, str) for text in values):
        raise UserError(f"{key} must be a list of strings, got {short(values)}")
    return [check_text(text, key) for text in values if text.strip()]


def _issued(record: Record) -> int | None:
    """Return the year of {"date-parts": [[2015, 3]]}, or of a date as text."""
    issued: Any = record.get("issued") or record.get("published")
    if not isinstance(issued, dict):
        return year_of(issued)
    return year_of(re.sub(r"[\[\]]", " ", str(issued.get("date-parts") or issued.get("raw") or issued.get("literal"))))
