"""Make collections from a library, one for each kind of task: labels, citations and searches of its papers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datamodules.options import check_options, option
from datamodules.papers.columns import check_split, csv_rows
from datamodules.papers.formats import json_rows
from datamodules.papers.library import Library, with_counts
from datamodules.papers.paper_record import LABEL_KINDS, Paper, clean, split_list
from datamodules.readers.checks import SPLITS
from datamodules.readers.io import suffix_of
from datamodules.readers.json_files import as_object
from datamodules.readers.jsonl import judgements
from datamodules.readers.labels import read_labels
from datamodules.readers.rows import BadLines, Record
from datamodules.records import Document, Sink, UserError

SEARCHES = ("title", "keywords")


class EmptyView(UserError):
    """Raised if the papers give no query for training."""


@dataclass(frozen=True)
class ViewOptions:
    """Options of the collections.

    A file of queries has JSON lines {"query": text, "positives": [id, ...] or {id: grade}, "negatives": [id, ...],
    "split": ...}, or is a CSV or TSV file with the columns query, positives (ids separated by ;) and split. Negatives
    and split are optional.
    """

    labels: tuple[str, ...] = option(
        (), "kinds of labels; by default, the first kind with two labels that are frequent enough", choices=LABEL_KINDS
    )
    min_papers: int = option(5, "minimum number of papers per label", minimum=1)
    definitions: str = option("", "file with the definitions of labels, by id or name (see readers.labels.read_labels)")
    search: str = option(
        "title", "title: titles find their abstracts. keywords: keywords find their paper. Otherwise, a file of queries"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.search not in SEARCHES and not os.path.isfile(self.search):
            raise UserError(f"search: expected {', '.join(SEARCHES)}, or a file of queries, got {self.search!r}")
        if self.definitions and not os.path.isfile(self.definitions):
            raise UserError(f"definitions: {self.definitions} is not a file")


class View(ABC):
    """A collection made from a library: documents, and queries with their relevant documents.

    num_documents: size of the corpus.
    kind: kind of documents, such as "labels".
    queries, pairs: number of queries, and of pairs with a grade above 0, in each split.
    left_out: number of papers, labels or queries left out, by reason.

    Raises EmptyView if there is no query for training.
    """

    kind = "paper"
    documents_sql = "SELECT id, title, abstract FROM papers ORDER BY number"
    queries_sql = "SELECT id, title, abstract FROM papers WHERE number IN (SELECT query FROM {judged}) ORDER BY number"
    nothing = "no query for training"

    def __init__(self, library: Library, options: ViewOptions, bad: BadLines):
        self.library, self.options, self.bad = library, options, bad
        self.database = library.database
        self.judged = f"judged_{type(self).__name__.lower()}"
        self.left_out: Counter[str] = Counter()
        # query: number of a paper, or of a row in `queries`. document: id.
        self.database.execute(
            f"CREATE TABLE {self.judged} (query INTEGER, id TEXT, split TEXT, document TEXT, grade INTEGER, "
            "PRIMARY KEY (query, document)) WITHOUT ROWID"
        )
        self.judge()
        self.left_out = +self.left_out
        self.num_documents = self.library.count(f"({self.documents_sql})")
        self.queries = self._by_split("count(DISTINCT query)")
        self.pairs = self._by_split("sum(grade > 0)")
        if not self.queries.get("train"):
            raise EmptyView("; ".join(filter(None, (self.nothing, with_counts(self.left_out)))))

    @abstractmethod
    def judge(self) -> None:
        """Fill the table of judgements."""

    def _by_split(self, counted: str) -> dict[str, int]:
        counts = dict(self.database.execute(f"SELECT split, {counted} FROM {self.judged} GROUP BY split"))
        return {split: counts[split] for split in SPLITS if split in counts}

    def stream(self, sink: Sink) -> None:
        """Write the documents, queries and judgements to a sink."""
        for row in self.database.execute(self.documents_sql):
            sink.add_document(Document(*row))
        for row in self.database.execute(self.queries_sql.format(judged=self.judged)):
            sink.add_query(Document(*row))
        for row in self.database.execute(f"SELECT split, id, document, grade FROM {self.judged} ORDER BY query"):
            sink.add_judgement(*row)


class Labels(View):
    """Queries are papers, and the corpus has their labels."""

    kind = "label"
    nothing = "no label for training"
    documents_sql = "SELECT label, name, definition FROM kept ORDER BY label"

    def judge(self) -> None:
        execute, minimum, count = self.database.execute, self.options.min_papers, self.library.count
        kinds = self.options.labels or self._first_frequent_kind()
        chosen = f"kind IN ({', '.join(map(repr, kinds))})"
        execute(f"CREATE TABLE chosen AS SELECT DISTINCT number, label FROM labelled WHERE {chosen}")
        execute("CREATE TABLE kept (label TEXT PRIMARY KEY, name TEXT, definition TEXT) WITHOUT ROWID")
        execute(
            f"INSERT INTO kept SELECT label, min(name), max(definition) FROM labels WHERE {chosen} "
            "AND label IN (SELECT label FROM chosen GROUP BY label HAVING count(*) >= ?) GROUP BY label",
            [minimum],
        )
        self.left_out[f"labels of fewer than {minimum} papers"] = count(
            "(SELECT DISTINCT label FROM chosen WHERE label NOT IN (SELECT label FROM kept))"
        )
        if count("kept") < 2:
            numbers = execute("SELECT count(DISTINCT label), kind FROM labelled GROUP BY kind").fetchall()
            shown = ", ".join(f"{number:,} {kind}" for number, kind in numbers) or "none"
            raise EmptyView(f"fewer than two labels have at least {minimum} papers (labels in the files: {shown})")
        if self.options.definitions:
            self._define()
        execute(
            f"INSERT INTO {self.judged} SELECT number, id, split, label, 1 "
            "FROM chosen JOIN kept USING (label) JOIN papers USING (number) WHERE split <> ''"
        )
        labelled = "(SELECT number FROM chosen JOIN kept USING (label))"
        self.left_out["papers without any of the labels"] = count(f"papers WHERE number NOT IN {labelled}")
        without_split = count(f"papers WHERE split = '' AND number IN {labelled}")
        self.left_out[f"labelled papers without a {self.library.splits.needs}"] = without_split

    def _first_frequent_kind(self) -> tuple[str, ...]:
        frequent = "SELECT kind, label FROM labelled GROUP BY kind, label HAVING count(*) >= ?"
        counts = dict(
            self.database.execute(f"SELECT kind, count(*) FROM ({frequent}) GROUP BY kind", [self.options.min_papers])
        )
        return next(((kind,) for kind in LABEL_KINDS if counts.get(kind, 0) >= 2), LABEL_KINDS[:1])

    def _define(self) -> None:
        """Read definitions from a file, for labels with the same id or name."""
        by_key: dict[str, str] = {}
        for label in read_labels(Path(self.options.definitions), self.bad).values():
            by_key.setdefault(label.title.casefold(), label.text)
            by_key[label.id.casefold()] = label.text
        missing = 0
        for id, name in self.database.execute("SELECT label, name FROM kept").fetchall():
            definition = by_key.get(id.casefold()) or by_key.get(name.casefold())
            missing += not definition
            if definition:
                self.database.execute("UPDATE kept SET definition = ? WHERE label = ?", (definition, id))
        self.left_out["labels without a definition (kept)"] = missing


class Citations(View):
    """Queries and documents are papers. The papers that a paper cites are relevant to it."""

    nothing = "no reference from one paper of the files to another"

    def judge(self) -> None:
        resolved = (
            "citations JOIN names AS a ON a.name = citing JOIN names AS b ON b.name = cited "
            "JOIN papers AS p ON p.number = a.number JOIN papers AS q ON q.number = b.number"
        )
        self.database.execute(
            f"INSERT OR IGNORE INTO {self.judged} SELECT p.number, p.id, p.split, q.id, 1 FROM {resolved} "
            "WHERE p.number <> q.number AND p.split <> ''"
        )
        count = self.library.count
        references, within = count("citations JOIN names ON name = citing"), count(resolved)
        self.left_out["references to papers that are not in the files"] = references - within
        self.left_out["references of a paper to itself"] = itself = count(f"{resolved} WHERE p.number = q.number")
        without = count(f"{resolved} WHERE p.number <> q.number AND p.split = ''")
        self.left_out[f"references of papers without a {self.library.splits.needs}"] = without
        self.left_out["repeated references"] = within - itself - without - count(self.judged)
        self.left_out["citations of papers that are not in the files"] = count("citations") - references


class Searches(View):
    """Search papers by title, by keywords, or by queries from a file. For titles, the corpus only has the abstracts."""

    queries_sql = "SELECT id, '', text FROM queries WHERE number IN (SELECT query FROM {judged}) ORDER BY number"

    def __init__(self, library: Library, options: ViewOptions, bad: BadLines):
        if options.search == "title":
            self.kind = "abstract"
            self.documents_sql = "SELECT id, '', abstract FROM papers WHERE abstract <> '' ORDER BY number"
        super().__init__(library, options, bad)

    def judge(self) -> None:
        columns = "number INTEGER PRIMARY KEY, id TEXT, text TEXT, split TEXT, UNIQUE (text, split)"
        self.database.execute(f"CREATE TABLE queries ({columns})")
        if self.options.search in SEARCHES:
            self._from_papers(self.options.search)
        else:
            self._from_file(Path(self.options.search))

    def _from_papers(self, name: str) -> None:
        """Make a query from each paper. Papers with the same title or keywords share a query and its split."""
        execute, count = self.database.execute, self.library.count
        if name == "title":
            texts = "SELECT number, title AS text FROM papers WHERE title <> '' AND abstract <> ''"
        else:
            texts = (
                "SELECT number, group_concat(name, ', ') AS text FROM (SELECT number, labels.name AS name "
                "FROM labelled JOIN labels USING (kind, label) WHERE kind = 'keywords' ORDER BY number, label) "
                "GROUP BY number"
            )
        execute(
            f"CREATE TABLE texts AS SELECT number, text, first_value(number) OVER "
            f"(PARTITION BY fold(text) ORDER BY number) AS first FROM ({texts})"
        )
        execute(
            f"INSERT INTO queries SELECT number, id || '#{name}', text, split FROM texts JOIN papers USING (number) "
            "WHERE number = first"
        )
        execute(
            f"INSERT INTO {self.judged} SELECT q.number, q.id, q.split, p.id, 1 FROM texts JOIN queries AS q "
            "ON q.number = texts.first JOIN papers AS p ON p.number = texts.number WHERE q.split <> ''"
        )
        lacking = "title or abstract" if name == "title" else "keywords"
        self.left_out[f"papers without {lacking}, as queries"] = len(self.library) - count("texts")
        shared = count("texts") - count("queries")
        self.left_out[f"papers with the {name} of an earlier one (they share its query)"] = shared
        self.left_out[f"queries of papers without a {self.library.splits.needs}"] = count("queries WHERE split = ''")

    def _from_file(self, path: Path) -> None:
        rows = csv_rows if suffix_of(path) in (".csv", ".tsv") else json_rows
        for number, row in enumerate(rows(path, self.bad), start=1):
            with row:
                self._add_query(number, as_object(row, " with query and positives"))

    def _add_query(self, number: int, record: Record) -> None:
        text = clean(record.words("query"), "query")
        grades = self._grades_of_papers(record)
        positives = [paper for paper, grade in grades.items() if grade > 0]
        if not positives:
            self.left_out["queries without a positive in the files"] += 1
            return
        newest = max((paper.year for paper in positives if paper.year), default=None)
        split = check_split(record["split"]) if record.get("split") not in (None, "") else ""
        split = split or self.library.splits.of(Paper(f"query {text}", year=newest))
        if not split:
            self.left_out[f"queries without a {self.library.splits.needs}"] += 1
            return
        execute = self.database.execute
        execute("INSERT OR IGNORE INTO queries VALUES (?, ?, ?, ?)", (number, f"query.{number}", text, split))
        number, id = execute("SELECT number, id FROM queries WHERE text = ? AND split = ?", (text, split)).fetchone()
        rows = ((number, id, split, paper.id, grade) for paper, grade in grades.items())
        highest = "ON CONFLICT DO UPDATE SET grade = max(grade, excluded.grade)"  # a line may repeat a query
        self.database.executemany(f"INSERT INTO {self.judged} VALUES (?, ?, ?, ?, ?) {highest}", rows)

    def _grades_of_papers(self, record: Record) -> dict[_JudgedPaper, int]:
        """Return the grade of each judged paper in the library. Other judged papers are counted as left out."""
        if isinstance(record.get("positives"), dict):
            positives = record.grades("positives")
        else:
            positives = dict.fromkeys(_ids(record, "positives"), 1)
        select = "SELECT id, year FROM names JOIN papers USING (number) WHERE name = ?"
        grades: dict[_JudgedPaper, int] = {}
        missing = 0
        for name, grade in judgements(positives, _ids(record, "negatives")).items():
            row = self.database.execute(select, [name]).fetchone()
            missing += row is None
            if row and grades.setdefault(_JudgedPaper(*row), grade) != grade:
                raise UserError(f"the paper {row[0]!r} has two grades, under two different names")
        self.left_out["ids of papers that are not in the files"] += missing
        return grades


class _JudgedPaper(NamedTuple):
    id: str
    year: int | None


def _ids(record: Record, key: str) -> list[str]:
    """Return a list of ids, given as a list or as text with ; between them."""
    value = record.get(key)
    return split_list(value, ";|, ") if isinstance(value, str) else record.ids(key)


VIEWS: Mapping[str, type[View]] = {"labels": Labels, "citations": Citations, "searches": Searches}
# The view that serves each kind of task.
VIEW_OF_KIND = {"classification": "labels", "link_prediction": "citations", "search": "searches"}
