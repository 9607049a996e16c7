"""SciRepEval's labelled examples: papers, with labels that a linear model predicts from their vectors.

Source: Singh et al., SciRepEval: A Multi-Format Benchmark for Scientific Document Representations, EMNLP 2023
(allenai/scirepeval and allenai/scirepeval_test on the Hugging Face hub).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.options import REQUIRED, option
from datamodules.readers.checks import check_id
from datamodules.readers.collecting import FolderReader, check_collection
from datamodules.readers.json_files import as_object
from datamodules.readers.rows import BadLines, Record
from datamodules.readers.scirepeval import ID_KEYS, evaluation_files
from datamodules.readers.tables import files_by_split, read_tables
from datamodules.records import Collection, Document, UserError, counted, short

log = logging.getLogger(__name__)

NUMBER = "number"
MAX_NUMBER = 1e100  # cross-validation squares the numbers, and larger squares may overflow

Label = Any  # str, tuple[int, ...] or float, in the views "class", "labels" and "number"


@dataclass
class SciRepEvalExamplesReader(FolderReader):
    """Reader of one config: texts from allenai/scirepeval, labels from allenai/scirepeval_test.

    This reader is for benchmarks with train_on. Queries are papers.

    folder/evaluation.jsonl              {"doc_id" or "corpus_id", "title", "abstract"} per row, of allenai/scirepeval
    judgements/train.jsonl, test.jsonl   {"paper_id", "label"} per row, of allenai/scirepeval_test

    Files may have the same formats as for SciRepEvalReader. A paper that is judged twice counts twice. Papers without
    text are left out with a warning, as in SciRepEval's own program.
    """

    judgements: str = option(REQUIRED, "folder with the labels")
    view: str = option(
        REQUIRED,
        "kind of labels. class: one class per paper, a number or a word; the corpus has the sorted classes. labels: a "
        "list with 0 or 1 for each label; the corpus has the indices of the labels. number: the corpus has a single "
        "document, whose grade is the number",
        choices=("class", "labels", NUMBER),
    )

    def sources(self) -> list[Path]:
        return [*evaluation_files(self.root), *(path for paths in self._judgement_files().values() for path in paths)]

    def _judgement_files(self) -> dict[str, list[Path]]:
        return files_by_split(Path(self.judgements))

    def collect(self, bad: BadLines) -> Collection:
        texts: dict[str, Document] = {}
        for row in read_tables(evaluation_files(self.root), bad):
            with row:
                paper = as_object(row).document(*ID_KEYS)
                texts.setdefault(paper.id, paper)
        splits = {split: self._read_examples(paths, texts, bad) for split, paths in self._judgement_files().items()}
        labels = [label for examples in splits.values() for _, label in examples]
        corpus = {id: Document(id, id) for id in self._corpus_ids(labels)}
        queries = {paper.id: paper for examples in splits.values() for paper, _ in examples}
        qrels = {
            split: {paper.id: self._grades(label) for paper, label in examples} for split, examples in splits.items()
        }
        return check_collection(Collection(corpus, queries, qrels), self.judgements)

    def _read_examples(
        self, paths: Sequence[Path], texts: Mapping[str, Document], bad: BadLines
    ) -> list[tuple[Document, Label]]:
        """Return the papers of a split and their labels, in the order that determines the cross-validation folds."""
        examples: list[tuple[Document, Label]] = []
        count: Counter[str] = Counter()
        num_without_text, num_labels = 0, None
        for row in read_tables(paths, bad):
            with row:
                record = as_object(row)
                id, label = record.id("paper_id"), self._read_label(record)
                if self.view == "labels":
                    num_labels = num_labels or len(label)
                    if len(label) != num_labels:
                        raise UserError(f"label has {len(label)} values, but earlier ones have {num_labels}")
                if id not in texts:
                    num_without_text += 1
                    continue
                count[id] += 1
                name = id if count[id] == 1 else f"{id}#{count[id]}"
                examples.append((Document(name, texts[id].title, texts[id].text), label))
        if num_without_text:
            log.warning(
                "%s: left out %s without a text in %s", paths[0], counted(num_without_text, "paper"), self.folder
            )
        return examples

    def _read_label(self, record: Record) -> Label:
        if self.view == "labels":
            label = record.array("label", required=True)
            if len(label) < 2 or not all(value in (0, 1) for value in label):
                raise UserError(f"label must be a list of 0 and 1, one for each label, got {short(label)}")
            return tuple(map(int, label))
        if "label" not in record:
            raise record.missing("label")
        label = record["label"]
        if self.view == "class":
            return check_id(int(label) if isinstance(label, float) and label.is_integer() else label, "label")
        if not isinstance(label, int | float) or isinstance(label, bool) or not abs(label) <= MAX_NUMBER:
            raise UserError(f"label must be a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}, got {short(label)}")
        return label

    def _corpus_ids(self, labels: Sequence[Label]) -> list[str]:
        if self.view == NUMBER:
            return [NUMBER]
        if self.view == "labels":
            if len(lengths := {len(label) for label in labels}) > 1:
                raise UserError(f"{self.judgements}: splits have {' and '.join(map(str, sorted(lengths)))} labels")
            return [str(index) for index in range(max(lengths, default=0))]
        classes = set(labels)
        are_numbers = all(re.fullmatch(r"-?\d{1,100}", label) for label in classes)
        # The label itself breaks ties, because "1" and "01" are two classes.
        return sorted(classes, key=(lambda label: (int(label), label)) if are_numbers else str)

    def _grades(self, label: Label) -> dict[str, Any]:
        if self.view == "labels":
            return {str(index): value for index, value in enumerate(label)}
        return {NUMBER: label} if self.view == NUMBER else {label: 1}
