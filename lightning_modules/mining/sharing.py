"""Hard negatives from papers that have something in common: an author, or the venue (paper, section 3.4)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.records import MiningPool, UserError
from lightning_modules.mining.miners import Miner, positives_of


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
