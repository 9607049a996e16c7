"""Predict the memory and time of a training run from a few of its steps."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import lightning as L
import numpy as np
import torch
from torch import nn

from datamodules.batches import MultiTaskDataModule
from datamodules.loader import default_num_workers
from datamodules.packed import ContrastiveBatch
from datamodules.records import Document, MinedNegatives, counted
from datamodules.tasks import TaskDataModule
from experiments.build.data import batches_per_step, build_data, describe_schedule
from experiments.build.mining import build_mining_callback
from experiments.build.models import device_of, ranks_of
from experiments.build.module import build_module, describe_parameters, first_batches
from experiments.build.trainer import build_balance, precision_of
from experiments.config.experiment import ExperimentOptions, folder_of, load_config, parse_overrides
from experiments.config.schema import Config
from experiments.shared.console import entry_point
from experiments.shared.table_formats import Column, Table, print_table
from lightning_modules.callbacks.hard_negatives import HardNegativeMining
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.base import Encoder
from lightning_modules.memory import Memory, num_bytes
from lightning_modules.mining.mine import Mining
from lightning_modules.retrieval.compute import computing_in, describe_device
from lightning_modules.task_balance import GradientBalance, TaskGradients
from lightning_modules.throughput import (
    Speed,
    computing_dtype,
    encoder_ceiling,
    num_positions,
    pads_attention,
    synchronize,
    text_lengths,
)

log = logging.getLogger(__name__)

WARM_UP, MEASURED = 2, 6  # number of batches per task
TEXTS = 256  # number of documents, and of queries, to encode per corpus
MEMORY = {  # part of a rank's memory -> where the figure comes from
    "weights": "computed",
    "gradients": "computed, for the task with the largest",
    "optimizer": "computed",
    "process": "measured: Python, libraries, data; on a GPU, all other memory",
    "activations": "measured: the rest of the peak; data.token_budget and trainer.grad_cache limit it",
    "further": "computed: vectors of the other ranks' documents, and similarities with them",
    "gathered": "computed: unsharded weights and gradients while a layer is computed (trainer.strategy=fsdp)",
    "balance": "computed: the gradients that objective.balance combines, one per task",
}
SHARDED = ("weights", "gradients", "optimizer")  # parts that fsdp divides among the ranks


@dataclass(kw_only=True)
class DryRunOptions(ExperimentOptions):
    """Predict the memory and time of a training run.

    Reads the data, builds the encoder, and trains a few steps of every task on one rank of this machine. From these
    steps, it computes the cost for the configured ranks and steps. Random documents replace the hard negatives that
    training will mine. It only writes the cache of the data.
    """


@dataclass
class TaskCost:
    """Mean cost of a batch of a task on one rank."""

    seconds: float  # for waiting, forward and backward
    waiting: float  # part of `seconds` spent waiting for the batch
    tokens: float
    positions: float  # number of tokens, including padding
    pairs: float  # number of pairs of a query and a positive
    queries: float
    documents: float  # number of candidates per query, over all ranks
    batches: int  # number of batches in the whole training, on each rank
    flops: float  # useful operations in forward and backward


@dataclass
class Prediction:
    """Memory of one rank in bytes, by the parts in MEMORY, and times in seconds."""

    memory: dict[str, int]
    update: float  # combining and clipping gradients, and the optimizer, per step
    start: float  # reading the data, building the encoder, tokenising
    teacher: float  # encoding all texts with objective.vector_teacher
    mining: float  # encoding for mining, over all rounds
    evaluation: float  # encoding for evaluation, over all evaluations
    tasks: dict[str, TaskCost]
    ceiling: float  # FLOP/s of the device, for the MFU

    def training(self, steps: int) -> float:
        """Return the seconds that the whole training takes."""
        return steps * self.update + self._total("seconds")

    def speed(self, steps: int, ranks: int) -> Speed:
        """Return the mean speed over the whole training, in the form of the training log."""
        seconds = self.training(steps)
        return Speed(
            tokens_per_second=ranks * self._total("tokens") / seconds,
            pairs_per_second=ranks * self._total("pairs") / seconds,
            mfu=self._total("flops") / seconds / self.ceiling,
            padding_share=1 - self._total("tokens") / self._total("positions"),
            data_seconds=self._total("waiting"),
            data_share=self._total("waiting") / seconds,
            memory_mb=sum(self.memory.values()) / 2**20,
        )

    def _total(self, name: str) -> float:
        """Return the sum of a cost over all batches of one rank."""
        return sum(cost.batches * getattr(cost, name) for cost in self.tasks.values())


@dataclass
class ZeroVectors:
    """Zeros instead of a teacher's vectors, so that encoding them does not count as training. dimension: size, G."""

    dimension: int

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), self.dimension), dtype=np.float32)


def main(arguments: Sequence[str]) -> None:
    options, overrides = parse_overrides(DryRunOptions, arguments)
    dry_run(options.experiment, overrides)


def dry_run(experiment: str, overrides: Sequence[str] = ()) -> Prediction:
    """Predict the cost of an experiment and print it."""
    config = load_config(experiment, overrides)
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = folder  # where quarantined lines go
        started = time.perf_counter()
        L.seed_everything(config.run.seed, verbose=False)
        data = build_data(config, training=True)
        module = build_module(config, data)
        if module.objective.vector_teacher is not None and config.objective.vector_teacher.cached:
            for task in data.tasks:
                task.teacher_vectors = {task.task.name: ZeroVectors(module.objective.vector_teacher.dimension)}
        describe_schedule(config, data)
        log.info("%s", describe_parameters(module))
        prediction = predict(config, data, module, time.perf_counter() - started)
    _show_tasks(config, prediction)
    _show_memory(prediction)
    _show_times(config, prediction)
    return prediction


def predict(config: Config, data: MultiTaskDataModule, module: ContrastiveModule, built: float = 0.0) -> Prediction:
    """Train a few steps of every task, and compute the rest from them. This changes the module's weights.

    built: seconds it took to build data and module.
    """
    module.to(device_of(config)).train()
    mining, rounds = _planned_mining(config, data)
    if rounds and data.rounds.at(0) is None:
        _add_random_negatives(data, mining.miners)
    first = {task.task.name: _FirstBatches.of(task, data) for task in data.tasks}
    steps = _Steps(config, module)
    steps.warm_up([batch for batches in first.values() for batch in batches.warm_up])
    costs = {name: _cost(config, data, module, name, batches, steps) for name, batches in first.items()}
    balance, combining = _balance_cost(config, module)
    return Prediction(
        memory=_memory(config, module, steps, costs) | {"balance": balance},
        update=combining + sum(steps.updates) / len(steps.updates),
        start=built + sum(batches.tokenising for batches in first.values()),
        teacher=_teacher_seconds(config, data, module),
        mining=rounds * _mining_seconds(config, data, module, mining),
        evaluation=_evaluation_seconds(config, data, module),
        tasks=costs,
        ceiling=1e12 * config.trainer.peak_tflops
        or encoder_ceiling(module.encoder, computing_dtype(precision_of(config))),
    )


def _planned_mining(config: Config, data: MultiTaskDataModule) -> tuple[Mining | None, int]:
    """Return the mining that happens during training, and the number of rounds."""
    callbacks = build_mining_callback(config, data, folder_of(config), batches_per_step(config))
    if not callbacks:
        return None, 0
    (callback,) = callbacks
    assert isinstance(callback, HardNegativeMining)
    return callback.mining, len(range(callback.first_step, config.trainer.max_steps, callback.every_n_steps))


def _add_random_negatives(data: MultiTaskDataModule, tasks: Collection[str]) -> None:
    """Let tasks draw random documents instead of the hard negatives that they will mine."""
    rng, negatives = np.random.default_rng(0), {}
    for task in data.tasks:
        if task.task.name in tasks:
            count = task.options.num_hard_negatives
            rows = [p.first_row + rng.integers(len(p.corpus), size=len(p.queries) * count) for p in task.pools()]
            documents = np.concatenate(rows).astype(np.int32)
            starts, scores = np.arange(0, len(documents) + 1, count), np.zeros(len(documents), dtype=np.float32)
            negatives[task.task.name] = MinedNegatives(starts, documents, np.zeros_like(documents), scores, {})
    data.rounds.write("random", negatives, {"data": data.fingerprints()})
    data.rounds.begin(0, "random")


@dataclass
class _FirstBatches:
    """The first batches of a task.

    tokenising: seconds to tokenise all texts, once.
    preparing: seconds to prepare a batch.
    """

    warm_up: list[ContrastiveBatch]
    measured: list[ContrastiveBatch]
    tokenising: float
    preparing: float

    @classmethod
    def of(cls, task: TaskDataModule, data: MultiTaskDataModule) -> _FirstBatches:
        task.prompts, task.rounds = data.prompts, data.rounds
        began = time.perf_counter()
        first_batches(task, data.tokenizer, 1)  # tokenises all texts of the task
        started = time.perf_counter()
        batches = first_batches(task, data.tokenizer, WARM_UP + MEASURED)
        preparing = (time.perf_counter() - started) / len(batches)
        last = data.num_batches() - 1  # the last step, because a loss may cost less during its warm-up
        batches = [dataclasses.replace(batch, step=last) for batch in batches]
        return cls(batches[:WARM_UP], batches[WARM_UP:], started - began, preparing)


class _Steps:
    """Optimizer steps of one batch each, measured in seconds and bytes.

    updates: seconds for clipping and the optimizer, for each step after the warm-up.
    gradients: bytes of the gradients, in the step with the largest.
    process: bytes in use after the warm-up, without weights and optimizer.
    """

    def __init__(self, config: Config, module: ContrastiveModule):
        self.module, self.device, self.clip = module, device_of(config), config.trainer.gradient_clip_val
        self.optimizer = module.configure_optimizers()["optimizer"]
        self.precision, self.memory = precision_of(config), Memory(self.device)
        self.updates: list[float] = []
        self.gradients = self.process = 0

    def warm_up(self, batches: Sequence[ContrastiveBatch]) -> None:
        for batch in batches:
            self.take(batch)
        self.updates.clear()
        self.process = max(0, self.memory.now() - self.weights - self.optimizer_state)
        self.memory.reset_peak()

    def take(self, batch: ContrastiveBatch) -> float:
        """Train on a batch, and return the seconds for forward and backward."""
        started = self._time()
        with computing_in(self.precision, self.device):
            self.module.training_step(batch.to(self.device), 0)["loss"].backward()
        middle = self._time()
        self.gradients = max(self.gradients, num_bytes(p.grad for p in self.module.parameters() if p.grad is not None))
        self.module.configure_gradient_clipping(self.optimizer, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates.append(self._time() - middle)
        return middle - started

    @property
    def weights(self) -> int:
        return num_bytes(self.module.parameters())

    @property
    def optimizer_state(self) -> int:
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return num_bytes(value for value in states if torch.is_tensor(value))

    @property
    def activations(self) -> int:
        others = self.process + self.weights + self.optimizer_state + self.gradients
        return max(0, self.memory.peak() - others)

    def _time(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def _cost(
    config: Config,
    data: MultiTaskDataModule,
    module: ContrastiveModule,
    task: str,
    first: _FirstBatches,
    steps: _Steps,
) -> TaskCost:
    """Train on the measured batches of a task, and return their mean cost."""
    batches = first.measured
    padded = pads_attention(module.encoder, computing_dtype(precision_of(config)))

    def mean(size: Callable[[ContrastiveBatch], float]) -> float:
        return sum(map(size, batches)) / len(batches)

    seconds = sum(steps.take(batch) for batch in batches) / len(batches)
    workers = config.data.num_workers
    if workers is None:
        workers = default_num_workers(steps.device.type == "cuda", ranks_of(config) // config.trainer.num_nodes)
    waiting = max(0.0, first.preparing / workers - seconds) if workers else first.preparing
    return TaskCost(
        seconds=waiting + seconds,
        waiting=waiting,
        tokens=mean(lambda batch: batch.num_tokens),
        positions=mean(lambda batch: num_positions(batch, padded)),
        pairs=mean(lambda batch: int((batch.positives >= 0).sum())),
        queries=mean(lambda batch: len(batch.queries)),
        documents=mean(lambda batch: len(batch.documents)) * ranks_of(config),
        batches=data.schedule().turns(config.trainer.max_steps * batches_per_step(config), task),
        flops=mean(lambda batch: sum(group.flops(module.encoder, x) for group, x in text_lengths(batch))),
    )


def _memory(config: Config, module: ContrastiveModule, steps: _Steps, costs: Mapping[str, TaskCost]) -> dict[str, int]:
    """Return the memory of a rank in bytes, by the parts in MEMORY except "balance"."""
    ranks, sharded = ranks_of(config), config.trainer.strategy == "fsdp"
    memory = {
        "weights": steps.weights,
        "gradients": steps.gradients,
        "optimizer": steps.optimizer_state,
        "process": steps.process,
        "activations": steps.activations,
    }
    if sharded:
        memory |= {name: memory[name] // ranks for name in SHARDED}
    # Vectors and similarities, in float32.
    largest = max(4 * cost.documents * (module.encoder.dimension + cost.queries) for cost in costs.values())
    memory["further"] = int(2 * largest * (ranks - 1) / ranks)  # once in forward, once in backward
    memory["gathered"] = _gathered_bytes(module.encoder) if sharded else 0
    return memory


def _gathered_bytes(encoder: Encoder) -> int:
    """Return the bytes of unsharded weights and gradients during a sharded step.

    They belong to the modules outside the layers and to two adjacent layers, because the next layer is gathered ahead.
    """
    modules = [nn.ModuleList(encoder.layer_modules(index)) for index in range(encoder.num_layers)]
    layers = [num_bytes(module.parameters()) for module in modules]
    outside = num_bytes(encoder.parameters()) - sum(layers)
    return 2 * (outside + max(map(sum, pairwise(layers)), default=layers[0]))


def _balance_cost(config: Config, module: ContrastiveModule) -> tuple[int, float]:
    """Return the bytes of the tasks' gradients, and the seconds per step to store and combine them."""
    callbacks = [callback for callback in build_balance(config) if isinstance(callback, GradientBalance)]
    if not callbacks:
        return 0, 0.0
    (balance,), trained = callbacks, [p for p in module.parameters() if p.requires_grad]
    balance.gradients = TaskGradients(trained, balance.tasks)
    random = {task: [torch.randn_like(p) for p in trained] for task in balance.tasks}
    trainer, losses = SimpleNamespace(global_step=0, loggers=[]), torch.ones(len(random), device=module.device)
    started = time.perf_counter()
    for task, gradients in random.items():
        balance.gradients.add(task, gradients)
    balance.gradients.apply(balance.coefficients(trainer, losses))
    float(trained[-1].grad.sum())  # wait for the GPU
    return num_bytes([balance.gradients.values]), time.perf_counter() - started


def _teacher_seconds(config: Config, data: MultiTaskDataModule, module: ContrastiveModule) -> float:
    """Return the seconds that one rank spends encoding for the vector teacher before training."""
    options, teacher = config.objective.vector_teacher, module.objective.vector_teacher
    if teacher is None or not options.cached:
        return 0.0
    teacher.encoder.to(module.device)
    tables = {task: parts for task, parts in data.texts_of_rows().items() if options.is_used_for(task)}
    with computing_in(precision_of(config), module.device):
        return sum(
            _encoding_seconds(config, teacher.encoder, task, *(part for part, _ in tables[task])) for task in tables
        )


def _mining_seconds(
    config: Config, data: MultiTaskDataModule, module: ContrastiveModule, mining: Mining | None
) -> float:
    """Return the seconds that one rank spends encoding for a round of mining, without ranking and judging."""
    if mining is None or not mining.needs_encoder:
        return 0.0
    pools = [pool for pool in data.pools() if pool.task in mining.miners]
    with computing_in(precision_of(config), module.device):
        return sum(_encoding_seconds(config, module.encoder, pool.task, pool.corpus, pool.queries) for pool in pools)


def _evaluation_seconds(config: Config, data: MultiTaskDataModule, module: ContrastiveModule) -> float:
    """Return the seconds that one rank spends encoding for all evaluations, without ranking."""
    settings, steps = config.evaluation, config.trainer.max_steps
    in_training = -(-steps // settings.every_n_steps) if settings.every_n_steps else 0
    final = 2 if settings.baselines else 1
    seconds = 0.0
    for split, count, precision in (("dev", in_training, precision_of(config)), (settings.split, final, "fp32")):
        with computing_in(precision, module.device):
            for benchmark in data.benchmarks(split) if count else ():
                texts = list(benchmark.corpus.values()), list(benchmark.queries.values())
                seconds += count * _encoding_seconds(config, module.encoder, benchmark.task, *texts)
    return seconds


def _encoding_seconds(config: Config, encoder: Encoder, task: str, *parts: Sequence[Document]) -> float:
    """Time the encoding of some texts, and return the seconds that one rank would spend on its share of all texts."""
    seconds = 0.0
    for texts in parts:
        sample = [texts[i] for i in range(0, len(texts), max(1, len(texts) // TEXTS))][:TEXTS]
        started = time.perf_counter()
        encoder.encode(sample, task, token_budget=config.data.token_budget)
        seconds += (time.perf_counter() - started) * len(texts) / max(1, len(sample))
    return seconds / ranks_of(config)


def _show_tasks(config: Config, prediction: Prediction) -> None:
    forms = {"batches": ",d", "ms per batch": ",.1f", "tokens": ",.0f", "tokens/s": ",.0f", "MFU": ".0%"}
    forms |= {"queries": ",.0f", "documents of all ranks": ",.0f", "TFLOP": ".3g"}
    columns = [
        Column("task", folds=True),
        *(Column(heading, form, folds=" " in heading) for heading, form in forms.items()),
    ]
    table = Table(columns, f"{config.experiment}, {config.scale}: a batch on one rank")
    for name, cost in prediction.tasks.items():
        mfu = cost.flops / cost.seconds / prediction.ceiling
        table.add(
            *(name, cost.batches, 1e3 * cost.seconds, cost.tokens, cost.tokens / cost.seconds, mfu),
            *(cost.queries, cost.documents, cost.flops / 1e12),
        )
    print_table(table)


def _show_memory(prediction: Prediction) -> None:
    table = Table([Column("memory per rank"), Column("MB", ",.0f"), Column("", folds=True)])
    for name, origin in MEMORY.items():
        share = ", one rank's share" if prediction.memory["gathered"] and name in SHARDED else ""
        table.add(name, prediction.memory[name] / 2**20, origin + share)
    table.add("memory", sum(prediction.memory.values()) / 2**20, "total")
    print_table(table)


def _show_times(config: Config, prediction: Prediction) -> None:
    ranks, steps = ranks_of(config), config.trainer.max_steps
    training = prediction.training(steps)
    times = {
        "start": prediction.start,
        "the teacher's vectors": prediction.teacher,
        counted(steps, "step"): training,
        "mining": prediction.mining,
        "evaluation": prediction.evaluation,
    }
    log.info(
        "measured on %s in %s, %s; configured: %s of %s",
        describe_device(device_of(config)),
        precision_of(config),
        counted(torch.get_num_threads(), "thread"),
        counted(ranks, "rank"),
        counted(config.trainer.num_nodes, "node"),
    )
    log.info(
        "a step takes %.1f ms (including %.1f ms for the update); %s, total %s",
        1e3 * training / steps,
        1e3 * prediction.update,
        ", ".join(f"{name} {_duration(seconds)}" for name, seconds in times.items() if seconds),
        _duration(sum(times.values())),
    )
    log.info("training speed: %s", prediction.speed(steps, ranks).text())
    log.info(
        "not counted: imports (a few seconds), BM25, ranking, judges, diagnostics, checkpoints, logging, and other "
        "programs on the machine, such as W&B's"
    )
    if prediction.memory["gathered"]:
        log.info(
            "not measured: gathering %.0f MB of weights per chunk in forward and backward, exchanging gradients, "
            "ranks that share cores, and the second copy of all weights during evaluation and mining",
            prediction.memory["weights"] * ranks / 2**20,
        )
    elif ranks > 1:
        log.info(
            "not measured: exchanging %.0f MB of gradients per step between ranks, and ranks that share cores",
            prediction.memory["gradients"] / 2**20,
        )
    if device_of(config).type == "cpu":
        flops = sum(cost.batches * cost.flops for cost in prediction.tasks.values())
        log.info(
            "on a GPU (not measured): each rank computes %.3g PFLOP of useful operations, which take %s at 50 "
            "TFLOP/s; memory is about as above, without the process, and less in bf16",
            flops / 1e15,
            _duration(flops / 50e12),
        )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


if __name__ == "__main__":
    entry_point(main)
