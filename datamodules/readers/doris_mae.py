"""DORIS-MAE: long questions that ask for several aspects at once, and abstracts that are judged aspect by aspect.

Source: Wang et al., DORIS-MAE: Scientific Document Retrieval using Multi-level Aspect-based Queries, NeurIPS 2023
(kwang927/Doris-Mae-Dataset; the data are at zenodo.org/records/8299749).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.json_values import as_object, members
from datamodules.readers.lines import find_file
from datamodules.records import Collection, Document, UserError


@dataclass(frozen=True, slots=True)
class _Question:
    query: Document
    pool: list[str]
    aspects: set[str]


class DorisMaeReader:
    """The folder of the release; all of it is the test split.

    folder/DORIS-MAE_dataset_v1.json   one object of
        "Corpus"      [{"original_abstract": text, ...}], papers that are named by their places, from 0
        "Query"       [{"query_text", "candidate_pool": [paper], "aspects": {aspect: [aspects below it]}}]
        "Annotation"  [{"aspect_id", "abstract_id", "score": 0, 1 or 2}]

    A paper is its abstract alone, as its authors encode it; the corpus is the papers that are candidates. view: how the
    grade of a candidate follows from its scores in all aspects of the query. "relevant": 1 where their mean is 1 or
    more; "sum": their sum; "best": 1 for those of the largest sum. on_error, quarantine: see BadLines.
    """

    VIEWS = ("relevant", "sum", "best")

    def __init__(self, folder: str, view: str, on_error: str = "fail", quarantine: str | None = None):
        fields.allowed("view", [view], self.VIEWS)
        BadLines(on_error)
        self.folder, self.view = Path(folder), view
        self.on_error, self.quarantine = on_error, quarantine

    def sources(self) -> list[Path]:
        """The file that it reads."""
        return [find_file(self.folder, "DORIS-MAE_dataset_v1.json")]

    def read(self) -> Collection:
        """Reads the large file twice. Raises UserError naming the file, the line and what is wrong with it."""
        (path,) = self.sources()
        with BadLines(self.on_error, self.quarantine) as bad:
            questions, scores = _questions(path, bad)
            corpus = _papers(path, bad, {id for question in questions for id in question.pool})
        qrels = {}
        for question in questions:
            try:
                fields.all_known(question.pool, corpus, "candidate_pool")
            except UserError as error:
                raise UserError(f"{path}: {question.query.id}: {error}") from error
            sums = {id: sum(scores.get((aspect, id), 0) for aspect in question.aspects) for id in question.pool}
            qrels[question.query.id] = self._grades(sums, len(question.aspects))
        queries = {question.query.id: question.query for question in questions}
        return fields.checked(Collection(corpus, queries, {"test": qrels}), path)

    def _grades(self, sums: Mapping[str, int], num_aspects: int) -> dict[str, int]:
        if self.view == "sum":
            return dict(sums)
        least = num_aspects if self.view == "relevant" else max(sums.values())
        return {id: int(value >= least) for id, value in sums.items()}


def _questions(path: Path, bad: BadLines) -> tuple[list[_Question], Mapping[tuple[str, str], int]]:
    """All questions, and (aspect, paper) -> score; the sum of those of one pair, as in the authors' program."""
    questions: list[_Question] = []
    scores: dict[tuple[str, str], int] = defaultdict(int)
    for key, place in members(path, bad, ("Query", "Annotation")):
        with place:
            record = as_object(place)
            if key == "Query":
                questions.append(_question(record, f"test.{place.ordinal}"))
            else:
                pair = fields.identifier(record, "aspect_id"), fields.identifier(record, "abstract_id")
                scores[pair] += fields.grade(record.get("score"))
    return questions, scores


def _papers(path: Path, bad: BadLines, wanted: Container[str]) -> dict[str, Document]:
    corpus: dict[str, Document] = {}
    for _, place in members(path, bad, ("Corpus",)):
        if (id := str(place.ordinal - 1)) in wanted:
            with place:
                corpus[id] = _paper(as_object(place), id)
    return corpus


def _question(record: Mapping[str, Any], id: str) -> _Question:
    query = Document(id, "", fields.text(record, "query_text", required=True))
    pool = fields.identifiers(record, "candidate_pool", required=True)
    above = fields.nested(record, "aspects")
    aspects = {fields.as_identifier(aspect, "aspects") for aspect in above}
    for aspect in above:
        aspects.update(fields.identifiers(above, aspect, required=True))
    if not (query.text.strip() and pool and aspects):
        raise UserError("query_text, candidate_pool or aspects is empty")
    return _Question(query, pool, aspects)


def _paper(record: Mapping[str, Any], id: str) -> Document:
    abstract = fields.text(record, "original_abstract", required=True)
    if not abstract.strip():
        raise UserError("original_abstract is empty")
    return Document(id, "", abstract)
