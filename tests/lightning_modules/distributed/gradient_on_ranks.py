"""Compare the gradient of an optimizer step under DDP with that of one process. test_ranks.py starts every rank.

    python -m tests.lightning_modules.distributed.gradient_on_ranks RANK WORLD_SIZE PORT KIND

KIND is one of ENCODERS.
The single process has the whole batch in one chunk, without GradCache. The setting is float64, experts in attention and
feed-forward, two positives per query, hard negatives that several ranks draw, documents that are known positives of
other ranks' queries, a learned temperature, both directions of the loss, and stored vectors of a teacher that are
compared through a projection. Every second document has features.
"""

import contextlib
import dataclasses
import re
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from datamodules.batches import BatchOptions
from datamodules.records import Collection, Document, Task
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import random_backbone, set_dropout, word_vocabulary
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.loss_weights import DynamicWeights
from lightning_modules.objective_options import VectorTeacherOptions
from lightning_modules.task_balance import (
    Coefficients,
    TaskGradients,
    balanced_coefficients,
    pcgrad_coefficients,
    torchjd_weighting,
)
from tests.conftest import SMALL_BERT, TASKS, WORDS, text_of, with_features

QUERIES = 16  # of the global batch
ENCODERS = {"moe": MoEEncoder, "stitched": CrossStitchEncoder, "control": ControlEncoder}
KINDS = {
    "classification": ClassificationDataModule,
    "link_prediction": LinkPredictionDataModule,
    "search": SearchDataModule,
}


class Step(nn.Module):
    """A module whose forward is the training step, as Lightning passes it to DDP."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return self.module.training_step(batch, 0)["loss"]


class TeacherVectors:
    """Random vectors (n, 24) of each row."""

    def __init__(self, count):
        self.vectors = np.random.default_rng(0).normal(size=(count, 24))
        self.vectors /= np.linalg.norm(self.vectors, axis=1, keepdims=True)

    def gather(self, rows):
        return self.vectors[rows]


def collection():
    """Return queries i with positives i and i + 3. They share hard negatives, so several ranks draw the same ones."""
    numbers = [*range(80), *range(100, 107)]
    corpus = {f"d{i}": Document(f"d{i}", text_of(i), text_of(*range(i, i + 1 + i % 9))) for i in numbers}
    queries = {f"q{i}": Document(f"q{i}", "", text_of(i, i + 7)) for i in range(80)}
    judged = {f"q{i}": {f"d{i}": 1, f"d{(i + 3) % 80}": 1, f"d{100 + i % 7}": 0} for i in range(80)}
    return Collection(corpus, queries, {"train": judged})


def make_encoder(kind):
    torch.manual_seed(0)
    backbone, tokenizer = random_backbone(
        SMALL_BERT | {"num_hidden_layers": 2}, word_vocabulary([*WORDS, "title text query"], 400)
    )
    set_dropout(backbone, 0.0, 0.0)
    arguments = {"attention": True, "ffn": True, "pooling": "mean", "max_length": 32}
    encoder = ENCODERS[kind](backbone, tokenizer, TASKS, **arguments)
    with torch.no_grad():  # at the start, no expert of another task would have a gradient
        for row in (row for name, row in encoder.named_parameters() if name.startswith("stitches.")):
            row.add_(0.2 * torch.randn_like(row))
    return with_features(encoder, list(collection().corpus.values())[::2]).double()


def batches(tokenizer, tasks, rank, world_size, token_budget):
    """Return this rank's batches, one for each of the tasks."""
    rank_batches = []
    for step, task in enumerate(tasks):
        size = QUERIES // world_size
        options = BatchOptions(batch_size=size, num_positives=2, max_length=32, token_budget=token_budget)
        data = KINDS[task](Task(task, task), {"toy": collection()}, options, tokenizer)
        data.setup()
        data.teacher_vectors = {task: TeacherVectors(len(data.documents))}
        source = data.train_dataloader().batches
        source = dataclasses.replace(source, rank=rank, world_size=world_size)
        batch = source[step]
        ids = batch.document_ids[batch.positives]  # (B, 2)
        known = torch.cat([ids, ids + 1, ids + 2, ids + 5], 1)  # mostly documents of other ranks
        rank_batches.append(dataclasses.replace(batch, known_positives=known))
    return rank_batches


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def accumulated(step, own_batches, synchronised):
    """Return the gradients that Lightning would accumulate from the batches of one optimizer step."""
    step.zero_grad(set_to_none=True)
    for i, batch in enumerate(own_batches):
        last = i == len(own_batches) - 1
        with contextlib.nullcontext() if last or not synchronised else step.no_sync():
            (step(batch) / len(own_batches)).backward()
    return gradients(step.module.module if synchronised else step.module)


def by_task(step, own_batches, plan, synchronised):
    """Return the gradients of each task in an optimizer step, as GradientBalance computes them."""
    step.zero_grad(set_to_none=True)
    gradients_by_task = TaskGradients(list(step.parameters()), sorted(set(plan)))
    for task, batch in zip(plan, own_batches, strict=True):
        with step.no_sync() if synchronised else contextlib.nullcontext():
            (step(batch) / len(own_batches)).backward()
        gradients_by_task.take(task)
    gradients_by_task.average_over_ranks()
    return gradients_by_task


def combined(gradients_by_task):
    """Return the gradient of an optimizer step with each method of combining the gradients of the tasks."""
    weightings = {name: torchjd_weighting(name) for name in ("mgda", "upgrad")}
    methods = [lambda products: pcgrad_coefficients(products, seed=0)]
    methods += [lambda products, w=w: balanced_coefficients(products, w) for w in weightings.values()]
    results = []
    for method in methods:
        shared = method(gradients_by_task.products())
        gradients_by_task.apply(Coefficients(shared, torch.ones_like(shared)))
        results.append(torch.cat([p.grad.flatten() for p in gradients_by_task.parameters if p.grad is not None]))
    return results


def weighted(step, own_batches, synchronised):
    """Return the weights of dynamic weight average after one step per batch, and the weighted gradients of the last."""
    tasks = sorted({batch.task for batch in own_batches})
    trainer = SimpleNamespace(global_step=0, loggers=[], precision_plugin=None, max_steps=-1, accumulate_grad_batches=1)
    balance = DynamicWeights(tasks, temperature=0.1, window=1)
    balance.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
    for batch in own_batches:
        step.zero_grad(set_to_none=True)
        balance.on_train_batch_start(trainer, None, batch, 0)
        loss = step(batch)
        balance.on_before_backward(trainer, None, loss)
        loss.backward()
        balance.on_before_optimizer_step(trainer)
    return balance.weights, gradients(step.module.module if synchronised else step.module)


def check(ours, whole, used, kind):
    for name, gradient in whole.items():
        assert (gradient is None) == (ours[name] is None), name
        # Of a stitched or control encoder, each task trains all experts.
        owner = re.search(r"\.experts\.(\w+)\." if kind == "moe" else r"^encoder\.stitches\.\d+\.(\w+)$", name)
        assert (gradient is None) == (owner is not None and owner[1] not in used), name
    pairs = [(ours[name], gradient) for name, gradient in whole.items() if gradient is not None]
    error = max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs)
    assert error < 1e-12, error
    assert max(b.abs().max() for _, b in pairs) > 1e-3
    norms = [torch.nn.utils.get_total_norm([pair[i] for pair in pairs]) for i in (0, 1)]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)  # so that clipping has the same effect


def main(rank, world_size, port, kind):
    encoder = make_encoder(kind)
    options = {"similarity": "cosine", "temperature": 0.1, "learn_temperature": "one", "symmetric": True}
    options["vector_teacher"] = VectorTeacherOptions(
        "random", {"classification": 0.0, "link_prediction": 2, "search": 1}
    )
    module = ContrastiveModule(encoder, **options, vector_teacher_model=SimpleNamespace(dimension=24)).double()
    plans = (["search"], ["search", "classification"], ["link_prediction", "search", "link_prediction"])
    wholes = [
        accumulated(Step(module), batches(encoder.tokenizer, plan, 0, 1, 100_000), synchronised=False) for plan in plans
    ]
    in_turns = ["link_prediction", "search"] * 3
    whole_weighted = weighted(Step(module), batches(encoder.tokenizer, in_turns, 0, 1, 100_000), False)
    assert (whole_weighted[0] - 1).abs().max() > 1e-3
    whole_by_task = by_task(Step(module), batches(encoder.tokenizer, plans[2], 0, 1, 100_000), plans[2], False)
    whole_combined = combined(whole_by_task)
    dist.init_process_group(
        "gloo", store=dist.TCPStore("127.0.0.1", port, world_size, rank == 0), rank=rank, world_size=world_size
    )
    step = nn.parallel.DistributedDataParallel(Step(module), find_unused_parameters=encoder.has_idle_parameters)
    for cache in (False, True):
        module.grad_cache = cache
        for plan, whole in zip(plans, wholes, strict=True):
            own_batches = batches(encoder.tokenizer, plan, rank, world_size, 32)
            assert all(len(batch.chunks) > 1 for batch in own_batches)
            check(accumulated(step, own_batches, synchronised=True), whole, plan, kind)
            print("equal", flush=True)
        weights, last = weighted(step, batches(encoder.tokenizer, in_turns, rank, world_size, 32), synchronised=True)
        torch.testing.assert_close(weights, whole_weighted[0], rtol=1e-12, atol=0)
        check(last, whole_weighted[1], in_turns[-1:], kind)
    for cache in (False, True):  # last, because DDP fails if gradients vanish before it has exchanged them
        module.grad_cache = cache
        gradients_by_task = by_task(step, own_batches, plans[2], synchronised=True)
        assert (gradients_by_task.used == whole_by_task.used).all()
        torch.testing.assert_close(gradients_by_task.products(), whole_by_task.products(), rtol=1e-12, atol=1e-12)
        for ours, whole in zip(combined(gradients_by_task), whole_combined, strict=True):
            torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    del step  # otherwise DDP would end the process group while holding a lock that the group's thread waits for
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
