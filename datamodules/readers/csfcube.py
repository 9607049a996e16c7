"""CSFCube: papers graded by the similarity of their background, method or result to that of a query paper.

Source: Mysore et al., CSFCube: A Test Collection of Computer Science Research Articles for Faceted Query by Example,
NeurIPS 2021 (iesl/CSFCube).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import REQUIRED, option
from datamodules.readers.checks import check_grade, check_id
from datamodules.readers.collecting import FolderReader, add_document, add_grade, check_collection, check_known
from datamodules.readers.json_files import as_object, read_records, read_whole_json
from datamodules.readers.rows import BadLines, Record
from datamodules.records import Collection, Document, Qrels, UserError, prefixed


@dataclass
class CsfCubeReader(FolderReader):
    """Reader of the CSFCube release. All data are the test split, and each query has its own candidates.

    folder/abstracts-csfcube-preds.jsonl           {"paper_id", "title", "abstract": [sentence]} per line
    folder/test-pid2anns-csfcube-background.json   {query: {"cands": [paper], "relevance_adju": [grade from 0 to 3]}}
    """

    facet: str = option(REQUIRED, "facet in which papers should be similar", choices=("background", "method", "result"))

    def sources(self) -> list[Path]:
        return list(map(self.find, ("abstracts-csfcube-preds.jsonl", f"test-pid2anns-csfcube-{self.facet}.json")))

    def collect(self, bad: BadLines) -> Collection:
        papers_path, judgements_path = self.sources()
        papers: dict[str, Document] = {}
        for row in read_records(papers_path, bad):
            with row:
                add_document(papers, _read_paper(as_object(row)))
        qrels = _read_judgements(judgements_path, papers, bad)
        return check_collection(Collection(papers, {id: papers[id] for id in qrels}, {"test": qrels}), self.folder)


def _read_paper(record: Record) -> Document:
    sentences = record.array("abstract")
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise UserError("abstract must be a list of sentences")
    values = {"abstract": " ".join(sentences)} if "abstract" in record else {}
    return Record.of(record.row, record, **values).document("paper_id", may_be_blank=True)


def _read_judgements(path: Path, papers: Mapping[str, Document], bad: BadLines) -> Qrels:
    content = read_whole_json(path)
    qrels: dict[str, dict[str, int]] = {}
    with prefixed(f"{path}: "):
        if not isinstance(content, dict):
            raise UserError("expected an object of queries")
        queries = Record(content)
        for query in queries:
            annotation = queries.object(query)
            ids = [check_id(id, "cands") for id in annotation.array("cands", required=True)]
            grades = [check_grade(grade, "grade") for grade in annotation.array("relevance_adju", required=True)]
            if len(ids) != len(grades):
                raise UserError(f"query {query!r} has {len(ids)} candidates but {len(grades)} grades")
            check_known(query, papers)
            bad.gaps.add_judgements(path, ids, papers)
            qrels[query] = {}
            for id, grade in zip(ids, grades, strict=True):
                add_grade(qrels[query], query, id, grade)
    return qrels
