"""Train an experiment: python -m experiments.train EXPERIMENT [scale=SCALE] [key=value ...]"""

from __future__ import annotations

from lightning_modules.distributed import signals

if __name__ == "__main__":
    signals.catch()  # before the other imports, which take ten seconds

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from datamodules.records import UserError
from experiments.agent import tell_other_ranks
from experiments.build.data import build_data, describe_schedule
from experiments.build.module import build_module
from experiments.build.trainer import build_callbacks, build_trainer, precision_of, warn_about_cores
from experiments.config.experiment import experiments, load_config
from experiments.config.paths import LAST, folder_of
from experiments.config.schema import Config
from experiments.results.final_table import FinalTable
from experiments.results.results import read_results
from experiments.run.endings import answer, how_to_go_on, naming_lost_ranks, raise_if_preempted
from experiments.run.folder import begun_in, open_run, write_config, write_manifest
from experiments.run.lock import only_job
from experiments.run.next_steps import next_steps
from experiments.run.tracking import build_loggers, log_end
from experiments.shared.console import entry_point
from lightning_modules.callbacks.before_first_step import BeforeFirstStep
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.distributed import launch
from lightning_modules.distributed.signals import Preempted, leave_if_asked
from lightning_modules.encoders.loading import checkpoint_of, load_encoder

log = logging.getLogger(__name__)


def train(experiment: str, overrides: Sequence[str] = ()) -> None:
    """Train an experiment, or go on with it, and measure it. A complete run is only shown.

    Asked by a signal to end, it saves and leaves the program, with a status of endings.py.
    """
    config = load_config(experiment, overrides)
    rank_zero_only.rank = launch.rank(max(config.trainer.devices, 1))
    tell_other_ranks(experiment, overrides, folder_of(config))
    try:
        with only_job(folder_of(config)):
            train_in_folder(config, overrides)
    except Preempted as preempted:
        sys.exit(answer(preempted, folder_of(config)))
    finally:
        signals.ignore()


def train_in_folder(config: Config, overrides: Sequence[str]) -> None:
    """Train, or go on, in the run's folder, which no other job uses. overrides: that config is of. Raises Preempted."""
    folder = open_run(config)
    if folder.complete:
        FinalTable.show(read_results(folder.results))
        log.info("This run is complete: it lies in %s (run.resume=never trains it anew).", folder.path)
        return

    warn_about_cores(config)
    L.seed_everything(config.run.seed, verbose=False)
    data = build_data(config, training=True)
    leave_if_asked()
    module = build_module(config, data)
    table = FinalTable(config, data.benchmarks(config.evaluation.split), folder)
    write_config(folder, config)
    callbacks = build_callbacks(config, data, folder.path)
    if config.evaluation.baselines:
        callbacks.insert(0, BeforeFirstStep(table.baselines))
    loggers = build_loggers(config, folder.path)
    precision = begun_in(folder) or precision_of(config)
    trainer = build_trainer(config, module.encoder, callbacks, loggers, folder.path, precision)

    log.info("%s at scale %s: %s", config.experiment, config.scale, folder.path)
    origin = f", from {folder.checkpoint}" if folder.checkpoint else ""
    kept = "" if precision == precision_of(config) else ", as the run began (a run that begins here would take another)"
    log.info("%s steps%s, in %s%s", config.trainer.max_steps, origin, precision, kept)
    num_parameters = sum(p.numel() for p in module.parameters())
    schedule = describe_schedule(config, data)
    noted = (folder, data, num_parameters, schedule, trainer.world_size, precision)
    write_manifest(*noted)
    started = time.perf_counter()
    with naming_lost_ranks(trainer):
        fit(trainer, module, data, folder.checkpoint)
        write_manifest(*noted, seconds=time.perf_counter() - started)
        raise_if_preempted(trainer)
        chosen = checkpoint_of(folder.path) if config.evaluation.every_n_steps else folder.path / LAST
        step = read_checkpoint(chosen)["global_step"]
        table.finish(load_encoder(chosen).to(module.device), chosen.name, step)
    if trainer.is_global_zero:
        log_end(loggers, table, trainer.global_step, [chosen, folder.path / "config.yaml"])
        table.show(table.results)
        log.info("The run lies in %s", folder.path)
        log.info("%s", next_steps(config, overrides, folder.path))


def fit(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, checkpoint: Path | None) -> None:
    """Train. Lightning answers Ctrl-C by leaving the program; here it stays a KeyboardInterrupt."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except SystemExit as leaving:
        if not trainer.interrupted:
            raise
        told = how_to_go_on(Path(trainer.default_root_dir))
        raise KeyboardInterrupt(f"interrupted at step {trainer.global_step}: {told}") from leaving


def main(arguments: Sequence[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise UserError(f"which experiment? There are {', '.join(experiments())}: python -m experiments.train moe")
    train(arguments[0], arguments[1:])


if __name__ == "__main__":
    entry_point(main)
