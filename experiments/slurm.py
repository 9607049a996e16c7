"""Write a SLURM job for an experiment, and submit it: python -m experiments.slurm EXPERIMENT TIME=time [KEY=value ...]

NODES     nodes (1)
GPUS      GPUs of each node, with a rank for each (1); 0 for a job on CPUs
TASKS     ranks on each node of a job on CPUs (1)
TIME      longest time of one attempt: minutes, hours:minutes:seconds, days-hours; a longer run goes on in the next one
SEEDS     an array of jobs with run.seed: 0,1,2
EXPS      an array of jobs, one an experiment: vanilla,moe; with SEEDS, each with every seed
SWEEP     an array of jobs, one a trial of a sweep (grid or random); make sweep then shows its table
AT_ONCE   so many jobs of the array run at the same time
SUBMIT    1 submits the job; else the command that does is told
PARTITION, ACCOUNT, QOS, CONSTRAINT, CPUS, MEM, GRACE, SETUP, LAUNCH, PYTHON    as in experiments/slurm/cluster.yaml
key=value of the experiment

The job is experiments/slurm/train.sbatch, filled in, and lies in slurm/; its log beside it.
"""

from __future__ import annotations

import itertools
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from datamodules.files import write_text
from datamodules.records import UserError
from experiments.config.experiment import FOLDER, experiments, load_config
from experiments.config.paths import folder_of
from experiments.config.schema import Config
from experiments.config.structured import keys
from experiments.config.suggest import did_you_mean
from experiments.config.sweep_file import read_sweep
from experiments.run.trials import trials_of
from experiments.shared.console import entry_point, whole_number

log = logging.getLogger(__name__)

TEMPLATE, DEFAULTS = FOLDER / "slurm" / "train.sbatch", FOLDER / "slurm" / "cluster.yaml"
OWN = {
    "NODES": "1",
    "GPUS": "1",
    "TASKS": "1",
    "TIME": "",
    "SEEDS": "",
    "EXPS": "",
    "SWEEP": "",
    "AT_ONCE": "",
    "SUBMIT": "",
}
LEAST_TRAINING = 60  # seconds of TIME that must be left before the signal


@dataclass(frozen=True, slots=True)
class Run:
    """One training: its experiment, its key=value, and the folder it will have."""

    experiment: str
    overrides: tuple[str, ...]
    folder: Path


def slurm(experiment: str, arguments: Sequence[str]) -> Path:
    """Write the job, and submit it if asked to. Returns the script."""
    values = _values([text for text in arguments if _is_own(text)])
    overrides = [text for text in arguments if not _is_own(text)]
    runs = _runs(experiment, overrides, values)
    name = runs[0].folder.name + (f"-and-{len(runs) - 1}-more" if len(runs) > 1 else "")
    script = Path("slurm", f"{name}.sbatch").absolute()
    try:
        script.parent.mkdir(exist_ok=True)
        write_text(script, fill(TEMPLATE.read_text(encoding="utf-8"), _fields(values, runs, script)))
    except OSError as error:
        raise UserError(f"{script}: cannot be written ({error})") from error
    log.info("the job: %s", script)
    for run in runs:
        log.info("  %s, in %s", run.experiment, run.folder)
    if values["SUBMIT"] in ("", "0"):
        log.info("Next: sbatch %s (or SUBMIT=1 here)", script)
    else:
        log.info("job %s: squeue --me, tail -F %s", submit(script), script.parent / f"{name}-*.out")
        log.info("To stop it: scancel JOB. To have it save, and go on later: scancel --signal=USR1 JOB")
    return script


def submit(script: Path) -> str:
    """Returns the job's number. Raises UserError if SLURM is not there, or refuses."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"SUBMIT: sbatch cannot be run here ({error}); the job lies in {script}") from error
    if done.returncode:
        raise UserError(f"SUBMIT: sbatch refused {script} ({done.stderr.strip()})")
    return done.stdout.strip().split(";")[0]


def _is_own(text: str) -> bool:
    return text.partition("=")[0].isupper()


def _values(arguments: Sequence[str]) -> dict[str, Any]:
    """The capital keys: what cluster.yaml says, and over it what the command line does."""
    try:
        of_cluster = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{DEFAULTS}: cannot be read ({error})") from error
    values: dict[str, Any] = OWN | {key.upper(): value for key, value in of_cluster.items()}
    for text in arguments:
        key, equals, value = text.partition("=")
        if key not in values or not equals:
            hint = did_you_mean(key, [*values, *keys(Config)])
            raise UserError(
                f"the command line: got {text!r}; {hint}allowed are {', '.join(values)}, and keys of an experiment"
            )
        values[key] = [value] if key == "SETUP" else value
    if not values["TIME"]:
        raise UserError("TIME: how long may one attempt take? For instance TIME=04:00:00")
    for key, least in (("NODES", 1), ("GPUS", 0), ("TASKS", 1), ("CPUS", 1), ("GRACE", 1), ("AT_ONCE", 1)):
        if values[key]:
            values[key] = whole_number(key, str(values[key]), least)
    if seconds(values["TIME"]) < values["GRACE"] + LEAST_TRAINING:
        raise UserError(
            f"TIME: {values['TIME']} leaves no time to train before GRACE, {values['GRACE']} seconds: a run that is "
            "told to save at its start never comes to an end"
        )
    return values


def seconds(time: str) -> int:
    """Of a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?", time)
    if not form or any(int(part or 0) > 59 for part in form.groups()[2:]):
        raise UserError(
            f"TIME: got {time!r}, allowed are minutes, hours:minutes:seconds and days-hours: 90, 04:00:00, 2-12"
        )
    days, first, second, third = (int(part) if part else None for part in form.groups())
    if days is not None:
        hours, minutes, rest = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, rest = first, second, third
    else:
        hours, minutes, rest = 0, first, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _runs(experiment: str, overrides: Sequence[str], values: Mapping[str, Any]) -> list[Run]:
    """All trainings of the job, each with its configuration checked here, before it waits in a queue."""
    said = {
        "trainer.num_nodes": str(values["NODES"]),
        "trainer.devices": str(values["GPUS"] or values["TASKS"]),
        "trainer.accelerator": "gpu" if values["GPUS"] else "cpu",
    }
    for text in overrides:
        key, _, value = text.partition("=")
        if said.get(key, value) != value:
            raise UserError(f"{text}: NODES, GPUS and TASKS say that it is {said[key]}")
    ranks = [f"{key}={value}" for key, value in said.items()]
    names = values["EXPS"].split(",") if values["EXPS"] else [experiment]
    seeds = [f"run.seed={seed}" for seed in values["SEEDS"].split(",")] if values["SEEDS"] else [None]
    trials = _trials(experiment, overrides, values)
    runs = []
    for name, seed, trial in itertools.product(names, seeds, trials):
        given = [*overrides, *([seed] if seed else []), *trial, *ranks]
        # There may be no GPU on this machine.
        config = load_config(name, [*given, "trainer.accelerator=cpu"], [*values])
        config.trainer.accelerator = said["trainer.accelerator"]
        runs.append(Run(name, tuple(given), folder_of(config)))
    folders = [run.folder for run in runs]
    if len(set(folders)) < len(folders):
        raise UserError("run.dir: the jobs of an array need a folder each; leave it out, and each finds its own")
    return runs


def _trials(experiment: str, overrides: Sequence[str], values: Mapping[str, Any]) -> list[list[str]]:
    """The key=value of each trial of SWEEP, or a single one of no sweep."""
    if not values["SWEEP"]:
        return [[]]
    if values["EXPS"] or values["SEEDS"]:
        raise UserError("SWEEP: its trials are the array; EXPS and SEEDS make another one")
    found = read_sweep(values["SWEEP"], experiment, overrides)
    if found.early_terminate:
        log.warning("early_terminate of %s: nobody leads an array, so its tasks run to their end", found.name)
    if found.method == "bayes":
        raise UserError("SWEEP: method bayes chooses values by the results of earlier trials; expected grid or random")
    return [trial.arguments(found) for trial in trials_of(found, found.folder)]


def _fields(values: Mapping[str, Any], runs: Sequence[Run], script: Path) -> dict[str, str]:
    """What stands for {{...}} in the template."""
    array = f"0-{len(runs) - 1}" + (f"%{values['AT_ONCE']}" if values["AT_ONCE"] else "") if len(runs) > 1 else ""
    lines = [f"  {number}) run {shlex.join((run.experiment, *run.overrides))} ;;" for number, run in enumerate(runs)]
    fields = {key.lower(): value for key, value in values.items()} | {
        "what": f"{', '.join(dict.fromkeys(run.experiment for run in runs))}: made by make slurm, from {TEMPLATE.name}",
        "name": script.stem,
        "tasks": values["GPUS"] or values["TASKS"],
        "gpus": values["GPUS"] or None,
        "array": array,
        "output": script.with_name(f"{script.stem}-{'%A_%a' if array else '%j'}.out"),
        "root": shlex.quote(str(Path.cwd())),
        "setup": "\n".join(values["SETUP"] or ["# (SETUP: lines before the run, such as module load)"]),
        "launch": values["LAUNCH"] or "",
        "python": values["PYTHON"] or shlex.quote(sys.executable),
        "runs": "\n".join(lines),
    }
    return {key: "" if value is None else str(value) for key, value in fields.items()}


def fill(template: str, fields: Mapping[str, str]) -> str:
    """The template with its fields. An option of sbatch without value is left out."""

    def filled(line: str) -> str:
        return re.sub(r"{{(\w+)}}", lambda field: fields[field[1]], line)

    lines = [filled(line) for line in template.splitlines()]
    return "\n".join(line for line in lines if not (line.startswith("#SBATCH") and line.endswith("="))) + "\n"


def main(arguments: Sequence[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise UserError(
            f"which experiment? There are {', '.join(experiments())}: python -m experiments.slurm moe TIME=60"
        )
    slurm(arguments[0], arguments[1:])


if __name__ == "__main__":
    entry_point(main)
