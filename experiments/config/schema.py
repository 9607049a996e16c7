"""All keys of an experiment: type, default, bounds and meaning. check_constraints checks whether keys fit together."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from datamodules.options import option
from datamodules.records import UserError, prefixed
from lightning_modules.encoders.backbone_options import BackboneOptions, check_peft
from lightning_modules.mining.mining_options import MiningOptions
from lightning_modules.objective_options import (
    COMBINES_GRADIENTS,
    ObjectiveOptions,
    check_balance_packages,
    check_objective,
)
from lightning_modules.optim_options import OptimOptions
from lightning_modules.retrieval.metrics import check_metric

METRICS = ["ndcg@10", "recall@20", "recall@100", "mrr@10", "map@100"]
DENSE_MINER = {"_target_": "lightning_modules.mining.miners.DenseMiner"}


@dataclass
class RunConfig:
    """Folder, seed and start of a run."""

    dir: str = option("", "folder of the run; by default, runs/<experiment>-<scale>-seed<seed>-<hash of the keys>")
    seed: int = option(0, "seed for all random numbers", minimum=0, maximum=2**32 - 1)
    resume: Literal["auto", "never"] = option(
        "auto",
        "auto: resume from the last checkpoint, if any; never: start over, and keep the old run under another name",
    )


@dataclass
class PhaseConfig:
    """A phase of the curriculum, which changes the shares of the tasks."""

    from_step: int = option(MISSING, "first optimizer step of the phase", minimum=1)
    weights: dict[str, float] = option({}, "relative share of the steps of each task", above=0, maximum=1e9)


@dataclass
class DataConfig:
    """Training data, batches, and the order of the tasks."""

    root: str = option("data", "folder that task files refer to as ${data.root}")
    cache: str | None = option(
        "~/.cache/scimult", "folder for memory-mapped copies of the data; null: read all data into memory"
    )
    on_error: Literal["fail", "skip"] = option(
        "fail", "what to do with a bad line: fail, or skip it and write it to quarantine.jsonl in the run's folder"
    )
    batch_size: int = option(32, "queries per batch and rank", minimum=1, maximum=1_000_000)
    batch_tokens: int = option(
        0,
        "number of tokens per batch on each rank (queries, positives, hard negatives), instead of batch_size; 0: use "
        "batch_size",
        minimum=0,
        maximum=1_000_000_000,
    )
    max_length: int = option(256, "maximum number of tokens of a text: [CLS], at least one word, [SEP]", minimum=3)
    token_budget: int | None = option(
        None,
        "maximum number of tokens per forward pass; by default 2,048 on a CPU, and on a GPU 32,768 in training and "
        "65,536 without gradients",
        minimum=1,
    )
    num_positives: int = option(1, "maximum number of positives per query, sampled by grade", minimum=1, maximum=10_000)
    num_hard_negatives: int = option(1, "maximum number of hard negatives per query", minimum=0, maximum=10_000)
    collection_temperature: float = option(
        1.0,
        "temperature of the shares of a task's collections: each share is proportional to the number of examples to "
        "the power 1 / collection_temperature, so a higher value makes them more even",
        minimum=0.1,
        maximum=1e6,
    )
    mixed_batches: bool = option(
        False,
        "mix a task's collections in each batch, in the same shares; by default, a batch comes from one collection",
    )
    num_workers: int | None = option(
        None,
        "processes that prepare batches on each rank; 0: the training process itself; by default one per spare core "
        "(at most 4) on a GPU, and 0 on a CPU",
        minimum=0,
        maximum=1024,
    )
    on_leak: Literal["ignore", "warn", "strip", "error"] = option(
        "warn",
        "what to do if evaluation texts are in the training data: ignore, warn, strip (train without them), or error "
        "(fail)",
    )
    leaks_in: list[str] = option(
        [], "further evaluations to check for leaks: folders in BEIR layout or with JSON lines"
    )
    schedule: Literal["round_robin", "together", "proportional", "temperature", "weights"] = option(
        "round_robin",
        "which task each step trains: round_robin (tasks take turns), together (all tasks), proportional (by number "
        "of examples), temperature (by number of examples to the power 1 / schedule_temperature), or weights (by "
        "data.weights)",
    )
    schedule_temperature: float = option(
        2.0,
        "temperature for schedule=temperature; 1 is proportional, higher values are more even",
        minimum=0.1,
        maximum=1e6,
    )
    weights: dict[str, float] = option(
        {}, "relative share of the steps of each task, for schedule=weights", above=0, maximum=1e9
    )
    curriculum: list[PhaseConfig] = option([], "phases that change the weights during training")


@dataclass
class MiningConfig(MiningOptions):
    """Mining of hard negatives, before training (store) or during it (every_n_steps or every_n_epochs)."""

    every_n_steps: int = option(
        0, "mine again with the current model after this many optimizer steps; 0: never", minimum=0
    )
    every_n_epochs: float = option(
        0.0, "mine again after this many passes over all examples; 0: never", minimum=0, maximum=1e6
    )
    first_step: int | None = option(
        None, "step of the first mining, by default after one interval; 0 mines before training", minimum=0
    )
    stop_at: float | None = option(
        None,
        "stop training if more than this share of the mined negatives look like positives; null: never",
        minimum=0,
        below=1,
    )
    store: str | None = option(None, "output folder of `make mine`; its negatives are used from the first step")
    use: Literal["mined", "data", "both"] = option(
        "mined", "hard negatives to use: mined (queries without mined ones use the data's), data, or both"
    )
    miner: dict[str, Any] = option(DENSE_MINER, "_target_ node: a class in lightning_modules.mining.miners")
    miners: dict[str, Any] = option(
        {}, "miners for individual tasks: task -> _target_ node; null: do not mine for this task"
    )
    judge: Any = option(
        None,
        "_target_ node of a judge, which drops mined negatives or turns them into positives: a class in "
        "lightning_modules.mining.relabel or cross_encoder; null for none",
    )
    judges: dict[str, Any] = option({}, "judges for individual tasks: task -> _target_ node; null for none")


@dataclass
class TrainerConfig:
    """Length of the training, hardware, and precision."""

    max_steps: int = option(1000, "number of optimizer steps", minimum=1, maximum=1_000_000_000)
    max_epochs: float = option(
        0.0,
        "number of passes over the examples of all tasks, instead of max_steps; 0: use max_steps",
        minimum=0,
        maximum=1e6,
    )
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "hardware; auto: GPUs if there are any")
    devices: int = option(1, "processes (ranks) per node; -1: one per GPU", minimum=-1, maximum=1024)
    num_nodes: int = option(1, "number of machines", minimum=1, maximum=100_000)
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option(
        "auto",
        "auto: bf16 on hardware made for it (GPUs, CPUs with AMX), else fp32; fp16 is for GPUs without bf16, tf32 is "
        "fp32 with faster products on GPUs; a resumed run keeps its precision",
    )
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the weights, such as 0.999; the average is evaluated and saved "
        "instead of the trained weights; 0: none",
        minimum=0,
        below=1,
    )
    start_share: float = option(
        0.0,
        "share of the initial weights, such as 0.3, when they are averaged with the best checkpoint after training to "
        "reduce forgetting; the average is evaluated and saved as merged.ckpt; 0: none",
        minimum=0,
        below=1,
    )
    gradient_clip_val: float = option(1.0, "maximum norm of the gradient; 0: no clipping", minimum=0, maximum=1e9)
    accumulate_grad_batches: int = option(
        1, "batches per optimizer step (per task with data.schedule=together)", minimum=1, maximum=1_000_000
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    grad_cache: bool = option(
        False,
        "GradCache: batches of any size in the memory of data.token_budget tokens, for the price of a second forward "
        "pass",
    )
    strategy: Literal["ddp", "fsdp"] = option(
        "ddp", "for several ranks: each holds all weights (ddp), or weights, gradients and optimizer are sharded (fsdp)"
    )
    compile: Literal["auto", "yes", "no"] = option(
        "auto", "torch.compile for the layers; auto: on a GPU, if the run is long enough to pay off"
    )
    timeout: int = option(1800, "seconds to wait for a rank that does not answer", minimum=1, maximum=10_000_000)
    log_every_n_steps: int = option(20, "number of optimizer steps between two log entries", minimum=1)
    peak_tflops: float = option(
        0.0,
        "peak speed of a device, in TFLOP/s, to which MFU is relative; 0: measure a matrix product at the start",
        minimum=0,
        maximum=1e9,
    )


@dataclass
class CheckpointConfig:
    """Checkpointing: when to save, and what to keep."""

    every_n_steps: int = option(200, "number of optimizer steps between two checkpoints", minimum=1)
    keep: int = option(2, "number of checkpoints to keep, including the last one", minimum=1, maximum=10_000)


@dataclass
class EvaluationConfig:
    """Evaluation during training and in the final table."""

    every_n_steps: int = option(
        200, "number of optimizer steps between two evaluations on the dev splits; 0: never", minimum=0
    )
    patience: int = option(
        0, "stop training early after this many evaluations in a row without a new best checkpoint; 0: never", minimum=0
    )
    split: Literal["train", "dev", "test", "none"] = option(
        "test", "split to evaluate for the final table; none: no table, for runs that other commands evaluate"
    )
    metrics: list[str] = option(METRICS, "metrics; the first one selects the best checkpoint")
    baselines: bool = option(True, "also evaluate BM25 and the encoder before training")


@dataclass
class DiagnosticsConfig:
    """Statistics of gradients, experts and vectors."""

    every_n_steps: int = option(0, "number of optimizer steps between two sets of statistics; 0: never", minimum=0)


LOGGERS = ("tensorboard", "csv")  # Lightning's own, as named in loggers.py
MAX_WANDB_NAME, MAX_WANDB_TAG = 128, 64  # characters


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = option(
        "offline", "offline: write to the run's folder, for `make sync`; online: send at once, with an account"
    )
    project: str = option("scimult", "name of the project")
    entity: str | None = option(None, "user or team, by default that of the account")
    name: str | None = option(None, "name of the run, by default the name of its folder")
    group: str | None = option(None, "group, by default experiment and scale")
    tags: list[str] = option([], "tags, by default experiment, scale and seedN")
    checkpoints: bool = option(False, "upload the checkpoint in the final table as an artifact")
    finish_timeout: int = option(30, "seconds to wait for the upload at the end", minimum=0, maximum=10_000_000)


@dataclass
class TaskConfig:
    """A task: its expert, its batches and its data."""

    kind: Literal["classification", "link_prediction", "search"] = option(MISSING, "kind of the task")
    expert: str = option(MISSING, "name of the expert that serves the task")
    instruction: str = option("", "description of the task in one sentence, for encoders that read instructions")
    batch_size: int | None = option(
        None, "queries per batch on each rank, by default data.batch_size", minimum=1, maximum=1_000_000
    )
    max_length: int | None = option(None, "maximum number of tokens, by default data.max_length", minimum=3)
    num_positives: int | None = option(
        None, "positives per query, by default data.num_positives", minimum=1, maximum=10_000
    )
    num_hard_negatives: int | None = option(
        None, "hard negatives per query, by default data.num_hard_negatives", minimum=0, maximum=10_000
    )
    collection_temperature: float | None = option(
        None,
        "temperature of the shares of its collections, by default data.collection_temperature",
        minimum=0.1,
        maximum=1e6,
    )
    mixed_batches: bool | None = option(None, "mix its collections in each batch, by default data.mixed_batches")
    data: dict[str, Any] = option(
        {}, "collection -> _target_ node of its reader; task files have such a block for each scale"
    )


@dataclass
class ExtendConfig:
    """Tasks that are added to a trained encoder, and classes from other packages."""

    model: str | None = option(None, "run, checkpoint or exported encoder that gets the experiment's tasks")
    packages: list[str] = option(
        [],
        "packages whose classes `_target_` may name, such as [mylab, lightning.pytorch.callbacks]; only set on the "
        "command line, because importing a package runs its code",
    )
    like: str = option("nearest", "task whose expert is copied for new tasks; nearest: the task with the lowest loss")
    freeze: bool = option(
        True,
        "train only the new experts, so that the vectors of the old tasks do not change; false: train all parameters",
    )


@dataclass
class Config:
    """All keys of an experiment."""

    experiment: str = option(
        MISSING, "name of a file in experiments, or path of your own file (the first argument of a command)"
    )
    scale: str = option("sample", "name of a file in experiments/scale")
    tasks: list[str] = option(MISSING, "names of the tasks to train (files in experiments/tasks)")
    init_from: str | None = option(None, "run, checkpoint or exported encoder whose weights training starts from")
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    encoder: dict[str, Any] = option(MISSING, "_target_ node: a class in lightning_modules.encoders, and its arguments")
    mining: MiningConfig = field(default_factory=MiningConfig)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    loggers: list[str] = option([], "further loggers that write into the run's folder: tensorboard, csv")
    losses: dict[str, Any] = option({}, "losses added to InfoNCE: name -> _target_ node with its weight")
    callbacks: dict[str, Any] = option({}, "further Lightning callbacks: name -> _target_ node")
    task: dict[str, TaskConfig] = option({}, "settings of each task, from experiments/tasks/<task>.yaml")


def settings_by_task(config: Config) -> list[dict[str, Any]]:
    """Return the settings that have an entry for each of several tasks, except `task` itself."""
    objective = config.objective
    nodes = [
        config.data.weights,
        *(phase.weights for phase in config.data.curriculum),
        config.mining.miners,
        config.mining.judges,
        objective.task_weights,
        objective.temperature,
        objective.vector_teacher.weight,
    ]
    return [node for node in nodes if isinstance(node, dict)]


def check_constraints(config: Config) -> None:
    """Raise UserError if settings contradict each other."""
    check_metrics("evaluation.metrics", config.evaluation.metrics)
    _check_patience(config)
    _check_curriculum(config)
    _check_balance(config)
    _check_wandb(config.wandb)
    _check_loggers(config.loggers)
    _check_sharding(config)
    _check_mining_times(config)
    _check_mined_negatives_are_used(config)
    check_objective(config.objective, list(config.task), "objective.")


def check_metrics(key: str, names: Sequence[str]) -> None:
    """Raise UserError for an unknown metric, or an empty list. key: setting with the metrics."""
    if not names:
        raise UserError(f"{key}: name at least one, such as ndcg@10")
    with prefixed(f"{key}: "):
        for name in names:
            check_metric(name)


def _check_patience(config: Config) -> None:
    if config.evaluation.patience and not config.evaluation.every_n_steps:
        raise UserError("evaluation.patience: there are no evaluations to count; set evaluation.every_n_steps")


def _check_curriculum(config: Config) -> None:
    steps = [phase.from_step for phase in config.data.curriculum]
    if steps != sorted(set(steps)):
        raise UserError(f"data.curriculum: expected phases with increasing from_step, got {', '.join(map(str, steps))}")


def _check_balance(config: Config) -> None:
    """Check objective.balance. It needs several tasks, and all of them in each step if it compares their gradients."""
    balance, schedule = config.objective.balance, config.data.schedule
    if balance != "none" and len(config.tasks) < 2:
        raise UserError(f"objective.balance: {balance} needs several tasks, but there is only {config.tasks[0]}")
    if balance in COMBINES_GRADIENTS and schedule != "together":
        raise UserError(
            f"objective.balance: {balance} compares the gradients of all tasks in each optimizer step; "
            f"set data.schedule=together (got {schedule})"
        )


def _check_wandb(wandb: WandbConfig) -> None:
    """Check names and tags now, because W&B would only refuse them when the first values are logged."""
    limits = {"project": MAX_WANDB_NAME, "entity": MAX_WANDB_NAME, "name": MAX_WANDB_NAME, "group": MAX_WANDB_NAME}
    texts = [(f"wandb.{key}", getattr(wandb, key), limit) for key, limit in limits.items()]
    texts += [("wandb.tags", tag, MAX_WANDB_TAG) for tag in wandb.tags]
    for key, text, limit in texts:
        if text is None:
            continue
        if not 1 <= len(text) <= limit:
            raise UserError(f"{key}: expected 1 to {limit} characters, got {len(text)} ({text[:40]!r})")
        if not text.isprintable():
            raise UserError(f"{key}: expected a text without control characters, got {text!r}")


def _check_loggers(names: list[str]) -> None:
    for name in names:
        if name not in LOGGERS or names.count(name) > 1:
            raise UserError(f"loggers: expected {' or '.join(LOGGERS)}, each at most once, got {name!r}")


def check_machine(config: Config) -> None:
    """Raise UserError if this machine lacks the hardware or the packages to train."""
    import torch  # only here, because it takes a second to import

    if "tensorboard" in config.loggers and importlib.util.find_spec("tensorboard") is None:
        raise UserError("loggers: tensorboard is not installed (pip install tensorboard)")
    if config.backbone.lora.rank:
        with prefixed("backbone."):
            check_peft()
    with prefixed("objective."):
        check_balance_packages(config.objective.balance)
    trainer = config.trainer
    if trainer.start_share and config.backbone.lora.rank:  # averaging A and B does not average their product
        raise UserError("trainer.start_share: does not support backbone.lora; use make merge after training")
    if trainer.devices == 0:
        raise UserError("trainer.devices: expected a number above 0, or -1 for all GPUs, got 0")
    if trainer.devices == -1 and not torch.cuda.is_available():
        raise UserError("trainer.devices: -1 means all GPUs, but there is no GPU; set a number above 0")
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator: got gpu, but there is no GPU; set auto or cpu")


def _check_sharding(config: Config) -> None:
    """Check the settings for fsdp. It needs several ranks, and does not support parameters outside the encoder."""
    if config.trainer.strategy == "ddp":
        return
    if config.trainer.devices == 1 and config.trainer.num_nodes == 1:
        raise UserError(
            "trainer.strategy: fsdp shards weights over ranks, but there is only one; set trainer.devices=2"
        )
    if config.trainer.compile == "yes":
        raise UserError("trainer.strategy: fsdp does not support trainer.compile=yes; set ddp, or compile=no")
    if config.trainer.precision == "fp16":  # each rank would decide on its own whether a step overflowed
        raise UserError("trainer.strategy: fsdp does not support trainer.precision=fp16; set ddp, or bf16")
    for key, value, required in (
        ("objective.learn_temperature", config.objective.learn_temperature, "no"),
        ("objective.balance", config.objective.balance, "none"),
        ("losses", config.losses, {}),
        ("optim.expert_decay", config.optim.expert_decay, 0),
        ("trainer.ema", config.trainer.ema, 0),
    ):
        if value != required:
            raise UserError(f"trainer.strategy: fsdp does not support {key}={value}; set ddp, or {key}={required}")


def _check_mining_times(config: Config) -> None:
    """Check that only one interval and one source for the first hard negatives are set, and first_rank < mining.k."""
    mining = config.mining
    if mining.every_n_steps and mining.every_n_epochs:
        raise UserError("mining.every_n_steps and mining.every_n_epochs: set only one of them")
    if mining.first_step is not None and not (mining.every_n_steps or mining.every_n_epochs):
        raise UserError("mining.first_step: only used with mining during training; set mining.every_n_steps")
    if mining.first_step == 0 and mining.store:
        raise UserError("mining.store and mining.first_step=0: set only one source for the first hard negatives")
    if mining.first_rank >= mining.k:
        raise UserError(f"mining.first_rank: expected a rank below mining.k ({mining.k}), got {mining.first_rank}")


def _check_mined_negatives_are_used(config: Config) -> None:
    mining = config.mining
    if not (mining.every_n_steps or mining.every_n_epochs or mining.store):
        return
    if mining.use == "data":
        raise UserError("mining.use: with data, mined hard negatives are never used; set mined or both")
    default = config.data.num_hard_negatives
    counts = [default if task.num_hard_negatives is None else task.num_hard_negatives for task in config.task.values()]
    if not any(counts):
        raise UserError("data.num_hard_negatives: is 0, so mined hard negatives are never used; set at least 1")
