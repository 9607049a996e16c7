"""Memory and time of a large batch with GradCache against a small one without, in one run.

    python -m experiments.bench.grad_cache [pairs=1024] [small=64] [tokens=128] [layers=6] [hidden=384]

The defaults are MiniLM's size. A step is forward, backward and AdamW; the token budget is the small batch, which is one
chunk. Memory is the peak of two steps above that of the model, each measured in a process of its own: resident
memory on the CPU, allocated memory on a GPU. Time is that of a pair, small steps before and after each large one.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from datamodules.batches import Collator
from datamodules.records import ContrastiveBatch, Example
from experiments.bench.timing import backbone_of, seconds
from experiments.shared.console import entry_point, key_values, whole_number
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.shared import SharedEncoder

KEYS = {"pairs": "1024", "small": "64", "tokens": "128", "layers": "6", "hidden": "384", "rounds": "1"}
VOCABULARY = 30_522
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def module_of(values: dict[str, int], cache: bool) -> ContrastiveModule:
    encoder = SharedEncoder(*backbone_of(values, VOCABULARY - 5), {"search": "search"}, pooling="mean")
    options = {"similarity": "cosine", "temperature": 0.05, "total_steps": 1000}
    return ContrastiveModule(encoder, grad_cache=cache, **options).to(DEVICE)


def batch_of(values: dict[str, int], pairs: int) -> ContrastiveBatch:
    """Pairs of texts of the full length, in chunks of the small batch."""
    texts = np.random.default_rng(0).integers(5, VOCABULARY, (2 * pairs, values["tokens"]))
    examples = [Example(i, (pairs + i,), (1,), (), (pairs + i,)) for i in range(pairs)]
    budget = 2 * values["small"] * values["tokens"]
    collator = Collator("search", examples, texts, 0, token_budget=budget, num_hard_negatives=0, seed=0)
    return collator([(i, 0) for i in range(pairs)], 0).to(DEVICE)


def step_of(values: dict[str, int], pairs: int, cache: bool) -> Callable[[], None]:
    """One step of training, as a function."""
    module, batch = module_of(values, cache), batch_of(values, pairs)
    optimizer = module.configure_optimizers()["optimizer"]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def peak_memory(values: dict[str, int], pairs: int, cache: bool) -> float:
    """The peak of two steps above the memory of the model, GB."""
    step = step_of(values, pairs, cache)
    if DEVICE == "cuda":
        model = torch.cuda.memory_allocated()
        step(), step()
        return (torch.cuda.max_memory_allocated() - model) / 1e9
    with open("/proc/self/status") as lines:
        model = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    step(), step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - model) / 1e6


def in_new_process(function: Callable[..., float], *arguments: object) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def times(values: dict[str, int]) -> tuple[float, float]:
    """Seconds a pair of small and large steps: medians."""
    small, large = step_of(values, values["small"], False), step_of(values, values["pairs"], True)
    small()
    found = {"small": [], "large": []}
    for _ in range(values["rounds"]):
        found["small"] += [seconds(small), seconds(small)]
        found["large"] += [seconds(large)]
        found["small"] += [seconds(small), seconds(small)]
    return statistics.median(found["small"]) / values["small"], statistics.median(found["large"]) / values["pairs"]


def main(arguments: Sequence[str]) -> None:
    values = {key: whole_number(key, value) for key, value in key_values(arguments, KEYS).items()}
    shape = ", ".join(f"{key} {value}" for key, value in values.items())
    table = Table("", "small, plain", "large, GradCache", "ratio", title=f"GradCache on {DEVICE} ({shape})")
    started = time.perf_counter()
    small, large = (
        in_new_process(peak_memory, values, pairs, cache)
        for pairs, cache in ((values["small"], False), (values["pairs"], True))
    )
    table.add_row("peak memory above the model, GB", f"{small:.2f}", f"{large:.2f}", f"{large / small:.2f}")
    small, large = times(values)
    table.add_row("a pair, ms", f"{1e3 * small:.1f}", f"{1e3 * large:.1f}", f"{large / small:.2f}")
    Console().print(table, f"in {time.perf_counter() - started:.0f} s", sep="\n")


if __name__ == "__main__":
    entry_point(main)
