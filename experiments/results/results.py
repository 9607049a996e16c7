"""Systems ranked and measured on benchmarks: figures, how they came about, and the files beside them."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.records import Benchmark, UserError
from experiments.results.cost import Meter
from experiments.results.figures import figures_of
from experiments.shared.progress import Progress
from lightning_modules.distributed.collectives import world_size
from lightning_modules.distributed.signals import leave_if_asked
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.compute import current
from lightning_modules.retrieval.evaluation import bm25_run, encoded, rank_vectors
from lightning_modules.retrieval.measure import depth
from lightning_modules.retrieval.metrics import Run
from lightning_modules.retrieval.probes import probe_runs
from lightning_modules.retrieval.search import Shards
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)
Results = dict[str, Any]


def evaluate_encoder(
    system: str,
    encoder: Encoder,
    benchmarks: Iterable[Benchmark],
    metrics: Sequence[str],
    folder: Path,
    *,
    similarity: str,
    token_budget: int | None,
    model: str = "",
    vectors: VectorCache | None = None,
) -> Results:
    """Rank and measure all benchmarks with an encoder.

    system: its name in the table and in run files. metrics, similarity: where a benchmark has none of its own. model:
    what the encoder was loaded from, to be noted. vectors: where the encoder's come from.
    """
    vectors = vectors or VectorCache(encoder, token_budget=token_budget)
    about = {"model": model or system, "fingerprint": vectors.fingerprint, "max_length": encoder.max_length}

    def ranked(benchmark: Benchmark, k: int) -> tuple[Iterable[Run], Results]:
        chosen, started = benchmark.similarity or similarity, time.monotonic()
        if benchmark.training is not None:
            chosen = "svr" if benchmark.probe.learns == "number" else "svm"
        texts = (len(benchmark.encoded_documents) + len(benchmark.queries)) // world_size()
        with Progress(f"{system} encodes {benchmark.name}", "texts", texts, brief=True) as progress:

            def advance(count: int) -> None:
                progress.advance(count)
                leave_if_asked()

            ids, queries, documents = encoded(encoder, benchmark, vectors, advance)
        seconds = {"encode": time.monotonic() - started}
        runs = _runs(system, encoder, benchmark, ids, queries, documents, k, chosen)
        return runs, about | {
            "similarity": chosen,
            "expert": encoder.expert_of(benchmark.task),
            "instruction": getattr(encoder, "instructions", {}).get(benchmark.task, ""),
            "precision": current(encoder.device),
            "device": device_name(encoder.device),
            "texts": len(benchmark.encoded_documents) + len(benchmark.queries),
            "seconds": seconds,
        }

    return _evaluate(system, encoder, ranked, benchmarks, metrics, folder)


def _runs(
    system: str,
    encoder: Encoder,
    benchmark: Benchmark,
    ids: Sequence[str],
    queries: np.ndarray,
    documents: Shards,
    k: int,
    similarity: str,
) -> Iterator[Run]:
    """One run, or in few-shot learning one for each draw. documents: of the corpus, or of the training papers."""
    if benchmark.training is not None:
        with Progress(f"{system} learns {benchmark.name}", "draws", benchmark.probe.draws, brief=True) as progress:
            for run in probe_runs(benchmark, ids, queries, documents.gather(np.arange(documents.count))):
                yield run
                progress.advance(1)
                leave_if_asked()
        return
    pairs = len(queries) * documents.count if benchmark.candidates is None else 0
    with Progress(f"{system} ranks {benchmark.name}", "pairs", pairs, brief=True) as progress:
        yield rank_vectors(
            benchmark, ids, queries, documents, k, similarity, device=encoder.device, advance=progress.advance
        )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def evaluate_bm25(benchmarks: Iterable[Benchmark], metrics: Sequence[str], folder: Path) -> Results:
    """The same for BM25; nothing where bm25s is not installed."""

    def ranked(benchmark: Benchmark, k: int) -> tuple[Iterable[Run], Results]:
        about = dict.fromkeys(("fingerprint", "max_length", "expert"))
        about |= {"instruction": "", "precision": "fp32", "device": "cpu", "seconds": {"encode": 0.0}}
        runs = (bm25_run(benchmark, k) for _ in range(1))
        return runs, {"model": "bm25", "similarity": "bm25"} | about

    if importlib.util.find_spec("bm25s") is None:
        log.warning("bm25s is not installed: the table is without BM25 (pip install bm25s)")
        return {}
    return _evaluate("bm25", None, ranked, benchmarks, metrics, folder)


def _evaluate(
    system: str,
    encoder: Encoder | None,
    ranked: Callable[[Benchmark, int], tuple[Iterable[Run], Results]],
    benchmarks: Iterable[Benchmark],
    metrics: Sequence[str],
    folder: Path,
) -> Results:
    """Benchmark name -> what was ranked, under "systems" the figures of this one, and under "measured" how."""
    results: Results = {}
    for benchmark in benchmarks:
        name, own = benchmark.name, benchmark.metrics or metrics
        log.info("%s on %s (%d queries, %d documents)", system, name, len(benchmark.queries), len(benchmark.corpus))
        meter = Meter(encoder)
        runs, about = ranked(benchmark, depth(own, benchmark))
        figures, more = figures_of(runs, benchmark, own, about["seconds"], folder, system)
        cost = meter.read(about["seconds"])
        about["seconds"] = {part: round(seconds, 2) for part, seconds in about["seconds"].items()}
        about |= more | {"cost": cost}
        results[name] = _about(benchmark, own) | {"systems": {system: figures}, "measured": {system: about}}
    return results


def _about(benchmark: Benchmark, metrics: Sequence[str]) -> Results:
    """Of a benchmark: its data and its protocol."""
    return {
        "task": benchmark.task,
        "split": benchmark.split,
        "queries": len(benchmark.queries),
        "documents": len(benchmark.corpus),
        "protocol": benchmark.protocol,
        "metrics": list(metrics),
        "data": benchmark.fingerprint(),
        "options": {
            "candidates": "corpus" if benchmark.candidates is None else "own",
            "exclude_query": benchmark.exclude_query,
            "names_first": benchmark.first is not None,
            "without_relevant": benchmark.without_relevant,
            **({"probe": vars(benchmark.probe)} if benchmark.training is not None else {}),
        },
    }


def combine(*parts: Results) -> Results:
    """The results of several systems on the same benchmarks as one.

    Raises UserError for two of one name that cannot be compared: of other protocols, or other data.
    """
    combined: Results = {}
    for part in parts:
        for name, result in part.items():
            if name not in combined:
                combined[name] = result | {"systems": {}, "measured": {}}
            for key in ("protocol", "data"):
                if combined[name].get(key) != result.get(key):
                    both = f"{combined[name].get(key)} and {result.get(key)}"
                    raise UserError(f"{name}: figures of different {key} cannot stand side by side ({both})")
            combined[name]["systems"] |= result["systems"]
            combined[name]["measured"] |= result.get("measured", {})
    return combined
