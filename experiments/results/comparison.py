"""Read the results of systems from runs and from `make eval`, and compare them query by query."""

from __future__ import annotations

import csv
import dataclasses
import functools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.files import regular
from datamodules.records import Benchmark, Document, UserError
from experiments.build.benchmarks import BenchmarkOptions, collection_benchmarks, suite_benchmarks
from experiments.config.arguments import parse_known
from experiments.config.run_config import config_of_run, existing_runs, run_of
from experiments.results.results import BenchmarkTable, Results, RunInfo, read_results
from lightning_modules.retrieval.trec import decode_id

log = logging.getLogger(__name__)

WRITTEN_AGAIN = "delete results.json, and repeat the command that wrote it"
MUST_AGREE = {"protocol": "protocols", "data": "data", "split": "splits", "task": "tasks"}  # field -> its plural
MOST_RELEVANT = 3  # number of relevant documents to show per query


@dataclass(frozen=True)
class MeasuredSystem:
    """One system in the folder of a run or of `make eval`.

    results.json                        the metrics, and how they were measured
    runs/BENCHMARK.SYSTEM.queries.tsv   the value of each metric on each query
    runs/BENCHMARK.SYSTEM.trec          the rankings
    runs/BENCHMARK.qrels                the judgements
    runs/BENCHMARK.SYSTEM.draws.tsv     the metrics of each draw, for few-shot learning (replaces queries.tsv and trec)

    packages: packages with readers that the user allows.
    """

    folder: Path
    system: str
    results: Results
    packages: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.folder}:{self.system}"

    @property
    def benchmarks(self) -> dict[str, BenchmarkTable]:
        """The benchmarks that this system was evaluated on."""
        return {name: table for name, table in self.results.benchmarks.items() if self.system in table.systems}

    def file(self, benchmark: str, kind: Literal["trec", "queries.tsv", "draws.tsv"]) -> Path:
        return self.folder / "runs" / f"{benchmark}.{self.system}.{kind}"

    def main_metric(self, benchmark: str) -> str:
        metrics = self.benchmarks[benchmark].metrics or self.results.info.metrics
        if not metrics:
            raise UserError(f"{self.folder}/results.json does not name its metrics; evaluate it again")
        return metrics[0]

    def values(self, benchmark: str, metric: str) -> dict[str, float]:
        """Return the value of each query.

        Raises UserError if the metric is not computed per query, or if the file is damaged (its mean differs from the
        metric in results.json).
        """
        path = self.file(benchmark, "queries.tsv")
        expected = self.benchmarks[benchmark].systems[self.system].metrics.get(metric)
        if self.file(benchmark, "draws.tsv").is_file():
            raise UserError(f"{metric} is a mean over draws of training papers, not over queries")
        try:
            with open(regular(path), encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
            values = {decode_id(row["query"]): float(row[metric]) for row in rows}
            mean = sum(values.values()) / max(len(values), 1)
            if expected is not None and not math.isclose(mean, expected, abs_tol=1e-6):
                raise ValueError(f"the mean {metric} of its {len(values)} queries is {mean:.6f}, not {expected:.6f}")
            return values
        except KeyError as error:
            names = ", ".join(name for name in rows[0] if name != "query") or "no metric"
            raise UserError(f"{path}: has no values of {metric} per query, only of {names}") from error
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {WRITTEN_AGAIN}") from error

    def ranking(self, benchmark: str, queries: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
        """Return the ranked documents of some queries with their scores, best first."""
        wanted, rankings = set(queries), defaultdict(list)
        for query, document, score in _read_rows(self.file(benchmark, "trec"), 6, 4, float):
            if query in wanted:
                rankings[query].append((document, score))
        return dict(rankings)

    def judgements(self, benchmark: str, queries: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return the relevant documents of some queries with their grades."""
        wanted, judgements = set(queries), defaultdict(dict)
        for query, document, grade in _read_rows(self.folder / "runs" / f"{benchmark}.qrels", 4, 3, int):
            if query in wanted and grade > 0:
                judgements[query][document] = grade
        return dict(judgements)

    def first_ranks(self, benchmark: str, queries: Sequence[str]) -> dict[str, int | None]:
        """Return the rank of each query's first relevant document, or None if none was retrieved."""
        relevant, ranks = self.judgements(benchmark, queries), Counter()
        first: dict[str, int | None] = dict.fromkeys(queries)
        for query, document, _ in _read_rows(self.file(benchmark, "trec"), 6, 4, float):
            ranks[query] += 1
            if document in relevant.get(query, ()) and first[query] is None:
                first[query] = ranks[query]
        return first


def _read_rows(path: Path, count: int, column: int, kind: Callable[[str], Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield the query, document and number of each line. Raises UserError if a line has another form.

    count: number of fields per line. column, kind: position and type of the number.
    """
    try:
        with open(regular(path), encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                fields = line.split()
                try:
                    value = kind(fields[column])
                except (ValueError, IndexError):
                    value = None
                if len(fields) != count or value is None:
                    raise UserError(f"{path}:{number}: expected {count} fields with a number, got {line.strip()!r}")
                yield decode_id(fields[0]), decode_id(fields[2]), value
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {WRITTEN_AGAIN}") from error


def open_systems(key: str, names: Sequence[str], packages: Sequence[str] = ()) -> list[MeasuredSystem]:
    """Open FOLDER or FOLDER:SYSTEM for each seed of a system. If all are runs, they are sorted by their seeds.

    SYSTEM is by default a run's trained encoder, or the only system of an evaluation.
    key: option with the names, for error messages. packages: packages that the user allows.
    """
    systems = [dataclasses.replace(_open_system(key, name), packages=tuple(packages)) for name in names]
    if len({(system.folder.resolve(), system.system) for system in systems}) < len(systems):
        raise UserError(f"{key}: the same system is named twice in {','.join(names)}")
    if seeds := seeds_of(systems):
        systems = [systems[i] for i in np.argsort(seeds)]
    return systems


def _open_system(key: str, name: str) -> MeasuredSystem:
    folder, system = name, ""
    if not Path(name).is_dir() and ":" in name:
        folder, _, system = name.rpartition(":")
    folder = Path(folder)
    path = folder / "results.json"
    if not folder.exists():
        raise UserError(f"{key}: {folder} does not exist. {existing_runs()}")
    if not path.is_file():
        others = ", ".join(sorted(str(p.parent) for p in folder.glob("evaluation/*/results.json")))
        hint = f"; use {others}" if others else " (complete runs and output folders of make eval have it)"
        raise UserError(f"{key}: {folder} has no results.json{hint}")
    results = read_results(path)
    systems = results.systems
    if not results.benchmarks:
        raise UserError(f"{key}: {path} has no results (evaluation.split=none); evaluate it: make eval model={folder}")
    if not system:
        system = "trained" if "trained" in systems else systems[-1] if len(systems) == 1 else ""
    if system not in systems:
        choices = ", ".join(f"{folder}:{choice}" for choice in systems)
        raise UserError(f"{key}: which system of {folder}? Expected one of {choices}")
    return MeasuredSystem(folder, system, results)


def seeds_of(systems: Sequence[MeasuredSystem]) -> tuple[int, ...]:
    """Return the seeds of the systems' runs, or () if a system has no run or two have the same seed."""
    seeds = [info.seed for system in systems if isinstance(info := system.results.info, RunInfo)]
    return tuple(seeds) if len({*seeds}) == len(systems) else ()


def chosen_benchmarks(chosen: Sequence[str], measured: Iterable[str]) -> list[str]:
    """Return the benchmarks to compare on, by default all measured ones. Raises UserError if one was not measured."""
    measured = list(measured)
    if unknown := set(chosen) - set(measured):
        raise UserError(f"benchmark: no results on {', '.join(sorted(unknown))}; choose from {', '.join(measured)}")
    return list(chosen) or measured


def aligned_values(
    a: Sequence[MeasuredSystem], b: Sequence[MeasuredSystem], benchmark: str, metric: str, benchmark_b: str = ""
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the values of two systems on the same queries, (S, Q) and (S', Q), and the queries.

    a, b: seeds of each system. benchmark_b: benchmark of B, by default the same. Raises UserError if the queries
        differ.
    """
    tables = [system.values(benchmark, metric) for system in a]
    tables += [system.values(benchmark_b or benchmark, metric) for system in b]
    queries = list(tables[0])
    if not queries:
        raise UserError(f"{benchmark}: no queries were measured")
    for system, table in zip((*a, *b), tables, strict=True):
        if table.keys() != tables[0].keys():
            raise UserError(f"{benchmark}: {system.folder} and {a[0].folder} measured different queries")
    values = np.array([[table[query] for query in queries] for table in tables])
    return values[: len(a)], values[len(a) :], queries


def incomparable(systems: Sequence[MeasuredSystem], benchmark: str) -> str:
    """Return why the systems cannot be compared on a benchmark, or "" if they can."""
    for system in systems:
        table = system.benchmarks.get(benchmark)
        if table is None:
            return f"{system.folder} has no results of {system.system} on this benchmark"
        if not all(getattr(table, key) for key in MUST_AGREE):
            return f"{system.folder} lacks some of {', '.join(MUST_AGREE)}; evaluate it again"
    for key, plural in MUST_AGREE.items():
        values = list(dict.fromkeys(getattr(system.benchmarks[benchmark], key) for system in systems))
        if len(values) > 1:
            return f"different {plural}: {' and '.join(values)}"
    return ""


def largest_differences(
    a: MeasuredSystem,
    b: MeasuredSystem,
    name: str,
    queries: Sequence[str],
    values_a: np.ndarray,
    values_b: np.ndarray,
    count: int,
) -> dict[str, list[dict[str, Any]]]:
    """Describe the queries on which A leads most, and those on which B leads most.

    name: name of the benchmark. values_a, values_b: values of the queries, (Q,). count: queries for each side.
    """
    differences = values_a - values_b
    order = np.argsort(-differences, kind="stable")
    chosen = {
        "A": [i for i in order[:count] if differences[i] > 0],
        "B": [i for i in order[::-1][:count] if differences[i] < 0],
    }
    ids = [queries[i] for side in chosen.values() for i in side]
    if not ids:
        return {side: [] for side in chosen}
    benchmark = benchmark_of(a, name)
    relevant = a.judgements(name, ids)
    rankings = {"A": a.ranking(name, ids), "B": b.ranking(name, ids)}

    def describe(i: int) -> dict[str, Any]:
        query, grades = queries[i], relevant.get(queries[i], {})
        best = sorted(grades, key=grades.get, reverse=True)[:MOST_RELEVANT]
        firsts = {side: ranking[query][0][0] if ranking.get(query) else None for side, ranking in rankings.items()}
        return {
            "query": query,
            "text": short_text(benchmark and benchmark.queries.get(query), query),
            "A": float(values_a[i]),
            "B": float(values_b[i]),
            **{f"first_{side}": id and describe_document(benchmark, id, grades) for side, id in firsts.items()},
            "relevant": [describe_document(benchmark, document, grades) for document in best],
        }

    return {side: [describe(i) for i in rows] for side, rows in chosen.items()}


def describe_document(benchmark: Benchmark | None, id: str, grades: Mapping[str, int]) -> dict[str, Any]:
    """Return a document's id, short text and grade."""
    return {"id": id, "text": short_text(benchmark and benchmark.corpus.get(id), id), "grade": grades.get(id, 0)}


def short_text(document: Document | None, id: str, longest: int = 120) -> str:
    """Return a document's title or else its text, cut after a word, or its id if both are empty."""
    text = (document.title or document.text) if document else ""
    text = " ".join(text.split()) or id
    return text if len(text) <= longest else text[: longest - 1].rsplit(" ", 1)[0] + "…"


def benchmark_of(measured: MeasuredSystem, name: str) -> Benchmark | None:
    """Read the data of a benchmark again. If the data are gone or have changed, warn and return None."""
    table = measured.benchmarks[name]
    try:
        benchmark = _read_benchmark(measured.folder.resolve(), name, table.split, measured.packages)
    except UserError as error:
        log.warning("%s: ids are shown without their texts (%s)", name, error)
        return None
    if benchmark and benchmark.fingerprint() != table.data:
        log.warning("%s: the data have changed, so ids are shown without their texts", name)
        return None
    return benchmark


@functools.lru_cache(maxsize=2)
def _read_benchmark(folder: Path, name: str, split: str, packages: tuple[str, ...]) -> Benchmark | None:
    if (folder / "config.yaml").is_file():
        return benchmarks_of_run(folder, split, packages).get(name)
    info = read_results(folder / "results.json").info
    if isinstance(info, RunInfo):
        raise UserError(f"{folder}: config.yaml, which names the data of the run, is missing")
    options, _ = parse_known(BenchmarkOptions, info.command)
    if options.benchmarks:
        options.benchmarks = (name,)
        return next(suite_benchmarks(options), None)
    config = config_of_run(options.run or run_of(info.model), packages)
    return next((benchmark for benchmark in collection_benchmarks(options, config) if benchmark.name == name), None)


@functools.lru_cache(maxsize=1)
def benchmarks_of_run(folder: Path, split: str, packages: tuple[str, ...] = ()) -> dict[str, Benchmark]:
    """Return the benchmarks of a run's final table, by name. Raises UserError if the data cannot be read."""
    from experiments.build.data import build_data  # only here, because Lightning takes seconds to import

    data = build_data(config_of_run(folder, packages))
    return {benchmark.name: benchmark for benchmark in data.benchmarks(split)}
