"""Train an experiment: python -m experiments.train EXPERIMENT [scale=SCALE] [key=value ...]"""

from __future__ import annotations

from lightning_modules.distributed import signals

if __name__ == "__main__":
    signals.catch()  # first, because the other imports take ten seconds

import functools
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_only

from datamodules.batches import MultiTaskDataModule
from datamodules.records import UserError
from experiments.build.data import build_data, describe_schedule
from experiments.build.module import build_module, describe_parameters, start_of
from experiments.build.trainer import (
    build_callbacks,
    build_trainer,
    check_ranks,
    compiles,
    precision_of,
    warn_about_cores,
)
from experiments.config.experiment import (
    BEST,
    LAST,
    MERGED,
    START,
    ExperimentOptions,
    folder_of,
    load_config,
    parse_overrides,
)
from experiments.config.schema import Config
from experiments.results.final_table import FinalTable, show_results
from experiments.results.results import RunInfo, read_run_results
from experiments.run.agent_trials import publish_trial
from experiments.run.endings import describe_resuming, exit_status, name_lost_ranks, next_steps, raise_if_preempted
from experiments.run.folder import (
    RunFolder,
    check_same_data,
    manifest_of,
    open_run,
    record_end,
    record_start,
    write_config,
)
from experiments.run.lock import lock_run
from experiments.run.processes import LAUNCHER, connection_explained
from experiments.run.wandb_logger import build_loggers
from experiments.shared.console import entry_point
from lightning_modules.callbacks.evaluation import BeforeFirstStep
from lightning_modules.checkpoint_files import damage, read_checkpoint, write_checkpoint
from lightning_modules.contrastive import CheckpointMismatch, ContrastiveModule
from lightning_modules.distributed import launch
from lightning_modules.distributed.signals import Preempted, leave_if_asked
from lightning_modules.encoders.families import num_graphs
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.loggers import RunLogger
from lightning_modules.merging import merge_with_start
from lightning_modules.retrieval.compute import describe_device, matrix_products_in

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainOptions(ExperimentOptions):
    """Train an experiment, or resume it, and evaluate it on its final split."""


def main(arguments: Sequence[str]) -> None:
    options, overrides = parse_overrides(TrainOptions, arguments)
    train(options.experiment, overrides)


def train(experiment: str, overrides: Sequence[str] = ()) -> None:
    """Train and evaluate an experiment. Resumes an interrupted run. For a complete run, only shows the results.

    After a signal, this saves the run and exits with a status from endings.py.
    """
    config = load_config(experiment, overrides)
    check_ranks(config)
    folder = folder_of(config)
    rank_zero_only.rank = launch.rank(max(config.trainer.devices, 1))
    publish_trial(experiment, overrides, folder)
    try:
        with lock_run(folder):
            train_in_folder(config, overrides)
    except Preempted as preempted:
        sys.exit(exit_status(preempted, folder))
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        raise UserError(f"run.dir: {folder} was deleted or moved during the training") from error
    finally:
        signals.ignore()


def train_in_folder(config: Config, overrides: Sequence[str]) -> None:
    """Train in the run's folder, which the caller has locked. Raises Preempted after a signal.

    overrides: key=value arguments with which config was loaded.
    """
    folder = open_run(config)
    if folder.complete:
        check_data_of_complete_run(folder, config)
        results, info = read_run_results(folder.results)
        restore_merged(config, folder.path, info)
        show_results(results)
        log.info("The run in %s is complete (run.resume=never trains it again).", folder.path)
        return

    warn_about_cores(config)
    L.seed_everything(config.run.seed, verbose=False)
    data = build_data(config, training=True)
    check_same_data(folder, config, data)
    leave_if_asked()
    module = build_module(config, data)
    table = FinalTable(config, data.benchmarks(config.evaluation.split), folder)
    callbacks = build_callbacks(config, data, folder.path)
    if not folder.checkpoint:
        write_config(folder, config)
    if config.evaluation.baselines and table.benchmarks:
        callbacks.insert(0, BeforeFirstStep(table.baselines))
    loggers = build_loggers(config, folder.path)
    precision = precision_of(config, folder.recorded_precision())
    trainer = build_trainer(config, module.encoder, callbacks, loggers, folder.path, precision)

    ends_with_merge = keep_start(config, module, folder)
    if compiles(config):
        module.encoder.compile()
    _log_start(config, folder, precision, trainer.strategy.root_device)
    log.info("%s", describe_parameters(module))
    record_attempt(trainer, folder, config, data, module, precision)
    start = time.perf_counter()
    with connection_explained(), name_lost_ranks(trainer):
        with matrix_products_in(precision):
            fit(trainer, module, data, folder.checkpoint)
        if compiles(config):
            log.info("the layers were compiled %d times", num_graphs())
        record_end(folder, time.perf_counter() - start)
        raise_if_preempted(trainer)
        checkpoint = final_checkpoint(config, folder.path, trainer, ends_with_merge)
        step = read_checkpoint(checkpoint)["global_step"]
        # Not module.device, because Lightning has already moved the module to the CPU.
        encoder = load_encoder(checkpoint, packages=config.extend.packages).to(trainer.strategy.root_device)
        table.finish(encoder, checkpoint.name, step, trainer.global_step, module.document_vectors)
    if trainer.is_global_zero:
        log_end(loggers, table, trainer.global_step, [checkpoint, folder.path / "config.yaml"])
        show_results(table.results)
        log.info("The run is in %s", folder.path)
        log.info("%s", next_steps(config, overrides, folder.path))


def record_attempt(
    trainer: L.Trainer,
    folder: RunFolder,
    config: Config,
    data: MultiTaskDataModule,
    module: ContrastiveModule,
    precision: str,
) -> None:
    """Record this attempt in the run's folder: of a new run now, of a resumed one once its checkpoint is accepted.

    So a refused resume changes nothing.
    """
    start = functools.partial(
        record_start,
        folder,
        data,
        num_parameters=sum(p.numel() for p in module.parameters()),
        schedule=describe_schedule(config, data),
        devices=trainer.world_size,
        precision=precision,
        start=start_of(config),
    )
    if not folder.checkpoint:
        start()  # config.yaml has been written
        return

    @functools.cache
    def record() -> None:
        write_config(folder, config)
        start()

    # If no steps are left to train, on_train_start is not called.
    hooks = dict.fromkeys(("on_train_start", "on_fit_end"), lambda *_: record())
    trainer.callbacks.append(LambdaCallback(**hooks))


def keep_start(config: Config, module: ContrastiveModule, folder: RunFolder) -> bool:
    """Write the untrained encoder to start.ckpt, and return whether the run will end with an average that includes it.

    A resumed run keeps the file of its first attempt, because the model that it started from may have changed since.
    Raises UserError if that file is missing.
    """
    path = folder.path / START
    if not config.trainer.start_share:
        return False
    recorded = manifest_of(folder.path) if folder.checkpoint else {}
    if recorded.get("start", start_of(config)) is None:
        log.warning("trainer.start_share has no effect: the weights before training are random")
        return False
    if folder.checkpoint:
        try:
            read_checkpoint(path)  # check it now, because training may take days
        except UserError as error:
            raise UserError(
                f"trainer.start_share: {error}. The file has the encoder before training. Restore it, or use make "
                f"merge with the last checkpoint, without training on"
            ) from error
    elif launch.rank() == 0:
        state = {f"encoder.{name}": tensor for name, tensor in module.encoder.state_dict().items()}
        write_checkpoint({"state_dict": state}, path)
    return True


def final_checkpoint(config: Config, folder: Path, trainer: L.Trainer, ends_with_merge: bool) -> Path:
    """Return the checkpoint of the trained encoder: the best (or else the last) checkpoint, or its average with the
    start.

    The first rank writes the average, and the others wait for it.
    """
    with_best = config.evaluation.every_n_steps and (folder / BEST).is_file()
    checkpoint = folder / (BEST if with_best else LAST)
    if not ends_with_merge:
        return checkpoint
    if trainer.is_global_zero:
        merge_with_start(checkpoint, folder / START, config.trainer.start_share, folder / MERGED)
    trainer.strategy.barrier()
    return folder / MERGED


def restore_merged(config: Config, folder: Path, info: RunInfo) -> None:
    """Compute the final average of a complete run again, if its file is missing or damaged.

    info: info of the run's results. Raises UserError if the averaged checkpoint is gone.
    """
    merged = folder / MERGED
    if launch.rank() > 0 or info.checkpoint != MERGED.name or not (problem := damage(merged)):
        return
    intact = [path for path in (folder / BEST, folder / LAST) if not damage(path)]
    trained = [path for path in intact if read_checkpoint(path)["global_step"] == info.checkpoint_step]
    if not trained:
        raise UserError(
            f"{merged}: missing or damaged ({problem}), like the checkpoint of step {info.checkpoint_step} from which "
            f"it was computed. run.resume=never trains the run again."
        )
    log.warning(
        "%s: missing or damaged (%s); computing it again from %s and the start", merged, problem, trained[0].name
    )
    merge_with_start(trained[0], folder / START, config.trainer.start_share, merged)


def check_data_of_complete_run(folder: RunFolder, config: Config) -> None:
    """Raise UserError if the data have changed since the run was completed, because its table is about the old data."""
    try:
        data = build_data(config)
    except UserError as error:
        log.warning("The data cannot be compared with the run's data: %s", error)
        return
    check_same_data(folder, config, data)


def fit(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, checkpoint: Path | None) -> None:
    """Train. Ctrl-C raises KeyboardInterrupt, whereas Lightning would exit."""
    if trainer.world_size > 1:
        signals.connecting(os.environ.get(LAUNCHER))
    os.environ[LAUNCHER] = str(os.getpid())  # for the ranks that Lightning starts
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except CheckpointMismatch as error:
        raise UserError(
            f"{checkpoint}: {error}. Restore the former file, or use run.resume=never to start over and "
            "keep the old run under another name."
        ) from error
    except SystemExit as leaving:
        if not trainer.interrupted:
            raise
        resuming = describe_resuming(Path(trainer.default_root_dir))
        raise KeyboardInterrupt(f"interrupted at step {trainer.global_step}: {resuming}") from leaving
    finally:
        os.environ.pop(LAUNCHER)


def log_end(loggers: Sequence[RunLogger], table: FinalTable, step: int, files: Sequence[Path]) -> None:
    """Log the final table and, with wandb.checkpoints, the model's files. Then close the loggers."""
    for logger in loggers:
        if table.benchmarks:
            logger.log_metrics(table.logged_metrics(), step=step)
            logger.log_table("results", *table.logged_rows(), step=step)
        if table.config.wandb.checkpoints:
            logger.log_model(files)
        logger.close()


def _log_start(config: Config, folder: RunFolder, precision: str, device: torch.device) -> None:
    log.info("%s at scale %s: %s", config.experiment, config.scale, folder.path)
    origin = f", from {folder.checkpoint}" if folder.checkpoint else ""
    default = precision_of(config)
    kept = "" if precision == default else f", as the run began (a new run would use {default} here)"
    where = describe_device(device)
    compiled = ", with compiled layers" if compiles(config) else ""
    steps = config.trainer.max_steps
    log.info("training on %s: %s steps%s, in %s%s%s", where, steps, origin, precision, kept, compiled)
    if config.evaluation.baselines and config.evaluation.split != "none" and not folder.checkpoint:
        log.info("first, BM25 and the encoder before training are evaluated (evaluation.baselines=false skips this)")


if __name__ == "__main__":
    entry_point(main)
