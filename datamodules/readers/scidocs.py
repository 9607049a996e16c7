"""SciDocs: classification by MAG and MeSH, and the ranking of cited, co-cited, co-viewed and co-read papers.

Source: Cohan et al., SPECTER: Document-level Representation Learning using Citation-informed Transformers, ACL 2020
(allenai/scidocs).
"""

from __future__ import annotations

import csv
from pathlib import Path

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.json_values import as_object, entries
from datamodules.readers.labels import read_labels
from datamodules.readers.lines import find_file, lines
from datamodules.records import Collection, Document, Qrels, UserError

CLASSIFICATION = ("mag", "mesh")
LINKS = ("cite", "cocite", "coview", "coread")
FILES = {"train": "train", "dev": "val", "test": "test"}


class SciDocsReader:
    """The data folder of SciDocs.

    folder/paper_metadata_mag_mesh.json         {paper id: {"paper_id", "title", "abstract"}}, one object
    folder/paper_metadata_view_cite_read.json   the same
    folder/mag/train.csv, val.csv, test.csv     a header, then paper id and label; mesh the same
    folder/cite/val.qrel, test.qrel             "query 0 document grade" a line; cocite, coview, coread the same

    task: "mag", "mesh" (queries are papers, the corpus is the label space), "cite", "cocite", "coview" or "coread"
    (queries and corpus are papers; each query's own candidates have grades, 0 if not relevant; there is no train
    split). labels: the file with the labels' names (see read_labels); it is needed where the labels are numbers, unless
    unnamed: then numbers stand for themselves, for a classifier that does not read them.

    Every file may end in .gz or .zst. on_error, quarantine: see BadLines.
    """

    TASKS = (*CLASSIFICATION, *LINKS)

    def __init__(
        self,
        folder: str,
        task: str,
        labels: str | None = None,
        unnamed: bool = False,
        on_error: str = "fail",
        quarantine: str | None = None,
    ):
        fields.allowed("task", [task], self.TASKS)
        BadLines(on_error)
        self.folder, self.task, self.labels, self.unnamed = Path(folder), task, labels, unnamed
        self.on_error, self.quarantine = on_error, quarantine

    def sources(self) -> list[Path]:
        """The files that it reads."""
        return [self._papers_file(), *self._labels_file(), *self._splits().values()]

    def _papers_file(self) -> Path:
        kind = "mag_mesh" if self.task in CLASSIFICATION else "view_cite_read"
        return find_file(self.folder, f"paper_metadata_{kind}.json")

    def _labels_file(self) -> list[Path]:
        path = Path(self.labels or "")
        return [find_file(path.parent, path.name)] if self.task in CLASSIFICATION and self.labels else []

    def _splits(self) -> dict[str, Path]:
        ending = "csv" if self.task in CLASSIFICATION else "qrel"
        names = {split: f"{self.task}/{stem}.{ending}" for split, stem in FILES.items()}
        found = {split: find_file(self.folder, name, required=False) for split, name in names.items()}
        return {split: path for split, path in found.items() if path}

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        classifies = self.task in CLASSIFICATION
        with BadLines(self.on_error, self.quarantine) as bad:
            papers = read_papers(self._papers_file(), bad)
            corpus = {} if classifies else papers
            for path in self._labels_file():
                corpus = read_labels(path, bad)
            read, name = self._labels if classifies else self._links, self._papers_file().name
            qrels = {split: read(path, papers, corpus, name, bad) for split, path in self._splits().items()}
        queries = {id: papers[id] for judged in qrels.values() for id in judged}
        return fields.checked(Collection(corpus, queries, qrels), self.folder / self.task)

    def _labels(self, path: Path, papers, corpus: dict[str, Document], name: str, bad: BadLines) -> Qrels:
        found = fields.Judgements(papers, corpus, bad, name, self.labels or str(path))
        for order, place in enumerate(lines(path, bad)):
            with place:
                paper, label = _columns(place.text)
                if order == 0 and paper not in papers and not any(map(str.isdigit, paper)):
                    continue  # the header: pid,class_label
                if not self.labels:
                    if label.isdigit() and not self.unnamed:
                        raise UserError(f"label {label!r} is no name; give the file of names as the argument labels")
                    corpus.setdefault(label, Document(label, label))
                found.add(paper, label, 1)
        return found.finished(path)

    def _links(self, path: Path, papers, corpus: dict[str, Document], name: str, bad: BadLines) -> Qrels:
        found = fields.Judgements(papers, corpus, bad, name, name)
        for place in lines(path, bad):
            with place:
                columns = place.text.split()
                if len(columns) != 4:
                    raise UserError(f"expected query, 0, document and grade between spaces, got {place.text[:60]!r}")
                found.add(columns[0], columns[2], fields.grade(columns[3], "grade"))
        return found.finished(path)


def read_papers(path: Path, bad: BadLines) -> dict[str, Document]:
    """The papers of a file paper_metadata_*.json."""
    papers: dict[str, Document] = {}
    for place in entries(path, bad, "object"):
        with place:
            fields.add_new(papers, fields.document(as_object(place), ("paper_id",)))
    return papers


def _columns(line: str) -> tuple[str, str]:
    try:
        columns = next(csv.reader([line]))
    except csv.Error as error:
        raise UserError(f"is no CSV ({error})") from error
    if len(columns) != 2 or not all(column.strip() for column in columns):
        raise UserError(f"expected a paper's id and its label between a comma, got {line[:60]!r}")
    return columns[0].strip(), columns[1].strip()
