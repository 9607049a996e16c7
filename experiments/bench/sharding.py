"""Measure memory and time of a sharded encoder: python -m experiments.bench.sharding --help"""

from __future__ import annotations

import ctypes
import multiprocessing
import socket
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn

from datamodules.options import option
from datamodules.packed import ContrastiveBatch
from experiments.bench.timing import VOCABULARY, backbone_of, module_of, random_pairs, seconds, tasks_of
from experiments.config.arguments import parse
from experiments.shared.console import entry_point, table_console
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.sharding import shard, slice_of
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.memory import Memory, num_bytes
from lightning_modules.retrieval.compute import resolve_device
from lightning_modules.throughput import synchronize

M_MMAP_THRESHOLD = -3  # option of glibc's mallopt
STRATEGIES = ("ddp", "fsdp", "fsdp, GradCache")


@dataclass(kw_only=True)
class ShardingOptions:
    """Compare a training step of a sharded encoder (trainer.strategy=fsdp) with a step under DDP.

    The default sizes are those of BERT-base, with experts in the attention of every second layer. Each rank has two
    chunks. Ranks are processes on the CPU (gloo), or one per GPU (NCCL). Sizes are measured on a rank's tensors after a
    step. The peak is over two steps: of allocated memory on a GPU, of the growth of the process on a CPU.
    """

    ranks: int = option(2, "number of ranks", minimum=1)
    experts: int = option(3, "number of experts", minimum=1)
    layers: int = option(12, "number of layers of the encoder", minimum=1)
    hidden: int = option(768, "hidden size of the encoder", minimum=1)
    pairs: int = option(8, "number of pairs on each rank", minimum=1)
    tokens: int = option(64, "number of tokens per text", minimum=1)
    rounds: int = option(3, "number of steps to time", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: GPUs if there are any, one per rank")


def main(arguments: Sequence[str]) -> None:
    options = parse(ShardingOptions, arguments)
    started = time.perf_counter()
    figures = {strategy: measure_ranks(strategy, options) for strategy in STRATEGIES}
    shape = ", ".join(f"{key} {value}" for key, value in vars(options).items())
    table = Table("per rank", *STRATEGIES, title=f"strategies, with their ratio to ddp ({shape})")
    for name, base in figures["ddp"].items():
        table.add_row(name, *(f"{figures[s][name]:,.0f} ({figures[s][name] / base:.2f})" for s in STRATEGIES))
    table_console().print(table, f"in {time.perf_counter() - started:.0f} s", sep="\n")


def measure_ranks(strategy: str, options: ShardingOptions) -> dict[str, float]:
    """Start the ranks, and return the largest value of each figure over ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(options.ranks, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(measure_rank, rank, port, strategy, options) for rank in range(options.ranks)]
        figures = [rank.result() for rank in ranks]
    return {name: max(figures_of_rank[name] for figures_of_rank in figures) for name in figures[0]}


def measure_rank(rank: int, port: int, strategy: str, options: ShardingOptions) -> dict[str, float]:
    """Return the size of one rank's tensors after a step, its peak memory, and the time of a step."""
    on_gpu = resolve_device(options.device).type == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    address = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": options.ranks}
    dist.init_process_group("nccl" if on_gpu else "gloo", **address)
    # Return freed memory to the system, so that it does not count. This is slow, so it is off for the timing below.
    _mallopt(M_MMAP_THRESHOLD, 128 << 10)
    memory = Memory(device)
    before = 0 if on_gpu else memory.peak()
    backbone, tokenizer = backbone_of(vars(options), VOCABULARY - 5)
    encoder = MoEEncoder(backbone, tokenizer, tasks_of(options.experts), pooling="mean").to(device)
    module = module_of(encoder, grad_cache="GradCache" in strategy)
    step: nn.Module = _Step(module)
    if strategy == "ddp":
        ids = [rank] if on_gpu else None
        step = nn.parallel.DistributedDataParallel(step, device_ids=ids, find_unused_parameters=True)
    else:
        shard(encoder, device)
    optimizer, budget = module.configure_optimizers()["optimizer"], options.pairs * options.tokens  # gives two chunks
    batch = random_pairs("task0", options.pairs, options.tokens, budget, seed=rank).to(device)

    def take() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(batch).backward()
        module.configure_gradient_clipping(optimizer, 1.0)
        optimizer.step()
        synchronize(device)

    take(), take()
    peak = (memory.peak() - before) / 1e6
    _mallopt(M_MMAP_THRESHOLD, 32 << 20)
    take()
    times = [seconds(take) for _ in range(options.rounds)]
    tensors = {
        "weights": list(module.parameters()),
        "gradients": [p.grad for p in module.parameters() if p.grad is not None],
        "optimizer": [s for state in optimizer.state.values() for s in state.values() if torch.is_tensor(s)],
    }
    figures = {f"{name}, MB": num_bytes(map(slice_of, kind)) / 1e6 for name, kind in tensors.items()}
    # Frees DDP, which would otherwise end the process group while holding a lock that the group's thread waits for.
    step = module
    dist.destroy_process_group()
    return figures | {"peak, MB": peak, "time per step, ms": 1e3 * statistics.median(times)}


class _Step(nn.Module):
    """A module that wraps a training step as its forward, as Lightning does for DDP."""

    def __init__(self, module: ContrastiveModule):
        super().__init__()
        self.module = module

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        return self.module.training_step(batch, 0)["loss"]


def _mallopt(option: int, value: int) -> None:
    """Call glibc's mallopt, if the C library has it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(option, value)


if __name__ == "__main__":
    entry_point(main)
