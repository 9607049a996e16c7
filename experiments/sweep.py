"""Run a sweep, or register it with W&B: python -m experiments.sweep EXPERIMENT sweep=NAME [key=value ...]

sweep          a file of experiments/sweeps by name, or a path
parallel       trials beside each other on this machine; on a machine with GPUs each has one of them
run_cap        so many trials, over the file's own number
trial          run this one alone, from 0, in this process: what the task of a SLURM array does
retry_failed   yes runs those again that failed
output         folder of the trials' runs, by default one that the same sweep finds again
key=value      of the experiment, for all trials; with wandb.mode=online the sweep is registered, for `make agent`
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from datamodules.records import UserError
from experiments.config.experiment import experiments, load_config
from experiments.config.schema import Config
from experiments.run.endings import PREEMPTED
from experiments.shared.console import choice, entry_point, key_values, near, whole_number
from experiments.sweeping.controller import Controller
from experiments.sweeping.file import Sweep, as_override, check_trials, read_sweep, sweeps
from experiments.sweeping.table import ranked, show, write_table
from lightning_modules.distributed.signals import Preempted

log = logging.getLogger(__name__)

KEYS = {"sweep": "", "parallel": "1", "run_cap": "", "trial": "", "retry_failed": "no", "output": ""}


def sweep(experiment: str, arguments: Sequence[str]) -> None:
    """Run a sweep to its end, one trial of it, or register it with W&B."""
    own = [text for text in arguments if text.partition("=")[0] in KEYS]
    values = key_values(own, KEYS)
    if not values["sweep"]:
        raise UserError(f"which sweep? There are {', '.join(sweeps())}: make sweep EXP=moe SWEEP=lr")
    cap = whole_number("run_cap", values["run_cap"]) if values["run_cap"] else None
    overrides = [text for text in arguments if text not in own]
    config = load_config(experiment, overrides, [*KEYS, "SWEEP", "PARALLEL", "TRIAL"])
    found = read_sweep(values["sweep"], experiment, overrides, cap)
    online = os.environ.get("WANDB_MODE", config.wandb.mode) == "online" and not values["trial"]
    if not online:
        found.trials()  # that there are any is soon said
    check_trials(found)
    if online:
        _register(found, config)
        return
    folder = Path(values["output"]).absolute() if values["output"] else found.folder
    retry = choice("retry_failed", values["retry_failed"], ("yes", "no")) == "yes"
    controller = Controller(found, folder, whole_number("parallel", values["parallel"]), retry)
    if values["trial"]:
        _one(controller, whole_number("trial", values["trial"], least=0))
    else:
        _all(controller)


def _all(controller: Controller) -> None:
    found, folder = controller.sweep, controller.folder
    log.info("%s: %d trials of %s, in %s", found.name, len(controller.trials), found.experiment, near(folder))
    try:
        controller.run()
    except Preempted as preempted:
        log.info("%s: the same command goes on", preempted)
        sys.exit(130 if preempted.signal and preempted.signal.name == "SIGINT" else PREEMPTED)
    finally:
        rows = ranked(controller)
        write_table(folder, found, rows)
    show(found, rows)
    if failed := [str(row["trial"]) for row in rows if row["state"] == "failed"]:
        log.warning(
            "failed: %s (their logs lie beside their runs; retry_failed=yes runs them again)", ", ".join(failed)
        )
    best = rows[0]
    if best["value"] is None:
        raise UserError(f"no trial logged {found.metric}")
    settings = " ".join(as_override(key, value) for key, value in best["parameters"].items())
    log.info("The best is trial %d: %s; %s %.4f", best["trial"], settings, found.metric, best["value"])
    run = near(best["run"])
    log.info("Its run lies in %s. Next: make eval model=%s split=dev", run, run)


def _one(controller: Controller, number: int) -> None:
    """Become the training of one trial; every rank of it computes the same parameters by itself."""
    if number >= len(controller.trials):
        raise UserError(f"trial: got {number}, the sweep has {len(controller.trials)}, from 0")
    trial, found = controller.trials[number], controller.sweep
    arguments = [*found.overrides, *trial.arguments(found)]
    os.execv(sys.executable, [sys.executable, "-m", "experiments.train", found.experiment, *arguments])


def _register(found: Sweep, config: Config) -> None:
    import wandb

    content = dict(found.content) | {"command": found.command(["${args_no_hyphens}"])}
    if found.run_cap:
        content["run_cap"] = found.run_cap
    try:
        name = wandb.sweep(content, entity=config.wandb.entity, project=config.wandb.project)
    except wandb.errors.Error as error:
        raise UserError(f"W&B did not take the sweep ({error}); without wandb.mode=online it runs here") from error
    place = [
        os.environ[f"WANDB_{part}"] for part in ("ENTITY", "PROJECT") if f"WANDB_{part}" in os.environ
    ]  # as it was taken
    log.info("Next, on any machine with this folder: make agent SWEEP_ID=%s", "/".join([*place, name]))


def main(arguments: Sequence[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise UserError(
            f"which experiment? There are {', '.join(experiments())}: python -m experiments.sweep moe sweep=lr"
        )
    sweep(arguments[0], arguments[1:])


if __name__ == "__main__":
    entry_point(main)
