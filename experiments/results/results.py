"""The contents of results.json as dataclasses, and the evaluation of a system that fills them."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from datamodules.files import RECREATED, read_json, write_json
from datamodules.records import Benchmark, UserError, check_name
from experiments.build.models import System
from experiments.results.cost import Cost, CostMeter
from experiments.shared.progress import Progress
from lightning_modules.distributed.signals import leave_if_asked
from lightning_modules.retrieval.compute import active_precision, computing_in
from lightning_modules.retrieval.evaluation import Stage, StageAdvance, evaluate, evaluate_bm25

log = logging.getLogger(__name__)

STAGES = {"encode": ("encodes", "texts"), "rank": ("ranks", "pairs"), "learn": ("learns", "draws")}
OMITTED_IF_NONE = (
    "document_fingerprint",
    "texts",
    "draws",
    "spread",
    "cost",
    "tokens_per_second",
    "mfu",
    "money",
)  # keys of an entry that are left out, not null


@dataclass(kw_only=True)
class SystemResult:
    """The metrics of one system on one benchmark, and how they were measured.

    metrics: name -> value, 1 is best.
    model: path or name of the model. fingerprint: hash of its weights, arguments and vocabulary.
    document_fingerprint: that of the model that encoded the documents, if it is another one.
    max_length: maximum number of tokens of a text.
    texts: number of encoded documents and queries. seconds: stage -> seconds.
    draws, spread: number of draws in few-shot learning, and standard deviation of each metric over them.
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

    queries, documents: how many there are. data: fingerprint of texts and judgements. options: protocol settings.
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
    """Where the results of a training run come from.

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
    """Where the results of `make eval` come from. command: its arguments."""

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
        metric, tables = self.info.metrics[0], self.benchmarks.values()
        values = {name: [t.systems[name].metrics[metric] for t in tables if name in t.systems] for name in self.systems}
        return {name: sum(scores) / len(scores) for name, scores in values.items() if len(scores) == len(tables)}

    def write(self, path: Path) -> None:
        write_json(path, {**dataclasses.asdict(self.info), "benchmarks": tables_to_json(self.benchmarks)})


def read_results(path: Path) -> Results:
    """Read a results.json of a run or of `make eval`. Raises UserError if it is damaged or is another kind of file."""
    content = read_json(path, {"benchmarks": dict})
    if not isinstance(content.get("metrics", []), list):  # files of earlier versions have none
        raise UserError(f"{path}: expected a list as metrics. {RECREATED}")
    try:
        benchmarks = tables_from_json(content["benchmarks"])
        info = RunInfo if "experiment" in content else EvaluationInfo
        return Results(info=info(**_known(info, content)), benchmarks=benchmarks)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: expected the results of benchmarks. {RECREATED}") from error


def read_run_results(path: Path) -> tuple[Results, RunInfo]:
    """Read the results.json of a training run."""
    results = read_results(path)
    if not isinstance(results.info, RunInfo):
        raise UserError(f"{path}: expected the results of a training run. {RECREATED}")
    return results, results.info


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
            metrics = {name: float(value) for name, value in metrics.items()}
            check_name("system", system)
            measured = entry.get("measured", {}).get(system, {})
            cost = Cost(**_known(Cost, {"texts_per_second": None} | measured["cost"])) if "cost" in measured else None
            systems[system] = SystemResult(**_known(SystemResult, measured) | {"metrics": metrics, "cost": cost})
        tables[name] = BenchmarkTable(**_known(BenchmarkTable, entry) | {"systems": systems})
    return tables


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: value for key, value in content.items() if key in names}


def _without_none(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if key == "cost" and value else value
        for key, value in content.items()
        if value is not None or key not in OMITTED_IF_NONE
    }


def evaluate_system(
    system: System,
    benchmark: Benchmark,
    metrics: Sequence[str],
    folder: Path,
    *,
    token_budget: int | None = None,
    precision: str = "fp32",
) -> Benchmarks:
    """Evaluate a system on a benchmark, and write the run files. Returns nothing for BM25 without bm25s.

    metrics: names of the metrics, unless the benchmark has its own. folder: where the run files go.
    token_budget: maximum number of tokens per forward pass. precision: "fp32", "tf32", "bf16", "fp16" or "auto".
    """
    if system.encoder is None and importlib.util.find_spec("bm25s") is None:
        log.warning("bm25s is not installed: the table has no BM25 (pip install bm25s)")
        return {}
    names = list(benchmark.metrics or metrics)
    log.info(
        "%s on %s (%d queries, %d documents)",
        *(system.name, benchmark.name, len(benchmark.queries), len(benchmark.corpus)),
    )
    if system.encoder is None:
        meter = CostMeter(None)
        result = evaluate_bm25(benchmark, names)
        origin = {"model": "bm25", "device": "cpu"}
    else:
        origin = _describe_encoder(system, benchmark)
        with computing_in(precision, system.encoder.device), _progress(system.name, benchmark.name) as advance:
            origin["precision"] = active_precision(system.encoder.device)
            meter = CostMeter(system.encoder, origin["precision"])
            result = evaluate(
                system.encoder,
                benchmark,
                names,
                similarity=system.similarity,
                token_budget=token_budget,
                vectors=system.vectors,
                document_vectors=system.document_vectors,
                advance=advance,
            )
        origin["texts"] = result.num_texts
    result.write(folder, system.name)
    table = _describe_benchmark(benchmark, names)
    table.systems[system.name] = SystemResult(
        **origin,
        metrics=result.metrics,
        similarity=result.similarity,
        seconds={stage: round(seconds, 2) for stage, seconds in result.seconds.items()},
        draws=len(result.draws) or None,
        spread=result.spread if result.draws else None,
        cost=meter.read(result.seconds),
    )
    return {benchmark.name: table}


def _describe_encoder(system: System, benchmark: Benchmark) -> dict[str, Any]:
    encoder = system.encoder
    return {
        "model": system.model or system.name,
        "fingerprint": system.vectors.fingerprint,
        "document_fingerprint": system.document_vectors.fingerprint if system.document_vectors else None,
        "max_length": encoder.max_length,
        "expert": encoder.expert_of(benchmark.task),
        "instruction": getattr(encoder, "instructions", {}).get(benchmark.task, ""),
        "device": torch.cuda.get_device_name(encoder.device) if encoder.device.type == "cuda" else encoder.device.type,
    }


def _describe_benchmark(benchmark: Benchmark, metrics: list[str]) -> BenchmarkTable:
    return BenchmarkTable(
        task=benchmark.task,
        split=benchmark.split,
        queries=len(benchmark.queries),
        documents=len(benchmark.corpus),
        protocol=benchmark.protocol,
        metrics=metrics,
        data=benchmark.fingerprint(),
        options={
            "candidates": "corpus" if benchmark.candidates is None else "own",
            "exclude_query": benchmark.exclude_query,
            "names_first": benchmark.first is not None,
            "without_relevant": benchmark.without_relevant,
            **({"probe": vars(benchmark.probe)} if benchmark.training is not None else {}),
        },
    )


@contextmanager
def _progress(system: str, benchmark: str) -> Iterator[StageAdvance]:
    """Show the progress of each stage. A signal may end the run between steps, except while ranking."""
    bars: dict[Stage, Progress] = {}
    with ExitStack() as stack:

        def advance(stage: Stage, count: int, total: int) -> None:
            if stage not in bars:
                stack.close()  # close the bar of the previous stage
                verb, unit = STAGES[stage]
                bars[stage] = stack.enter_context(Progress(f"{system} {verb} {benchmark}", unit, total, brief=True))
            bars[stage].advance(count)
            if stage != "rank":
                leave_if_asked()

        yield advance


def combine(*results: Benchmarks) -> Benchmarks:
    """Put several systems into the same tables. Raises UserError if benchmarks of the same name differ."""
    combined: Benchmarks = {}
    for tables in results:
        for name, table in tables.items():
            target = combined.setdefault(name, dataclasses.replace(table, systems={}))
            for key in ("protocol", "data"):
                first, second = getattr(target, key), getattr(table, key)
                if first != second:
                    raise UserError(f"{name}: results that differ in {key} cannot share a table ({first} and {second})")
            target.systems |= table.systems
    return combined
