"""What was measured, out of the files of a run's folder or of one of `make eval`.

results.json                        what was measured, how, and the means
runs/BENCHMARK.SYSTEM.queries.tsv   the value of each metric for each query
runs/BENCHMARK.SYSTEM.trec          the ranking
runs/BENCHMARK.qrels                the judgements
runs/BENCHMARK.SYSTEM.draws.tsv     of few-shot learning, the figures of each draw, instead of single queries
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.files import read_json
from datamodules.records import UserError
from experiments.config.paths import runs_there

SAME = {"protocol": "protocols", "data": "data", "split": "splits", "task": "tasks"}  # key -> in words


@dataclass(frozen=True)
class Measured:
    """One system's figures in one folder. results: what stands in its results.json."""

    folder: Path
    system: str
    results: Mapping[str, Any]

    @property
    def benchmarks(self) -> dict[str, Mapping[str, Any]]:
        """Those that this system was measured on."""
        return {name: of for name, of in self.results["benchmarks"].items() if self.system in of["systems"]}

    def file(self, benchmark: str, kind: str) -> Path:
        """kind: "trec", "queries.tsv" or "draws.tsv"."""
        return self.folder / "runs" / f"{benchmark}.{self.system}.{kind}"

    def values(self, benchmark: str, metric: str) -> dict[str, float]:
        """Query -> value. Raises UserError if the metric was not measured for single queries."""
        path = self.file(benchmark, "queries.tsv")
        if self.file(benchmark, "draws.tsv").is_file():
            raise UserError(f"{metric} is a mean over draws of training papers, and not over queries")
        try:
            with open(path, encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
            return {row["query"]: float(row[metric]) for row in rows}
        except KeyError as error:
            names = ", ".join(name for name in rows[0] if name != "query") or "nothing"
            raise UserError(f"{path}: holds {names} of single queries, and no {metric}") from error
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); measure again with make eval") from error

    def ranking(self, benchmark: str, queries: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
        """Some queries' documents with their scores, best first."""
        wanted, found = set(queries), defaultdict(list)
        for query, _, document, _, score, _ in _fields(self.file(benchmark, "trec"), 6):
            if query in wanted:
                found[query].append((document, float(score)))
        return dict(found)

    def judgements(self, benchmark: str, queries: Sequence[str]) -> dict[str, dict[str, int]]:
        """Some queries' relevant documents with their grades."""
        wanted, found = set(queries), defaultdict(dict)
        for query, _, document, grade in _fields(self.folder / "runs" / f"{benchmark}.qrels", 4):
            if query in wanted and int(grade) > 0:
                found[query][document] = int(grade)
        return dict(found)

    def first_ranks(self, benchmark: str, queries: Sequence[str]) -> dict[str, int | None]:
        """The rank of each query's first relevant document, None if none was retrieved."""
        relevant, ranks = self.judgements(benchmark, queries), Counter()
        found: dict[str, int | None] = dict.fromkeys(queries)
        for query, _, document, *_ in _fields(self.file(benchmark, "trec"), 6):
            ranks[query] += 1
            if document in relevant.get(query, ()) and found[query] is None:
                found[query] = ranks[query]
        return found


def _fields(path: Path, count: int) -> Iterator[list[str]]:
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                fields = line.split()
                if len(fields) != count:
                    raise UserError(f"{path}, line {number}: expected {count} fields, got {line.strip()!r}")
                yield fields
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); measure again with make eval") from error


def open_measured(key: str, name: str) -> list[Measured]:
    """The systems that key=FOLDER[:SYSTEM],... names, several of them where these are seeds of one.

    By default a run's trained encoder, or what an evaluation measured. Raises UserError for what is not there.
    """
    found = [_one(key, part) for part in name.split(",")]
    if len({(part.folder.resolve(), part.system) for part in found}) < len(found):
        raise UserError(f"{key}: the same system is named twice: {name}")
    return found


def _one(key: str, name: str) -> Measured:
    folder, system = Path(name), ""
    if not folder.is_dir() and ":" in name:
        folder, _, system = name.rpartition(":")
        folder = Path(folder)
    path = folder / "results.json"
    if not folder.exists():
        raise UserError(f"{key}: {folder} is not there, and has no results.json. {runs_there()}")
    if not path.is_file():
        found = ", ".join(sorted(str(p.parent) for p in folder.glob("evaluation/*/results.json")))
        more = f"; there are {found}" if found else " (it is that of a complete run, or of make eval)"
        raise UserError(f"{key}: {folder} has no results.json{more}")
    results = read_json(path)
    try:
        systems = list(dict.fromkeys(s for of in results["benchmarks"].values() for s in of["systems"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no results of benchmarks") from error
    if not system:
        system = "trained" if "trained" in systems else systems[-1] if len(systems) == 1 else ""
    if system not in systems:
        raise UserError(f"{key}: which system of {folder}? There are {', '.join(f'{folder}:{s}' for s in systems)}")
    return Measured(folder, system, results)


def aligned(
    one: Sequence[Measured], other: Sequence[Measured], benchmark: str, metric: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Values (S, Q) and (S', Q) of the same queries, and these. Raises UserError if the queries differ."""
    tables = [part.values(benchmark, metric) for part in (*one, *other)]
    queries = list(tables[0])
    if not queries:
        raise UserError(f"{benchmark}: none of its queries counts in the mean")
    for part, table in zip((*one, *other), tables, strict=True):
        if table.keys() != tables[0].keys():
            raise UserError(f"{benchmark}: {part.folder} has measured other queries than {one[0].folder}")
    values = np.array([[table[query] for query in queries] for table in tables])
    return values[: len(one)], values[len(one) :], queries


def why_not(sides: Sequence[Measured], benchmark: str) -> str:
    """Why figures of this benchmark cannot be compared, in the user's words; empty if they can."""
    for part in sides:
        if benchmark not in part.benchmarks:
            return f"{part.folder} has not measured {part.system} on it"
        if not all(part.benchmarks[benchmark].get(key) for key in SAME):
            return f"{part.folder} does not tell the {' and '.join(SAME)} that it was measured with: measure it again"
    for key, words in SAME.items():
        found = list(dict.fromkeys(part.benchmarks[benchmark][key] for part in sides))
        if len(found) > 1:
            return f"other {words}: {' and '.join(found)}"
    return ""
