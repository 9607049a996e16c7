"""Compare the gradient of an optimizer step with an additional loss under DDP with that of one process.

    python -m tests.lightning_modules.auxiliary.losses_on_ranks NAME RANK WORLD_SIZE PORT

NAME is one of LOSSES. The single process has the whole batch in one chunk, without GradCache. The ranks have several
chunks; they run with and without GradCache, with and without accumulation over tasks. All in float64.
"""

import sys

import torch.distributed as dist
from torch import nn

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.records import Task
from lightning_modules.auxiliary.consistency import CrossTaskConsistency
from lightning_modules.contrastive import ContrastiveModule
from tests.conftest import TASKS
from tests.lightning_modules.distributed.gradient_on_ranks import (
    KINDS,
    QUERIES,
    Step,
    accumulated,
    collection,
    encoder_and_tokenizer,
)

LOSSES = {"consistency": lambda: CrossTaskConsistency(list(TASKS), 32, hidden=16, candidates=20, warmup=0)}
PLANS = (["search"], ["link_prediction", "search", "classification"])


def batches(module, plan, rank, world_size, token_budget):
    """Return this rank's batches, one for each task of the plan, with the companions of the module's losses."""
    options = BatchOptions(batch_size=QUERIES // world_size, num_positives=2, max_length=32, token_budget=token_budget)
    tasks = [kind(Task(task, task), {task: collection()}, options) for task, kind in KINDS.items()]
    data = MultiTaskDataModule(tasks, options, module.encoder.tokenizer)
    data.setup()
    module.prepare_losses(data)
    source = data.train_dataloader().batches
    source.rank, source.world_size = rank, world_size
    steps = {source.schedule.task(step): step for step in range(len(KINDS) - 1, -1, -1)}
    return [source[steps[task]] for task in plan]


def check(ours, whole):
    """Raise AssertionError unless gradients differ by less than 1e-12 of the largest."""
    assert {name for name, g in ours.items() if g is None} == {name for name, g in whole.items() if g is None}
    pairs = {name: (ours[name], gradient) for name, gradient in whole.items() if gradient is not None}
    largest = max(b.abs().max() for _, b in pairs.values())
    error = max((a - b).abs().max() for a, b in pairs.values()) / largest
    assert error < 1e-12, error
    assert all(b.abs().max() > 1e-6 * largest for name, (_, b) in pairs.items() if name.startswith("losses."))


def main(name, rank, world_size, port):
    module = ContrastiveModule(
        encoder_and_tokenizer(), similarity="cosine", temperature=0.1, losses={"loss": LOSSES[name]()}
    ).double()
    wholes = [accumulated(Step(module), batches(module, plan, 0, 1, 100_000), synchronised=False) for plan in PLANS]
    dist.init_process_group(
        "gloo", store=dist.TCPStore("127.0.0.1", port, world_size, rank == 0), rank=rank, world_size=world_size
    )
    step = nn.parallel.DistributedDataParallel(Step(module), find_unused_parameters=True)
    for module.grad_cache in (False, True):
        for plan, whole in zip(PLANS, wholes, strict=True):
            own_batches = batches(module, plan, rank, world_size, 32)
            assert all(len(batch.chunks) > 1 for batch in own_batches)
            check(accumulated(step, own_batches, synchronised=True), whole)
            print("equal", flush=True)
    del step  # otherwise DDP would end the process group while holding a lock that the group's thread waits for
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
