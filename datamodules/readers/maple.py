"""MAPLE: papers of one field with labels, authors, venue and references.

Sources: Zhang et al., The Effect of Metadata on Scientific Literature Tagging, WWW 2023 (yuzhimanhua/MAPLE, data on
Zenodo). For training as in SciMult: Zhang et al., Pre-training Multi-task Contrastive Learning Models for Scientific
Literature Understanding, Findings of EMNLP 2023, section 3.4 (hard negatives) and appendix A (100 pairs per label).
"""

from __future__ import annotations

import heapq
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import option
from datamodules.readers.checks import check_percentages, split_of, stable_hash
from datamodules.readers.collecting import FolderReader, add_id, check_collection
from datamodules.readers.io import find_file
from datamodules.readers.json_files import as_object, read_records
from datamodules.readers.labels import read_labels
from datamodules.readers.rows import BadLines, Record
from datamodules.records import Collection, Document

log = logging.getLogger(__name__)

NEGATIVES = ("cited", "author", "venue")
ATTEMPTS = 8  # maximum number of draws per hard negative


@dataclass(slots=True)
class _Paper:
    """A paper, with the fields that give labels, links and hard negatives."""

    document: Document
    year: int | None
    venue: str
    authors: list[str]
    references: list[str]
    labels: list[str]


@dataclass
class MapleReader(FolderReader):
    """Reader of one folder of MAPLE, such as MAPLE/Computer_Science, or of several folders as one collection.

    folder/papers.json   {"paper", "venue", "year", "title", "abstract", "label": [id], "author": [id],
                         "reference": [id]} per line; title_raw and abstract_raw are preferred if present
    folder/labels.txt    id <tab> name per line (or labels_mesh.txt)

    Files may be compressed as .gz or .zst. Labels that are not in the label file are dropped, and so are papers that
    have no other label. A warning counts both.
    """

    view: str = option(
        "labels",
        "labels: queries are papers, the corpus is the label space. citations: queries and corpus are papers, and the "
        "references within the corpus are relevant. fields: queries are papers, and the corpus has the names of the "
        "folders",
        choices=("labels", "citations", "fields"),
    )
    labels: str | None = option(None, "label file to use instead, in the folder or as a full path (see read_labels)")
    label_key: str = option("label", "key of a paper's labels")
    further: list[str] | None = option(
        None,
        "more folders of the same collection, with the same label file. A paper in several folders counts once, with "
        "the text from the first folder and the labels from all folders",
    )
    max_per_label: int = option(
        100,
        "maximum number of training papers per label or field, drawn with the seed; 0: all. In fields, papers of "
        "every split are drawn, by a hash of their ids, and only these are kept in memory",
        minimum=0,
    )
    negatives: list[str] | None = option(
        None,
        "sources of hard negatives: papers that a paper cites, or papers that share an author or the venue with it. "
        "In labels and fields, a hard negative is a label of such a paper that the paper itself lacks. In citations, "
        "it is a reference of a cited paper, or a paper with the same author or venue, unless the paper cites it",
        choices=NEGATIVES,
    )
    num_negatives: int = option(5, "maximum number of hard negatives per training paper", minimum=0)
    train_until: int | None = option(
        None, "last year of training. Later papers are the test split (MAPLE's own split is 2015)"
    )
    dev_percent: int = option(5, "percentage of papers in the dev split, chosen by a hash of their ids")
    test_percent: int = option(5, "percentage of papers in the test split, chosen likewise; not used with train_until")
    seed: int = option(0, "seed of all draws")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_percentages(self.dev_percent, self.test_percent)

    @property
    def folders(self) -> list[Path]:
        """All folders of the collection."""
        return [self.root, *map(Path, self.further or ())]

    def sources(self) -> list[Path]:
        labels = [self._labels_file()] if self.view == "labels" else []
        return [*map(self._papers_file, self.folders), *labels]

    def _papers_file(self, folder: Path) -> Path:
        return find_file(folder, "papers.json", "papers.jsonl")

    def _labels_file(self) -> Path:
        return self.find(*([str(Path(self.labels))] if self.labels else ("labels.txt", "labels_mesh.txt")))

    def collect(self, bad: BadLines) -> Collection:
        papers = self._read_papers(bad)
        corpus, relevant = self._judge(papers, bad)
        splits: dict[str, dict[str, list[str]]] = {split: {} for split in self._splits()}
        for id, documents in relevant.items():
            if documents:
                splits[self._split(papers[id])][id] = documents
        is_labelled = self.view != "citations"
        neighbours = _Neighbours(papers, splits["train"], is_labelled, self.negatives or (), self.seed)
        if is_labelled:
            splits["train"] = self._cap(splits["train"])
        qrels = {
            split: {id: dict.fromkeys(documents, 1) for id, documents in queries.items()}
            for split, queries in splits.items()
        }
        for id, grades in qrels["train"].items():
            negatives = neighbours.draw(id, relevant[id], self.num_negatives)
            qrels["train"][id] = dict.fromkeys(negatives, 0) | grades
        queries = {id: papers[id].document for split in qrels.values() for id in split}
        return check_collection(Collection(corpus, queries, qrels), self.folder)

    def _judge(self, papers: dict[str, _Paper], bad: BadLines) -> tuple[dict[str, Document], dict[str, list[str]]]:
        """Return the corpus, and the relevant documents of each paper."""
        if self.view == "citations":
            relevant = {id: [r for r in p.references if r in papers and r != id] for id, p in papers.items()}
            within, total = sum(map(len, relevant.values())), sum(len(p.references) for p in papers.values())
            log.info("%s: %d of %d references are papers of the collection", self.folder, within, total)
            return {id: paper.document for id, paper in papers.items()}, relevant
        if self.view == "fields":
            names = {folder.name: folder.name.replace("_", " ") for folder in self.folders}
            return {id: Document(id, name) for id, name in names.items()}, {id: p.labels for id, p in papers.items()}
        path = self._labels_file()
        corpus = read_labels(path, bad)
        return corpus, self._drop_unknown_labels(papers, corpus, path)

    def _read_papers(self, bad: BadLines) -> dict[str, _Paper]:
        papers: dict[str, _Paper] = {}
        for folder in self.folders:
            new: dict[str, _Paper] = {}
            kept: dict[str, list[tuple[int, str]]] = defaultdict(list)  # split -> heap; only for the view "fields"
            for row in read_records(self._papers_file(folder), bad):
                with row:
                    paper = self._read_paper(as_object(row, " with paper, title, abstract and label"), folder)
                    add_id(new, paper.document.id, paper)
                    if self.view == "fields" and self.max_per_label:
                        self._drop_surplus(new, kept[self._split(paper)], paper.document.id)
            for id, paper in new.items():
                first = papers.setdefault(id, paper)
                first.labels = list(dict.fromkeys((*first.labels, *paper.labels)))
        return papers

    def _read_paper(self, record: Record, folder: Path) -> _Paper:
        title, body = (f"{key}_raw" if record.get(f"{key}_raw") else key for key in ("title", "abstract"))
        document = record.document("paper", title=title, body=body)
        labels = record.ids(self.label_key, required=self.view == "labels")
        authors = record.ids("author")
        references = record.ids("reference", required=self.view == "citations")
        return _Paper(
            document,
            None if self.train_until is None else record.grade("year"),
            "" if record.get("venue") in (None, "") else record.id("venue"),
            [sys.intern(author) for author in authors],  # papers share the strings, which saves memory
            [sys.intern(reference) for reference in references],
            [folder.name] if self.view == "fields" else [sys.intern(label) for label in labels],
        )

    def _drop_surplus(self, papers: dict[str, _Paper], heap: list[tuple[int, str]], id: str) -> None:
        """Add a paper to the heap, and drop the paper with the highest hash if there are more than max_per_label."""
        heapq.heappush(heap, (-stable_hash(f"{self.seed}/{id}"), id))
        if len(heap) > self.max_per_label:
            del papers[heapq.heappop(heap)[1]]

    def _drop_unknown_labels(
        self, papers: Mapping[str, _Paper], corpus: Mapping[str, Document], path: Path
    ) -> dict[str, list[str]]:
        """Drop labels that are not in the corpus, and return the other labels of each paper."""
        relevant, num_labels, num_papers = {}, 0, 0
        for id, paper in papers.items():
            known = [label for label in paper.labels if label in corpus]
            num_labels += len(paper.labels) - len(known)
            num_papers += bool(paper.labels) and not known
            relevant[id] = paper.labels = known
        if num_labels:
            log.warning(
                "%s: dropped %d labels of papers, because they are not in this file; %d papers have no other label",
                path,
                num_labels,
                num_papers,
            )
        return relevant

    def _splits(self) -> list[str]:
        has_test = self.train_until is not None or self.test_percent
        return ["train", *(["dev"] if self.dev_percent else []), *(["test"] if has_test else [])]

    def _split(self, paper: _Paper) -> str:
        return split_of(paper.document.id, self.dev_percent, self.test_percent, paper.year, self.train_until)

    def _cap(self, train: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """Draw at most max_per_label papers for each label. Papers left without a label are left out."""
        by_label = defaultdict(list)
        for id, labels in train.items():
            for label in labels:
                by_label[label].append(id)
        kept: dict[str, list[str]] = {id: [] for id in train}
        for label, ids in by_label.items():
            if 0 < self.max_per_label < len(ids):
                ids = random.Random(f"{self.seed}/{label}").sample(ids, self.max_per_label)
            for id in ids:
                kept[id].append(label)
        return {id: labels for id, labels in kept.items() if labels}


@dataclass
class _Neighbours:
    """Hard negatives from related training papers (SciMult, section 3.4). The paper's id and the seed determine them.

    train: relevant documents (labels, or cited papers) of each training paper.
    is_labelled: whether the relevant documents are labels. If so, a related paper contributes its labels. Otherwise, a
        cited paper contributes its references, and any other related paper itself.
    sources: some of NEGATIVES.
    """

    papers: Mapping[str, _Paper]
    train: Mapping[str, Sequence[str]]
    is_labelled: bool
    sources: Sequence[str]
    seed: int

    def __post_init__(self) -> None:
        self.by_author, self.by_venue = defaultdict(list), defaultdict(list)
        for id in self.train if self.sources else ():
            self.by_venue[self.papers[id].venue].append(id)
            for author in self.papers[id].authors:
                self.by_author[author].append(id)

    def draw(self, id: str, relevant: Sequence[str], number: int) -> list[str]:
        """Return up to `number` documents that are neither relevant to the paper nor the paper itself."""
        paper, rng = self.papers[id], random.Random(f"{self.seed}/{id}")
        cited = [other for other in paper.references if other in self.train] if "cited" in self.sources else []
        negatives: dict[str, None] = {}
        for _ in range(ATTEMPTS * number if self.sources else 0):
            source = rng.choice(self.sources)
            neighbour = rng.choice(cited) if source == "cited" and cited else self._related(paper, source, rng)
            if neighbour is None or neighbour == id:
                continue
            candidates = self.train.get(neighbour, ()) if self.is_labelled or source == "cited" else (neighbour,)
            candidate = rng.choice(candidates) if candidates else id
            if candidate != id and candidate not in relevant:
                negatives[candidate] = None
            if len(negatives) == number:
                break
        return list(negatives)

    def _related(self, paper: _Paper, source: str, rng: random.Random) -> str | None:
        """Return a training paper that shares an author or the venue with a paper."""
        if source == "author" and paper.authors:
            return rng.choice(self.by_author[rng.choice(paper.authors)])
        return rng.choice(self.by_venue[paper.venue]) if source == "venue" and paper.venue else None
