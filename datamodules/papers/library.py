"""All papers of an import, in a temporary SQLite file, so that dumps larger than memory can be joined and counted."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from datamodules.papers.paper_record import Paper
from datamodules.papers.splits import Splits
from datamodules.records import UserError

# papers     one paper per row; number: position in the files
# names      id or other name of a paper, such as a DOI -> number of the paper
# citations  names of citing and cited papers, as in the files
# labelled   labels of each paper
# labels     name and definition of each label, as in the first paper that has it
# parts      abstracts from separate files
SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -200000;
CREATE TABLE papers (number INTEGER PRIMARY KEY, id TEXT UNIQUE, title TEXT, abstract TEXT, year INTEGER, split TEXT);
CREATE TABLE names (name TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE citations (citing TEXT, cited TEXT, PRIMARY KEY (citing, cited)) WITHOUT ROWID;
CREATE TABLE labels (kind TEXT, label TEXT, name TEXT, definition TEXT, PRIMARY KEY (kind, label)) WITHOUT ROWID;
CREATE TABLE labelled (number INTEGER, kind TEXT, label TEXT, PRIMARY KEY (number, kind, label)) WITHOUT ROWID;
CREATE TABLE parts (id TEXT PRIMARY KEY, abstract TEXT) WITHOUT ROWID;
"""


def with_counts(left_out: Mapping[str, int]) -> str:
    """List the reasons why records were left out, each with a count."""
    return "; ".join(f"{reason}: {count:,}" for reason, count in left_out.items())


class EmptyLibrary(UserError):
    """Raised if the files contain no papers."""


class Library:
    """The papers of all files, without duplicates and without papers that have no text.

        with library_in(Splits("80/10/10")) as library:
            library.read(papers)

    left_out: number of records left out of the library, by reason.
    num_records: number of records in the files, except bad ones.
    """

    def __init__(self, connection: sqlite3.Connection, splits: Splits):
        self.database, self.splits = connection, splits
        self.database.create_function("fold", 1, str.casefold, deterministic=True)
        self.database.executescript(SCHEMA)
        self.database.execute("BEGIN")  # with one transaction per paper, SQLite would write to disk for each paper
        self.left_out: Counter[str] = Counter()
        self.num_records = 0

    def read(self, papers: Iterable[Paper | None]) -> None:
        """Store all papers. Raises EmptyLibrary if no paper is left."""
        for paper in papers:
            self.num_records += 1
            if paper is None:
                self.left_out["not papers (notes, attachments, unknown ids)"] += 1
            elif paper.is_part:
                self._add_part(paper)
            else:
                self._add(paper)
        self._join_parts()
        self._drop_without_text()
        if not len(self):
            raise EmptyLibrary(f"contains no papers ({with_counts(self.left_out) or 'no records'})")

    def _add(self, paper: Paper) -> None:
        execute = self.database.execute
        new = execute(
            "INSERT OR IGNORE INTO papers (id, title, abstract, year, split) VALUES (?, ?, ?, ?, ?)",
            (paper.id, paper.title, paper.abstract, paper.year, self.splits.of(paper)),
        )
        if not new.rowcount:
            (title,) = execute("SELECT title FROM papers WHERE id = ?", (paper.id,)).fetchone()
            differs = "" if _plain(title) == _plain(paper.title) else ", but another title"
            self.left_out[f"papers with the id of an earlier one{differs}"] += 1
            return
        number, citing = new.lastrowid, paper.id
        if earlier := self._of_same_work(paper):
            self.left_out["papers with DOI and title of an earlier one (joined with it)"] += 1
            execute("DELETE FROM papers WHERE number = ?", (number,))
            number, citing = earlier
            execute("UPDATE papers SET abstract = ? WHERE number = ? AND abstract = ''", (paper.abstract, number))
            execute("UPDATE papers SET year = ? WHERE number = ? AND year IS NULL", (paper.year, number))
        for name in (paper.id, *paper.names):
            execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (name, number))
        self._add_citations(citing, paper)
        for kind, labels in paper.labels.items():
            for label in labels:
                execute("INSERT OR IGNORE INTO labels VALUES (?, ?, ?, ?)", (kind, *label))
                execute("INSERT OR IGNORE INTO labelled VALUES (?, ?, ?)", (number, kind, label.id))

    def _of_same_work(self, paper: Paper) -> tuple[int, str] | None:
        """Return the number and id of an earlier paper with the same DOI and title, if any.

        The title counts too, because all papers of a volume may have the volume's DOI.
        """
        select = "SELECT number, id, title FROM names JOIN papers USING (number) WHERE name = ?"
        for name in paper.names:
            earlier = self.database.execute(select, (name,)).fetchone() if name.startswith("doi:") else None
            if earlier and paper.title and _plain(earlier[2]) == _plain(paper.title):
                return earlier[:2]
        return None

    def _add_part(self, part: Paper) -> None:
        if part.abstract:
            self.database.execute("INSERT OR IGNORE INTO parts VALUES (?, ?)", (part.id, part.abstract))
        self._add_citations(part.id, part)

    def _add_citations(self, citing: str, paper: Paper) -> None:
        pairs = ((citing, cited) for cited in paper.references)
        self.database.executemany("INSERT OR IGNORE INTO citations VALUES (?, ?)", pairs)

    def _join_parts(self) -> None:
        self.database.execute(
            "UPDATE papers SET abstract = (SELECT parts.abstract FROM parts WHERE parts.id = papers.id) "
            "WHERE abstract = '' AND id IN (SELECT id FROM parts)"
        )
        if unused := self.count("parts WHERE id NOT IN (SELECT id FROM papers)"):
            self.left_out["abstracts of papers that are not in the files"] += unused

    def _drop_without_text(self) -> None:
        execute = self.database.execute
        if dropped := execute("DELETE FROM papers WHERE title = '' AND abstract = ''").rowcount:
            self.left_out["papers without title and abstract"] += dropped
            for table in ("names", "labelled"):
                execute(f"DELETE FROM {table} WHERE number NOT IN (SELECT number FROM papers)")

    def __len__(self) -> int:
        return self.count("papers")

    def count(self, rest: str) -> int:
        """Count the rows of a table. rest: name of the table and conditions, in SQL."""
        return self.database.execute(f"SELECT count(*) FROM {rest}").fetchone()[0]

    def write(self, path: Path) -> None:
        """Write the papers as JSON lines, with their years, labels and references."""
        select = self.database.execute
        labels_of = (
            "SELECT kind, name FROM labelled JOIN labels USING (kind, label) WHERE number = ? ORDER BY kind, label"
        )
        with open(path, "w", encoding="utf-8") as file:
            for number, id, title, abstract, year, split in select("SELECT * FROM papers ORDER BY number"):
                labels: dict[str, list[str]] = {}
                for kind, name in select(labels_of, (number,)):
                    labels.setdefault(kind, []).append(name)
                references = [cited for (cited,) in select("SELECT cited FROM citations WHERE citing = ?", (id,))]
                record = {"id": id, "title": title, "abstract": abstract, "year": year, "split": split} | labels
                file.write(json.dumps(record | {"references": references}, ensure_ascii=False) + "\n")


def _plain(title: str) -> str:
    """Return a title without case, spaces and punctuation, which differ between databases."""
    return "".join(filter(str.isalnum, title.casefold()))


@contextmanager
def library_in(splits: Splits, folder: Path | None = None) -> Iterator[Library]:
    """Open an empty library in a temporary folder, which is deleted at the end.

    splits: rule that gives each paper a split. folder: parent of the temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix=".papers-", dir=folder) as temporary:
        connection = sqlite3.connect(Path(temporary) / "papers.sqlite", isolation_level=None)
        try:
            yield Library(connection, splits)
        except sqlite3.OperationalError as error:  # most likely, the disk is full
            raise UserError(f"{temporary}: the temporary database cannot be used ({error})") from error
        finally:
            connection.close()
