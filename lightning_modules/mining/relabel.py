"""Relabel mined negatives: a judge keeps each one, drops it, or turns it into a positive (RLHN, arXiv 2505.16967).

Shapes: j mined documents of all queries of a pool.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datamodules.ragged import Ragged
from datamodules.records import DROP, KEEP, LABELS, POSITIVE, MinedNegatives, MiningPool, UserError, explained, short
from lightning_modules.encoders.backbone import installed
from lightning_modules.encoders.loading import check_serves, load_encoder
from lightning_modules.mining.filters import positive_score
from lightning_modules.retrieval.search import row_scores
from lightning_modules.retrieval.vector_cache import VectorCache, fingerprint, vectors_of_pool

NUM_EXAMPLES = 5  # examples of each decision in a report


class Pairs(NamedTuple):
    """The mined documents of a pool: query numbers and corpus rows, (j,) each."""

    pool: MiningPool
    queries: np.ndarray
    documents: np.ndarray


def pairs_of(mined: MinedNegatives, pool: MiningPool) -> Pairs:
    """Return the mined documents of one of the pools of a task."""
    lists = Ragged(mined.starts, mined.documents).take(pool.first_example + np.arange(len(pool.queries)))
    return Pairs(pool, lists.owners, lists.values.astype(np.int64) - pool.first_row)


class Verdict(NamedTuple):
    """Decisions on the pairs of a pool, as indices of LABELS, and the judge's scores or NaN, (j,) each."""

    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class JudgeContext:
    """Other inputs of a judge.

    pools: pools of all tasks.
    folder: folder for vectors and trained judges.
    device: device of the computations.
    """

    pools: Sequence[MiningPool]
    folder: Path
    device: torch.device | str = "cpu"


class Judge(ABC):
    """Decide on mined negatives by a score. Higher scores mean more relevant documents.

    drop_above: drop documents with at least this score; null: none.
    positive_above: turn documents with at least this score into positives; null: none.
    """

    def __init__(self, drop_above: float | None, positive_above: float | None):
        if drop_above is not None and positive_above is not None and positive_above < drop_above:
            raise UserError(
                f"positive_above: expected at least drop_above, {drop_above}, got {positive_above}; the higher the "
                "score, the more relevant the document"
            )
        self.drop_above, self.positive_above = drop_above, positive_above

    def check(self, pools: Sequence[MiningPool]) -> None:  # noqa: B027
        """Raise UserError if the judge does not fit the pools of all tasks. Called before mining."""

    @abstractmethod
    def judge(self, pairs: Sequence[Pairs], context: JudgeContext) -> list[Verdict]:
        """Return the decisions on the mined documents of all pools of a task. All ranks call this together."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the model or file that makes the decisions."""

    @property
    def description(self) -> dict[str, Any]:
        """Class, fingerprint and settings of the judge."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"judge": f"{type(self).__module__}.{type(self).__name__}", "fingerprint": self.fingerprint} | settings

    def by_score(self, scores: np.ndarray) -> Verdict:
        """Decide by the thresholds. Documents without a score (NaN) are kept."""
        labels = np.full(len(scores), KEEP, dtype=np.int8)
        for threshold, label in ((self.drop_above, DROP), (self.positive_above, POSITIVE)):
            if threshold is not None:
                labels[scores >= threshold] = label
        return Verdict(labels, scores)


class GuideJudge(Judge):
    """Score by a frozen encoder: the cosine of query and document, minus the mean cosine of the query's positives.

    model: folder, checkpoint or hub name, or package:NAME.
    drop_above: 0 drops documents that the guide prefers to the positives; -0.05 also drops documents just below.
    """

    def __init__(
        self,
        model: str,
        drop_above: float | None = 0.0,
        positive_above: float | None = None,
        tasks: Mapping[str, str] | None = None,
        packages: Sequence[str] = (),
    ):
        super().__init__(drop_above, positive_above)
        self.model = model
        self._encoder = load_encoder(installed(model), tasks, packages=packages)
        self._fingerprint = fingerprint(self._encoder)
        check_serves(self._encoder, tasks or (), "model")

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def judge(self, pairs, context):
        cache = VectorCache(self._encoder.to(context.device), context.folder / "judge", similarity="cosine")
        verdicts = []
        for pool, queries, documents in pairs:
            vectors = vectors_of_pool(cache, pool)
            positive_scores = row_scores(*vectors, pool.positives.owners, pool.positives.values)
            positive = positive_score(positive_scores, pool.positives, "mean")  # (Q,)
            verdicts.append(self.by_score(row_scores(*vectors, queries, documents) - positive[queries]))
        return verdicts


class FileJudge(Judge):
    """Take judgements from a file. They may come from people, or from a model that runs elsewhere.

    Each line has the ids of a query and a paper, and a label (keep, drop, positive) or a score. In a .tsv file, these
    are three columns; in other files, a JSON object: {"query": "q1", "paper": "d7", "label": "drop"} or {..., "score":
    0.9}. Documents without a judgement are kept.
    """

    def __init__(self, path: str, drop_above: float | None = 0.5, positive_above: float | None = None):
        super().__init__(drop_above, positive_above)
        self.path = path
        with explained(f"path: {path} cannot be read", OSError, UnicodeDecodeError):
            self._content = Path(path).read_text(encoding="utf-8-sig")
        self._judgements = list(self._lines())  # at the start, because mining may take hours

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self._content.encode(), digest_size=8).hexdigest()

    def check(self, pools):
        self._read(pools)

    def judge(self, pairs, context):
        judgements = self._read(context.pools)
        verdicts = []
        for pool, queries, documents in pairs:
            values = [
                judgements.get((pool.queries[query].id, pool.corpus[row].id), math.nan)
                for query, row in zip(queries.tolist(), documents.tolist(), strict=True)
            ]
            labels = np.array(
                [LABELS.index(value) if isinstance(value, str) else -1 for value in values], dtype=np.int8
            )
            scores = np.array([math.nan if isinstance(value, str) else value for value in values], dtype=np.float64)
            by_score = self.by_score(scores)
            verdicts.append(Verdict(np.where(labels >= 0, labels, by_score.labels), scores))
        return verdicts

    def _read(self, pools: Sequence[MiningPool]) -> dict[tuple[str, str], str | float]:
        """Return the label or score of each pair. Raises UserError for a line that is invalid or has unknown ids."""
        queries = [{query.id for query in pool.queries} for pool in pools]
        papers = [{document.id for document in pool.corpus} for pool in pools]
        judgements: dict[tuple[str, str], str | float] = {}
        for number, query, paper, value in self._judgements:
            where = f"{self.path}:{number}"
            if not any(query in known for known in queries):
                raise UserError(
                    f"{where}: unknown query {query!r}; expected the id of a training query (of queries with the same "
                    "text, that of the first)"
                )
            if not any(query in q and paper in p for q, p in zip(queries, papers, strict=True)):
                raise UserError(f"{where}: unknown paper {paper!r}; expected an id in the corpus of query {query!r}")
            if (before := judgements.setdefault((query, paper), value)) != value:
                raise UserError(f"{where}: {query!r}, {paper!r}: got {value!r} here, but {before!r} earlier; keep one")
        return judgements

    def _lines(self) -> Iterator[tuple[int, str, str, str | float]]:
        """Yield the line number, query, paper, and label or score of each non-empty line."""
        is_tsv = Path(self.path).suffix == ".tsv"
        form = "three columns:" if is_tsv else "a JSON object with"
        for number, line in enumerate(self._content.replace("\r\n", "\n").split("\n"), start=1):
            if not line.strip() or (is_tsv and number == 1 and line.split("\t")[:2] == ["query", "paper"]):
                continue
            try:
                fields: Any = line.split("\t") if is_tsv else json.loads(line)
                if not is_tsv:
                    values = [fields[key] for key in ("label", "score") if fields.get(key) is not None]
                    fields = [str(fields["query"]), str(fields["paper"]), *values]
                query, paper, value = fields
                if value not in LABELS and not math.isfinite(value := float(value)):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                names = ", ".join(LABELS)
                raise UserError(
                    f"{self.path}:{number}: expected {form} query, paper, and label ({names}) or score (a finite "
                    f"number), got {short(line)}"
                ) from None
            yield number, query, paper, value


class Relabelled(NamedTuple):
    """Decisions of a judge on the mined documents of a task.

    judge: description of the judge.
    counts: number of documents with each label.
    examples: documents that were dropped or became positives, with the highest scores.
    """

    judge: Mapping[str, Any]
    counts: Mapping[str, int]
    examples: Sequence[Mapping[str, Any]]


def relabel(mined: MinedNegatives, judge: Judge, task: str, context: JudgeContext) -> tuple[MinedNegatives, Relabelled]:
    """Return the mined negatives of a task with the decisions of a judge. All ranks call this together."""
    pairs = [pairs_of(mined, pool) for pool in context.pools if pool.task == task]
    verdicts = judge.judge(pairs, context)
    labels = np.concatenate([verdict.labels for verdict in verdicts]).astype(np.int8)
    counts = {name: int((labels == label).sum()) for label, name in enumerate(LABELS)}
    examples = [example for label in (POSITIVE, DROP) for example in _examples(pairs, verdicts, label)]
    return dataclasses.replace(mined, labels=labels), Relabelled(judge.description, counts, examples)


def _examples(pairs: Sequence[Pairs], verdicts: Sequence[Verdict], label: int) -> list[dict[str, Any]]:
    """Return the NUM_EXAMPLES highest-scoring pairs with a label."""
    examples: list[dict[str, Any]] = []
    for (pool, queries, documents), verdict in zip(pairs, verdicts, strict=True):
        rows = np.flatnonzero(verdict.labels == label)
        order = rows[np.argsort(-np.nan_to_num(verdict.scores[rows], nan=-np.inf), kind="stable")[:NUM_EXAMPLES]]
        for i in order.tolist():
            query, paper = pool.queries[int(queries[i])], pool.corpus[int(documents[i])]
            score = None if math.isnan(verdict.scores[i]) else float(verdict.scores[i])
            texts: dict[str, Any] = {
                "query_text": query.title or query.text[:80],
                "title": paper.title or paper.text[:80],
            }
            examples.append({"label": LABELS[label], "query": query.id, "paper": paper.id, "score": score} | texts)
    return sorted(examples, key=lambda example: -(example["score"] or 0.0))[:NUM_EXAMPLES]
