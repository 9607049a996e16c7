"""Hard negatives from neighbours: papers that a paper cites, that share an author with it, or its venue.

Source: Zhang et al., Pre-training Multi-task Contrastive Learning Models for Scientific Literature Understanding,
Findings of EMNLP 2023, section 3.4.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datamodules.records import Document

SOURCES = ("cited", "author", "venue")
DRAWS = 8  # for each negative that is wanted


@dataclass(slots=True)
class Paper:
    document: Document
    year: int | None
    venue: str
    authors: list[str]
    references: list[str]
    labels: list[str]


class Neighbours:
    """Draws hard negatives from the neighbours of training papers, for each paper by its id and the seed.

    train: id of a training paper -> its relevant documents (labels, or papers that it cites). of_labels: whether these
    are labels: a neighbour then offers its own. Else a cited neighbour offers what it cites, and others themselves.
    """

    def __init__(
        self,
        papers: Mapping[str, Paper],
        train: Mapping[str, Sequence[str]],
        of_labels: bool,
        sources: Sequence[str],
        seed: int,
    ):
        self.papers, self.train, self.of_labels, self.sources, self.seed = papers, train, of_labels, sources, seed
        self.by_author, self.by_venue = defaultdict(list), defaultdict(list)
        for id in train if sources else ():
            self.by_venue[papers[id].venue].append(id)
            for author in papers[id].authors:
                self.by_author[author].append(id)

    def negatives(self, id: str, relevant: Sequence[str], number: int) -> list[str]:
        """At most number documents that are not relevant to the paper, and not the paper."""
        paper, rng = self.papers[id], random.Random(f"{self.seed}/{id}")
        cited = [other for other in paper.references if other in self.train] if "cited" in self.sources else []
        found: dict[str, None] = {}
        for _ in range(DRAWS * number if self.sources else 0):
            source = rng.choice(self.sources)
            near = rng.choice(cited) if source == "cited" and cited else self._beside(paper, source, rng)
            if near is None or near == id:
                continue
            offered = self.train.get(near, ()) if self.of_labels or source == "cited" else (near,)
            drawn = rng.choice(offered) if offered else id
            if drawn != id and drawn not in relevant:
                found[drawn] = None
            if len(found) == number:
                break
        return list(found)

    def _beside(self, paper: Paper, source: str, rng: random.Random) -> str | None:
        """A training paper of one of the authors, or of the venue."""
        if source == "author" and paper.authors:
            return rng.choice(self.by_author[rng.choice(paper.authors)])
        return rng.choice(self.by_venue[paper.venue]) if source == "venue" and paper.venue else None
