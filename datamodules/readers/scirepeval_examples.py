"""SciRepEval's labelled examples: papers, and what a linear model is to tell of them by their vectors.

Source: Singh et al., SciRepEval: A Multi-Format Benchmark for Scientific Document Representations, EMNLP 2023
(allenai/scirepeval and allenai/scirepeval_test on the Hugging Face hub).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.readers import fields
from datamodules.readers.bad_lines import BadLines
from datamodules.readers.json_values import as_object
from datamodules.readers.rows import files_by_split, rows_of_files
from datamodules.readers.scirepeval import IDS
from datamodules.records import Collection, Document, UserError

log = logging.getLogger(__name__)

NUMBER = "number"
LARGEST = 1e100  # number: the squares of larger ones, by which C is chosen, are no floats


class SciRepEvalExamplesReader:
    """A config of both data sets. Queries are papers; this is to be measured on, by a benchmark with train_on.

    folder/evaluation.jsonl              {"doc_id" or "corpus_id", "title", "abstract"} a row, of allenai/scirepeval
    judgements/train.jsonl, test.jsonl   {"paper_id", "label"} a row, of allenai/scirepeval_test

    Files as SciRepEvalReader takes them.

    view: what a label is. "class": the one class of a paper, a number or a word; the corpus is the classes, in order.
    "labels": a list of 0 and 1, one for each label; the corpus is their places. "number": the corpus is one document,
    which has the number as its grade. A paper that is judged twice counts twice. Papers without text are left out, with
    a warning, as SciRepEval's own program leaves them out. on_error, quarantine: see BadLines.
    """

    VIEWS = ("class", "labels", NUMBER)

    def __init__(self, folder: str, judgements: str, view: str, on_error: str = "fail", quarantine: str | None = None):
        fields.allowed("view", [view], self.VIEWS)
        BadLines(on_error)
        self.folder, self.judgements, self.view = Path(folder), Path(judgements), view
        self.on_error, self.quarantine = on_error, quarantine

    def sources(self) -> list[Path]:
        """The files that it reads."""
        return [*self._texts(), *(path for paths in files_by_split(self.judgements).values() for path in paths)]

    def _texts(self) -> list[Path]:
        splits = files_by_split(self.folder)
        if "test" not in splits:
            raise UserError(f"{self.folder}: has no file of the split evaluation (evaluation.jsonl, or .parquet)")
        return splits["test"]

    def read(self) -> Collection:
        """Raises UserError naming the file, the line and what is wrong with it."""
        texts: dict[str, Document] = {}
        with BadLines(self.on_error, self.quarantine) as bad:
            for place in rows_of_files(self._texts(), bad):
                with place:
                    paper = fields.document(as_object(place), IDS)
                    texts.setdefault(paper.id, paper)
            splits = {
                split: self._examples(paths, texts, bad) for split, paths in files_by_split(self.judgements).items()
            }
        found = [label for examples in splits.values() for _, label in examples]
        corpus = {id: Document(id, id) for id in self._corpus(found)}
        queries = {paper.id: paper for examples in splits.values() for paper, _ in examples}
        qrels = {s: {paper.id: self._grades(label) for paper, label in examples} for s, examples in splits.items()}
        return fields.checked(Collection(corpus, queries, qrels), self.judgements)

    def _examples(self, paths: Sequence[Path], texts: dict[str, Document], bad: BadLines) -> list[tuple[Document, Any]]:
        """Papers of a split with their labels, in the order of the file: folds of cross-validation follow from it."""
        found, times, without, length = [], Counter(), 0, None
        for place in rows_of_files(paths, bad):
            with place:
                record = as_object(place)
                id, label = fields.identifier(record, "paper_id"), self._label(record)
                length = length or (len(label) if self.view == "labels" else 1)
                if self.view == "labels" and len(label) != length:
                    raise UserError(f"label has {len(label)} values, those before have {length}")
                if id not in texts:
                    without += 1
                    continue
                times[id] += 1
                name = id if times[id] == 1 else f"{id}#{times[id]}"
                found.append((Document(name, texts[id].title, texts[id].text), label))
        if without:
            log.warning("%s: %d papers have no text in %s, and are left out", paths[0], without, self.folder)
        return found

    def _label(self, record: dict[str, Any]) -> Any:
        if self.view == "labels":
            label = fields.listed(record, "label", required=True)
            if len(label) < 2 or not all(one in (0, 1) for one in label):
                raise UserError(f"label must be a list of 0 and 1, one for each label, got {str(label)[:60]}")
            return tuple(map(int, label))
        if "label" not in record:
            raise UserError(f"label is missing (keys here: {', '.join(record)})")
        label = record["label"]
        if self.view == "class":
            return fields.as_identifier(
                int(label) if isinstance(label, float) and label.is_integer() else label, "label"
            )
        if not isinstance(label, int | float) or isinstance(label, bool) or not abs(label) <= LARGEST:
            raise UserError(f"label must be a number from -{LARGEST:g} to {LARGEST:g}, got {str(label)[:60]!r}")
        return label

    def _corpus(self, labels: Sequence[Any]) -> list[str]:
        if self.view == NUMBER:
            return [NUMBER]
        if self.view == "labels":
            if len(lengths := {len(label) for label in labels}) > 1:
                raise UserError(f"{self.judgements}: splits have {' and '.join(map(str, sorted(lengths)))} labels")
            return [str(place) for place in range(max(lengths, default=0))]
        classes = set(labels)
        of_numbers = all(re.fullmatch(r"-?\d{1,100}", label) for label in classes)
        return sorted(classes, key=(lambda label: (int(label), label)) if of_numbers else str)  # "1" is not "01"

    def _grades(self, label: Any) -> dict[str, Any]:
        if self.view == "labels":
            return {str(place): one for place, one in enumerate(label)}
        return {NUMBER: label} if self.view == NUMBER else {label: 1}
