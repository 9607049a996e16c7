"""Compare gradients with each added loss under DDP with those of one process. test_ranks.py starts every rank.

    python -m tests.lightning_modules.distributed.losses_on_ranks RANK WORLD_SIZE PORT

Gradients are accumulated over a batch of each task, in float64, plain and with GradCache. The single process has each
batch in one chunk, without GradCache.
"""

import dataclasses
import sys

import torch
import torch.distributed as dist
from torch import nn

from tests.lightning_modules.auxiliary.cases import CASES, TASKS, module_of, world
from tests.lightning_modules.distributed.gradient_on_ranks import Step, accumulated

QUERIES = 12  # of the global batch


def batches(module, rank, world_size, token_budget):
    """Return this rank's batches, one for each task."""
    data = world().data(batch_size=QUERIES // world_size, token_budget=token_budget)
    module.prepare_losses(data)
    source = data.train_dataloader().batches
    source = dataclasses.replace(source, rank=rank, world_size=world_size)
    return [source[step] for step in range(len(TASKS))]


def check(ours, whole):
    assert {name for name, gradient in ours.items() if gradient is None} == {n for n, g in whole.items() if g is None}
    pairs = [(ours[name], gradient) for name, gradient in whole.items() if gradient is not None]
    error = max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs)
    assert error < 1e-12, error


def main(rank, world_size, port):
    modules = {case: module_of(case).double() for case in CASES}
    wholes = {
        case: accumulated(Step(module), batches(module, 0, 1, 100_000), synchronised=False)
        for case, module in modules.items()
    }
    dist.init_process_group(
        "gloo", store=dist.TCPStore("127.0.0.1", port, world_size, rank == 0), rank=rank, world_size=world_size
    )
    for case, module in modules.items():
        step = nn.parallel.DistributedDataParallel(Step(module), find_unused_parameters=True)
        for module.grad_cache in (False, True):
            own_batches = batches(module, rank, world_size, 40)
            assert all(len(batch.chunks) > 1 for batch in own_batches)
            check(accumulated(step, own_batches, synchronised=True), wholes[case])
            print("equal", flush=True)
        del step  # otherwise DDP would end the process group while holding a lock that the group's thread waits for
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
