"""DORIS-MAE: long questions with several aspects, and abstracts that are judged for each aspect.

Source: Wang et al., DORIS-MAE: Scientific Document Retrieval using Multi-level Aspect-based Queries, NeurIPS 2023
(kwang927/Doris-Mae-Dataset; the data are at zenodo.org/records/8299749).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import REQUIRED, option
from datamodules.readers.checks import check_id
from datamodules.readers.collecting import FolderReader, check_collection
from datamodules.readers.json_files import as_object, read_members
from datamodules.readers.rows import BadLines, Record
from datamodules.records import Collection, Document, UserError


@dataclass(frozen=True, slots=True)
class _Question:
    """A query with its candidates and aspects."""

    query: Document
    candidates: list[str]
    aspects: set[str]


@dataclass
class DorisMaeReader(FolderReader):
    """Reader of the DORIS-MAE release. All data are the test split.

    folder/DORIS-MAE_dataset_v1.json   one object with
        "Corpus"      [{"original_abstract": text, ...}]; the id of a paper is its index in this list
        "Query"       [{"query_text", "candidate_pool": [paper], "aspects": {aspect: [sub-aspect]}}]
        "Annotation"  [{"aspect_id", "abstract_id", "score": 0, 1 or 2}]

    The text of a paper is only its abstract, as in the authors' experiments. The corpus only has papers that are
    candidates of a query.
    """

    view: str = option(
        REQUIRED,
        "grade of a candidate, from its scores in all aspects of the query. relevant: 1 if the mean score is at least "
        "1. sum: the sum of the scores. best: 1 for the candidates with the largest sum",
        choices=("relevant", "sum", "best"),
    )

    def sources(self) -> list[Path]:
        return [self.find("DORIS-MAE_dataset_v1.json")]

    def collect(self, bad: BadLines) -> Collection:
        (path,) = self.sources()
        questions, scores = _read_questions(path, bad)
        corpus = _read_papers(path, bad, {id for question in questions for id in question.candidates})
        qrels = {}
        for question in questions:
            bad.gaps.add_judgements(path, question.candidates, corpus)
            sums = {id: sum(scores.get((aspect, id), 0) for aspect in question.aspects) for id in question.candidates}
            qrels[question.query.id] = self._grades(sums, len(question.aspects))
        queries = {question.query.id: question.query for question in questions}
        return check_collection(Collection(corpus, queries, {"test": qrels}), path)

    def _grades(self, sums: Mapping[str, int], num_aspects: int) -> dict[str, int]:
        if self.view == "sum":
            return dict(sums)
        threshold = num_aspects if self.view == "relevant" else max(sums.values())
        return {id: int(value >= threshold) for id, value in sums.items()}


def _read_questions(path: Path, bad: BadLines) -> tuple[list[_Question], Mapping[tuple[str, str], int]]:
    """Return all questions, and the score of each (aspect, paper).

    Several scores for the same pair are added up, as in the authors' program.
    """
    questions: list[_Question] = []
    scores: dict[tuple[str, str], int] = defaultdict(int)
    for key, row in read_members(path, bad, ("Query", "Annotation")):
        with row:
            record = as_object(row)
            if key == "Query":
                questions.append(_read_question(record, f"test.{row.ordinal}"))
            else:
                pair = record.id("aspect_id"), record.id("abstract_id")
                scores[pair] += record.grade("score")
    return questions, scores


def _read_papers(path: Path, bad: BadLines, wanted: Container[str]) -> dict[str, Document]:
    corpus: dict[str, Document] = {}
    for _, row in read_members(path, bad, ("Corpus",)):
        if (id := str(row.ordinal - 1)) in wanted:
            with row:
                corpus[id] = Document(id, "", as_object(row).words("original_abstract"))
    return corpus


def _read_question(record: Record, id: str) -> _Question:
    query = Document(id, "", record.words("query_text"))
    candidates = record.ids("candidate_pool", required=True)
    tree = record.object("aspects")
    aspects = {check_id(aspect, "aspects") for aspect in tree}
    for aspect in tree:
        aspects.update(tree.ids(aspect, required=True))
    if not (candidates and aspects):
        raise UserError("candidate_pool or aspects is empty")
    return _Question(query, candidates, aspects)
