"""What proposes candidates: a miner ranks the documents of a pool for its training queries.

Shapes: Q queries of the pool in part, k candidates of each.
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
    """What a miner may use. queries, documents: vectors of the pool, where it needs_vectors. pools: of all tasks."""

    queries: Shards | None = None
    documents: Shards | None = None
    pools: Sequence[MiningPool] = ()
    memory: int = MEMORY
    backend: str = "auto"
    device: torch.device | str = "cpu"
    kept: dict[str, Any] = field(default_factory=dict)  # what a miner makes once for a pool


class Miner(ABC):
    """Ranks documents for queries. Its scores are the model's where it needs_vectors, else on a scale of its own."""

    needs_vectors: ClassVar[bool] = False

    def __init__(self) -> None:  # noqa: B027  a signature, which configurations are checked against
        pass

    @abstractmethod
    def rank(self, pool: MiningPool, part: range, k: int, context: MiningContext) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents, best first, of the queries in part: rows (Q, k) int64, -1 for none, and scores (Q, k).

        Raises UserError if it cannot rank this pool.
        """

    @property
    def about(self) -> dict[str, Any]:
        """Its class and arguments."""
        return {"miner": f"{type(self).__module__}.{type(self).__name__}"} | vars(self)


class DenseMiner(Miner):
    """The nearest by the model's vectors (ANCE, Xiong et al., 2021)."""

    needs_vectors = True

    def rank(self, pool, part, k, context):
        queries = context.queries.gather(np.arange(part.start, part.stop))
        how = {"backend": context.backend, "memory": context.memory, "device": context.device}
        return top_k(queries, context.documents, k, **how)


class RankBandMiner(DenseMiner):
    """The nearest of a band of ranks, [first, last): hard, yet not the nearest (SciNCL, Ostendorff et al., 2022)."""

    def __init__(self, first: int, last: int):
        if not 0 <= first < last:
            raise UserError(f"first, last: got {first} and {last}, expected 0 <= first < last")
        self.first, self.last = first, last

    def rank(self, pool, part, k, context):
        rows, scores = super().rank(pool, part, self.last, context)
        if rows.shape[1] <= self.first:
            raise UserError(
                f"{pool.name}: ranks from {self.first} on are asked for, and it has {rows.shape[1]} documents"
            )
        rows[:, : self.first] = -1  # ranks stay those of the whole ranking
        return rows, scores


class RandomMiner(Miner):
    """Any documents, drawn by the seed: what others are to be compared with. Scores are 0."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def rank(self, pool, part, k, context):
        count, k = len(pool.corpus), min(k, len(pool.corpus))
        rows = np.stack([np.random.default_rng([self.seed, q]).choice(count, k, replace=False) for q in part])
        return rows.astype(np.int64), np.zeros(rows.shape)


class BM25Miner(Miner):
    """The nearest by words; documents that share none are none."""

    def rank(self, pool, part, k, context):
        if "bm25" not in context.kept:
            context.kept["bm25"] = Bm25Index(pool.corpus)
        return context.kept["bm25"].top_k(pool.queries[part.start : part.stop], min(k, len(pool.corpus)))


class ShownMiner(Miner):
    """What the data themselves name, shown and not clicked (grade 0 in the train split), so that filters reach it."""

    def rank(self, pool, part, k, context):
        starts, documents = pool.shown
        rows = np.full((len(part), k), -1, dtype=np.int64)
        for i, query in enumerate(part):
            found = documents[starts[query] : starts[query + 1]][:k]
            rows[i, : len(found)] = found
        return rows, np.zeros(rows.shape)


class TwoHopMiner(Miner):
    """Documents that are two links away, those on most ways first. Scores are the numbers of ways.

    Which links, a subclass says.
    """

    @abstractmethod
    def links(self, pool: MiningPool, context: MiningContext) -> tuple[Sequence[np.ndarray], Mapping[int, np.ndarray]]:
        """From each query to what it is linked with, and from there to documents of the pool."""

    def rank(self, pool, part, k, context):
        if "links" not in context.kept:
            context.kept["links"] = self.links(pool, context)
        first, second = context.kept["links"]
        k = min(k, len(pool.corpus))
        rows, scores = np.full((len(part), k), -1, dtype=np.int64), np.zeros((len(part), k))
        for i, query in enumerate(part):
            ends = [second[middle] for middle in first[query].tolist() if middle in second]
            if ends:
                found, ways = np.unique(np.concatenate(ends), return_counts=True)
                best = np.lexsort((found, -ways))[:k]
                rows[i, : len(best)], scores[i, : len(best)] = found[best], ways[best]
        return rows, scores


def positives_of(pool: MiningPool) -> list[np.ndarray]:
    """Each query's positives."""
    starts, documents = pool.positives
    return np.split(documents, starts[1:-1])


class CitedByCitedMiner(TwoHopMiner):
    """What the papers that a paper cites cite themselves (SPECTER, Cohan et al., 2020; paper, section 3.4).

    For pools whose queries are documents of the corpus.
    """

    def links(self, pool, context):
        if (pool.own < 0).all():
            raise UserError(f"{pool.name}: CitedByCitedMiner is for papers that cite papers (kind: link_prediction)")
        positives = positives_of(pool)
        return positives, {int(own): found for own, found in zip(pool.own, positives, strict=True) if own >= 0}


class LabelsOfCitedMiner(TwoHopMiner):
    """Labels of papers that the paper cites (paper, section 3.4).

    Who cites whom it knows from the pools of link prediction, in which papers have the same ids.
    """

    def links(self, pool, context):
        cited: dict[str, list[str]] = {}
        for other in context.pools:
            for query, own, found in zip(other.queries, other.own, positives_of(other), strict=True):
                if own >= 0:
                    cited.setdefault(query.id, []).extend(other.corpus[row].id for row in found.tolist())
        number = {query.id: i for i, query in enumerate(pool.queries)}
        first = [
            np.array([number[name] for name in cited.get(query.id, ()) if name in number], dtype=np.int64)
            for query in pool.queries
        ]
        if not any(len(found) for found in first):
            raise UserError(
                f"{pool.name}: LabelsOfCitedMiner knows citations from tasks of the kind link_prediction, and none of "
                "theirs is between this collection's papers"
            )
        return first, dict(enumerate(positives_of(pool)))


class SharingMiner(Miner):
    """Papers that share a value with the query's paper; where queries are no documents (labels), their positives.

    papers: a JSON-lines file of the papers, with their id and the field (a value, or a list of them). Those that share
    most come first, the others in an order drawn by the seed. most: papers that are drawn for each value.
    """

    def __init__(self, papers: str, field: str, id: str = "id", most: int = 1000, seed: int = 0):
        if most < 1:
            raise UserError(f"most: got {most}, allowed are numbers above 0")
        self.papers, self.field, self.id, self.most, self.seed = papers, field, id, most, seed

    def rank(self, pool, part, k, context):
        if "sharing" not in context.kept:
            context.kept["sharing"] = self._groups(pool)
        values, groups, offered = context.kept["sharing"]
        k = min(k, len(pool.corpus))
        rows, scores = np.full((len(part), k), -1, dtype=np.int64), np.zeros((len(part), k))
        for i, query in enumerate(part):
            rng = np.random.default_rng([self.seed, query])
            near = [
                rng.permutation(groups[value])[: self.most] if len(groups[value]) > self.most else groups[value]
                for value in values[query]
            ]
            papers = [paper for group in near for paper in group.tolist() if paper != query]
            if papers:
                found, ways = np.unique(np.concatenate([offered[paper] for paper in papers]), return_counts=True)
                best = np.lexsort((rng.random(len(found)), -ways))[:k]
                rows[i, : len(best)], scores[i, : len(best)] = found[best], ways[best]
        return rows, scores

    def _groups(self, pool: MiningPool) -> tuple[list[list[str]], Mapping[str, np.ndarray], list[np.ndarray]]:
        """Each query's values; the queries of each value; and the documents that each query's paper stands for."""
        known = values_of(Path(self.papers), self.id, self.field, {query.id for query in pool.queries})
        values = [known.get(query.id, []) for query in pool.queries]
        groups = defaultdict(list)
        for query, own in enumerate(values):
            for value in own:
                groups[value].append(query)
        if not any(len(group) > 1 for group in groups.values()):
            raise UserError(f"{pool.name}: no two of its papers share a value of {self.field!r} in {self.papers}")
        positives = positives_of(pool)
        offered = [np.array([own]) if own >= 0 else found for own, found in zip(pool.own, positives, strict=True)]
        return values, {value: np.array(group) for value, group in groups.items()}, offered


def values_of(path: Path, id: str, field: str, wanted: set[str]) -> dict[str, list[str]]:
    """Paper -> its distinct values of a field, of the papers that are wanted.

    Raises UserError, with file and line, for what is no file of JSON objects with an id.
    """
    found: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                record = _record(line)
                if id not in record:
                    got = f"got {line[:60]!r}"
                    raise UserError(f"papers: {path}, line {number}: expected a JSON object with {id!r}, {got}")
                if str(record[id]) in wanted:
                    values = record.get(field) or []
                    values = values if isinstance(values, list) else [values]
                    found[str(record[id])] = list(dict.fromkeys(map(str, values)))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"papers: {path} cannot be read ({error})") from error
    return found


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
