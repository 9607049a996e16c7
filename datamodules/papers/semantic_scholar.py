"""Semantic Scholar: pages and batches from the API, and the bulk data sets papers, abstracts, s2orc and citations.

The bulk data sets may be in one folder. Abstracts and citations belong to the papers with the same corpusid.
"""

from __future__ import annotations

from typing import Any

from datamodules.papers.paper_record import Paper, doi_names, labels_of, objects, optional_id, year_of
from datamodules.readers.rows import Record
from datamodules.records import UserError, short

WRAPPERS = ("citedPaper", "citingPaper")  # keys in entries of the endpoints "references" and "citations"
KEYS = {"paperId", "corpusId", "corpusid", "citingcorpusid", *WRAPPERS}


def recognises(record: Record) -> bool:
    return not KEYS.isdisjoint(record)


def paper(record: Record) -> Paper | None:
    for key in WRAPPERS:
        if key in record:
            record = record.object(key)
    if "citingcorpusid" in record:
        cited = optional_id(record, "citedcorpusid")  # null for papers outside Semantic Scholar
        return Paper(record.id("citingcorpusid"), references=[cited] if cited else [], is_part=True)
    id, corpus_id = optional_id(record, "paperId"), _corpus_id(record)
    if not id and not corpus_id and "paperId" in record:
        return None  # the API returns unknown papers as {"paperId": null, "title": ...}
    external: dict[str, Any] = next((record[key] for key in ("externalIds", "externalids") if record.get(key)), {})
    if not isinstance(external, dict):
        raise UserError(f"externalIds must be an object, got {short(external)}")
    return Paper(
        id=id or corpus_id or record.id("paperId", "corpusid"),
        title=record.text("title"),
        abstract=record.text("abstract"),
        year=year_of(record.get("year")) or year_of(record.get("publicationDate")),
        labels={"fields": labels_of(_fields(record), "fieldsOfStudy")},
        references=[name for reference in objects(record, "references") for name in _reference(reference)],
        names=[*_corpus_names(corpus_id), *doi_names(external.get("DOI"))],
        is_part="title" not in record and "abstract" in record,
    )


def _corpus_id(record: Record) -> str:
    return optional_id(record, "corpusId") or optional_id(record, "corpusid")


def _corpus_names(corpus_id: str) -> list[str]:
    return [f"corpusid:{corpus_id}"] if corpus_id else []


def _reference(record: Record) -> list[str]:
    id = optional_id(record, "paperId")
    return [id] if id else _corpus_names(_corpus_id(record))


def _fields(record: Record) -> list[Any]:
    """Return the fields of study: a list of names, or objects with a category from one of two sources."""
    studies = objects(record, "s2FieldsOfStudy") or objects(record, "s2fieldsofstudy")
    return [study.get("category") for study in studies] or record.array("fieldsOfStudy")
