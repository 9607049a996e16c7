"""Evaluate a system on a benchmark, and measure the cost."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from datamodules.records import Benchmark
from experiments.build.models import System
from experiments.results.results import Benchmarks, BenchmarkTable, Cost, SystemResult
from experiments.shared.progress import Progress
from lightning_modules.distributed.collectives import gather_objects
from lightning_modules.distributed.signals import leave_if_asked
from lightning_modules.encoders.base import Encoder
from lightning_modules.memory import Memory
from lightning_modules.retrieval.compute import active_precision, computing_in
from lightning_modules.retrieval.evaluation import STAGES, Stage, StageAdvance, evaluate, evaluate_bm25
from lightning_modules.throughput import computing_dtype, encoder_ceiling

log = logging.getLogger(__name__)


def evaluate_system(
    system: System,
    benchmark: Benchmark,
    metrics: Sequence[str],
    folder: Path,
    *,
    token_budget: int | None = None,
    precision: str = "fp32",
) -> Benchmarks:
    """Evaluate a system on a benchmark, and write the run files. Returns an empty result for BM25 if bm25s is missing.

    metrics: names of the metrics, unless the benchmark has its own. folder: folder for the run files.
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
    """Show the progress of each stage. A signal may stop the run between steps, except while ranking."""
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


class CostMeter:
    """Measures the cost of one system on one benchmark, from its construction to read().

    encoder: None for BM25.
    precision: precision of the encoder, such as "bf16".
    """

    def __init__(self, encoder: Encoder | None, precision: str = "fp32"):
        self.encoder, self.before = encoder, dict(encoder.encoded) if encoder else {}
        self.dtype = computing_dtype(precision)
        self.memory = Memory(encoder.device if encoder else torch.device("cpu"))
        self.memory.reset_peak()

    def read(self, seconds: Mapping[str, float]) -> Cost:
        """Return the cost so far. All ranks must call this. seconds: stage -> seconds on this rank."""
        encoded = {key: count - self.before[key] for key, count in self.encoder.encoded.items()} if self.encoder else {}
        usage = {"texts": 0, "tokens": 0, **encoded, "memory_mb": round(self.memory.peak() / 2**20)}
        encode_seconds = seconds.get("encode", 0.0)
        speed = {}
        if usage["texts"] and encode_seconds:
            speed = {f"{unit}_per_second": round(usage[unit] / encode_seconds, 1) for unit in ("texts", "tokens")}
            speed["mfu"] = round(usage["flops"] / encode_seconds / encoder_ceiling(self.encoder, self.dtype), 4)
        ranks = gather_objects(usage)
        return Cost(
            texts=sum(rank["texts"] for rank in ranks),
            tokens=sum(rank["tokens"] for rank in ranks),
            **speed,
            devices=len(ranks),
            device_seconds=round(sum(seconds.values()) * len(ranks), 2),
            memory_mb=max(rank["memory_mb"] for rank in ranks),
        )
