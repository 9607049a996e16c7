"""What a training will need, from a few of its steps on one rank: memory, time of a step, hours of the whole.

Time and peak memory are measured where this runs; what further ranks add is computed.
"""

from __future__ import annotations

import dataclasses
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

WARM, MEASURED = 2, 6  # batches of each task
TEXTS = 256  # of a benchmark that are encoded


@dataclasses.dataclass
class TaskCost:
    """Of one batch on one rank, means. seconds: forward, backward and preparing it. documents: of all ranks, that a
    query is compared with. batches: in the whole training, on each rank. scores: bytes of similarities of all ranks'
    documents. flops: of forward and backward, 6 for each parameter and token.
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
    """Bytes and seconds. peak: of this process, or of GPU memory, in the measured steps. activations: what of it is
    neither weights nor gradients nor the optimizer's nor the process itself. further: what other ranks' documents add.
    gathered: weights and gradients that stand whole for a time where ranks share them out (trainer.strategy=fsdp), when
    those above are a rank's share. start: data and encoder are read and built, texts tokenised.
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
        """Seconds of all steps."""
        return steps * self.update + sum(cost.batches * cost.seconds for cost in self.tasks.values())


def ranks_of(config: Config) -> int:
    devices = torch.cuda.device_count() if config.trainer.devices == -1 else config.trainer.devices
    return devices * config.trainer.num_nodes


def predict(config: Config, data: MultiTaskDataModule, module: ContrastiveModule, built: float = 0.0) -> Prediction:
    """Take a few steps with every task. The module's weights change. built: seconds that both took to build."""
    device = torch.device("cpu" if config.trainer.accelerator == "cpu" or not torch.cuda.is_available() else "cuda")
    module.to(device).train()
    memory, steps = Memory(device), _Steps(config, module, device)
    batches, preparing, tokenising = {}, {}, 0.0
    for task in data.tasks:
        began = time.perf_counter()
        _batches(task, data, 1)  # its texts are tokenised, once
        started = time.perf_counter()
        tokenising += started - began
        batches[task.task.name] = _batches(task, data, WARM + MEASURED)
        preparing[task.task.name] = (time.perf_counter() - started) / (WARM + MEASURED)
    weights = _bytes(module)
    for some in batches.values():
        for batch in some[:WARM]:
            steps.take(batch)
    states = [s for state in steps.optimizer.state.values() for s in state.values() if torch.is_tensor(s)]
    optimizer = sum(s.numel() * s.element_size() for s in states)
    process = max(0, memory.now() - weights - optimizer)
    memory.forget_peak()
    costs, update, gradients = {}, [], 0
    for name, some in batches.items():
        taken = [steps.take(batch) for batch in some[WARM:]]
        gradients = max(gradients, steps.gradients)
        update += [after for _, after in taken]
        mean = sum(seconds for seconds, _ in taken) / len(taken)
        own = 0.0 if config.data.num_workers else preparing[name]
        costs[name] = _cost(config, data, module, name, some[WARM:], mean + own)
    activations = max(0, memory.peak() - process - weights - optimizer - gradients)
    ranks = ranks_of(config)
    sharded = config.trainer.strategy == "fsdp"
    shares = ranks if sharded else 1
    largest = max(cost.scores + cost.documents * module.encoder.dimension * 4 for cost in costs.values())
    return Prediction(
        weights // shares,
        gradients // shares,
        optimizer // shares,
        process,
        activations,
        # Vectors of others' documents and similarities with them, forward and backward.
        int(2 * largest * (ranks - 1) / ranks),
        _gathered(module.encoder) if sharded else 0,
        sum(update) / len(update),
        _evaluation(config, data, module) / ranks,
        built + tokenising,
        costs,
    )


def _gathered(encoder: Encoder) -> int:
    """Bytes of what is outside of layers, and of two neighbours, of which one was asked for early; with gradients."""
    layers = [_bytes(nn.ModuleList(encoder.layer_modules(index))) for index in range(encoder.num_layers)]
    return 2 * (_bytes(encoder) - sum(layers) + max(map(sum, pairwise(layers)), default=layers[0]))


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _batches(task: TaskDataModule, data: MultiTaskDataModule, count: int) -> list[ContrastiveBatch]:
    task.prompts = data.prompts
    return first_batches(task, data.tokenizer, count)


class _Steps:
    """Optimizer steps of one batch each, timed."""

    def __init__(self, config: Config, module: ContrastiveModule, device: torch.device):
        self.module, self.device, self.clip = module, device, config.trainer.gradient_clip_val
        self.optimizer = module.configure_optimizers()["optimizer"]
        self.bf16, self.gradients = precision_of(config) == "bf16", 0

    def take(self, batch: ContrastiveBatch) -> tuple[float, float]:
        """Seconds of forward and backward, and of clipping and the optimizer."""
        started = self._time()
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            self.module.training_step(batch.to(self.device), 0)["loss"].backward()
        middle = self._time()
        self.gradients = sum(p.grad.numel() * p.grad.element_size() for p in self._with_gradient())
        self.module.configure_gradient_clipping(self.optimizer, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return middle - started, self._time() - middle

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
    def mean(of: Callable[[ContrastiveBatch], float]) -> float:
        return sum(of(batch) for batch in batches) / len(batches)

    count, schedule, ranks = config.trainer.max_steps * batches_per_step(config), data.schedule(), ranks_of(config)
    tokens, queries = mean(lambda b: b.num_tokens), mean(lambda b: len(b.queries))
    documents = mean(lambda b: len(b.documents)) * ranks
    return TaskCost(
        seconds,
        tokens,
        queries,
        documents,
        schedule.turns(count, task),
        4 * queries * documents,
        6 * tokens * _parameters(module),
    )


def _parameters(module: ContrastiveModule) -> int:
    """Of a forward: no embeddings, and of each kind of expert one."""
    tasks = max(1, len(set(module.encoder.tasks.values())))
    sizes = [(name, p.numel()) for name, p in module.encoder.named_parameters() if "embeddings" not in name]
    return sum(size // tasks if ".experts." in name else size for name, size in sizes)


def _evaluation(config: Config, data: MultiTaskDataModule, module: ContrastiveModule) -> float:
    """Seconds of all evaluations on one rank, by the texts of each benchmark; ranking is not counted."""
    settings, steps = config.evaluation, config.trainer.max_steps
    in_training = -(-steps // settings.every_n_steps) if settings.every_n_steps else 0
    final = 2 if settings.baselines else 1
    seconds = 0.0
    for split, count, precision in (("dev", in_training, precision_of(config)), (settings.split, final, "fp32")):
        with computing_in(precision, module.device):
            seconds += count * sum(_encoding(config, module, b) for b in (data.benchmarks(split) if count else ()))
    return seconds


def _encoding(config: Config, module: ContrastiveModule, benchmark: Benchmark) -> float:
    corpus, queries = list(benchmark.corpus.values()), list(benchmark.queries.values())
    seconds = 0.0
    for texts in (corpus, queries):
        some = texts[:: max(1, len(texts) // TEXTS)][:TEXTS]
        started = time.perf_counter()
        module.encoder.encode(some, benchmark.task, token_budget=config.data.token_budget)
        seconds += (time.perf_counter() - started) * len(texts) / len(some)
    return seconds
