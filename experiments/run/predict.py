"""Predict what a training needs from a few of its steps on one rank: memory, time of a step, time in all.

Time and peak memory are measured on this machine. What further ranks add is computed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import nn

from datamodules.batches import MultiTaskDataModule
from datamodules.records import Benchmark, ContrastiveBatch
from datamodules.tasks import TaskDataModule
from experiments.build.data import batches_per_step
from experiments.build.module import first_batches
from experiments.build.trainer import precision_of
from experiments.config.schema import Config
from experiments.shared.memory import Memory
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.compute import computing_in

NUM_WARMUP, NUM_MEASURED = 2, 6  # batches of each task
MAX_TEXTS = 256  # texts of a benchmark that are encoded


@dataclasses.dataclass
class TaskCost:
    """Mean cost of one batch of a task on one rank.

    seconds: time to prepare it, and of the forward and backward pass. documents: documents of all ranks, with which
    each query is compared. batches: number of batches on each rank in the whole training. scores: bytes of the
    similarities with the documents of all ranks. flops: forward and backward, 6 for each parameter and token.
    """

    seconds: float
    tokens: float
    queries: float
    documents: float
    batches: int
    scores: float
    flops: float


@dataclasses.dataclass
class Prediction:
    """Memory of a rank in bytes, and times in seconds.

    process: Python, libraries and data (on a GPU: other memory). activations: the rest of the measured peak.
    further: vectors of other ranks' documents, and similarities with them. gathered: weights and gradients that are
    whole for a time with trainer.strategy=fsdp; weights, gradients and optimizer are a rank's share then.
    update: clipping and the optimizer, per step. evaluation: all evaluations. start: reading and building data and
    encoder, and tokenising. tasks: cost by task.
    """

    weights: int
    gradients: int
    optimizer: int
    process: int
    activations: int
    further: int
    gathered: int
    update: float
    evaluation: float
    start: float
    tasks: dict[str, TaskCost]

    @property
    def memory(self) -> int:
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.process + self.activations + self.further + self.gathered

    def training(self, steps: int) -> float:
        """Return the seconds of a number of steps."""
        return steps * self.update + sum(cost.batches * cost.seconds for cost in self.tasks.values())


def ranks_of(config: Config) -> int:
    devices = torch.cuda.device_count() if config.trainer.devices == -1 else config.trainer.devices
    return devices * config.trainer.num_nodes


def predict(config: Config, data: MultiTaskDataModule, module: ContrastiveModule, built: float = 0.0) -> Prediction:
    """Take a few steps with every task, which change the module's weights. built: seconds that building both took."""
    device = torch.device("cpu" if config.trainer.accelerator == "cpu" or not torch.cuda.is_available() else "cuda")
    module.to(device).train()
    memory, stepper = Memory(device), _Stepper(config, module, device)
    batches, preparing, tokenising = {}, {}, 0.0
    for task in data.tasks:
        start = time.perf_counter()
        _batches(task, data, 1)  # tokenises the texts, once
        tokenised = time.perf_counter()
        tokenising += tokenised - start
        batches[task.task.name] = _batches(task, data, NUM_WARMUP + NUM_MEASURED)
        preparing[task.task.name] = (time.perf_counter() - tokenised) / (NUM_WARMUP + NUM_MEASURED)
    weights = _bytes(module)
    for task_batches in batches.values():
        for batch in task_batches[:NUM_WARMUP]:
            stepper.step(batch)
    optimizer = stepper.optimizer_bytes()
    process = max(0, memory.now() - weights - optimizer)
    memory.forget_peak()
    costs, updates, gradients = {}, [], 0
    for name, task_batches in batches.items():
        measured = task_batches[NUM_WARMUP:]
        times = [stepper.step(batch) for batch in measured]
        gradients = max(gradients, stepper.gradients)
        updates += [update for _, update in times]
        seconds = sum(passes for passes, _ in times) / len(times)
        in_turn = 0.0 if config.data.num_workers else preparing[name]  # workers prepare batches in parallel
        costs[name] = _cost(config, data, module, name, measured, seconds + in_turn)
    activations = max(0, memory.peak() - process - weights - optimizer - gradients)
    num_ranks = ranks_of(config)
    is_sharded = config.trainer.strategy == "fsdp"
    shares = num_ranks if is_sharded else 1
    largest = max(cost.scores + cost.documents * module.encoder.dimension * 4 for cost in costs.values())
    return Prediction(
        weights=weights // shares,
        gradients=gradients // shares,
        optimizer=optimizer // shares,
        process=process,
        activations=activations,
        further=int(2 * largest * (num_ranks - 1) / num_ranks),  # forward and backward
        gathered=_gathered(module.encoder) if is_sharded else 0,
        update=sum(updates) / len(updates),
        evaluation=_evaluation(config, data, module) / num_ranks,
        start=built + tokenising,
        tasks=costs,
    )


def _gathered(encoder: Encoder) -> int:
    """Return the bytes, with gradients, of what is outside of layers and of two neighbouring layers.

    FSDP gathers a layer while the one before it is computed.
    """
    layers = [_bytes(nn.ModuleList(encoder.layer_modules(index))) for index in range(encoder.num_layers)]
    return 2 * (_bytes(encoder) - sum(layers) + max(map(sum, pairwise(layers)), default=layers[0]))


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _batches(task: TaskDataModule, data: MultiTaskDataModule, count: int) -> list[ContrastiveBatch]:
    task.prompts = data.prompts
    return first_batches(task, data.tokenizer, count)


class _Stepper:
    """Takes optimizer steps of one batch each, and times them. gradients: bytes of the last step's gradients."""

    def __init__(self, config: Config, module: ContrastiveModule, device: torch.device):
        self.module, self.device, self.clip = module, device, config.trainer.gradient_clip_val
        self.optimizer = module.configure_optimizers()["optimizer"]
        self.bf16, self.gradients = precision_of(config) == "bf16", 0

    def step(self, batch: ContrastiveBatch) -> tuple[float, float]:
        """Return the seconds of the forward and backward pass, and those of clipping and the optimizer."""
        start = self._time()
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            self.module.training_step(batch.to(self.device), 0)["loss"].backward()
        middle = self._time()
        self.gradients = sum(p.grad.numel() * p.grad.element_size() for p in self._with_gradient())
        self.module.configure_gradient_clipping(self.optimizer, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return middle - start, self._time() - middle

    def optimizer_bytes(self) -> int:
        tensors = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))

    def _with_gradient(self) -> Iterator[torch.nn.Parameter]:
        return (p for p in self.module.parameters() if p.grad is not None)

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _cost(
    config: Config,
    data: MultiTaskDataModule,
    module: ContrastiveModule,
    task: str,
    batches: list[ContrastiveBatch],
    seconds: float,
) -> TaskCost:
    def mean(value: Callable[[ContrastiveBatch], float]) -> float:
        return sum(value(batch) for batch in batches) / len(batches)

    tokens, queries = mean(lambda batch: batch.num_tokens), mean(lambda batch: len(batch.queries))
    documents = mean(lambda batch: len(batch.documents)) * ranks_of(config)
    return TaskCost(
        seconds=seconds,
        tokens=tokens,
        queries=queries,
        documents=documents,
        batches=data.schedule().turns(config.trainer.max_steps * batches_per_step(config), task),
        scores=4 * queries * documents,
        flops=6 * tokens * _parameters(module),
    )


def _parameters(module: ContrastiveModule) -> int:
    """Return the number of parameters that a token passes: no embeddings, and only one of a layer's experts."""
    tasks = max(1, len(set(module.encoder.tasks.values())))
    sizes = [(name, p.numel()) for name, p in module.encoder.named_parameters() if "embeddings" not in name]
    return sum(size // tasks if ".experts." in name else size for name, size in sizes)


def _evaluation(config: Config, data: MultiTaskDataModule, module: ContrastiveModule) -> float:
    """Return the seconds that encoding takes in all evaluations on one rank. Ranking is not included."""
    settings, steps = config.evaluation, config.trainer.max_steps
    in_training = math.ceil(steps / settings.every_n_steps) if settings.every_n_steps else 0
    final = 2 if settings.baselines else 1
    seconds = 0.0
    for split, count, precision in (("dev", in_training, precision_of(config)), (settings.split, final, "fp32")):
        with computing_in(precision, module.device):
            seconds += count * sum(_encoding(config, module, b) for b in (data.benchmarks(split) if count else ()))
    return seconds


def _encoding(config: Config, module: ContrastiveModule, benchmark: Benchmark) -> float:
    """Return the seconds that encoding a benchmark takes, from a sample of its texts."""
    seconds = 0.0
    for documents in (benchmark.corpus, benchmark.queries):
        texts = list(documents.values())
        sample = texts[:: max(1, len(texts) // MAX_TEXTS)][:MAX_TEXTS]
        start = time.perf_counter()
        module.encoder.encode(sample, benchmark.task, token_budget=config.data.token_budget)
        seconds += (time.perf_counter() - start) * len(texts) / len(sample)
    return seconds
