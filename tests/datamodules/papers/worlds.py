"""The same few hundred papers in every format, in the layout that its publisher uses, and what they contain.

Each world has the same irregularities: paper 3 is there twice, paper 5 has no abstract, paper 7 has no text at all, and
papers cite some that are not in the file.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.sax.saxutils import escape

NUM = 300
TWICE, WITHOUT_ABSTRACT, WITHOUT_TEXT = 3, 5, 7
WORDS = ("graph", "neural", "cell", "market", "quantum", "protein", "language", "soil", "vision", "climate", "bond")
TOPICS = ["Graph Theory", "Cell Biology", "Soil Science", "Computer Vision", "Plasma Physics", "Rare Topic"]


@dataclass
class Truth:
    """A paper as it is written. topics, keywords: names. references: numbers of cited papers, or None for others."""

    number: int
    title: str
    abstract: str
    year: int
    topics: list[str]
    keywords: list[str]
    references: list[int | None] = field(default_factory=list)


def papers(number: int = NUM, seed: int = 0) -> list[Truth]:
    """Return papers 0 to number - 1. Only two of them have the topic that is last in TOPICS."""
    rng = random.Random(seed)
    made = []
    for i in range(number):
        topics = rng.sample(TOPICS[:-1], rng.randint(1, 2)) + TOPICS[-1:] * (i in (20, 21))
        words = " ".join(rng.choices(WORDS, k=12))
        references = sorted(rng.sample(range(i), min(i, rng.randint(0, 4)))) + [None] * rng.randint(0, 2)
        title = f"Títle {i} on {rng.choice(WORDS)} & {rng.choice(WORDS)}"
        keywords = rng.sample(WORDS, 3)
        made.append(
            Truth(i, title, f"We study {words}. {i} results < {i + 1}.", 2000 + i % 20, topics, keywords, references)
        )
    made[WITHOUT_ABSTRACT].abstract = ""
    made[WITHOUT_TEXT].abstract = made[WITHOUT_TEXT].title = ""
    return made


def in_file(truths: list[Truth]) -> list[Truth]:
    """Return the papers as they are in a file: one of them twice, with another title the second time."""
    return [*truths, replace(truths[TWICE], title="A later copy", references=[])]


@dataclass(frozen=True)
class World:
    """A format.

    file: name of the file.
    write: writes papers to a path.
    id: returns the id of a paper, by number.
    kind: kind of labels that the import chooses.
    marker: pattern at the start of a line, once in every record; empty for binary files.
    extra: number of records that are not papers.
    """

    file: str
    write: Callable[[Path, list[Truth]], None]
    id: Callable[[int], str]
    marker: bytes
    kind: str = "keywords"
    has_references: bool = False
    extra: int = 0

    @property
    def name(self) -> str:
        return self.write.__name__

    def labels(self, truth: Truth) -> list[str]:
        return truth.keywords if self.kind == "keywords" else truth.topics

    def label_names(self, truth: Truth) -> list[str]:
        """Return the names of a paper's labels in the import. arXiv's categories are codes with names."""
        return [ARXIV[name][1] for name in truth.topics] if self.write is arxiv else self.labels(truth)


def dump(path: Path, content: object) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


def lines(path: Path, records: list[dict]) -> None:
    dump(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def outside(truth: Truth, position: int) -> int:
    """Return a number that no paper has."""
    return 10_000 + truth.number * 10 + position


def cited(truth: Truth) -> list[int]:
    return [outside(truth, i) if number is None else number for i, number in enumerate(truth.references)]


# --- one writer per format ---


def openalex_record(truth: Truth) -> dict:
    index: dict[str, list[int]] = {}
    for position, word in enumerate(truth.abstract.split()):
        index.setdefault(word, []).append(position)

    def entity(kind: str, name: str) -> dict:
        return {"id": f"https://openalex.org/{kind}{sum(map(ord, name))}", "display_name": name}

    return {
        "id": f"https://openalex.org/W{truth.number}",
        "doi": f"https://doi.org/10.1234/X{truth.number}",
        "title": truth.title or None,
        "display_name": truth.title or None,
        "publication_year": truth.year,
        "type": "article",
        "topics": [entity("T", name) | {"score": 0.9, "field": entity("fields/", "Science")} for name in truth.topics],
        "keywords": [entity("keywords/", name) | {"score": 0.5} for name in truth.keywords],
        "mesh": [],
        "referenced_works": [f"https://openalex.org/W{number}" for number in cited(truth)],
        "abstract_inverted_index": index or None,
    }


def openalex(path: Path, truths: list[Truth]) -> None:
    lines(path, [openalex_record(truth) for truth in truths])


def openalex_pages(path: Path, truths: list[Truth]) -> None:
    """Answers of the API, one after another, as `curl` appends them."""
    pages = [truths[start : start + 25] for start in range(0, len(truths), 25)]
    answers = [{"meta": {"count": len(truths)}, "results": list(map(openalex_record, page))} for page in pages]
    dump(path, "\n".join(json.dumps(answer, indent=1) for answer in answers))


def s2_reference(number: int) -> dict:
    return {"paperId": f"{number:040x}", "title": "cited"} if number % 2 else {"paperId": None, "corpusId": number}


def semantic_scholar(path: Path, truths: list[Truth]) -> None:
    """A page of the API's bulk search, with an unknown paper."""
    records = [
        {
            "paperId": f"{truth.number:040x}",
            "corpusId": truth.number,
            "externalIds": {"DOI": f"10.1234/X{truth.number}", "CorpusId": truth.number},
            "title": truth.title or None,
            "abstract": truth.abstract or None,
            "year": truth.year,
            "fieldsOfStudy": None,
            "s2FieldsOfStudy": [{"category": name, "source": "s2-fos-model"} for name in truth.topics],
            "references": [s2_reference(number) for number in cited(truth)],
        }
        for truth in truths
    ]
    dump(path, json.dumps({"total": len(records), "token": None, "data": [*records, None]}, indent=1))


def pubmed(path: Path, truths: list[Truth]) -> None:
    def article(truth: Truth) -> str:
        headings = "".join(
            f'<MeshHeading><DescriptorName UI="D{sum(map(ord, name)):06}" MajorTopicYN="N">{name}</DescriptorName>'
            '<QualifierName UI="Q000001" MajorTopicYN="Y">methods</QualifierName></MeshHeading>'
            for name in truth.topics
        )
        keywords = "".join(f'<Keyword MajorTopicYN="N">{word}</Keyword>' for word in truth.keywords)
        references = "".join(
            f"<Reference><Citation>J. {number}</Citation><ArticleIdList>"
            f'<ArticleId IdType="doi">10.1234/X{number}</ArticleId><ArticleId IdType="pubmed">{number}</ArticleId>'
            "</ArticleIdList></Reference>"
            for number in cited(truth)
        )
        first, _, rest = truth.abstract.partition(". ")
        abstract = f"<AbstractText>{escape(first)}.</AbstractText><AbstractText>{escape(rest)}</AbstractText>"
        title = escape(truth.title).replace("Títle", "<i>Títle</i>")
        return (
            f'<PubmedArticle><MedlineCitation Status="MEDLINE" Owner="NLM"><PMID Version="1">{truth.number}</PMID>'
            "<Article><Journal><JournalIssue><PubDate>"
            f"<MedlineDate>{truth.year} Spring</MedlineDate></PubDate></JournalIssue></Journal>"
            f"<ArticleTitle>{title}</ArticleTitle>{f'<Abstract>{abstract}</Abstract>' if truth.abstract else ''}"
            f'<ELocationID EIdType="doi" ValidYN="Y">10.1234/X{truth.number}</ELocationID></Article>'
            f'<MeshHeadingList>{headings}</MeshHeadingList><KeywordList Owner="NOTNLM">{keywords}</KeywordList>'
            f"</MedlineCitation><PubmedData><ReferenceList>{references}</ReferenceList></PubmedData></PubmedArticle>\n"
        )

    start = (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE PubmedArticleSet PUBLIC '
        '"-//NLM//DTD PubMedArticle, 1st January 2025//EN" "https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">\n<PubmedArticleSet>\n'
    )
    dump(path, start + "".join(map(article, truths)) + "</PubmedArticleSet>\n")


ARXIV = {  # code and name of the category that stands for a topic
    "Graph Theory": ("math.CO", "Combinatorics"),
    "Cell Biology": ("q-bio.CB", "Cell Behavior"),
    "Soil Science": ("physics.geo-ph", "Geophysics"),
    "Computer Vision": ("cs.CV", "Computer Vision and Pattern Recognition"),
    "Plasma Physics": ("physics.plasm-ph", "Plasma Physics"),
    "Rare Topic": ("hep-th", "High Energy Physics - Theory"),
}


def arxiv(path: Path, truths: list[Truth]) -> None:
    lines(
        path,
        [
            {
                "id": f"{2000 + truth.number}.00001",
                "submitter": "A. Author",
                "title": truth.title.replace(" on ", "\n  on "),
                "doi": None,
                "categories": " ".join(ARXIV[name][0] for name in truth.topics),
                "abstract": f"  {truth.abstract}\n" if truth.abstract else "",
                "versions": [{"version": "v1", "created": f"Mon, 2 Apr {truth.year} 19:18:42 GMT"}],
                "update_date": "2024-01-01",
            }
            for truth in truths
        ],
    )


def zotero(path: Path, truths: list[Truth]) -> None:
    """The export of Better BibTeX, with a note and an attachment."""
    items = [
        {
            "itemID": truth.number,
            "itemType": "journalArticle",
            "title": truth.title.replace("Títle", "<i>Títle</i>").replace("&", "&amp;"),
            "abstractNote": truth.abstract.replace("<", "&lt;"),
            "date": f"{truth.year}-03-01",
            "DOI": f"10.1234/X{truth.number}",
            "tags": [{"tag": word} for word in truth.keywords],
            "relations": {"dc:relation": [f"http://zotero.org/users/1/items/K{n}" for n in cited(truth)]},
            "citationKey": f"key{truth.number}",
            "itemKey": f"K{truth.number}",
        }
        for truth in truths
    ]
    others = [
        {"itemType": "note", "note": "read this", "key": "N1"},
        {"itemType": "attachment", "path": "a.pdf", "key": "A1"},
    ]
    dump(path, json.dumps({"config": {"id": "x"}, "items": items + others}, indent=1, ensure_ascii=False))


def crossref(path: Path, truths: list[Truth]) -> None:
    items = [
        {
            "DOI": f"10.1234/X{truth.number}",
            "type": "journal-article",
            "title": [truth.title.replace("&", "&amp;")] if truth.title else [],
            "abstract": f"<jats:title>Abstract</jats:title><jats:p>{escape(truth.abstract)}</jats:p>"
            if truth.abstract
            else "",
            "issued": {"date-parts": [[truth.year, 3]]},
            "subject": truth.topics,
            "reference-count": len(truth.references),
            "reference": [{"key": f"r{n}", "DOI": f"10.1234/x{n}"} for n in cited(truth)],
        }
        for truth in truths
    ]
    message = {"total-results": len(items), "items": items}
    dump(path, json.dumps({"status": "ok", "message-type": "work-list", "message": message}, indent=1))


def csl(path: Path, truths: list[Truth]) -> None:
    records = [
        {
            "id": f"key{truth.number}",
            "type": "article-journal",
            "title": truth.title.replace("&", "&amp;"),
            "abstract": truth.abstract.replace("<", "&lt;"),
            "issued": {"date-parts": [[str(truth.year), 3, 1]]},
            "keyword": ", ".join(truth.keywords),
        }
        for truth in truths
    ]
    dump(path, json.dumps(records, indent=2, ensure_ascii=False))


def bibtex(path: Path, truths: list[Truth]) -> None:
    entries = [
        f"@article{{key{truth.number},\n  author = {{Author, Anna}},\n"
        f"  title = {{{{T{chr(92)}'itle}} {truth.title[6:].replace('&', chr(92) + '&')}}},\n"
        f"  abstract = {{{truth.abstract}}},\n  year = {truth.year},\n  journal = jmlr,\n"
        f"  keywords = {{{', '.join(truth.keywords)}}}\n}}\n"
        if truth.title
        else f"@misc{{key{truth.number}, note = {{nothing}}, keywords = {{{', '.join(truth.keywords)}}} }}\n"
        for truth in truths
    ]
    dump(path, '% Encoding: UTF-8\n@string{jmlr = "JMLR"}\n\n' + "\n".join(entries) + "\n@comment{jabref-meta: x}\n")


def ris(path: Path, truths: list[Truth]) -> None:
    def record(truth: Truth) -> str:
        words = "".join(f"KW  - {word}\n" for word in truth.keywords)
        text = f"TI  - {truth.title}\nAB  - {truth.abstract.replace('. ', '.' + chr(10), 1)}\n" if truth.title else ""
        return (
            f"TY  - JOUR\nID  - key{truth.number}\nAU  - Author, A.\n{text}PY  - {truth.year}/03//\n{words}ER  - \n\n"
        )

    dump(path, "Provider: a database\nContent: text\n\n" + "".join(map(record, truths)))


def table_rows(truths: list[Truth]) -> list[dict]:
    return [
        {
            "id": f"p{truth.number}",
            "Title": truth.title,
            "Abstract": truth.abstract,
            "Publication Year": truth.year,
            "Author Keywords": "; ".join(truth.keywords),
            "references": ";".join(f"p{number}" for number in cited(truth)),
        }
        for truth in truths
    ]


def comma(path: Path, truths: list[Truth], delimiter: str = ",") -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(table_rows(truths)[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table_rows(truths))


def tab(path: Path, truths: list[Truth]) -> None:
    comma(path, truths, "\t")


def parquet(path: Path, truths: list[Truth]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        row | {"references": row["references"].split(";") if row["references"] else []} for row in table_rows(truths)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def excel(path: Path, truths: list[Truth]) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    rows = table_rows(truths)
    for row in [list(rows[0]), *(list(row.values()) for row in rows)]:
        book.active.append(row)
    book.save(path)


def json_table(path: Path, truths: list[Truth]) -> None:
    lines(path, [row | {"Author Keywords": row["Author Keywords"].split("; ")} for row in table_rows(truths)])


KEY = "key{}".format
ROW = "p{}".format
WORLDS = (
    World("works.jsonl", openalex, "W{}".format, rb'^{"id": "https://openalex', "topics", True),
    World("pages.json", openalex_pages, "W{}".format, rb'^   "publication_year"', "topics", True),
    World("papers.json", semantic_scholar, "{:040x}".format, rb'^   "s2FieldsOfStudy"', "fields", True, extra=1),
    World("pubmed.xml", pubmed, "{}".format, rb"^<PubmedArticle>", "mesh", True),
    World("arxiv.json", arxiv, lambda number: f"{2000 + number}.00001", rb'^{"id": "2', "topics"),
    World("zotero.json", zotero, KEY, rb'^   "citationKey"', has_references=True, extra=2),
    World("crossref.json", crossref, "10.1234/x{}".format, rb'^    "issued"', "fields", True),
    World("csl.json", csl, KEY, rb'^  "issued"'),
    World("library.bib", bibtex, KEY, rb"^@(article|misc){key"),
    World("library.ris", ris, KEY, rb"^TY  - JOUR"),
    World("papers.csv", comma, ROW, rb"^p[0-9]+,T", has_references=True),
    World("papers.tsv", tab, ROW, rb"^p[0-9]+\tT", has_references=True),
    World("papers.parquet", parquet, ROW, b"", has_references=True),
    World("papers.xlsx", excel, ROW, b"", has_references=True),
    World("table.jsonl", json_table, ROW, rb'^{"id": "p', has_references=True),
)


def semantic_scholar_bulk(folder: Path, truths: list[Truth]) -> None:
    """The data sets papers, abstracts and citations, each in two compressed shards."""
    records: dict[str, list[dict]] = {"papers": [], "abstracts": [], "citations": []}
    for truth in truths:
        fields = [{"category": name, "source": "external"} for name in truth.topics]
        base = {"corpusid": truth.number, "externalids": {"DOI": None, "ACL": None}}
        records["papers"].append(base | {"title": truth.title, "year": truth.year, "s2fieldsofstudy": fields})
        if truth.abstract:
            records["abstracts"].append({"corpusid": truth.number, "openaccessinfo": {}, "abstract": truth.abstract})
        for number in cited(truth):
            records["citations"].append({"citationid": 1, "citingcorpusid": truth.number, "citedcorpusid": number})
    for name, content in records.items():
        (folder / name).mkdir(parents=True)
        for part in (0, 1):
            text = "".join(json.dumps(record) + "\n" for record in content[part::2])
            (folder / name / f"{name}-part{part}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
