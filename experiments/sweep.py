"""Run a sweep, or register it with W&B: python -m experiments.sweep EXPERIMENT sweep=NAME [key=value ...]"""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from datamodules.files import write_json
from datamodules.options import option
from datamodules.records import UserError, changes
from experiments.config.arguments import option_keys
from experiments.config.experiment import ExperimentOptions, as_dict, load_config, parse_overrides
from experiments.config.schema import Config
from experiments.config.sweep_file import Sweep, as_override, check_trials, read_sweep, sweeps
from experiments.run.trials import Controller, Trial
from experiments.run.wandb_environment import check_environment, wandb_mode
from experiments.shared.console import entry_point, relative_path, verbosity
from experiments.shared.output import writable_folder
from experiments.shared.plain import say
from experiments.shared.table_formats import Column, Table, print_table
from lightning_modules.distributed.signals import Preempted

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SweepOptions(ExperimentOptions):
    """Run the trials of a sweep on this machine, or register it with W&B (wandb.mode=online) for `make agent`."""

    sweep: str = option("", "name of a file in experiments/sweeps, or a path")
    parallel: int = option(1, "number of trials to run at a time, with one GPU each if there are GPUs", minimum=1)
    run_cap: int | None = option(None, "maximum number of trials, instead of the file's run_cap", minimum=1)
    trial: int | None = option(None, "run only this trial, in this process, as job arrays do", minimum=0)
    retry_failed: bool = option(False, "run failed trials again")
    output: Path | None = option(
        None, "folder for the trials' runs; by default, the same command always uses the same folder"
    )
    check: bool = option(False, "only check all files in experiments/sweeps")


def main(arguments: Sequence[str]) -> None:
    options, overrides = parse_overrides(SweepOptions, arguments)
    if options.check:
        for name in sweeps():
            check_trials(read_sweep(name, options.experiment))
        say(f"{len(sweeps())} sweeps are valid")
        return
    if not options.sweep:
        raise UserError(f"sweep: expected one of {', '.join(sweeps())}, for instance make sweep EXP=moe SWEEP=lr")
    config = load_config(options.experiment, overrides, [*option_keys(SweepOptions), "SWEEP", "PARALLEL", "TRIAL"])
    sweep = read_sweep(options.sweep, options.experiment, overrides, options.run_cap)
    if options.trial is None and wandb_mode(config.wandb.mode) == "online":
        check_trials(sweep)
        register(sweep, config)
        return
    folder = options.output.absolute() if options.output else sweep.folder
    if "${" in str(folder):
        raise UserError(f"output: trials would read {str(folder)!r} as another path; expected one without ${{")
    controller = Controller(sweep, folder, options.parallel, options.retry_failed)
    check_trials(sweep)
    if options.trial is None:
        with writable_folder("output", folder):
            run_all(controller)
    else:
        run_one(controller, options.trial)


def register(sweep: Sweep, config: Config) -> None:
    """Register a sweep with W&B's server, which then gives its trials to agents."""
    import wandb

    check_environment()
    content = dict(sweep.content) | {"command": sweep.command(["${args_no_hyphens}"])}
    if sweep.run_cap:
        content["run_cap"] = sweep.run_cap
    try:
        sweep_id = wandb.sweep(content, entity=config.wandb.entity, project=config.wandb.project)
    except wandb.errors.Error as error:
        raise UserError(f"W&B refused the sweep ({error}); without wandb.mode=online, it runs here") from error
    # wandb.sweep sets these variables to the entity and project that it used.
    path = [os.environ[name] for name in ("WANDB_ENTITY", "WANDB_PROJECT") if name in os.environ]
    log.info("Next, on any machine with this folder: make agent SWEEP_ID=%s", "/".join([*path, sweep_id]))


def run_all(controller: Controller) -> None:
    """Run all trials, print their table, and name the best one."""
    sweep, folder = controller.sweep, controller.folder
    log.info("%s: %d trials of %s, in %s", sweep.name, len(controller.trials), sweep.experiment, relative_path(folder))
    check_parameters(controller)
    check_data(controller)
    try:
        controller.run()
    except Preempted as preempted:
        log.info("%s: the same command resumes the sweep", preempted)
        sys.exit(preempted.status)
    finally:
        rows = ranking(controller)
        content = {"sweep": sweep.name, "experiment": sweep.experiment, "overrides": list(sweep.overrides)}
        content |= {"metric": sweep.metric, "goal": sweep.settings.metric.goal, "trials": rows}
        write_json(folder / "results.json", content)
    _show(sweep, rows)
    if failed := [str(row["trial"]) for row in rows if row["state"] == "failed"]:
        log.warning(
            "failed: %s (their logs are next to their runs; retry_failed=yes runs them again)", ", ".join(failed)
        )
    best = rows[0]
    if best["value"] is None:
        raise UserError(f"metric.name: no trial logged {sweep.metric}; the logs of the trials are next to their runs")
    settings = " ".join(starmap(as_override, best["parameters"].items()))
    log.info("The best is trial %d (%s): %s %.4f", best["trial"], settings, sweep.metric, best["value"])
    run = relative_path(best["run"])
    log.info("Its run is in %s. Next: make eval model=%s split=dev", run, shlex.quote(str(run)))


def check_parameters(controller: Controller) -> None:
    """Raise UserError if the folder has trials of another sweep, which would look like trials of this one."""
    states = controller.states()
    for trial in controller.trials:
        recorded = states.get(trial.number, {})
        then, settings = recorded.get("parameters", {}), recorded.get("settings")
        # Earlier versions did not record settings.
        settings = settings if isinstance(settings, dict) else controller.settings
        now = trial.values or {parameter.name: then.get(parameter.name) for parameter in controller.sweep.parameters}
        if then and (differences := changes(settings | then, controller.settings | now)):
            raise UserError(
                f"output: {relative_path(controller.folder)} has trials of another sweep (trial {trial.number}: "
                f"{'; '.join(differences)}). Choose another output, or delete the folder."
            )


def check_data(controller: Controller) -> None:
    """Raise UserError if the data of a finished trial have changed, because its result would differ now."""
    ended = [trial for trial in controller.ended() if (trial.folder / "manifest.json").is_file()]
    if not ended:
        return
    from experiments.build.data import build_data  # imports torch, which a new sweep does not need
    from experiments.run.folder import data_differences

    sweep, loaded = controller.sweep, {}
    for trial in ended:
        config = load_config(sweep.experiment, [*sweep.overrides, *trial.arguments(sweep)])
        settings = as_dict(config)
        key = repr([settings[name] for name in ("tasks", "task", "data")])  # most trials have the same
        loaded[key] = loaded.get(key) or build_data(config)
        if differences := data_differences(trial.folder, config, loaded[key]):
            raise UserError(
                f"output: trial {trial.number} in {relative_path(controller.folder)} was trained on other data "
                f"({'; '.join(differences)}). Restore the data, or choose another output for a new sweep."
            )


def run_one(controller: Controller, number: int) -> None:
    """Replace this process with the training of one trial. Each rank computes the same parameters."""
    sweep = controller.sweep
    if number >= len(controller.trials):
        raise UserError(f"trial: expected a number from 0 to {len(controller.trials) - 1}, got {number}")
    trial = controller.trials[number]
    if not trial.values:
        raise UserError("trial: method bayes needs the results of earlier trials, so it cannot run a single trial")
    arguments = [*sweep.overrides, *trial.arguments(sweep)]
    command = [sys.executable, "-m", "experiments.train", sweep.experiment, *arguments, *verbosity()]
    os.execv(sys.executable, command)


def ranking(controller: Controller) -> list[dict[str, Any]]:
    """Return a row for each trial, best first."""
    states = controller.states()
    rows = [_row(controller.sweep, trial, states.get(trial.number, {})) for trial in controller.trials]
    return sorted(rows, key=lambda row: _rank(row, controller.sweep.maximize))


def _row(sweep: Sweep, trial: Trial, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a trial in results.json. recorded: the trial's last row of trials.jsonl."""
    state = recorded.get("state", "waiting")
    return {
        "trial": trial.number,
        "parameters": dict(recorded.get("parameters", trial.values)),
        "state": state,
        "value": trial.best(sweep.metric, sweep.maximize),
        **({"step": recorded["step"], "reason": recorded["reason"]} if state == "stopped" else {}),
        "run": str(trial.folder),
    }


def _rank(row: Mapping[str, Any], maximize: bool) -> tuple[bool, float]:
    """Return the key that sorts finished trials first, then by value."""
    if row["value"] is None:
        return True, math.inf
    return row["state"] != "finished", -row["value"] if maximize else row["value"]


def _show(sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    names = [parameter.name for parameter in sweep.parameters]
    any_stopped = any("reason" in row for row in rows)
    columns = [Column("trial", "d"), *(Column(name, "", folds=True) for name in names), Column("state", folds=True)]
    columns += [Column(sweep.metric.rpartition("/")[2], ".4f"), *([Column("why", folds=True)] if any_stopped else [])]
    table = Table(columns, f"{sweep.name} ({sweep.experiment}): {sweep.metric}")
    for row in rows:
        values = [_cell(row["parameters"][name]) if name in row["parameters"] else "" for name in names]
        state = f"stopped early at step {row['step']}" if "reason" in row else row["state"]
        table.add(row["trial"], *values, state, row["value"], *([row.get("reason")] if any_stopped else []))
    print_table(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


if __name__ == "__main__":
    entry_point(main)
