"""Measure memory and time of GradCache: python -m experiments.bench.grad_cache --help"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from datamodules.options import option
from experiments.bench.timing import (
    DEVICES,
    VOCABULARY,
    Run,
    backbone_of,
    in_new_process,
    random_pairs,
    seconds,
    training_step,
)
from experiments.config.arguments import parse
from experiments.shared.console import entry_point, table_console
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.memory import Memory
from lightning_modules.retrieval.compute import resolve_device
from lightning_modules.throughput import synchronize


@dataclass(kw_only=True)
class GradCacheOptions:
    """Compare a GradCache step on a large batch with a plain step on a small batch.

    The default sizes are those of MiniLM. A step is forward, backward, clipping and AdamW. The small batch is one
    chunk, and the large batch has chunks of the same size. Memory is the peak of two steps in a new process, without
    the model: resident memory on a CPU, allocated memory on a GPU. Time is per pair. Small steps run before and after
    each large one.
    """

    pairs: int = option(1024, "number of pairs in the large batch", minimum=1)
    small: int = option(64, "number of pairs in the small batch", minimum=1)
    tokens: int = option(128, "number of tokens per text", minimum=1)
    layers: int = option(6, "number of layers of the encoder", minimum=1)
    hidden: int = option(384, "hidden size of the encoder", minimum=1)
    rounds: int = option(1, "number of large steps to time", minimum=1)
    device: str = option("auto", DEVICES)


def main(arguments: Sequence[str]) -> None:
    options = parse(GradCacheOptions, arguments)
    options.device = str(resolve_device(options.device))
    shape = ", ".join(f"{key} {value}" for key, value in vars(options).items() if key != "device")
    table = Table("", "small, plain", "large, GradCache", "ratio", title=f"GradCache on {options.device} ({shape})")
    started = time.perf_counter()
    small = in_new_process(peak_memory, options, options.small, False)
    large = in_new_process(peak_memory, options, options.pairs, True)
    table.add_row("peak memory above the model, GB", f"{small:.2f}", f"{large:.2f}", f"{large / small:.2f}")
    small, large = seconds_per_pair(options)
    table.add_row("time per pair, ms", f"{1e3 * small:.1f}", f"{1e3 * large:.1f}", f"{large / small:.2f}")
    table_console().print(table, f"in {time.perf_counter() - started:.0f} s", sep="\n")


def peak_memory(options: GradCacheOptions, pairs: int, cache: bool) -> float:
    """Return the peak memory of two steps without the model, in GB."""
    step, memory = step_of(options, pairs, cache), Memory(torch.device(options.device))
    model = memory.now()
    step(), step()
    return (memory.peak() - model) / 1e9


def seconds_per_pair(options: GradCacheOptions) -> tuple[float, float]:
    """Return the median seconds per pair, of small steps and of large steps."""
    small, large = step_of(options, options.small, False), step_of(options, options.pairs, True)
    small()
    small_times, large_times = [], []
    for _ in range(options.rounds):
        small_times += [seconds(small), seconds(small)]
        large_times += [seconds(large)]
        small_times += [seconds(small), seconds(small)]
    return statistics.median(small_times) / options.small, statistics.median(large_times) / options.pairs


def step_of(options: GradCacheOptions, pairs: int, cache: bool) -> Run:
    """Return a function that runs one training step and waits for it to finish."""
    encoder = SharedEncoder(*backbone_of(vars(options), VOCABULARY - 5), {"search": "search"}, pooling="mean")
    budget = 2 * options.small * options.tokens  # chunks as large as the small batch
    batch = random_pairs("search", pairs, options.tokens, budget).to(options.device)
    step = training_step(encoder.to(options.device), [batch], grad_cache=cache)

    def run() -> None:
        step()
        synchronize(torch.device(options.device))

    return run


if __name__ == "__main__":
    entry_point(main)
