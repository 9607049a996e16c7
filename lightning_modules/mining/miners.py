"""Propose candidates for hard negatives: each miner ranks a pool's documents for its training queries.

Shapes: Q queries, k candidates per query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from datamodules.citation_graph import CitationGraph
from datamodules.files import json_object
from datamodules.options import check_number
from datamodules.records import MiningPool, UserError, explained, short
from datamodules.store import checksum
from lightning_modules.retrieval.bm25 import Bm25Index
from lightning_modules.retrieval.search import MEMORY, Shards, top_k


@dataclass(frozen=True)
class MiningContext:
    """Other inputs that a miner may need.

    queries, documents: vectors of the pool, for miners with needs_vectors.
    pools: pools of all tasks.
    memory: memory limit of the search, in bytes.
    backend: library for exact search, one of search.BACKENDS.
    device: device of the search.
    prepared: cache for data that a miner computes once per pool, such as an index.
    """

    queries: Shards | None = None
    documents: Shards | None = None
    pools: Sequence[MiningPool] = ()
    memory: int = MEMORY
    backend: str = "auto"
    device: torch.device | str = "cpu"
    prepared: dict[str, Any] = field(default_factory=dict)


class Miner(ABC):
    """Rank documents for queries. With needs_vectors, scores come from the model; otherwise, any scale is possible."""

    needs_vectors: ClassVar[bool] = False

    def __init__(self) -> None:  # noqa: B027  configurations are checked against this signature
        pass

    @abstractmethod
    def rank(self, pool: MiningPool, queries: range, k: int, context: MiningContext) -> tuple[np.ndarray, np.ndarray]:
        """Return the best documents of each query, best first: rows (Q, k) int64, -1 for none, and scores (Q, k).

        queries: query numbers in the pool. Raises UserError if the miner cannot rank this pool.
        """

    @property
    def description(self) -> dict[str, Any]:
        """Class and arguments of the miner."""
        return {"miner": f"{type(self).__module__}.{type(self).__name__}"} | vars(self)


class DenseMiner(Miner):
    """Rank by the dot product of the model's vectors (ANCE, Xiong et al., 2021)."""

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
    """Take ranks first to last - 1 of DenseMiner: hard, but not the hardest (SciNCL, Ostendorff et al., 2022)."""

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
        rows[:, : self.first] = -1  # padding, so that columns remain ranks
        return rows, scores


class RandomMiner(Miner):
    """Draw random documents, as a baseline for other miners. All scores are 0."""

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
    """Take the data's own hard negatives: documents that were shown but not clicked (grade 0 in the train split).

    The filters also apply to them, because they count as mined negatives.
    """

    def rank(self, pool, queries, k, context):
        shown = pool.judged_negatives.take(np.arange(queries.start, queries.stop)).padded()[:, :k].astype(np.int64)
        rows = np.pad(shown, ((0, 0), (0, k - shown.shape[1])), constant_values=-1)
        return rows, np.zeros(rows.shape)


class RelatedMiner(Miner):
    """Rank the documents that are related to a query. Subclasses define what "related" means."""

    @abstractmethod
    def relations(self, pool: MiningPool, context: MiningContext) -> Any:
        """Return the data that `related` needs for a pool. It is computed once."""

    @abstractmethod
    def related(self, relations: Any, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the documents that are related to a query, and their scores, (n,) each.

        Documents with equal scores keep their order.
        """

    def rank(self, pool, queries, k, context):
        key = f"relations of {type(self).__qualname__} {vars(self)}"
        if key not in context.prepared:
            context.prepared[key] = self.relations(pool, context)
        k = min(k, len(pool.corpus))
        rows, scores = np.full((len(queries), k), -1, dtype=np.int64), np.zeros((len(queries), k))
        for i, query in enumerate(queries):
            documents, values = self.related(context.prepared[key], query)
            best = np.argsort(-values, kind="stable")[:k]
            rows[i, : len(best)], scores[i, : len(best)] = documents[best], values[best]
        return rows, scores


class TwoHopMiner(RelatedMiner):
    """Rank documents that are two links away from the query, by the number of paths to them.

    `relations` returns the links: the intermediate nodes of each query, and the document rows of each node.
    """

    def related(self, relations, query):
        first_hops, second_hops = relations
        ends = [second_hops[node] for node in first_hops[query].tolist() if node in second_hops]
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *ends]), return_counts=True)


def positives_of(pool: MiningPool) -> list[np.ndarray]:
    """Return the positives of each query."""
    return np.split(pool.positives.values, pool.positives.starts[1:-1])


def check_cites(pool: MiningPool, miner: str) -> None:
    """Raise UserError if no query of a pool is a document of its corpus."""
    if (pool.document_of_query < 0).all():
        raise UserError(
            f"{pool.name}: {miner} needs papers that cite papers (link_prediction), but no query is a document of the "
            "corpus"
        )


class CitedByCitedMiner(TwoHopMiner):
    """Take papers cited by the papers that the query cites (SPECTER, Cohan et al., 2020; SciMult, section 3.4).

    The pool's queries must be documents of its corpus.
    """

    def relations(self, pool, context):
        check_cites(pool, "CitedByCitedMiner")
        positives = positives_of(pool)
        return positives, {
            int(row): cited for row, cited in zip(pool.document_of_query, positives, strict=True) if row >= 0
        }


class RandomWalkMiner(RelatedMiner):
    """Rank papers by the mean probability, over 1 to `steps` steps, that a random walk on the citations visits them.

    A walk moves between citing and cited papers. The pool's queries must be documents of its corpus.
    """

    def __init__(self, steps: int = 2):
        check_number("steps", steps, minimum=2)
        self.steps = steps

    def relations(self, pool, context):
        check_cites(pool, "RandomWalkMiner")
        # Queries that are not documents of the corpus are nodes after its documents.
        other_nodes = len(pool.corpus) + np.arange(len(pool.queries))
        nodes = np.where(pool.document_of_query < 0, other_nodes, pool.document_of_query)
        pairs = np.stack([nodes[pool.positives.owners], pool.positives.values], axis=1)
        return CitationGraph(pairs, len(pool.corpus) + len(pool.queries)), nodes, len(pool.corpus)

    def related(self, relations, query):
        graph, nodes, num_documents = relations
        visits = graph.visits(nodes[query], self.steps)
        visited, number = np.unique(np.concatenate([rows for rows, _ in visits]), return_inverse=True)
        shares = np.bincount(number, np.concatenate([shares for _, shares in visits]), len(visited)) / self.steps
        is_other = (visited != nodes[query]) & (visited < num_documents)
        return visited[is_other], shares[is_other]


class LabelsOfCitedMiner(TwoHopMiner):
    """Take labels of papers that the query cites (SciMult, section 3.4).

    Citations come from the link prediction pools, which must use the same paper ids.
    """

    def relations(self, pool, context):
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
                f"{pool.name}: LabelsOfCitedMiner needs citations from a link_prediction task, but no citation links "
                "two papers of this collection; check that both tasks use the same paper ids"
            )
        return first_hops, dict(enumerate(positives_of(pool)))


class SharingMiner(RelatedMiner):
    """Take papers that share an author, venue or other value with the query's paper (SciMult, section 3.4).

    If those papers are not documents of the corpus, as in classification, take their positives (labels). Papers that
    share the most values come first. Ties are broken at random.

    papers: JSON-lines file with the ids and values of the papers.
    field: field to compare, with one value or a list of values.
    id: field of the paper's id.
    most: maximum number of papers to draw per value.
    seed: seed of the random draws.
    """

    def __init__(self, papers: str, field: str, id: str = "id", most: int = 1000, seed: int = 0):
        check_number("most", most, above=0)
        self.papers, self.field, self.id, self.most, self.seed = papers, field, id, most, seed

    @property
    def description(self):
        with explained(f"papers: {self.papers} cannot be read"):
            return super().description | {"checksum": checksum(Path(self.papers))}

    def relations(self, pool, context):
        values_of_paper = _read_values(Path(self.papers), self.id, self.field, {query.id for query in pool.queries})
        values = [values_of_paper.get(query.id, []) for query in pool.queries]
        queries_of_value = defaultdict(list)
        for query, values_of_query in enumerate(values):
            for value in values_of_query:
                queries_of_value[value].append(query)
        if not any(len(queries) > 1 for queries in queries_of_value.values()):
            raise UserError(f"{pool.name}: no two of its papers share a value of {self.field!r} in {self.papers}")
        documents = [
            np.array([row]) if row >= 0 else positives
            for row, positives in zip(pool.document_of_query, positives_of(pool), strict=True)
        ]
        return _SharedValues(values, {value: np.array(group) for value, group in queries_of_value.items()}, documents)

    def related(self, relations, query):
        rng = np.random.default_rng([self.seed, query])
        sharing = [
            rng.permutation(group)[: self.most] if len(group) > self.most else group
            for group in (relations.queries_of_value[value] for value in relations.values[query])
        ]
        candidates = [relations.documents[other] for group in sharing for other in group.tolist() if other != query]
        documents, num_shared = np.unique(
            np.concatenate([np.zeros(0, dtype=np.int64), *candidates]), return_counts=True
        )
        order = rng.random(len(documents)).argsort()
        return documents[order], num_shared[order]


@dataclass(frozen=True)
class _SharedValues:
    """Values of each query, queries with each value, and rows of each query's candidates."""

    values: list[list[str]]
    queries_of_value: Mapping[str, np.ndarray]
    documents: list[np.ndarray]


def _read_values(path: Path, id: str, field: str, papers: set[str]) -> dict[str, list[str]]:
    """Return each paper's distinct values of a field. Raises UserError for an unreadable file or an invalid line."""
    values: dict[str, list[str]] = {}
    with (
        explained(f"papers: {path} cannot be read", OSError, UnicodeDecodeError),
        open(path, encoding="utf-8") as lines,
    ):
        for number, line in enumerate(lines, start=1):
            record = json_object(line)
            if record is None or id not in record:
                raise UserError(f"{path}:{number}: expected a JSON object with {id!r}, got {short(line)}")
            if str(record[id]) in papers:
                value = record.get(field) or []
                value = value if isinstance(value, list) else [value]
                values[str(record[id])] = list(dict.fromkeys(map(str, value)))
    return values
