"""Miners propose candidates: each ranks the documents of a pool for its training queries.

Shapes: Q queries, k candidates per query.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from datamodules.records import MiningPool, UserError
from lightning_modules.retrieval.bm25 import Bm25Index
from lightning_modules.retrieval.search import MEMORY, Shards, top_k


@dataclass(frozen=True)
class MiningContext:
    """What miners can use besides the pool.

    queries, documents: vectors of the pool, for miners with needs_vectors.
    pools: those of all tasks.
    memory: number of bytes for scores at a time.
    backend: of the exact search (search.BACKENDS).
    prepared: what a miner computes once for a pool, such as an index. It lives as long as the pool.
    """

    queries: Shards | None = None
    documents: Shards | None = None
    pools: Sequence[MiningPool] = ()
    memory: int = MEMORY
    backend: str = "auto"
    device: torch.device | str = "cpu"
    prepared: dict[str, Any] = field(default_factory=dict)


class Miner(ABC):
    """Ranks documents for queries. Scores are those of the model if it needs_vectors, else on any scale."""

    needs_vectors: ClassVar[bool] = False

    def __init__(self) -> None:  # noqa: B027  configurations are checked against this signature
        pass

    @abstractmethod
    def rank(self, pool: MiningPool, queries: range, k: int, context: MiningContext) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best documents of some queries, best first: rows (Q, k) int64, -1 for none, and scores (Q, k).

        queries: their numbers in the pool. Raises UserError if the miner cannot rank this pool.
        """

    @property
    def description(self) -> dict[str, Any]:
        """The class of the miner, and its arguments."""
        return {"miner": f"{type(self).__module__}.{type(self).__name__}"} | vars(self)


class DenseMiner(Miner):
    """Rank by the model's vectors (ANCE, Xiong et al., 2021)."""

    needs_vectors = True

    def rank(self, pool, queries, k, context):
        return top_k(
            context.queries.gather(np.arange(queries.start, queries.stop)),
            context.documents,
            k,
            backend=context.backend,
            memory=context.memory,
            device=context.device,
        )


class RankBandMiner(DenseMiner):
    """Take only ranks [first, last) of DenseMiner: hard, but not the hardest (SciNCL, Ostendorff et al., 2022)."""

    def __init__(self, first: int, last: int):
        if not 0 <= first < last:
            raise UserError(f"first and last: expected 0 <= first < last, got {first} and {last}")
        self.first, self.last = first, last

    def rank(self, pool, queries, k, context):
        rows, scores = super().rank(pool, queries, self.last, context)
        if rows.shape[1] <= self.first:
            raise UserError(
                f"first: expected a rank below the number of documents of {pool.name}, {rows.shape[1]}, got "
                f"{self.first}"
            )
        rows[:, : self.first] = -1  # so that ranks remain those of the complete ranking
        return rows, scores


class RandomMiner(Miner):
    """Draw random documents: a baseline for other miners. All scores are 0."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def rank(self, pool, queries, k, context):
        count, k = len(pool.corpus), min(k, len(pool.corpus))
        rows = np.stack([np.random.default_rng([self.seed, q]).choice(count, k, replace=False) for q in queries])
        return rows.astype(np.int64), np.zeros(rows.shape)


class BM25Miner(Miner):
    """Rank by BM25. Documents that share no word with the query are never returned."""

    def rank(self, pool, queries, k, context):
        if "bm25" not in context.prepared:
            context.prepared["bm25"] = Bm25Index(pool.corpus)
        return context.prepared["bm25"].top_k(pool.queries[queries.start : queries.stop], min(k, len(pool.corpus)))


class ShownMiner(Miner):
    """Take the hard negatives of the data: documents that were shown and not clicked (grade 0 in the train split).

    As mined negatives they go through the filters.
    """

    def rank(self, pool, queries, k, context):
        starts, documents = pool.judged_negatives.starts, pool.judged_negatives.values
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        for i, query in enumerate(queries):
            shown = documents[starts[query] : starts[query + 1]][:k]
            rows[i, : len(shown)] = shown
        return rows, np.zeros(rows.shape)


class TwoHopMiner(Miner):
    """Rank documents that are two links away from the query by the number of paths, which is their score.

    A subclass defines the links.
    """

    @abstractmethod
    def links(self, pool: MiningPool, context: MiningContext) -> tuple[Sequence[np.ndarray], Mapping[int, np.ndarray]]:
        """Return the links of each query to intermediate nodes, and of each node to documents of the pool."""

    def rank(self, pool, queries, k, context):
        if "links" not in context.prepared:
            context.prepared["links"] = self.links(pool, context)
        first_hops, second_hops = context.prepared["links"]
        k = min(k, len(pool.corpus))
        rows, scores = np.full((len(queries), k), -1, dtype=np.int64), np.zeros((len(queries), k))
        for i, query in enumerate(queries):
            ends = [second_hops[node] for node in first_hops[query].tolist() if node in second_hops]
            if ends:
                documents, num_paths = np.unique(np.concatenate(ends), return_counts=True)
                best = np.lexsort((documents, -num_paths))[:k]
                rows[i, : len(best)], scores[i, : len(best)] = documents[best], num_paths[best]
        return rows, scores


def positives_of(pool: MiningPool) -> list[np.ndarray]:
    """Return the positives of each query."""
    return np.split(pool.positives.values, pool.positives.starts[1:-1])


class CitedByCitedMiner(TwoHopMiner):
    """Take papers that the papers cited by the query cite (SPECTER, Cohan et al., 2020; SciMult, section 3.4).

    The queries of the pool must be documents of its corpus.
    """

    def links(self, pool, context):
        if (pool.document_of_query < 0).all():
            raise UserError(
                f"{pool.name}: CitedByCitedMiner needs papers that cite papers (link_prediction), but no query is a "
                "document of the corpus"
            )
        positives = positives_of(pool)
        return positives, {
            int(row): cited for row, cited in zip(pool.document_of_query, positives, strict=True) if row >= 0
        }


class LabelsOfCitedMiner(TwoHopMiner):
    """Take labels of papers that the query cites (SciMult, section 3.4).

    Citations come from the pools of link prediction, where papers must have the same ids.
    """

    def links(self, pool, context):
        cited: dict[str, list[str]] = {}
        for other in context.pools:
            for query, row, positives in zip(other.queries, other.document_of_query, positives_of(other), strict=True):
                if row >= 0:
                    cited.setdefault(query.id, []).extend(other.corpus[positive].id for positive in positives.tolist())
        query_numbers = {query.id: i for i, query in enumerate(pool.queries)}
        first_hops = [
            np.array([query_numbers[id] for id in cited.get(query.id, ()) if id in query_numbers], dtype=np.int64)
            for query in pool.queries
        ]
        if not any(len(hops) for hops in first_hops):
            raise UserError(
                f"{pool.name}: LabelsOfCitedMiner takes citations from link_prediction tasks, but none of theirs is "
                "between papers of this collection"
            )
        return first_hops, dict(enumerate(positives_of(pool)))


class SharingMiner(Miner):
    """Take papers that share an author, a venue or another value with the query's paper (SciMult, section 3.4).

    If queries are not documents of the corpus (as with labels), take the positives of those papers. Papers that share
    most values come first; ties are broken randomly by the seed.

    papers: JSON-lines file of the papers with their ids and values.
    field: field to compare, one value or a list of values.
    id: field of the paper's id.
    most: maximum number of papers to draw for each value.
    """

    def __init__(self, papers: str, field: str, id: str = "id", most: int = 1000, seed: int = 0):
        if most < 1:
            raise UserError(f"most: expected a number above 0, got {most}")
        self.papers, self.field, self.id, self.most, self.seed = papers, field, id, most, seed

    def rank(self, pool, queries, k, context):
        if "sharing" not in context.prepared:
            context.prepared["sharing"] = self._groups(pool)
        groups: _SharedValues = context.prepared["sharing"]
        k = min(k, len(pool.corpus))
        rows, scores = np.full((len(queries), k), -1, dtype=np.int64), np.zeros((len(queries), k))
        for i, query in enumerate(queries):
            rng = np.random.default_rng([self.seed, query])
            sharing = [
                rng.permutation(group)[: self.most] if len(group) > self.most else group
                for group in (groups.queries_of_value[value] for value in groups.values[query])
            ]
            others = [other for group in sharing for other in group.tolist() if other != query]
            if others:
                offered = np.concatenate([groups.documents[other] for other in others])
                documents, num_shared = np.unique(offered, return_counts=True)
                best = np.lexsort((rng.random(len(documents)), -num_shared))[:k]
                rows[i, : len(best)], scores[i, : len(best)] = documents[best], num_shared[best]
        return rows, scores

    def _groups(self, pool: MiningPool) -> _SharedValues:
        known = _read_values(Path(self.papers), self.id, self.field, {query.id for query in pool.queries})
        values = [known.get(query.id, []) for query in pool.queries]
        queries_of_value = defaultdict(list)
        for query, values_of_query in enumerate(values):
            for value in values_of_query:
                queries_of_value[value].append(query)
        if not any(len(queries) > 1 for queries in queries_of_value.values()):
            raise UserError(f"{pool.name}: no two of its papers share a value of {self.field!r} in {self.papers}")
        positives = positives_of(pool)
        documents = [
            np.array([row]) if row >= 0 else positives_of_query
            for row, positives_of_query in zip(pool.document_of_query, positives, strict=True)
        ]
        return _SharedValues(values, {value: np.array(group) for value, group in queries_of_value.items()}, documents)


@dataclass(frozen=True)
class _SharedValues:
    """Which queries share values, and the documents that each query's paper offers to the others."""

    values: list[list[str]]
    queries_of_value: Mapping[str, np.ndarray]
    documents: list[np.ndarray]


def _read_values(path: Path, id: str, field: str, papers: set[str]) -> dict[str, list[str]]:
    """Return the distinct values of a field for each of the papers.

    Raises UserError with file and line if the file cannot be read, or a line is not a JSON object with an id.
    """
    values: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                record = _json_object(line)
                if id not in record:
                    raise UserError(f"{path}:{number}: expected a JSON object with {id!r}, got {line[:60]!r}")
                if str(record[id]) in papers:
                    value = record.get(field) or []
                    value = value if isinstance(value, list) else [value]
                    values[str(record[id])] = list(dict.fromkeys(map(str, value)))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"papers: {path} cannot be read ({error})") from error
    return values


def _json_object(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
