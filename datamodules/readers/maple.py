"""MAPLE: papers of one field with labels, authors, venue and references.

Source: Zhang et al., The Effect of Metadata on Scientific Literature Tagging, WWW 2023 (yuzhimanhua/MAPLE, data on
Zenodo). How SciMult trains on it: Zhang et al., Pre-training Multi-task Contrastive Learning Models for Scientific
Literature Understanding, Findings of EMNLP 2023, section 3.4 (hard negatives) and appendix A (100 pairs a label).
"""

from __future__ import annotations

import heapq
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.json_values import as_object, records
from datamodules.readers.labels import read_labels
from datamodules.readers.lines import find_file
from datamodules.readers.neighbours import SOURCES, Neighbours, Paper
from datamodules.records import Collection, Document, UserError

log = logging.getLogger(__name__)


class MapleReader:
    """One folder of MAPLE, such as MAPLE/Computer_Science, or several as one set.

    folder/papers.json   {"paper", "venue", "year", "title", "abstract", "label": [id], "author": [id],
                         "reference": [id]} a line; title_raw and abstract_raw are taken where they are given
    folder/labels.txt    id <tab> name, or labels_mesh.txt; or the file of the folder, or with its whole path, that
                         `labels` names: see read_labels

    view: "labels" (queries are papers, the corpus is the label space), "citations" (queries and corpus are papers, the
    relevant ones are the references within the corpus) or "fields" (queries are papers, the corpus is the names of the
    folders, which are fields).
    further: folders whose papers belong to the same set, with the labels of the first. A paper that several folders
    have is one paper, with the text of the first, and with the labels of all.
    max_per_label: positive pairs of a label, or papers of a field, in the train split at most, drawn by the seed; 0 for
    all. In "fields" no other papers are kept in memory, so they are drawn by a hash of their id, from each split.
    negatives: from where hard negatives come: papers that the paper cites, that share an author, or the venue. In
    "labels" and "fields" such a paper's label that is none of the paper's own; in "citations" what a cited paper cites,
    or the paper of the same author or venue, if the paper does not cite it. For each training paper up to
    num_negatives.
    Splits: by a hash of the paper's id, dev_percent and test_percent of the papers. With train_until, papers of later
    years are the test split (MAPLE's own split is 2015), and dev_percent of the others dev.

    Labels that the label file does not have are dropped, with the papers that have no other, and counted in a warning.
    Files may end in .gz or .zst. on_error, quarantine: see BadLines.
    """

    VIEWS = ("labels", "citations", "fields")

    def __init__(
        self,
        folder: str,
        view: str = "labels",
        labels: str | None = None,
        label_key: str = "label",
        further: list[str] | None = None,
        max_per_label: int = 100,
        negatives: list[str] | None = None,
        num_negatives: int = 5,
        train_until: int | None = None,
        dev_percent: int = 5,
        test_percent: int = 5,
        seed: int = 0,
        on_error: str = "fail",
        quarantine: str | None = None,
    ):
        fields.allowed("view", [view], self.VIEWS)
        BadLines(on_error)
        if min(dev_percent, test_percent) < 0 or dev_percent + test_percent >= 100:
            raise UserError(
                f"dev_percent, test_percent: got {dev_percent}, {test_percent}; both from 0, below 100 in sum"
            )
        if min(max_per_label, num_negatives) < 0:
            raise UserError(f"max_per_label, num_negatives: got {max_per_label}, {num_negatives}, allowed from 0 on")
        self.folder, self.view, self.labels, self.label_key = Path(folder), view, labels, label_key
        self.folders = [self.folder, *map(Path, further or ())]
        self.max_per_label, self.num_negatives, self.seed = max_per_label, num_negatives, seed
        self.negatives = fields.allowed("negatives", negatives or [], SOURCES)
        self.train_until, self.dev_percent, self.test_percent = train_until, dev_percent, test_percent
        self.on_error, self.quarantine = on_error, quarantine

    def sources(self) -> list[Path]:
        """The files that it reads."""
        labels = [self._labels_file()] if self.view == "labels" else []
        return [*map(self._papers_file, self.folders), *labels]

    def _papers_file(self, folder: Path) -> Path:
        return find_file(folder, "papers.json", "papers.jsonl")

    def _labels_file(self) -> Path:
        return find_file(self.folder, *([str(Path(self.labels))] if self.labels else ("labels.txt", "labels_mesh.txt")))

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        with BadLines(self.on_error, self.quarantine) as bad:
            papers = self._papers(bad)
            corpus, relevant = self._judged(papers, bad)
        splits: dict[str, dict[str, list[str]]] = {split: {} for split in self._splits()}
        for id, its in relevant.items():
            if its:
                splits[self._split(papers[id])][id] = its
        train, of_labels = splits["train"], self.view != "citations"
        near = Neighbours(papers, train, of_labels, self.negatives, self.seed)
        judged = {
            id: dict.fromkeys(near.negatives(id, relevant[id], self.num_negatives), 0) | dict.fromkeys(its, 1)
            for id, its in (self._capped(train) if of_labels else train).items()
        }
        others = {s: {id: dict.fromkeys(its, 1) for id, its in q.items()} for s, q in splits.items() if s != "train"}
        qrels = {"train": judged} | others
        queries = {id: papers[id].document for split in qrels.values() for id in split}
        return fields.checked(Collection(corpus, queries, qrels), self.folder)

    def _judged(self, papers: dict[str, Paper], bad: BadLines) -> tuple[dict[str, Document], dict[str, list[str]]]:
        """The corpus, and for each paper what is relevant to it."""
        if self.view == "citations":
            relevant = {id: [r for r in p.references if r in papers and r != id] for id, p in papers.items()}
            within, total = sum(map(len, relevant.values())), sum(len(p.references) for p in papers.values())
            log.info("%s: %d of %d references are papers of the folder", self.folder, within, total)
            return {id: paper.document for id, paper in papers.items()}, relevant
        if self.view == "fields":
            names = {folder.name: folder.name.replace("_", " ") for folder in self.folders}
            return {id: Document(id, name) for id, name in names.items()}, {id: p.labels for id, p in papers.items()}
        path = self._labels_file()
        corpus = read_labels(path, bad)
        return corpus, self._known(papers, corpus, path)

    def _papers(self, bad: BadLines) -> dict[str, Paper]:
        papers: dict[str, Paper] = {}
        for folder in self.folders:
            found: dict[str, Paper] = {}
            lowest: dict[str, list[tuple[int, str]]] = defaultdict(list)  # of "fields": a heap for each split
            for place in records(self._papers_file(folder), bad):
                with place:
                    paper = self._paper(as_object(place, " with paper, title, abstract and label"), folder)
                    if paper.document.id in found:
                        raise UserError(f"the id {paper.document.id!r} stands on an earlier line too")
                    found[paper.document.id] = paper
                    if self.view == "fields" and self.max_per_label:
                        self._drop_highest(found, lowest[self._split(paper)], paper.document.id)
            for id, paper in found.items():
                before = papers.setdefault(id, paper)
                before.labels = list(dict.fromkeys((*before.labels, *paper.labels)))
        return papers

    def _paper(self, record: Mapping[str, Any], folder: Path) -> Paper:
        title, body = (f"{key}_raw" if record.get(f"{key}_raw") else key for key in ("title", "abstract"))
        document = fields.document(record, ("paper",), title, body)
        labels = fields.identifiers(record, self.label_key, required=self.view == "labels")
        authors = fields.identifiers(record, "author")
        references = fields.identifiers(record, "reference", required=self.view == "citations")
        return Paper(
            document,
            None if self.train_until is None else fields.grade(record.get("year"), "year"),
            "" if record.get("venue") in (None, "") else fields.identifier(record, "venue"),
            [sys.intern(author) for author in authors],  # one string in memory for all that name it
            [sys.intern(reference) for reference in references],
            [folder.name] if self.view == "fields" else [sys.intern(label) for label in labels],
        )

    def _drop_highest(self, papers: dict[str, Paper], heap: list[tuple[int, str]], id: str) -> None:
        """Of more than max_per_label papers in the heap, drop the one of the highest hash."""
        heapq.heappush(heap, (-fields.hashed(f"{self.seed}/{id}"), id))
        if len(heap) > self.max_per_label:
            del papers[heapq.heappop(heap)[1]]

    def _known(self, papers: Mapping[str, Paper], corpus: Mapping[str, Document], path: Path) -> dict[str, list[str]]:
        relevant, num_labels, num_papers = {}, 0, 0
        for id, paper in papers.items():
            known = [label for label in paper.labels if label in corpus]
            num_labels += len(paper.labels) - len(known)
            num_papers += bool(paper.labels) and not known
            relevant[id] = paper.labels = known
        if num_labels:
            log.warning("%s: lacks %d labels of papers; %d papers have no other", path, num_labels, num_papers)
        return relevant

    def _splits(self) -> list[str]:
        has_test = self.train_until is not None or self.test_percent
        return ["train", *(["dev"] if self.dev_percent else []), *(["test"] if has_test else [])]

    def _split(self, paper: Paper) -> str:
        return fields.split_of(paper.document.id, self.dev_percent, self.test_percent, paper.year, self.train_until)

    def _capped(self, train: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """At most max_per_label papers for each label, and no paper without a label."""
        by_label = defaultdict(list)
        for id, its in train.items():
            for label in its:
                by_label[label].append(id)
        kept: dict[str, list[str]] = {id: [] for id in train}
        for label, ids in by_label.items():
            if 0 < self.max_per_label < len(ids):
                ids = random.Random(f"{self.seed}/{label}").sample(ids, self.max_per_label)
            for id in ids:
                kept[id].append(label)
        return {id: its for id, its in kept.items() if its}
