"""Memory and time of a step with an encoder that ranks share out (trainer.strategy=fsdp), against DDP, in one run.

    python -m experiments.bench.sharding [ranks=2] [experts=3] [layers=12] [hidden=768] [pairs=8] [tokens=64]

The defaults are BERT-base's size, with experts in attention in every second layer, and a batch of two chunks on each
rank. Ranks are processes on the CPU (gloo), or one a GPU (NCCL); each strategy has its own. What a rank holds after a
step is counted; the peak is that of two steps, of the process above what it was before the model, or of the GPU.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from datamodules.batches import Collator
from datamodules.records import ContrastiveBatch, Example
from experiments.bench.timing import backbone_of, seconds, tasks_of
from experiments.shared.console import entry_point, key_values, whole_number
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.sharding import shard, slice_of
from lightning_modules.encoders.moe import MoEEncoder

KEYS = {"ranks": "2", "experts": "3", "layers": "12", "hidden": "768", "pairs": "8", "tokens": "64", "rounds": "3"}
VOCABULARY = 30_522
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
WAYS = {"ddp": {}, "fsdp": {}, "fsdp, GradCache": {"cache": True}}


class _Step(nn.Module):
    """What Lightning gives to DDP: a module whose forward is the training step."""

    def __init__(self, module: ContrastiveModule):
        super().__init__()
        self.module = module

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        return self.module.training_step(batch, 0)["loss"]


def batch_of(values: Mapping[str, int], rank: int) -> ContrastiveBatch:
    """Pairs of texts of the full length, in two chunks."""
    pairs = values["pairs"]
    texts = np.random.default_rng(rank).integers(5, VOCABULARY, (2 * pairs, values["tokens"]))
    examples = [Example(i, (pairs + i,), (1,), (), (pairs + i,)) for i in range(pairs)]
    budget = pairs * values["tokens"]
    collator = Collator("task0", examples, texts, 0, token_budget=budget, num_hard_negatives=0, seed=0)
    return collator([(i, 0) for i in range(pairs)], 0)


def measured(rank: int, port: int, way: str, values: dict[str, int]) -> dict[str, float]:
    """On one rank: MB of what stands in memory after a step, of the peak, and seconds of a step."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        **{"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": values["ranks"]},
    )
    # Larger blocks go back to the system when they are freed. It takes time, and without it they stay with the process.
    _mallopt(M_MMAP_THRESHOLD, 128 << 10)
    before = _peak()
    encoder = MoEEncoder(*backbone_of(values, VOCABULARY - 5), tasks_of(values["experts"]), pooling="mean")
    cached = WAYS[way].get("cache", False)
    options = {"similarity": "cosine", "temperature": 0.05, "total_steps": 1000}
    module = ContrastiveModule(encoder, grad_cache=cached, **options).to(device).train()
    step: nn.Module = _Step(module)
    if way == "ddp":
        ids = [rank] if on_gpu else None
        step = nn.parallel.DistributedDataParallel(step, device_ids=ids, find_unused_parameters=True)
    else:
        shard(encoder, device)
    optimizer, batch = module.configure_optimizers()["optimizer"], batch_of(values, rank).to(device)

    def take() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(batch).backward()
        module.configure_gradient_clipping(optimizer, 1.0)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    take(), take()
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else 1e-3 * (_peak() - before)
    _mallopt(M_MMAP_THRESHOLD, 32 << 20)
    take()
    times = [seconds(take) for _ in range(values["rounds"])]
    kinds = {
        "weights": list(module.parameters()),
        "gradients": [p.grad for p in module.parameters() if p.grad is not None],
        "optimizer": [s for state in optimizer.state.values() for s in state.values() if torch.is_tensor(s)],
    }
    found = {f"{name}, MB": megabytes(tensors) for name, tensors in kinds.items()}
    dist.destroy_process_group()
    return found | {"peak, MB": peak, "a step, ms": 1e3 * statistics.median(times)}


def megabytes(tensors: Sequence[Tensor]) -> float:
    return sum(slice_of(tensor).numel() * tensor.element_size() for tensor in tensors) / 1e6


def _mallopt(option: int, value: int) -> None:
    """Where there is one."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(option, value)


def _peak() -> int:
    """KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def on_ranks(way: str, values: dict[str, int]) -> dict[str, float]:
    """The largest of the ranks' figures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(values["ranks"], mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(measured, rank, port, way, values) for rank in range(values["ranks"])]
        found = [rank.result() for rank in ranks]
    return {name: max(figures[name] for figures in found) for name in found[0]}


def main(arguments: Sequence[str]) -> None:
    values = {key: whole_number(key, value) for key, value in key_values(arguments, KEYS).items()}
    started = time.perf_counter()
    ways = {way: on_ranks(way, values) for way in WAYS}
    shape = ", ".join(f"{key} {value}" for key, value in values.items())
    table = Table("of a rank", *ways, title=f"strategies, with their ratio to ddp ({shape})")
    for name, base in ways["ddp"].items():
        table.add_row(name, *(f"{found[name]:,.0f} ({found[name] / base:.2f})" for found in ways.values()))
    Console(width=100).print(table, f"in {time.perf_counter() - started:.0f} s", sep="\n")


if __name__ == "__main__":
    entry_point(main)
