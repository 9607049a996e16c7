"""The closed part of a configuration: every key, its type, its default and what it means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from lightning_modules.encoders.backbone import BackboneOptions
from lightning_modules.mining.mine import MiningOptions
from lightning_modules.objective.options import ObjectiveOptions
from lightning_modules.optim import OptimOptions


@dataclass
class RunConfig:
    """dir: by default runs/<experiment>-<scale>-seed<seed>-<hash of the configuration>, so that the same command finds
    its run again. resume: "auto" (from the run's last checkpoint, if it has one) or "never" (start over, the old run is
    kept beside).
    """

    dir: str = ""
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"


@dataclass
class PhaseConfig:
    """from_step: on; weights: task -> share of the steps, in any unit."""

    from_step: int = MISSING
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class DataConfig:
    """root: folder of the data, for `${data.root}` in tasks. batch_size: queries on each rank. batch_tokens: tokens on
    each rank (of queries, their positives and hard negatives), instead of batch_size; 0 counts queries. max_length:
    tokens of a text, special tokens included. token_budget: padded tokens of one forward. num_positives: at most, for
    each query, sampled by grade. num_hard_negatives: for each query, where it has them. num_workers: processes that
    prepare batches. cache: folder in which data are kept in a form that is mapped instead of read, made once; null
    reads them into memory. on_error: of readers, "fail" at the first bad line, or "skip" it, into quarantine.jsonl in
    the run's folder. on_leak: what becomes of dev and test queries that are trained on too, and of all texts of the
    folders leaks_in (BEIR layout, JSON lines) that are: a warning, training without them ("strip"), or an error.

    schedule: which task a step has. "round_robin": they take turns. "together": each optimizer step has a batch of
    every task. "proportional" to the numbers of examples; "temperature": to their power 1 / schedule_temperature;
    "weights": task -> share. curriculum: further phases with other weights.
    """

    root: str = "data"
    cache: str | None = "~/.cache/scimult"
    on_error: Literal["fail", "skip"] = "fail"
    batch_size: int = 32
    batch_tokens: int = 0
    max_length: int = 256
    token_budget: int = 16384
    num_positives: int = 1
    num_hard_negatives: int = 1
    num_workers: int = 0
    on_leak: Literal["ignore", "warn", "strip", "error"] = "warn"
    leaks_in: list[str] = field(default_factory=list)
    schedule: Literal["round_robin", "together", "proportional", "temperature", "weights"] = "round_robin"
    schedule_temperature: float = 2.0
    weights: dict[str, float] = field(default_factory=dict)
    curriculum: list[PhaseConfig] = field(default_factory=list)


@dataclass
class MiningConfig(MiningOptions):
    """Hard negatives that a model finds. every_n_steps: optimizer steps between two minings with the current model, or
    every_n_epochs: passes through all examples; 0 for no mining in training. first_step: of the first mining, by
    default every_n_steps; 0 mines before the first step. stop_at: the share of mined negatives that look like positives
    above which training stops, null for never. store: folder of `make mine`, whose negatives hold from the start. use:
    hard negatives "mined" (where an example has some, else those of the data), of the "data", or "both" together.

    miner: a node of lightning_modules/mining/miners.py; miners: task -> its own, or null for a task that is not mined.
    Further keys: MiningOptions, beside it.
    """

    every_n_steps: int = 0
    every_n_epochs: float = 0.0
    first_step: int | None = None
    stop_at: float | None = None
    store: str | None = None
    use: Literal["mined", "data", "both"] = "mined"
    miner: dict[str, Any] = field(default_factory=lambda: {"_target_": "lightning_modules.mining.miners.DenseMiner"})
    miners: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainerConfig:
    """max_steps: optimizer steps. precision: "auto" is bf16 on GPUs that compute in it and on CPUs with AMX, else fp32;
    a run keeps to that of its first attempt. devices: a number, or -1 for all. gradient_clip_val: largest norm of the
    gradient, 0 for none. accumulate_grad_batches: batches of one optimizer step (of each task, with
    data.schedule=together). grad_cache: a batch needs the memory of data.token_budget alone, whatever its size, for a
    second forward. strategy: of several ranks, "ddp" (each has all weights) or "fsdp" (they share out weights,
    gradients and the optimizer's state). timeout: seconds after which ranks no longer wait for one that does not
    answer.
    """

    max_steps: int = 1000
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_clip_val: float = 1.0
    accumulate_grad_batches: int = 1
    gradient_checkpointing: bool = False
    grad_cache: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    timeout: int = 1800
    log_every_n_steps: int = 20


@dataclass
class CheckpointConfig:
    """every_n_steps: the last checkpoint is renewed that often. keep: so many of them stay, the last included."""

    every_n_steps: int = 200
    keep: int = 2


@dataclass
class EvaluationConfig:
    """every_n_steps: on the dev splits during training, 0 for never. split: of the final table. metrics: the first one
    chooses the best checkpoint. baselines: put BM25 and the untrained encoder beside the trained one.
    """

    every_n_steps: int = 200
    split: Literal["train", "dev", "test"] = "test"
    metrics: list[str] = field(default_factory=lambda: ["ndcg@10", "recall@20", "recall@100", "mrr@10", "map@100"])
    baselines: bool = True


@dataclass
class DiagnosticsConfig:
    """every_n_steps: gradients, experts and vectors of all tasks are looked at and logged, 0 for never."""

    every_n_steps: int = 0


@dataclass
class WandbConfig:
    """mode: "offline" writes W&B's files into the run's folder, to be sent by `make sync`; "online", which needs an
    account, has a process beside the training send them at once, and the end of the run wait for it finish_timeout
    seconds at most. group: by default experiment and scale; tags: experiment, scale and seed. checkpoints: the best
    one becomes an artifact.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "scimult"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    checkpoints: bool = False
    finish_timeout: int = 30


@dataclass
class TaskConfig:
    """expert: that serves the task. instruction: a sentence that describes it, for encoders that read one. data:
    name -> node of a reader; in tasks/*.yaml, one block for each scale. batch_size, max_length, num_positives,
    num_hard_negatives: of this task's batches, by default those of data.
    """

    kind: Literal["classification", "link_prediction", "search"] = MISSING
    expert: str = MISSING
    instruction: str = ""
    batch_size: int | None = None
    max_length: int | None = None
    num_positives: int | None = None
    num_hard_negatives: int | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class ExtendConfig:
    """model: a run, checkpoint or exported encoder that is given the experiment's tasks, all of them new to it; only
    their experts are trained. like: the task whose expert they begin as, or "nearest": that of the lowest loss on their
    first batches.
    """

    model: str | None = None
    like: str = "nearest"


@dataclass
class Config:
    """The whole experiment. init_from: a run, checkpoint or exported encoder whose weights it starts from."""

    experiment: str = MISSING
    scale: str = "sample"
    tasks: list[str] = MISSING
    init_from: str | None = None
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    encoder: dict[str, Any] = MISSING
    mining: MiningConfig = field(default_factory=MiningConfig)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    task: dict[str, TaskConfig] = field(default_factory=dict)
