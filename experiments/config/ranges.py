"""The values that a configuration may have, where its types do not say it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from datamodules.records import UserError
from experiments.config.schema import Config
from lightning_modules.objective_options import check_objective
from lightning_modules.retrieval.metrics import check_metric

ABOVE_0 = (
    *("data.batch_size", "data.token_budget", "data.num_positives", "data.schedule_temperature"),
    *("objective.gradnorm_lr", "optim.lr", "optim.eps", "optim.layer_decay"),
    *("trainer.max_steps", "trainer.num_nodes", "trainer.accumulate_grad_batches", "trainer.timeout"),
    *("trainer.log_every_n_steps", "checkpoint.every_n_steps", "checkpoint.keep", "backbone.vocab_size"),
    *("mining.k", "mining.num_negatives", "mining.sampling_temperature", "mining.memory_mb"),
)
FROM_0 = (
    *("run.seed", "data.num_hard_negatives", "data.num_workers", "data.batch_tokens"),
    *("objective.gradnorm_alpha", "optim.weight_decay", "evaluation.every_n_steps", "diagnostics.every_n_steps"),
    *("trainer.gradient_clip_val", "mining.every_n_steps", "mining.every_n_epochs", "mining.first_step"),
    *("mining.first_rank", "mining.absolute_margin", "mining.guide_margin", "wandb.finish_timeout"),
)
SHARES = (
    *("optim.warmup", "optim.beta1", "optim.beta2", "backbone.dropout", "backbone.attention_dropout"),
    *("mining.relative_margin", "mining.stop_at"),
)


def check_ranges(config: Config) -> None:
    """Raise UserError for a value that is out of its range, or that another one makes meaningless."""
    _check_numbers(config)
    _check_lengths(config)
    _check_balance(config)
    _check_devices(config)
    _check_strategy(config)
    _check_mining(config)
    if not config.evaluation.metrics:
        raise UserError("evaluation.metrics: name at least one, such as ndcg@10")
    for name in config.evaluation.metrics:
        check_metric(name)
    check_objective(config.objective, list(config.task), "objective.")


def _check_numbers(config: Config) -> None:
    _refuse(_values(config, ABOVE_0, ("batch_size", "num_positives")), lambda x: 0 < x < math.inf, "above 0")
    _refuse(_values(config, FROM_0, ("num_hard_negatives",)), lambda x: 0 <= x < math.inf, "from 0")
    _refuse(_values(config, SHARES), lambda x: 0 <= x < 1, "from 0 to below 1")


def _values(config: Config, keys: Sequence[str], of_tasks: Sequence[str] = ()) -> dict[str, float]:
    """Key -> value. of_tasks: keys that each task may have. Without those that leave it to a default."""
    found = {key: functools.reduce(getattr, key.split("."), config) for key in keys}
    for name, task in config.task.items():
        found |= {f"task.{name}.{key}": getattr(task, key) for key in of_tasks}
    return {key: value for key, value in found.items() if value is not None}


def _refuse(values: Mapping[str, float], good: Callable[[float], bool], allowed: str) -> None:
    for key, value in values.items():
        if not good(value):
            raise UserError(f"{key}: got {value}, allowed are numbers {allowed}")


def _check_lengths(config: Config) -> None:
    for key, value in _values(config, ["data.max_length"], ["max_length"]).items():
        if value < 3:
            raise UserError(f"{key}: got {value}, allowed is 3 or more ([CLS], a word and [SEP])")


def _check_balance(config: Config) -> None:
    balance, schedule = config.objective.balance, config.data.schedule
    if balance != "none" and len(config.tasks) < 2:
        raise UserError(f"objective.balance: got {balance}, but there is one task alone ({', '.join(config.tasks)})")
    if balance in ("gradnorm", "pcgrad") and schedule != "together":
        raise UserError(
            f"objective.balance: {balance} compares the gradients of all tasks in each optimizer step, which takes "
            f"data.schedule=together (got {schedule})"
        )


def _check_devices(config: Config) -> None:
    trainer = config.trainer
    if trainer.devices < 1 and trainer.devices != -1:
        raise UserError(f"trainer.devices: got {trainer.devices}, allowed are numbers above 0, and -1 for all")
    if trainer.devices == -1 and not torch.cuda.is_available():
        raise UserError("trainer.devices: got -1 for all GPUs, and there is none (a number above 0 runs on the CPU)")
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator: got gpu, and there is none (auto takes what there is)")


def _check_strategy(config: Config) -> None:
    if config.trainer.strategy == "ddp":
        return
    if config.trainer.devices == 1 and config.trainer.num_nodes == 1:
        raise UserError("trainer.strategy: fsdp shares weights out over ranks, and there is one (trainer.devices=2)")
    for key, value, without in (
        ("objective.learn_temperature", config.objective.learn_temperature, "no"),
        ("objective.balance", config.objective.balance, "none"),
    ):
        if value != without:
            raise UserError(f"trainer.strategy: fsdp does not go with {key}={value} (take ddp, or {key}={without})")


def _check_mining(config: Config) -> None:
    mining = config.mining
    if mining.every_n_steps and mining.every_n_epochs:
        raise UserError("mining.every_n_steps and mining.every_n_epochs: set one of them")
    repeated = bool(mining.every_n_steps or mining.every_n_epochs)
    if mining.first_step is not None and not repeated:
        raise UserError("mining.first_step: is for mining in training (mining.every_n_steps)")
    if mining.first_step == 0 and mining.store:
        raise UserError("mining.store and mining.first_step=0: both say which hard negatives hold from the start")
    if mining.first_rank >= mining.k:
        raise UserError(f"mining.first_rank: got {mining.first_rank}, allowed are ranks below mining.k, {mining.k}")
    if not (repeated or mining.store):
        return
    if mining.use == "data":
        raise UserError("mining.use: with data, what is mined would never be used (mined, or both)")
    counts = [
        config.data.num_hard_negatives if t.num_hard_negatives is None else t.num_hard_negatives
        for t in config.task.values()
    ]
    if not any(counts):
        raise UserError("data.num_hard_negatives: is 0, so what is mined would never be used")
