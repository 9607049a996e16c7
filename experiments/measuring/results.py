"""Systems ranked and measured on benchmarks: figures, how they came about, and the files beside them."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from datamodules.records import Benchmark, UserError
from experiments.progress import Progress
from lightning_modules.distributed import rank, world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.measure import (
    depth,
    means,
    of_all_ranks,
    query_values,
    whole_run,
    write_qrels,
    write_query_values,
    write_trec,
)
from lightning_modules.metrics import Run
from lightning_modules.precision import current
from lightning_modules.retrieval import bm25_run, encoded, rank_vectors
from lightning_modules.signals import leave_if_asked
from lightning_modules.vectors import Vectors

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
    token_budget: int,
    model: str = "",
    vectors: Vectors | None = None,
) -> Results:
    """Rank and measure all benchmarks with an encoder.

    system: its name in the table and in run files. metrics, similarity: where a benchmark has none of its own. model:
    what the encoder was loaded from, to be noted. vectors: where the encoder's come from.
    """
    vectors = vectors or Vectors(encoder, token_budget=token_budget)
    about = {"model": model or system, "fingerprint": vectors.fingerprint, "max_length": encoder.max_length}

    def ranked(benchmark: Benchmark, k: int) -> tuple[Run, Results]:
        chosen, started = benchmark.similarity or similarity, time.monotonic()
        if benchmark.training is not None:
            chosen = "svm"
        texts = (len(benchmark.encoded_documents) + len(benchmark.queries)) // world_size()
        with Progress(f"{system} encodes {benchmark.name}", "texts", texts, brief=True) as progress:

            def advance(count: int) -> None:
                progress.advance(count)
                leave_if_asked()

            ids, queries, documents = encoded(encoder, benchmark, vectors, advance)
        between = time.monotonic()
        searched = benchmark.candidates is None and benchmark.training is None
        pairs = len(queries) * documents.count if searched else 0
        with Progress(f"{system} ranks {benchmark.name}", "pairs", pairs, brief=True) as progress:
            run = rank_vectors(
                benchmark, ids, queries, documents, k, chosen, device=encoder.device, advance=progress.advance
            )
        seconds = {"encode": between - started, "rank": time.monotonic() - between}
        return run, about | {
            "similarity": chosen,
            "expert": encoder.expert_of(benchmark.task),
            "instruction": getattr(encoder, "instructions", {}).get(benchmark.task, ""),
            "precision": current(encoder.device),
            "device": device_name(encoder.device),
            "texts": len(benchmark.corpus) + len(benchmark.queries),
            "seconds": seconds,
        }

    return _evaluate(system, ranked, benchmarks, metrics, folder)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def evaluate_bm25(benchmarks: Iterable[Benchmark], metrics: Sequence[str], folder: Path) -> Results:
    """The same for BM25; nothing where bm25s is not installed."""

    def ranked(benchmark: Benchmark, k: int) -> tuple[Run, Results]:
        started = time.monotonic()
        run = bm25_run(benchmark, k)
        about = dict.fromkeys(("fingerprint", "max_length", "expert"))
        about |= {"instruction": "", "precision": "fp32", "device": "cpu"}
        seconds = {"encode": 0.0, "rank": time.monotonic() - started}
        return run, {"model": "bm25", "similarity": "bm25"} | about | {"seconds": seconds}

    if importlib.util.find_spec("bm25s") is None:
        log.warning("bm25s is not installed: the table is without BM25 (pip install bm25s)")
        return {}
    return _evaluate("bm25", ranked, benchmarks, metrics, folder)


def _evaluate(
    system: str,
    ranked: Callable[[Benchmark, int], tuple[Run, Results]],
    benchmarks: Iterable[Benchmark],
    metrics: Sequence[str],
    folder: Path,
) -> Results:
    """Benchmark name -> what was ranked, under "systems" the figures of this one, and under "measured" how."""
    results: Results = {}
    for benchmark in benchmarks:
        name, own = benchmark.name, benchmark.metrics or metrics
        log.info("%s on %s (%d queries, %d documents)", system, name, len(benchmark.queries), len(benchmark.corpus))
        run, about = ranked(benchmark, depth(own, benchmark))
        started = time.monotonic()
        values = of_all_ranks(query_values(run, benchmark, own))
        figures = means(values, benchmark, own)
        about["seconds"]["metrics"] = time.monotonic() - started
        about["seconds"] = {part: round(seconds, 2) for part, seconds in about["seconds"].items()}
        whole = whole_run(run)
        if rank() == 0:
            write_trec(whole, folder / f"{name}.{system}.trec", system)
            write_query_values(values, benchmark, folder / f"{name}.{system}.queries.tsv")
            write_qrels(benchmark, folder / f"{name}.qrels")
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
