"""The closed part of a configuration: every key, its type, its default and what it means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from datamodules.records import UserError
from lightning_modules.encoders.backbone import BackboneOptions
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
class DataConfig:
    """root: folder of the data, for `${data.root}` in tasks. batch_size: queries on each rank. max_length: tokens of a
    text, special tokens included. token_budget: padded tokens of one forward. num_hard_negatives: for each query, where
    it has them. num_workers: processes that prepare batches.
    """

    root: str = "data"
    batch_size: int = 32
    max_length: int = 256
    token_budget: int = 16384
    num_hard_negatives: int = 1
    num_workers: int = 0


@dataclass
class ObjectiveConfig:
    """similarity and temperature of InfoNCE; the paper's are dot and 1. mask_known_positives: a document that is a
    known positive of a query is never its negative.
    """

    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = 1.0
    mask_known_positives: bool = True


@dataclass
class TrainerConfig:
    """max_steps: optimizer steps. precision: "auto" is bf16 where the hardware computes in it. devices: a number, or -1
    for all. gradient_clip_val: largest norm of the gradient, 0 for none.
    """

    max_steps: int = 1000
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_clip_val: float = 1.0
    accumulate_grad_batches: int = 1
    gradient_checkpointing: bool = False
    log_every_n_steps: int = 20


@dataclass
class CheckpointConfig:
    """every_n_steps: the last checkpoint is renewed that often."""

    every_n_steps: int = 200


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
class WandbConfig:
    """mode: "online" needs an account; when its server cannot be reached the run goes on offline. Offline runs are sent
    later by `wandb sync`. dir of the files is the run's.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "scimult"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout: int = 20


@dataclass
class TaskConfig:
    """expert: that serves the task. data: name -> node of a reader; in tasks/*.yaml, one block for each scale."""

    kind: Literal["classification", "link_prediction", "search"] = MISSING
    expert: str = MISSING
    instruction: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Config:
    """The whole experiment. init_from: a run, checkpoint or exported encoder whose weights it starts from."""

    experiment: str = MISSING
    scale: str = "sample"
    tasks: list[str] = MISSING
    init_from: str | None = None
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    encoder: dict[str, Any] = MISSING
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimOptions = field(default_factory=OptimOptions)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    task: dict[str, TaskConfig] = field(default_factory=dict)


def check_ranges(config: Config) -> None:
    """Raise UserError for a number that is out of its range."""
    positive = {
        "data.batch_size": config.data.batch_size,
        "data.max_length": config.data.max_length,
        "data.token_budget": config.data.token_budget,
        "objective.temperature": config.objective.temperature,
        "optim.lr": config.optim.lr,
        "optim.layer_decay": config.optim.layer_decay,
        "trainer.max_steps": config.trainer.max_steps,
        "trainer.accumulate_grad_batches": config.trainer.accumulate_grad_batches,
        "trainer.log_every_n_steps": config.trainer.log_every_n_steps,
        "checkpoint.every_n_steps": config.checkpoint.every_n_steps,
        "backbone.vocab_size": config.backbone.vocab_size,
    }
    not_negative = {
        "data.num_hard_negatives": config.data.num_hard_negatives,
        "data.num_workers": config.data.num_workers,
        "optim.weight_decay": config.optim.weight_decay,
        "evaluation.every_n_steps": config.evaluation.every_n_steps,
        "trainer.gradient_clip_val": config.trainer.gradient_clip_val,
    }
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"{key}: got {value}, allowed are numbers above 0")
    for key, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"{key}: got {value}, allowed are numbers from 0")
    if not 0 <= config.optim.warmup < 1:
        raise UserError(f"optim.warmup: got {config.optim.warmup}, allowed is a share of the steps, from 0 to below 1")
