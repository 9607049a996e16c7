"""Measure every part of training and embedding on a device: python -m experiments.bench.gpu --help"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.options import option
from datamodules.readers.rows import BadLines
from datamodules.readers.texts import read_shards, text_files
from datamodules.records import UserError
from experiments.bench import gpu_checks, gpu_parts
from experiments.bench.gpu_checks import Check
from experiments.bench.gpu_parts import Figure
from experiments.bench.gpu_results import Results
from experiments.bench.peer import peer_version
from experiments.bench.timing import DEVICES
from experiments.bench.workload import SHAPES, Workload, synthetic_documents, synthetic_tokenizer
from experiments.config.arguments import parse
from experiments.shared.console import entry_point
from experiments.shared.output import writable_folder
from lightning_modules.encoders.backbone import quiet_transformers
from lightning_modules.retrieval.compute import resolve_device, resolve_precision
from lightning_modules.throughput import encoder_ceiling

log = logging.getLogger(__name__)

# Part -> function, and its share of the budget. A small budget only covers the first parts.
PARTS: dict[str, tuple[Callable[[Workload], Iterator[Figure | Check]], float]] = {
    "gemm": (gpu_parts.gemm, 0.03),
    "forward": (gpu_parts.forward, 0.13),
    "encode": (gpu_parts.encode, 0.18),
    "train": (gpu_parts.train, 0.16),
    "checks": (gpu_checks.checks, 0.14),
    "make_train": (gpu_parts.make_train, 0.14),
    "grad_cache": (gpu_parts.grad_cache, 0.12),
    "minilm": (gpu_parts.minilm, 0.07),
    "search": (gpu_parts.search, 0.05),
    "tokenizer": (gpu_parts.tokenizer, 0.03),
}
# Sizes for each kind of device, and for small=yes.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"texts": 8192, "queries": 64, "cached_pairs": 4096, "vectors": 200_000, "seconds": 1.0},
    "cpu": {"texts": 64, "queries": 16, "cached_pairs": 64, "vectors": 20_000, "seconds": 1.0},
    "small": {"texts": 24, "queries": 2, "cached_pairs": 12, "vectors": 2000, "seconds": 0.0},
}


@dataclass(kw_only=True)
class GpuOptions:
    """Compare the speed with sentence-transformers in the same process, and check what only a GPU can show.

    The parts are: matrix products (gemm), the forward pass alone, encoding from texts to vectors, training steps,
    checks (packed texts in bf16, batch-invariant vectors, waiting, recompilations), a real `make train`, GradCache, a
    model of MiniLM's shape, search and mining, and the tokenizer. MFU is the useful operations per second, relative to
    a matrix product of the encoder's width. A part stops when its time is over, so a slow device yields fewer figures
    but does not take longer.

    Weights are random. Lengths are distributed like those of real titles with abstracts. Other work on the machine
    changes the speeds, so only compare speeds of the same run.
    """

    device: str = option("auto", DEVICES)
    shape: Literal["bert-base", "minilm", "tiny"] = option("bert-base", "shape of the encoder")
    pooling: Literal["mean", "cls"] = option("mean", "pooling of the encoder")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "precision; auto: bf16 if the device is fast")
    texts: int = option(0, "number of texts; 0: 8192 on a GPU, 64 on a CPU", minimum=0)
    tokens: float = option(209, "mean number of tokens of a text, after truncation", above=0)
    max_length: int = option(256, "maximum number of tokens of a text", minimum=16)
    input: Path | None = option(None, "file of texts, as for make embed, instead of synthetic texts")
    parts: tuple[Literal[*PARTS], ...] = option((), "parts to measure; by default all")
    budget: float = option(240, "total time in seconds", above=0)
    small: bool = option(False, "use a tiny encoder and a few texts, to try the program on a CPU in seconds")
    output: Path = option(Path("runs/bench-gpu"), "folder for gpu.json and gpu.html, which has a plot")


def main(arguments: Sequence[str]) -> None:
    options = parse(GpuOptions, arguments)
    device = resolve_device(options.device)
    quiet_transformers()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    with writable_folder("output", options.output), tempfile.TemporaryDirectory() as folder:
        workload = build_workload(options, device, Path(folder))
        results = Results(workload)
        if peer_version():
            importlib.import_module("sentence_transformers")  # slow, so not within the time of a part
        try:
            run_parts(options, workload, results)
        finally:  # Ctrl-C keeps what was measured
            results.write(options.output)


def build_workload(options: GpuOptions, device: torch.device, folder: Path) -> Workload:
    """Prepare texts and sizes, and measure the ceiling of MFU."""
    sizes = dict(SIZES["small" if options.small else device.type])
    tokenizer, count = synthetic_tokenizer(), options.texts or sizes["texts"]
    if options.input is None:
        documents = synthetic_documents(count, options.tokens, options.max_length, tokenizer)
    else:
        shards = read_shards(text_files(options.input), 1024, range(10**9), BadLines())
        documents = list(itertools.islice(itertools.chain.from_iterable(shard for _, shard in shards), count))
        if len(documents) < 3:
            raise UserError(f"input: {options.input} has {len(documents)} texts; expected at least 3")
    workload = Workload(
        device,
        resolve_precision(options.precision, device),
        SHAPES["tiny" if options.small else options.shape] | {"max_position_embeddings": max(512, options.max_length)},
        [dataclasses.replace(document, id=str(i)) for i, document in enumerate(documents)],
        tokenizer,
        options.max_length,
        options.pooling,
        **{name: sizes[name] for name in ("queries", "cached_pairs", "vectors", "seconds")},
        folder=folder,
    )
    workload.ceiling = encoder_ceiling(workload.encoder(), workload.dtype)
    return workload


def run_parts(options: GpuOptions, workload: Workload, results: Results) -> None:
    """Run each part until it ends or its time is over. If a part fails, the others still run."""
    chosen = [name for name in PARTS if name in options.parts or not options.parts]
    deadline = time.perf_counter() + options.budget
    for number, name in enumerate(chosen):
        started = time.perf_counter()
        left = deadline - started
        if left <= 0:
            results.skip(name, "not measured, because the budget is used up")
            continue
        # A part may use time that earlier parts did not need.
        limit = left * PARTS[name][1] / sum(PARTS[later][1] for later in chosen[number:])
        measured = PARTS[name][0](workload)
        try:
            for result in measured:
                results.add(dataclasses.replace(result, part=name) if isinstance(result, Figure) else result)
                if time.perf_counter() - started > limit:
                    results.skip(name, f"stopped here after its {limit:.0f} s; a larger budget measures more")
                    break
        except Exception as error:  # out of memory, no compiler, ...: the other parts can still be measured
            log.debug("%s", name, exc_info=True)
            results.skip(name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            measured.close()
        if workload.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    entry_point(main)
