"""SciDocs: classification by MAG and MeSH, and ranking of cited, co-cited, co-viewed and co-read papers.

Source: Cohan et al., SPECTER: Document-level Representation Learning using Citation-informed Transformers, ACL 2020
(allenai/scidocs).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import REQUIRED, option
from datamodules.readers.checks import check_grade
from datamodules.readers.collecting import FolderReader, Judgements, add_documents, check_collection
from datamodules.readers.io import find_path, find_split_files, read_lines
from datamodules.readers.json_files import read_entries
from datamodules.readers.labels import read_labels
from datamodules.readers.rows import BadLines
from datamodules.records import Collection, Document, Qrels, UserError, explained, short

CLASSIFICATION = ("mag", "mesh")
LINKS = ("cite", "cocite", "coview", "coread")
FILES = {"train": "train", "val": "dev", "test": "test"}


@dataclass
class SciDocsReader(FolderReader):
    """Reader of the data folder of SciDocs.

    folder/paper_metadata_mag_mesh.json         {paper id: {"paper_id", "title", "abstract"}}, one object
    folder/paper_metadata_view_cite_read.json   the same
    folder/mag/train.csv, val.csv, test.csv     a header, then paper id and label; mesh likewise
    folder/cite/val.qrel, test.qrel             "query 0 document grade" per line; cocite, coview, coread likewise

    Every file may be compressed as .gz or .zst.
    """

    task: str = option(
        REQUIRED,
        "task. In mag and mesh, queries are papers and the corpus is the label space. In the others, queries and "
        "corpus are papers, each query has its own candidates with grades (0: not relevant), and no train split exists",
        choices=(*CLASSIFICATION, *LINKS),
    )
    labels: str | None = option(None, "file with names for the labels (see read_labels), if the labels are numbers")
    unnamed: bool = option(
        False, "whether to accept numbers as labels, for a classifier that does not read their names"
    )

    def sources(self) -> list[Path]:
        return [self._papers_file(), *self._labels_file(), *self._split_files().values()]

    def _papers_file(self) -> Path:
        kind = "mag_mesh" if self.task in CLASSIFICATION else "view_cite_read"
        return self.find(f"paper_metadata_{kind}.json")

    def _labels_file(self) -> list[Path]:
        return [find_path(Path(self.labels))] if self.task in CLASSIFICATION and self.labels else []

    def _split_files(self) -> dict[str, Path]:
        suffix = "csv" if self.task in CLASSIFICATION else "qrel"
        return find_split_files(self.root, f"{self.task}/SPLIT.{suffix}", names=FILES)

    def collect(self, bad: BadLines) -> Collection:
        is_classification = self.task in CLASSIFICATION
        papers = read_papers(self._papers_file(), bad)
        corpus = {} if is_classification else papers
        for path in self._labels_file():
            corpus = read_labels(path, bad)
        read = self._read_labelled_papers if is_classification else self._read_links
        qrels = {split: read(path, papers, corpus, bad) for split, path in self._split_files().items()}
        queries = {id: papers[id] for judged in qrels.values() for id in judged}
        return check_collection(Collection(corpus, queries, qrels), self.root / self.task)

    def _read_labelled_papers(
        self, path: Path, papers: Mapping[str, Document], corpus: dict[str, Document], bad: BadLines
    ) -> Qrels:
        """Return the judgements of a CSV file. Without a file of names, this adds the labels to the corpus."""
        judgements = Judgements(path, papers, corpus, bad, self._papers_file().name)
        for index, row in enumerate(read_lines(path, bad)):
            with row:
                paper, label = _split_columns(row.text)
                if index == 0 and paper not in papers and not any(map(str.isdigit, paper)):
                    continue  # the header: pid,class_label
                if not self.labels:
                    if label.isdigit() and not self.unnamed:
                        raise UserError(f"label {label!r} is a number, not a name; set `labels` to a file of names")
                    corpus.setdefault(label, Document(label, label))
                judgements.add(paper, label, 1)
        return judgements.finish()

    def _read_links(
        self, path: Path, papers: Mapping[str, Document], corpus: Mapping[str, Document], bad: BadLines
    ) -> Qrels:
        judgements = Judgements(path, papers, corpus, bad, self._papers_file().name)
        for row in read_lines(path, bad):
            with row:
                columns = row.text.split()
                if len(columns) != 4:
                    raise UserError(
                        f"expected query, 0, document and grade, separated by spaces, got {short(row.text)}"
                    )
                judgements.add(columns[0], columns[2], check_grade(columns[3], "grade"))
        return judgements.finish()


def read_papers(path: Path, bad: BadLines) -> dict[str, Document]:
    """Return the papers of a paper_metadata_*.json file."""
    papers: dict[str, Document] = {}
    add_documents(papers, read_entries(path, bad, "object"), "paper_id", may_be_blank=True)
    return papers


def _split_columns(line: str) -> tuple[str, str]:
    with explained("invalid CSV", csv.Error):
        columns = next(csv.reader([line]))
    if len(columns) != 2 or not all(column.strip() for column in columns):
        raise UserError(f"expected a paper's id and its label, separated by a comma, got {short(line)}")
    return columns[0].strip(), columns[1].strip()
