"""Check settings that depend on each other. Bounds of single settings are on their fields (schema.py)."""

from __future__ import annotations

import torch

from datamodules.records import UserError
from experiments.config.schema import Config
from experiments.config.structured import prefixed
from lightning_modules.objective_options import check_objective
from lightning_modules.retrieval.metrics import check_metric


def check_constraints(config: Config) -> None:
    """Raise UserError for settings that contradict each other, or that this machine cannot serve."""
    _check_metrics(config)
    _check_balance(config)
    _check_devices(config)
    _check_sharding(config)
    _check_mining_times(config)
    _check_mined_negatives_are_used(config)
    check_objective(config.objective, list(config.task), "objective.")


def _check_metrics(config: Config) -> None:
    if not config.evaluation.metrics:
        raise UserError("evaluation.metrics: name at least one, such as ndcg@10")
    with prefixed("evaluation.metrics: "):
        for name in config.evaluation.metrics:
            check_metric(name)


def _check_balance(config: Config) -> None:
    """Balancing needs several tasks; gradients can only be compared if every step has all of them."""
    balance, schedule = config.objective.balance, config.data.schedule
    if balance != "none" and len(config.tasks) < 2:
        raise UserError(f"objective.balance: {balance} needs several tasks, but there is only {config.tasks[0]}")
    if balance in ("gradnorm", "pcgrad") and schedule != "together":
        raise UserError(
            f"objective.balance: {balance} compares the gradients of all tasks in each optimizer step; "
            f"set data.schedule=together (got {schedule})"
        )


def _check_devices(config: Config) -> None:
    """Check that this machine has the requested hardware."""
    trainer = config.trainer
    if trainer.devices == 0:
        raise UserError("trainer.devices: expected a number above 0, or -1 for all GPUs, got 0")
    if trainer.devices == -1 and not torch.cuda.is_available():
        raise UserError("trainer.devices: -1 means all GPUs, but there is no GPU; set a number above 0")
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator: got gpu, but there is no GPU; set auto or cpu")


def _check_sharding(config: Config) -> None:
    """Sharding needs several ranks, and does not support parameters outside the encoder."""
    if config.trainer.strategy == "ddp":
        return
    if config.trainer.devices == 1 and config.trainer.num_nodes == 1:
        raise UserError("trainer.strategy: fsdp shards weights over ranks, but there is one; set trainer.devices=2")
    for key, value, required in (
        ("objective.learn_temperature", config.objective.learn_temperature, "no"),
        ("objective.balance", config.objective.balance, "none"),
    ):
        if value != required:
            raise UserError(f"trainer.strategy: fsdp does not support {key}={value}; set ddp, or {key}={required}")


def _check_mining_times(config: Config) -> None:
    """At most one interval and one source of the first hard negatives; ranks that the miner returns."""
    mining = config.mining
    if mining.every_n_steps and mining.every_n_epochs:
        raise UserError("mining.every_n_steps and mining.every_n_epochs: set only one of them")
    if mining.first_step is not None and not (mining.every_n_steps or mining.every_n_epochs):
        raise UserError("mining.first_step: only used with mining during training; set mining.every_n_steps")
    if mining.first_step == 0 and mining.store:
        raise UserError("mining.store and mining.first_step=0: set only one source of the first hard negatives")
    if mining.first_rank >= mining.k:
        raise UserError(f"mining.first_rank: expected a rank below mining.k ({mining.k}), got {mining.first_rank}")


def _check_mined_negatives_are_used(config: Config) -> None:
    mining = config.mining
    if not (mining.every_n_steps or mining.every_n_epochs or mining.store):
        return
    if mining.use == "data":
        raise UserError("mining.use: with data, the mined hard negatives are never used; set mined or both")
    default = config.data.num_hard_negatives
    counts = [default if task.num_hard_negatives is None else task.num_hard_negatives for task in config.task.values()]
    if not any(counts):
        raise UserError("data.num_hard_negatives: is 0, so mined hard negatives are never used; set at least 1")
