"""The contents of results.json as dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from datamodules.files import RECREATED, damage_explained, read_json, write_json
from datamodules.records import UserError, check_name, short

T = TypeVar("T")
# Keys that are left out if they are None. Other keys are written as null.
OMITTED_IF_NONE = ("document_fingerprint", "texts", "draws", "spread", "cost", "tokens_per_second", "mfu", "money")


@dataclass(kw_only=True)
class Cost:
    """The cost of evaluating a system, over all ranks.

    texts, tokens: number of encoded texts and tokens, without padding. Texts with cached vectors do not count.
    texts_per_second, tokens_per_second: speed of one device while encoding; None if nothing was encoded.
    mfu: useful operations per second of one device, relative to a large matrix product (see throughput.py).
    device_seconds: seconds on this rank, times the number of devices.
    memory_mb: peak memory of a GPU, or of a process without one.
    money: price of the device seconds; None if no price was given.
    """

    texts: int
    tokens: int
    texts_per_second: float | None = None
    devices: int
    device_seconds: float
    memory_mb: int
    tokens_per_second: float | None = None
    mfu: float | None = None
    money: float | None = None

    def price(self, per_hour: float) -> None:
        """Compute `money`. per_hour: price of one device per hour."""
        self.money = round(self.device_seconds / 3600 * per_hour, 6)


@dataclass(kw_only=True)
class SystemResult:
    """The metrics of one system on one benchmark, and how they were measured.

    metrics: name -> value; 1 is best.
    model: path or name of the model.
    fingerprint: hash of the model's weights, arguments and vocabulary.
    document_fingerprint: fingerprint of the model that encoded the documents, if it is another model.
    max_length: maximum number of tokens per text.
    texts: number of encoded documents and queries.
    seconds: stage -> seconds.
    draws, spread: in few-shot learning, the number of draws, and the standard deviation of each metric over draws.
    """

    metrics: dict[str, float]
    model: str | None = None
    fingerprint: str | None = None
    document_fingerprint: str | None = None
    max_length: int | None = None
    similarity: str | None = None
    expert: str | None = None
    instruction: str = ""
    precision: str = "fp32"
    device: str | None = None
    texts: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    draws: int | None = None
    spread: dict[str, float] | None = None
    cost: Cost | None = None


@dataclass(kw_only=True)
class BenchmarkTable:
    """The results of several systems on one benchmark.

    queries, documents: number of queries and documents.
    data: fingerprint of texts and judgements.
    options: protocol settings.
    Fields that an old file lacks are None.
    """

    task: str | None = None
    split: str | None = None
    queries: int | None = None
    documents: int | None = None
    protocol: str | None = None
    metrics: list[str] | None = None
    data: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    systems: dict[str, SystemResult] = field(default_factory=dict)


@dataclass(kw_only=True)
class RunInfo:
    """Origin of the results of a training run.

    steps: planned number of optimizer steps. stopped_at: step at which training stopped early, or None.
    """

    experiment: str
    scale: str
    seed: int
    steps: int
    checkpoint: str
    checkpoint_step: int
    split: str
    metrics: list[str]
    stopped_at: int | None = None


@dataclass(kw_only=True)
class EvaluationInfo:
    """Origin of the results of `make eval`. command: arguments of the command."""

    model: str = ""
    similarity: str = ""
    metrics: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] | None = None
    command: list[str] = field(default_factory=list)
    created: str = ""


Benchmarks = dict[str, BenchmarkTable]


@dataclass(kw_only=True)
class Results:
    """The contents of a results.json: its origin, and the table of each benchmark."""

    info: RunInfo | EvaluationInfo
    benchmarks: Benchmarks

    @property
    def systems(self) -> list[str]:
        """Names of all systems, in order of appearance."""
        return list(dict.fromkeys(name for table in self.benchmarks.values() for name in table.systems))

    def means(self) -> dict[str, float]:
        """Return the mean of the first metric for each system that was evaluated on all benchmarks."""
        means = {name: mean_over(self.benchmarks, name, self.info.metrics[0]) for name in self.systems}
        return {name: mean for name, mean in means.items() if mean is not None}

    def write(self, path: Path) -> None:
        write_json(path, {**dataclasses.asdict(self.info), "benchmarks": tables_to_json(self.benchmarks)})


def mean_over(benchmarks: Benchmarks, system: str, metric: str) -> float | None:
    """Return a system's mean of a metric over all benchmarks, or None if a benchmark has no value for it."""
    results = [table.systems.get(system) for table in benchmarks.values()]
    values = [result.metrics.get(metric) if result else None for result in results]
    return None if None in values else statistics.fmean(values)


def read_results(path: Path) -> Results:
    """Read a results.json of a run or of `make eval`. Raises UserError if it is damaged or not such a file."""
    content, benchmarks = read_tables(path)
    kind = RunInfo if "experiment" in content else EvaluationInfo
    with damage_explained(path, "results of evaluations"):
        return Results(info=_checked(kind, content), benchmarks=benchmarks)


def read_run_results(path: Path) -> tuple[Results, RunInfo]:
    """Read the results.json of a training run."""
    results = read_results(path)
    if not isinstance(results.info, RunInfo):
        raise UserError(f"{path}: expected the results of a training run. {RECREATED}")
    return results, results.info


def read_tables(path: Path) -> tuple[dict[str, Any], Benchmarks]:
    """Read a file with the tables of benchmarks, and return its content and the tables. Raises UserError as above."""
    content = read_json(path, {"benchmarks": dict})
    with damage_explained(path, "results of evaluations"):
        return content, tables_from_json(content["benchmarks"])


def tables_to_json(tables: Benchmarks) -> dict[str, Any]:
    """Return tables in the layout of results.json: "systems" has the metrics, "measured" everything else."""
    content = {}
    for name, table in tables.items():
        entry = dataclasses.asdict(table)
        systems = entry.pop("systems")
        entry["systems"] = {system: result.pop("metrics") for system, result in systems.items()}
        entry["measured"] = {system: _without_none(result) for system, result in systems.items()}
        content[name] = entry
    return content


def tables_from_json(content: Mapping[str, Any]) -> Benchmarks:
    """Return the tables of a results.json."""
    tables = {}
    for name, entry in content.items():
        check_name("benchmark", name)
        systems = {}
        for system, metrics in entry["systems"].items():
            check_name("system", system)
            measured = entry.get("measured", {}).get(system, {})
            cost = _checked(Cost, measured["cost"]) if "cost" in measured else None
            systems[system] = _checked(SystemResult, measured | {"metrics": metrics, "cost": cost})
        tables[name] = _checked(BenchmarkTable, entry | {"systems": systems})
    return tables


def _checked(kind: type[T], content: Mapping[str, Any]) -> T:
    """Build a dataclass from the keys of content that are its fields. Raises ValueError if a value has a wrong type."""
    hints = _type_hints(kind)
    values = {key: value for key, value in content.items() if key in hints}
    for key, value in values.items():
        if not _has_type(value, hints[key]) or (key, value) == ("metrics", []):
            raise ValueError(f"{key} cannot be {short(value)}")
    return kind(**values)


_type_hints = functools.cache(get_type_hints)


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON has a type. An integer also counts as a float."""
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, each) for each in get_args(hint))
    if get_origin(hint) in (list, dict):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, get_origin(hint)) and all(_has_type(item, get_args(hint)[-1]) for item in items)
    return hint is Any or type(value) is hint or (hint is float and type(value) is int)


def _without_none(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if key == "cost" and value else value
        for key, value in content.items()
        if value is not None or key not in OMITTED_IF_NONE
    }


def combine(*results: Benchmarks) -> Benchmarks:
    """Merge the tables of several systems. The result has all their metrics.

    If a system has several results on a benchmark, the last one counts. Raises UserError if benchmarks with the same
    name differ.
    """
    combined: Benchmarks = {}
    for tables in results:
        for name, table in tables.items():
            target = combined.setdefault(name, dataclasses.replace(table, systems={}))
            for key in ("protocol", "data"):
                first, second = getattr(target, key), getattr(table, key)
                if first != second:
                    raise UserError(f"{name}: results that differ in {key} cannot share a table ({first} and {second})")
            target.systems |= table.systems
            metrics = dict.fromkeys([*(target.metrics or ()), *(table.metrics or ())])
            measured = {metric for result in target.systems.values() for metric in result.metrics}
            target.metrics = [metric for metric in metrics if metric in measured] or None
    return combined


def total_cost(results: Sequence[SystemResult]) -> Cost:
    """Add up the costs of one system over several benchmarks. Memory is the maximum.

    All results must have a cost. The sum has a price only if every cost has one.
    """
    costs = [result.cost for result in results]
    with_seconds = [(result.cost, result.seconds["encode"]) for result in results if result.cost.texts]
    encoding, devices = sum(seconds for _, seconds in with_seconds), max(cost.devices for cost in costs)
    texts, tokens = sum(cost.texts for cost in costs), sum(cost.tokens for cost in costs)
    has_mfu = encoding and all(cost.mfu is not None for cost, _ in with_seconds)
    return Cost(
        texts=texts,
        tokens=tokens,
        texts_per_second=texts / devices / encoding if encoding else None,
        tokens_per_second=tokens / devices / encoding if encoding else None,
        mfu=sum(cost.mfu * seconds for cost, seconds in with_seconds) / encoding if has_mfu else None,
        devices=devices,
        device_seconds=sum(cost.device_seconds for cost in costs),
        memory_mb=max(cost.memory_mb for cost in costs),
        money=None if any(cost.money is None for cost in costs) else sum(cost.money for cost in costs),
    )
