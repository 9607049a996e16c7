"""Compare the gradients of losses that are added to InfoNCE under DDP with those of one process, in float64.

    python -m tests.lightning_modules.distributed.losses_on_ranks RANK WORLD_SIZE PORT

test_ranks.py starts every rank. The single process has the whole batch in one chunk, without GradCache. Each plan is
the tasks of one optimizer step, so the second one accumulates. Ranks draw some of the same documents.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.records import Task
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule
from lightning_modules.auxiliary.cross_task import CrossTaskDistillation
from lightning_modules.auxiliary.quadruplets import QuadrupletRanking
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import random_backbone, set_dropout, word_vocabulary
from lightning_modules.encoders.moe import MoEEncoder
from tests.lightning_modules.auxiliary.graded_world import OBJECTIVE, TASKS, world
from tests.lightning_modules.distributed.gradient_on_ranks import QUERIES, Step, accumulated, check

KINDS = {"links": LinkPredictionDataModule, "fields": ClassificationDataModule}
LOSSES = {
    "distillation": lambda: CrossTaskDistillation(
        {"links": ["fields"], "fields": ["links"]}, list(TASKS), objective=OBJECTIVE
    ),
    "quadruplets": lambda: QuadrupletRanking({"links": "fields"}, list(TASKS), objective=OBJECTIVE),
}
PLANS = (["links"], ["links", "fields"])


def encoder_and_tokenizer(collections):
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
    }
    texts = [document.text for collection in collections.values() for document in collection.queries.values()]
    torch.manual_seed(0)
    backbone, tokenizer = random_backbone(shape, word_vocabulary(texts, 1000))
    set_dropout(backbone, 0.0, 0.0)
    return MoEEncoder(backbone, tokenizer, TASKS, attention=True, ffn=True, pooling="mean", max_length=16).double()


def batches(module, collections, plan, rank, world_size, token_budget):
    """Return this rank's batches of the tasks of an optimizer step."""
    tasks = [KINDS[name](Task(name), {name: collection}) for name, collection in collections.items()]
    options = BatchOptions(batch_size=QUERIES // world_size, num_positives=2, max_length=16, token_budget=token_budget)
    data = MultiTaskDataModule(tasks, options, module.encoder.tokenizer)
    data.setup()
    module.prepare_losses(data)
    source = data.train_dataloader().batches
    source.rank, source.world_size = rank, world_size
    steps = iter(range(100))
    return [source[next(step for step in steps if source.schedule.task(step) == task)] for task in plan]


def main(rank, world_size, port):
    collections = world(False, 96, False)
    encoder = encoder_and_tokenizer(collections)
    modules = {
        name: ContrastiveModule(encoder, **vars(OBJECTIVE), losses={name: make()}).double()
        for name, make in LOSSES.items()
    }
    wholes = {
        name: [accumulated(Step(module), batches(module, collections, plan, 0, 1, 100_000), False) for plan in PLANS]
        for name, module in modules.items()
    }
    dist.init_process_group(
        "gloo", store=dist.TCPStore("127.0.0.1", port, world_size, rank == 0), rank=rank, world_size=world_size
    )
    for name, module in modules.items():
        step = nn.parallel.DistributedDataParallel(Step(module), find_unused_parameters=True)
        for cache in (False, True):
            module.grad_cache = cache
            for plan, whole in zip(PLANS, wholes[name], strict=True):
                own_batches = batches(module, collections, plan, rank, world_size, 64)
                assert all(len(texts.chunks) > 1 for batch in own_batches for texts in (batch, *batch.companions))
                check(accumulated(step, own_batches, synchronised=True), whole, plan)
                print("equal", flush=True)
        del step  # otherwise DDP would end the process group while holding a lock that the group's thread waits for
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
