"""PubMed and MEDLINE in XML: PubmedArticleSet (baseline, update files, searches) and MedlineCitationSet."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.papers.paper_record import Label, Paper, doi_names, labels_of, objects, without_tags, year_of
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.readers.xml_elements import read_elements
from datamodules.records import UserError

RECORDS = {"PubmedArticleSet": "PubmedArticle", "MedlineCitationSet": "MedlineCitation"}


def rows(path: Path, bad: BadLines) -> Iterator[Row]:
    """Yield each article as an object, and other elements, such as books, as None.

    Raises UserError if the XML is damaged or defines entities.
    """
    count = 0
    for element in read_elements(path, RECORDS):
        count += 1
        value = _as_object(element) if element.tag in RECORDS.values() else None
        yield Row(bad, path, count, ElementTree.tostring(element, "unicode"), count, value)
    bad.end_of_file(path, count)


def _as_object(article: ElementTree.Element) -> dict[str, Any]:
    """Return the parts of an article that are read, unchecked, so that errors in them belong to its row."""
    citation = article if article.tag == "MedlineCitation" else article.find("MedlineCitation")
    if citation is None:
        return {}
    date = citation.find("Article/Journal/JournalIssue/PubDate")
    dates = [None if date is None else " ".join(date.itertext()), citation.findtext("Article/ArticleDate/Year")]
    return {
        "pmid": _text(citation.find("PMID")),
        "title": _text(citation.find("Article/ArticleTitle")),
        "abstract": " ".join(map(_section, citation.iterfind("Article/Abstract/AbstractText"))),
        "dates": dates,
        "headings": [
            {"id": name.get("UI", ""), "name": _text(name)}
            for name in citation.iterfind("MeshHeadingList/MeshHeading/DescriptorName")
        ],
        "keywords": [_text(keyword) for keyword in citation.iterfind("KeywordList/Keyword")],
        "doi": next((_text(id) for id in _ids(article, citation) if "doi" in id.attrib.values()), ""),
        "references": [_reference(ids) for ids in article.iterfind("PubmedData//Reference/ArticleIdList")],
    }


def _ids(article: ElementTree.Element, citation: ElementTree.Element) -> Iterator[ElementTree.Element]:
    yield from citation.iterfind("Article/ELocationID")
    yield from article.iterfind("PubmedData/ArticleIdList/ArticleId")


def _reference(ids: ElementTree.Element) -> str:
    """Return the PMID of a cited paper, or else the name of its DOI, or ""."""
    by_type = {id.get("IdType"): _text(id) for id in ids}
    return by_type.get("pubmed") or next(iter(doi_names(by_type.get("doi"))), "")


def _text(element: ElementTree.Element | None) -> str:
    """Return the text of an element, including the text inside <i>, <sub> and so on."""
    return "" if element is None else re.sub(r"\s+", " ", "".join(element.itertext())).strip()


def _section(element: ElementTree.Element) -> str:
    """Return a section of a structured abstract, as printed: "METHODS: We ..."."""
    name, text = element.get("Label", "").strip(), _text(element)
    return f"{name}: {text}" if name and text else text


def paper(record: Record) -> Paper:
    if not record.get("pmid"):
        raise UserError("the article has no PMID")
    return Paper(
        id=record.id("pmid"),
        title=without_tags(record.text("title")),  # some abstracts have escaped tags, &lt;b&gt;
        abstract=without_tags(record.text("abstract")),
        year=next(filter(None, map(year_of, record["dates"])), None),
        labels={
            "mesh": [
                Label(heading["id"] or heading["name"], heading["name"])
                for heading in objects(record, "headings")
                if heading["name"]
            ],
            "keywords": labels_of(record["keywords"], "KeywordList"),
        },
        references=list(filter(None, record["references"])),
        names=doi_names(record["doi"]),
    )
