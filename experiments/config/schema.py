"""Every key of an experiment, with its type, default, bounds and meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from datamodules.options import option
from lightning_modules.encoders.backbone import BackboneOptions
from lightning_modules.mining.mine import MiningOptions
from lightning_modules.objective_options import ObjectiveOptions
from lightning_modules.optim import OptimOptions

METRICS = ["ndcg@10", "recall@20", "recall@100", "mrr@10", "map@100"]
DENSE_MINER = {"_target_": "lightning_modules.mining.miners.DenseMiner"}


@dataclass
class RunConfig:
    """The folder of a run, and how the run starts."""

    dir: str = option("", "folder of the run; by default runs/<experiment>-<scale>-seed<seed>-<hash of the keys>")
    seed: int = option(0, "seed of all random numbers", minimum=0)
    resume: Literal["auto", "never"] = option(
        "auto", "auto continues from the last checkpoint, if there is one; never starts over and keeps the old run"
    )


@dataclass
class PhaseConfig:
    """A phase of the curriculum: from a step on, tasks are drawn with these weights."""

    from_step: int = option(MISSING, "first optimizer step of the phase", minimum=0)
    weights: dict[str, float] = option({}, "task -> its share of the steps, in any unit", above=0)


@dataclass
class DataConfig:
    """Training data, batches, and the order of the tasks."""

    root: str = option("data", "folder that task files refer to as ${data.root}")
    cache: str | None = option(
        "~/.cache/scimult", "folder of the memory-mapped copies of the data, made once; null reads them into memory"
    )
    on_error: Literal["fail", "skip"] = option(
        "fail", "at a bad line: fail, or skip it and write it to quarantine.jsonl in the run's folder"
    )
    batch_size: int = option(32, "queries per batch and rank", minimum=1)
    batch_tokens: int = option(
        0, "tokens per batch and rank (queries, positives, hard negatives), instead of batch_size; 0: off", minimum=0
    )
    max_length: int = option(256, "maximum number of tokens of a text: [CLS], at least one word, [SEP]", minimum=3)
    token_budget: int = option(16384, "maximum number of padded tokens per forward pass", minimum=1)
    num_positives: int = option(1, "maximum number of positives per query, sampled by grade", minimum=1)
    num_hard_negatives: int = option(1, "maximum number of hard negatives per query", minimum=0)
    num_workers: int = option(0, "processes that prepare batches; 0: the training process itself", minimum=0)
    on_leak: Literal["ignore", "warn", "strip", "error"] = option(
        "warn", "if evaluation texts are in the training data: ignore, warn, train without them (strip), or fail"
    )
    leaks_in: list[str] = option(
        [], "folders (BEIR layout or JSON lines) whose queries and corpus must not be in the training data either"
    )
    schedule: Literal["round_robin", "together", "proportional", "temperature", "weights"] = option(
        "round_robin",
        "task of each step: in turns (round_robin), all in every step (together), by number of examples "
        "(proportional), by that number to the power 1 / schedule_temperature (temperature), or by data.weights",
    )
    schedule_temperature: float = option(2.0, "temperature of the schedule of that name", above=0)
    weights: dict[str, float] = option({}, "task -> its share of the steps, in any unit, for schedule=weights", above=0)
    curriculum: list[PhaseConfig] = option([], "later phases, with other weights")


@dataclass
class MiningConfig(MiningOptions):
    """Hard negatives, mined before training (store) or during it (every_n_steps or every_n_epochs)."""

    every_n_steps: int = option(0, "optimizer steps between two minings with the current model; 0: off", minimum=0)
    every_n_epochs: float = option(0.0, "passes over all examples between two minings; 0: off", minimum=0)
    first_step: int | None = option(
        None, "step of the first mining, by default after one interval; 0 mines before training", minimum=0
    )
    stop_at: float | None = option(
        None, "stop if a larger share of the mined negatives look like positives; null: never", minimum=0, below=1
    )
    store: str | None = option(None, "output folder of `make mine`, whose negatives are used from the first step")
    use: Literal["mined", "data", "both"] = option(
        "mined", "hard negatives: mined (those of the data where a query has none), data, or both together"
    )
    miner: dict[str, Any] = option(DENSE_MINER, "_target_ node: a class of lightning_modules.mining.miners")
    miners: dict[str, Any] = option({}, "task -> its own miner; null does not mine for the task")


@dataclass
class TrainerConfig:
    """Length of the training, hardware, and precision."""

    max_steps: int = option(1000, "number of optimizer steps", minimum=1)
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "hardware; auto takes GPUs if there are any")
    devices: int = option(1, "processes (ranks) per node; -1: one per GPU", minimum=-1)
    num_nodes: int = option(1, "number of machines", minimum=1)
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "auto: bf16 where the hardware computes in it (GPUs, CPUs with AMX); a resumed run keeps its precision"
    )
    gradient_clip_val: float = option(1.0, "maximum norm of the gradient; 0: no clipping", minimum=0)
    accumulate_grad_batches: int = option(
        1, "batches per optimizer step (per task with data.schedule=together)", minimum=1
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    grad_cache: bool = option(
        False, "limit the memory of a batch to that of data.token_budget, for a second forward pass"
    )
    strategy: Literal["ddp", "fsdp"] = option(
        "ddp", "several ranks: each has all weights (ddp), or weights, gradients and optimizer are sharded (fsdp)"
    )
    timeout: int = option(1800, "seconds after which ranks give up waiting for one that does not answer", minimum=1)
    log_every_n_steps: int = option(20, "optimizer steps between two log entries", minimum=1)


@dataclass
class CheckpointConfig:
    """Checkpoints of the training."""

    every_n_steps: int = option(200, "optimizer steps between two checkpoints", minimum=1)
    keep: int = option(2, "number of checkpoints on disk, the last one included", minimum=1)


@dataclass
class EvaluationConfig:
    """Evaluation during training and in the final table."""

    every_n_steps: int = option(200, "optimizer steps between two evaluations on the dev splits; 0: never", minimum=0)
    split: Literal["train", "dev", "test"] = option("test", "split of the final table")
    metrics: list[str] = option(METRICS, "metrics; the first one selects the best checkpoint")
    baselines: bool = option(True, "evaluate BM25 and the untrained encoder too")


@dataclass
class DiagnosticsConfig:
    """Statistics of gradients, experts and vectors."""

    every_n_steps: int = option(0, "optimizer steps between two sets of statistics; 0: never", minimum=0)


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = option(
        "offline", "offline writes into the run's folder, for `make sync`; online sends at once and needs an account"
    )
    project: str = option("scimult", "project")
    entity: str | None = option(None, "user or team; by default that of the account")
    name: str | None = option(None, "name of the run; by default that of its folder")
    group: str | None = option(None, "group; by default experiment and scale")
    tags: list[str] = option([], "tags, in addition to experiment, scale and seed")
    checkpoints: bool = option(False, "upload the best checkpoint as an artifact")
    finish_timeout: int = option(30, "seconds to wait at the end until everything is sent", minimum=0)


@dataclass
class TaskConfig:
    """A task: its expert, its batches and its data."""

    kind: Literal["classification", "link_prediction", "search"] = option(MISSING, "kind of the task")
    expert: str = option(MISSING, "name of the expert that serves the task")
    instruction: str = option("", "sentence that describes the task, for encoders that read instructions")
    batch_size: int | None = option(None, "queries per batch and rank, by default data.batch_size", minimum=1)
    max_length: int | None = option(None, "maximum number of tokens, by default data.max_length", minimum=3)
    num_positives: int | None = option(None, "positives per query, by default data.num_positives", minimum=1)
    num_hard_negatives: int | None = option(
        None, "hard negatives per query, by default data.num_hard_negatives", minimum=0
    )
    data: dict[str, Any] = option({}, "collection -> _target_ node of its reader; in tasks/*.yaml, a block per scale")


@dataclass
class ExtendConfig:
    """New tasks for a trained encoder: only their experts are trained."""

    model: str | None = option(None, "run, checkpoint or exported encoder that gets the experiment's tasks")
    like: str = option("nearest", "task whose expert the new ones start as; nearest: that with the lowest loss")


@dataclass
class Config:
    """What an experiment is made of."""

    experiment: str = option(MISSING, "name of the experiment (the first argument of a command)")
    scale: str = option("sample", "name of a file in experiments/scale")
    tasks: list[str] = option(MISSING, "tasks to train, by the names of their files in experiments/tasks")
    init_from: str | None = option(None, "run, checkpoint or exported encoder whose weights are the initial ones")
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    encoder: dict[str, Any] = option(MISSING, "_target_ node: a class of lightning_modules.encoders, and its arguments")
    mining: MiningConfig = field(default_factory=MiningConfig)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    callbacks: dict[str, Any] = option({}, "name -> _target_ node of a further Lightning callback")
    task: dict[str, TaskConfig] = option({}, "task -> its settings, from experiments/tasks/<task>.yaml")
