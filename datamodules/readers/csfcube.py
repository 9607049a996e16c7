"""CSFCube: papers, and candidates that are judged by how alike their background, method or result is.

Source: Mysore et al., CSFCube: A Test Collection of Computer Science Research Articles for Faceted Query by Example,
NeurIPS 2021 (iesl/CSFCube).
"""

from __future__ import annotations

from pathlib import Path

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.json_values import as_object, records, whole
from datamodules.readers.lines import find_file
from datamodules.records import Collection, Document, Qrels, UserError


class CsfCubeReader:
    """The folder of the release; all of it is the test split.

    folder/abstracts-csfcube-preds.jsonl           {"paper_id", "title", "abstract": [sentence]} a line
    folder/test-pid2anns-csfcube-background.json   {query: {"cands": [paper], "relevance_adju": [grade from 0 to 3]}}

    facet: "background", "method" or "result". Each query has its own candidates. on_error, quarantine: see BadLines.
    """

    FACETS = ("background", "method", "result")

    def __init__(self, folder: str, facet: str, on_error: str = "fail", quarantine: str | None = None):
        fields.allowed("facet", [facet], self.FACETS)
        BadLines(on_error)
        self.folder, self.facet = Path(folder), facet
        self.on_error, self.quarantine = on_error, quarantine

    def sources(self) -> list[Path]:
        """The files that it reads."""
        names = ("abstracts-csfcube-preds.jsonl", f"test-pid2anns-csfcube-{self.facet}.json")
        return [find_file(self.folder, name) for name in names]

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        papers_path, judged_path = self.sources()
        papers: dict[str, Document] = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            for place in records(papers_path, bad):
                with place:
                    fields.add_new(papers, _paper(as_object(place)))
        qrels = _judgements(judged_path, papers)
        return fields.checked(Collection(papers, {id: papers[id] for id in qrels}, {"test": qrels}), self.folder)


def _paper(record) -> Document:
    sentences = fields.listed(record, "abstract")
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise UserError("abstract must be a list of sentences")
    return fields.document(record | {"abstract": " ".join(sentences)}, ("paper_id",))


def _judgements(path: Path, papers: dict[str, Document]) -> Qrels:
    content, qrels = whole(path), {}
    try:
        if not isinstance(content, dict):
            raise UserError("expected an object of queries")
        for query in content:
            judged = fields.nested(content, query)
            ids = [fields.as_identifier(id, "cands") for id in fields.listed(judged, "cands", required=True)]
            grades = [fields.grade(grade, "grade") for grade in fields.listed(judged, "relevance_adju", required=True)]
            if len(ids) != len(grades):
                raise UserError(f"query {query!r} has {len(ids)} candidates and {len(grades)} grades")
            fields.all_known([query, *ids], papers, f"query {query!r}")
            qrels[query] = dict(zip(ids, grades, strict=True))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return qrels
