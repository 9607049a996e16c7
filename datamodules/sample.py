"""The built-in sample: a small synthetic science with all three tasks, generated from a seed within seconds.

Every paper has four facets, and each task depends on two of them (docs/sample.md describes the tasks):

    facet       meaning                                classification   link prediction   search
    subfield    what the paper is about                      x                x
    aspect      which aspect of it is studied                  x                              x
    method      how it is studied                                             x
    material    what it is studied on                                                       x

A fourth collection has captions of two figures of each paper, which name the paper's subfield, method and material.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from dataclasses import dataclass

from datamodules.records import Collection, Document, UserError, check_choice

NUM_FIELDS, SUBFIELDS_PER_FIELD, TOPICS_PER_SUBFIELD = 12, 5, 4
NUM_ASPECTS, NUM_METHODS, NUM_MATERIALS = 24, 40, 80
METHODS_PER_FIELD, ASPECTS_PER_MATERIAL = 8, 6
FIRST_YEAR, LAST_YEAR = 1990, 2019

Documents = dict[str, Document]
Grades = dict[str, dict[str, int]]  # query -> document -> grade

TITLES = (
    "{aspect} of {material} in {subfield}",
    "{subfield} {aspect} by {method}",
    "a {method} approach to {subfield} {aspect}",
    "{method} for the {aspect} of {material}",
    "on {material} and the {aspect} of {subfield}",
)
SENTENCES = {
    "subfield": ("a study in {}", "results for {}", "open questions of {}"),
    "aspect": ("focus on {}", "we find clear {}", "a model of {}"),
    "method": ("measured by {}", "data from {}", "we use {}"),
    "material": ("samples of {}", "made with {}", "tests on {}"),
    "other": ("unlike {}", "not for {}", "in contrast to {}"),
}
QUERIES = ("{material} {aspect}", "{aspect} of {material}", "papers on {aspect} in {material}")
CAPTIONS = ("{material} under {method} in {subfield}", "{subfield} of {material} seen with {method}")
DEFINITION = "a topic that deals with {}"


@dataclass(frozen=True, slots=True)
class _Paper:
    document: Document
    year: int
    subfield: int
    aspect: int
    method: int
    material: int
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SearchQuery:
    document: Document
    material: int
    aspect: int


@dataclass(frozen=True)
class Science:
    """The generated papers, labels, citations, queries and captions, from which the collections are made."""

    papers: tuple[_Paper, ...]
    labels: dict[str, Document]
    citations: dict[str, tuple[str, ...]]
    queries: dict[str, SearchQuery]
    captions: dict[str, Document]


class Lexicon:
    """Eight invented words for each value of a facet.

    Papers use the first six words, of which older papers use the earlier ones. Queries and definitions use the last
    four.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.used: set[str] = set()
        self.terms: dict[tuple[str, int], list[str]] = {}
        facets = {
            "field": ("ology", NUM_FIELDS),
            "subfield": ("ics", NUM_FIELDS * SUBFIELDS_PER_FIELD),
            "aspect": ("ion", NUM_ASPECTS),
            "method": ("metry", NUM_METHODS),
            "material": ("ite", NUM_MATERIALS),
        }
        for facet, (ending, count) in facets.items():
            for value in range(count):
                self.terms[facet, value] = [self._word(ending) for _ in range(8)]

    def _word(self, ending: str) -> str:
        while True:
            syllables = [self.rng.choice("bcdfglmnprstvz") + self.rng.choice("aeiou") for _ in range(3)]
            word = "".join(syllables) + self.rng.choice("lmnrst") + ending
            if word not in self.used:
                self.used.add(word)
                return word

    def in_paper(self, facet: str, value: int, year: int) -> str:
        """Draw a term that authors use in a given year."""
        era = 5 * (year - FIRST_YEAR) / (LAST_YEAR - FIRST_YEAR)
        return self.terms[facet, value][min(5, max(0, round(self.rng.gauss(era, 1.0))))]

    def outside(self, facet: str, value: int) -> str:
        """Draw a term that definitions of labels and queries use."""
        return self.rng.choice(self.terms[facet, value][4:])


def _split(key: str, seed: int) -> str:
    """Return "train" (80 %), "dev" (10 %) or "test" (10 %), as a function of the key and the seed."""
    draw = random.Random(f"{seed}/{key}").random()
    return "train" if draw < 0.8 else "dev" if draw < 0.9 else "test"


@functools.lru_cache(maxsize=2)
def science(seed: int, num_papers: int) -> Science:
    """Generate papers, labels, citations and queries. The same seed gives the same result on every machine."""
    rng = random.Random(seed)
    lexicon = Lexicon(rng)
    num_subfields = NUM_FIELDS * SUBFIELDS_PER_FIELD
    aspects = [rng.sample(range(NUM_ASPECTS), TOPICS_PER_SUBFIELD) for _ in range(num_subfields)]
    methods = [rng.sample(range(NUM_METHODS), METHODS_PER_FIELD) for _ in range(NUM_FIELDS)]
    materials: dict[int, list[int]] = defaultdict(list)  # aspect -> materials studied under it
    for material in range(NUM_MATERIALS):
        for aspect in rng.sample(range(NUM_ASPECTS), ASPECTS_PER_MATERIAL):
            materials[aspect].append(material)

    labels = _labels(lexicon, aspects)
    papers = []
    for number in range(num_papers):
        year = rng.randint(FIRST_YEAR, LAST_YEAR)
        subfield = rng.randrange(num_subfields)
        aspect = rng.choice(aspects[subfield])
        method = rng.choice(methods[subfield // SUBFIELDS_PER_FIELD])
        material = rng.choice(materials[aspect] or range(NUM_MATERIALS))
        second = rng.choice(aspects[subfield]) if rng.random() < 0.25 else aspect
        facets = {"subfield": subfield, "aspect": aspect, "method": method, "material": material}
        document = _paper(f"paper{number:05d}", lexicon, facets, second, year)
        labelled = _label_ids(subfield, aspect) | _label_ids(subfield, second)
        papers.append(_Paper(document, year, **facets, labels=tuple(sorted(labelled))))
    citations, queries = _citations(papers, rng), _queries(papers, lexicon)
    return Science(tuple(papers), labels, citations, queries, _captions(papers, lexicon))


def _labels(lexicon: Lexicon, aspects: list[list[int]]) -> dict[str, Document]:
    """Make the labels (fields, subfields and topics), each with a name and a definition."""
    labels = {}

    def add(label: str, *facets: tuple[str, int]) -> None:
        name = " ".join(lexicon.outside(*facet) for facet in facets)
        words = [lexicon.outside(*facet) for facet in facets for _ in range(2)]
        labels[label] = Document(label, name, DEFINITION.format(" and ".join(words)))

    for field in range(NUM_FIELDS):
        add(f"field{field}", ("field", field))
    for subfield, subfield_aspects in enumerate(aspects):
        field = subfield // SUBFIELDS_PER_FIELD
        add(f"subfield{subfield}", ("subfield", subfield), ("field", field))
        for aspect in subfield_aspects:
            add(f"topic{subfield}.{aspect}", ("subfield", subfield), ("aspect", aspect))
    return labels


def _label_ids(subfield: int, aspect: int) -> set[str]:
    return {f"field{subfield // SUBFIELDS_PER_FIELD}", f"subfield{subfield}", f"topic{subfield}.{aspect}"}


def _paper(paper: str, lexicon: Lexicon, facets: dict[str, int], second_aspect: int, year: int) -> Document:
    rng = lexicon.rng
    words = {facet: lexicon.in_paper(facet, value, year) for facet, value in facets.items()}
    sentences = [rng.choice(SENTENCES[f]).format(lexicon.in_paper(f, value, year)) for f, value in facets.items()]
    if second_aspect != facets["aspect"]:
        sentences.append(rng.choice(SENTENCES["aspect"]).format(lexicon.in_paper("aspect", second_aspect, year)))
    for facet, count in (("subfield", NUM_FIELDS * SUBFIELDS_PER_FIELD), ("material", NUM_MATERIALS)):
        other = rng.randrange(count)
        if other != facets[facet]:
            sentences.append(rng.choice(SENTENCES["other"]).format(lexicon.in_paper(facet, other, year)))
    rng.shuffle(sentences)
    return Document(paper, rng.choice(TITLES).format(**words), ". ".join(sentences) + ".")


def _citations(papers: list[_Paper], rng: random.Random) -> dict[str, tuple[str, ...]]:
    """Draw citations, mostly of the five most recent papers with the same subfield and method."""
    by_subfield: dict[int, list[_Paper]] = defaultdict(list)
    cited: dict[str, tuple[str, ...]] = {}
    for paper in sorted(papers, key=lambda p: (p.year, p.document.id)):
        earlier = [p for p in by_subfield[paper.subfield] if p.year < paper.year]
        close = [p for p in earlier if p.method == paper.method][-5:]
        chosen = {p.document.id for p in close if rng.random() < 0.9}
        if earlier and rng.random() < 0.3:
            chosen.add(rng.choice(earlier[-20:]).document.id)
        by_subfield[paper.subfield].append(paper)
        if chosen:
            cited[paper.document.id] = tuple(sorted(chosen))
    return cited


def _queries(papers: list[_Paper], lexicon: Lexicon) -> dict[str, SearchQuery]:
    """Make three queries for each pair of material and aspect that a paper studies."""
    queries = {}
    for material, aspect in sorted({(p.material, p.aspect) for p in papers}):
        for number in range(3):
            words = {"material": lexicon.outside("material", material), "aspect": lexicon.outside("aspect", aspect)}
            key = f"query{material}.{aspect}.{number}"
            text = lexicon.rng.choice(QUERIES).format(**words)
            queries[key] = SearchQuery(Document(key, "", text), material, aspect)
    return queries


def _captions(papers: list[_Paper], lexicon: Lexicon) -> dict[str, Document]:
    """Make the captions of two figures of each paper, in the words of its year."""
    captions = {}
    for paper in papers:
        facets = {"subfield": paper.subfield, "method": paper.method, "material": paper.material}
        for number, caption in enumerate(CAPTIONS):
            words = {facet: lexicon.in_paper(facet, value, paper.year) for facet, value in facets.items()}
            key = f"{paper.document.id}.figure{number}"
            captions[key] = Document(key, "", caption.format(**words))
    return captions


class SampleReader:
    """Reader of one of the sample's four collections.

    view: "topics" (classification), "citations" (link prediction), "searches" (search) or "captions" (search).
    num_papers: number of papers, at least 500.
    """

    VIEWS = ("topics", "citations", "searches", "captions")

    def __init__(self, view: str, num_papers: int = 5000, seed: int = 0):
        if num_papers < 500:
            raise UserError(f"num_papers: expected at least 500, got {num_papers} (fewer leave some topics empty)")
        self.view, self.num_papers, self.seed = check_choice("view", view, self.VIEWS), num_papers, seed

    def read(self) -> Collection:
        world = science(self.seed, self.num_papers)
        papers = {paper.document.id: paper.document for paper in world.papers}
        make = {
            "topics": self._topics,
            "citations": self._citations,
            "searches": self._searches,
            "captions": self._captions,
        }
        corpus, queries, judged = make[self.view](world, papers)
        qrels: dict[str, dict[str, dict[str, int]]] = {"train": {}, "dev": {}, "test": {}}
        for query, grades in judged.items():
            # All three queries of a material and an aspect are in the same split, and so are all captions of a paper.
            split = _split(query.rsplit(".", 1)[0], self.seed)
            qrels[split][query] = grades if split == "train" else {d: g for d, g in grades.items() if g > 0}
        return Collection(corpus, queries, qrels)

    def _topics(self, world: Science, papers: Documents) -> tuple[Documents, Documents, Grades]:
        labels_of = {paper.document.id: paper.labels for paper in world.papers}
        judged = {}
        for paper, labels in labels_of.items():
            cited_labels = {label for cited in world.citations.get(paper, ()) for label in labels_of[cited]}
            judged[paper] = dict.fromkeys(sorted(cited_labels - set(labels)), 0) | dict.fromkeys(labels, 1)
        return world.labels, papers, judged

    def _citations(self, world: Science, papers: Documents) -> tuple[Documents, Documents, Grades]:
        judged = {}
        for paper, cited in world.citations.items():
            indirect = {id for direct in cited for id in world.citations.get(direct, ())} - set(cited) - {paper}
            judged[paper] = dict.fromkeys(sorted(indirect), 0) | dict.fromkeys(cited, 1)
        return papers, {paper: papers[paper] for paper in judged}, judged

    def _searches(self, world: Science, papers: Documents) -> tuple[Documents, Documents, Grades]:
        by_material, by_aspect = defaultdict(list), defaultdict(list)
        for paper in world.papers:
            by_material[paper.material].append(paper)
            by_aspect[paper.aspect].append(paper)
        judged = {}
        for key, query in world.queries.items():
            shown = [p for p in by_aspect[query.aspect] if p.material != query.material]
            shown = random.Random(f"{self.seed}/{key}").sample(shown, min(10, len(shown)))
            grades = {p.document.id: 0 for p in shown}
            grades |= {p.document.id: 1 + (p.aspect == query.aspect) for p in by_material[query.material]}
            judged[key] = grades
        return papers, {key: query.document for key, query in world.queries.items()}, judged

    def _captions(self, world: Science, papers: Documents) -> tuple[Documents, Documents, Grades]:
        judged = {}
        for key in world.captions:
            paper = key.partition(".")[0]
            judged[key] = dict.fromkeys(world.citations.get(paper, ()), 0) | {paper: 1}
        return papers, world.captions, judged
