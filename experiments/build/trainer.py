"""Build the callbacks and the trainer of an experiment."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy

from datamodules.batches import MultiTaskDataModule
from datamodules.cores import available_cores
from datamodules.records import UserError, counted
from experiments.build.data import batches_per_step
from experiments.build.mining import build_mining_callback
from experiments.build.models import device_of
from experiments.config.experiment import BEST, EXPERTS, LAST
from experiments.config.schema import Config
from experiments.config.targets import instantiate
from lightning_modules.callbacks.checkpoint import LastCheckpoint, SafeCheckpointIO
from lightning_modules.callbacks.diagnostics import Diagnostics
from lightning_modules.callbacks.evaluation import Evaluation
from lightning_modules.callbacks.heartbeat import Heartbeat
from lightning_modules.callbacks.negatives import NegativesReport
from lightning_modules.callbacks.preemption import Preemption
from lightning_modules.callbacks.training_log import RankReport, TrainingBar, TrainingLog
from lightning_modules.distributed import launch
from lightning_modules.distributed.sharding import ShardedStrategy
from lightning_modules.encoders.base import Encoder
from lightning_modules.loss_weights import DynamicWeights
from lightning_modules.retrieval.compute import resolve_precision
from lightning_modules.task_balance import GradNorm, GramianBalance, PCGrad

log = logging.getLogger(__name__)

# TF32 is a setting of matrix products (see matrix_products_in) that Lightning does not know.
LIGHTNING_PRECISIONS = {"fp32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

# Compiling takes about a minute. It saves 8 of 60 ms in a step of BERT-base with 64 pairs and a hard negative (H100).
COMPILE_STEPS = 5000


def on_a_terminal() -> bool:
    return sys.stdout.isatty() and "CI" not in os.environ and "SLURM_JOB_ID" not in os.environ


def build_callbacks(config: Config, data: MultiTaskDataModule, folder: Path) -> list[L.Callback]:
    """Create the callbacks of a run.

    The average of the weights comes first, so that the other callbacks see it updated for the current step. The
    checkpoint comes after the evaluation and the user's callbacks, so that it contains their state.
    """
    settings = config.trainer
    callbacks: list[L.Callback] = [
        TrainingLog(settings.log_every_n_steps, plain=not on_a_terminal(), peak_tflops=settings.peak_tflops)
    ]
    if settings.ema:
        # Without a device, Lightning keeps the average on the CPU, and each step waits for a copy.
        callbacks.append(EMAWeightAveraging(device_of(config), use_buffers=False, decay=settings.ema))
    callbacks += build_balance(config)
    if config.diagnostics.every_n_steps:
        steps, picture_steps = config.diagnostics.every_n_steps, config.evaluation.every_n_steps
        callbacks.append(Diagnostics(steps, picture_steps, folder / EXPERTS))
    evaluation = _build_evaluation(config, data, folder) if config.evaluation.every_n_steps else None
    callbacks += [evaluation] if evaluation else []
    callbacks += build_mining_callback(config, data, folder, batches_per_step(config))
    user_callbacks = {name: instantiate(node, f"callbacks.{name}") for name, node in config.callbacks.items()}
    for name, callback in user_callbacks.items():
        _check_monitor(f"callbacks.{name}", callback, evaluation)
    callbacks += user_callbacks.values()
    last = LastCheckpoint(folder / LAST, config.checkpoint.every_n_steps)
    callbacks += [NegativesReport(), RankReport(), Heartbeat(config.trainer.timeout), last, Preemption(last)]
    if on_a_terminal():
        callbacks.append(TrainingBar(refresh_rate=5))
    return callbacks


def build_balance(config: Config) -> list[L.Callback]:
    """Create the callback for objective.balance. Learned weights do not need one."""
    objective, steps = config.objective, config.trainer.log_every_n_steps
    match objective.balance:
        case "dwa":
            return [DynamicWeights(config.tasks, objective.dwa_temperature, objective.dwa_window, steps)]
        case "gradnorm":
            return [GradNorm(config.tasks, objective.gradnorm_alpha, objective.gradnorm_lr, steps)]
        case "pcgrad":
            return [PCGrad(config.tasks)]
        case "mgda" | "upgrad":
            return [GramianBalance(config.tasks, objective.balance, steps)]
    return []


def _build_evaluation(config: Config, data: MultiTaskDataModule, folder: Path) -> Evaluation:
    benchmarks = data.benchmarks("dev")
    if config.evaluation.patience and not benchmarks:
        raise UserError("evaluation.patience: early stopping needs a dev split, and no task has one; set it to 0")
    if not benchmarks:
        log.warning("no task has a dev split: no evaluation during training (evaluation.every_n_steps=0 hides this)")
    settings = config.evaluation
    return Evaluation(
        benchmarks,
        settings.metrics,
        settings.every_n_steps,
        config.data.token_budget,
        folder / BEST,
        settings.patience,
    )


def _check_monitor(key: str, callback: L.Callback, evaluation: Evaluation | None) -> None:
    """Raise UserError if a callback of Lightning monitors an unknown metric, or minimises it."""
    monitor = getattr(callback, "monitor", None)
    if not isinstance(callback, EarlyStopping | ModelCheckpoint) or monitor is None:
        return
    if monitor in ("epoch", "step") and isinstance(callback, ModelCheckpoint):
        return
    if evaluation is None or not evaluation.benchmarks:
        raise UserError(f"{key}.monitor: needs evaluations on a dev split; set evaluation.every_n_steps")
    if monitor not in evaluation.names:
        raise UserError(f"{key}.monitor: unknown metric {monitor!r}; expected one of {', '.join(evaluation.names)}")
    if callback.mode != "max":
        raise UserError(f"{key}.mode: {monitor} is best at 1; set mode to max (got {callback.mode})")


def precision_of(config: Config, recorded: str | None = None) -> str:
    """Return the precision of a run on this machine: "fp32", "tf32", "bf16" or "fp16".

    recorded: the precision a resumed run started with, which it keeps.
    """
    return resolve_precision(recorded or config.trainer.precision, device_of(config))


def compiles(config: Config) -> bool:
    """Return whether the layers of a run are compiled."""
    settings = config.trainer
    if settings.compile != "auto":
        return settings.compile == "yes"
    is_long = settings.max_steps >= COMPILE_STEPS and settings.strategy != "fsdp"
    return is_long and device_of(config).type == "cuda"


def warn_about_cores(config: Config) -> None:
    """Warn if trainer.devices exceeds the number of cores and there is no GPU."""
    cores = available_cores()
    on_cpu, devices = config.trainer.accelerator == "cpu" or not torch.cuda.is_available(), config.trainer.devices
    if on_cpu and devices > cores:
        log.warning("trainer.devices=%d: without GPUs, that many processes share %d cores", devices, cores)
        log.warning("  trainer.devices=1 uses all cores in one process, which is faster and needs less memory")


def build_trainer(
    config: Config,
    encoder: Encoder,
    callbacks: list[L.Callback],
    loggers: list[Logger],
    folder: Path,
    precision: str,
) -> L.Trainer:
    """Create the trainer. folder: folder of the run. precision: a result of precision_of."""
    settings = config.trainer
    lightning_precision: str | None = LIGHTNING_PRECISIONS[precision]
    plugins = [SafeCheckpointIO(folder / LAST, config.checkpoint.keep), *_environment(config)]
    if precision == "fp16" and device_of(config).type == "cpu":  # Lightning would compute in bf16
        lightning_precision, plugins = None, [MixedPrecision("16-mixed", "cpu"), *plugins]
    return L.Trainer(
        default_root_dir=folder,
        max_steps=settings.max_steps,
        max_epochs=-1,
        accelerator="gpu" if device_of(config).type == "cuda" else "cpu",  # auto would be Apple's GPU on a Mac
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=_strategy(config, encoder),
        precision=lightning_precision,
        gradient_clip_val=settings.gradient_clip_val or None,
        accumulate_grad_batches=batches_per_step(config),
        callbacks=callbacks,
        logger=loggers,
        plugins=plugins,
        # LastCheckpoint and Evaluation write the checkpoints. By default, Lightning would add its own callback.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=on_a_terminal(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        check_val_every_n_epoch=2,  # with 1, EarlyStopping and ModelCheckpoint would not wait for Evaluation
        log_every_n_steps=settings.log_every_n_steps,
    )


def check_ranks(config: Config) -> None:
    """Raise UserError if a launcher started another number of ranks than the configuration needs.

    Variables that a launcher has left behind would otherwise make this process a rank above 0, which writes no run.
    """
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    launch.number("MASTER_PORT")
    if devices == -1:
        return
    needed, started, rank = devices * nodes, launch.num_ranks(), launch.rank(devices)
    is_started = launch.under_srun() or "RANK" in os.environ
    if rank >= needed or (is_started and needed != started > 1):
        raise UserError(
            f"trainer.devices={devices} with trainer.num_nodes={nodes} needs {counted(needed, 'rank')}, but the "
            f"environment is that of rank {rank} of {started}. Start as many with srun or torchrun, or unset RANK, "
            "LOCAL_RANK, NODE_RANK and WORLD_SIZE, if an earlier launcher left them."
        )


def _strategy(config: Config, encoder: Encoder) -> DDPStrategy | str:
    """Return DDP or FSDP for several ranks."""
    if config.trainer.num_nodes == 1 and config.trainer.devices == 1:
        return "auto"
    if config.trainer.strategy == "fsdp":
        return ShardedStrategy()
    # In a batch of one task, the parameters of other tasks get no gradient. An extended encoder also has its old tasks.
    has_task_parameters = config.objective.learn_temperature == "per_task" or config.objective.balance == "uncertainty"
    several, trains_old_tasks = len(config.tasks) > 1, bool(config.extend.model) and not config.extend.freeze
    idle = several and (encoder.has_idle_parameters or has_task_parameters)
    idle = idle or (trains_old_tasks and encoder.has_idle_parameters)
    # Buffers are the same on all ranks already, and tables of features are large.
    return DDPStrategy(find_unused_parameters=idle, broadcast_buffers=False)


def _environment(config: Config) -> list[ClusterEnvironment]:
    """Return the cluster environment if Lightning would choose the wrong one, else []."""
    if launch.by_torchrun() or "SLURM_JOB_ID" not in os.environ:
        return []
    if not launch.under_srun() or (launch.num_tasks() == 1 and config.trainer.num_nodes == 1):
        return [LightningEnvironment()]  # a shell inside an allocation, where Lightning starts the other ranks
    return [SLURMEnvironment(auto_requeue=False)]  # auto_requeue would save inside a signal handler
