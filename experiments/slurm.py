"""Write a SLURM job, and submit it: python -m experiments.slurm EXPERIMENT TIME=04:00:00 [KEY=value ...]"""

from __future__ import annotations

import itertools
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from datamodules.files import write_text
from datamodules.options import option, option_key
from datamodules.records import UserError, check_name, explained
from experiments.config.arguments import as_argument, option_keys
from experiments.config.experiment import FOLDER, ExperimentOptions, folder_of, load_config, parse_overrides
from experiments.config.structured import read_yaml, structured
from experiments.config.sweep_file import read_sweep
from experiments.run.trials import trials_of
from experiments.shared.console import entry_point
from experiments.shared.output import name_of

log = logging.getLogger(__name__)

TEMPLATE, CLUSTER = FOLDER / "slurm" / "train.sbatch", FOLDER / "slurm" / "cluster.yaml"
FIELD = re.compile(r"{{(\w+)}}")
PLAIN_WORD = re.compile(r"[\w@%+=:,./${}-]+", re.ASCII)
NOT_IN_LOG = re.compile(r"[\x00-\x1f\x7f%\\]")  # sbatch replaces % and \ in the name of a log, even in quotes
FOR_THE_SHELL = {"setup", "launch", "python"}  # keys of cluster.yaml whose values the shell reads
MIN_TRAINING = 60  # minimum number of seconds to train before the signal


@dataclass(kw_only=True)
class ClusterOptions:
    """Resources of a job. Defaults come from experiments/slurm/cluster.yaml, in which keys are in lower case."""

    partition: str | None = option(None, "partition; by default, the cluster chooses", key="PARTITION")
    account: str | None = option(None, "account to charge", key="ACCOUNT")
    qos: str | None = option(None, "quality of service", key="QOS")
    constraint: str | None = option(None, "kind of node, such as a100", key="CONSTRAINT")
    cpus: int = option(8, "cores per rank", minimum=1, key="CPUS")
    mem: str | None = option(None, "memory per node, such as 200G; 0: all memory of the node", key="MEM")
    grace: int = option(120, "seconds before the end of TIME when the run saves", minimum=1, key="GRACE")
    setup: str = option("", "shell commands before the run, such as module load cuda", key="SETUP")
    launch: str | None = option(
        None, "command in front of python on every rank, such as apptainer exec IMAGE", key="LAUNCH"
    )
    python: str | None = option(
        None,
        "Python interpreter of the job, by default the one that runs this command (from .venv)",
        key="JOB_PYTHON",
    )


@dataclass(kw_only=True)
class SlurmOptions(ExperimentOptions, ClusterOptions):
    """Write a SLURM job, or an array of jobs, that trains an experiment, and submit it.

    The job is a filled-in copy of experiments/slurm/train.sbatch in slurm/, with its log next to it.
    """

    time: str = option(
        help="time limit of one attempt, such as 90 (minutes), 04:00:00 or 2-12 (days-hours); the next attempt resumes",
        key="TIME",
    )
    nodes: int = option(1, "number of nodes", minimum=1, key="NODES")
    gpus: int = option(1, "GPUs per node, with one rank each; 0 for a CPU job", minimum=0, key="GPUS")
    tasks: int = option(1, "ranks per node, for a CPU job", minimum=1, key="TASKS")
    seeds: tuple[str, ...] = option((), "values of run.seed, for an array with one job per seed", key="SEEDS")
    exps: tuple[str, ...] = option(
        (),
        "experiments, for an array with one job per experiment; with SEEDS, one job per experiment and seed",
        key="EXPS",
    )
    sweep: str = option("", "grid or random sweep, for an array with one job per trial", key="SWEEP")
    at_once: int | None = option(
        None, "maximum number of array jobs that run at the same time", minimum=1, key="AT_ONCE"
    )
    submit: bool | None = option(
        None, "whether to submit the job; otherwise, the sbatch command is printed", key="SUBMIT"
    )


@dataclass(frozen=True, slots=True)
class Run:
    """One training of the job. overrides: key=value arguments. folder: folder of the run."""

    experiment: str
    overrides: tuple[str, ...]
    folder: Path


def main(arguments: Sequence[str]) -> None:
    slurm(arguments)


def slurm(arguments: Sequence[str]) -> Path:
    """Write the job, and submit it with SUBMIT=1. Returns the path of the script."""
    options, overrides = read_options(arguments)
    runs = plan_runs(options, overrides)
    name = name_of(runs[0].folder) + (f"-and-{len(runs) - 1}-more" if len(runs) > 1 else "")
    check_name("run.dir: folder", name)
    script = Path("slurm", f"{name}.sbatch").absolute()
    if NOT_IN_LOG.search(str(script)):
        raise UserError(
            f"{str(script)!r}: expected a path without %, \\ and control characters, which sbatch cannot handle"
        )
    with explained(f"{script}: cannot be written"):
        script.parent.mkdir(exist_ok=True)
        write_text(script, fill(TEMPLATE.read_text(encoding="utf-8"), _template_fields(options, runs, script)))
    log.info("the job: %s", script)
    for run in runs:
        log.info("  %s, in %s", run.experiment, run.folder)
    if options.submit:
        log.info("job %s: squeue --me, tail -F %s", submit(script), script.parent / f"{name}-*.out")
        log.info("To stop it: scancel JOB. To save, and resume later: scancel --signal=USR1 JOB")
    else:
        log.info("Next: sbatch %s (or SUBMIT=1 here)", shlex.quote(str(script)))
    return script


def read_options(arguments: Sequence[str]) -> tuple[SlurmOptions, list[str]]:
    """Return the options, with defaults from cluster.yaml, and the overrides of the experiment."""
    cluster = _read_cluster()
    defaults = [f"{option_key(field)}={as_argument(getattr(cluster, field.name))}" for field in fields(cluster)]
    if arguments and "=" not in arguments[0]:  # the experiment must remain the first argument
        arguments = [arguments[0], *defaults, *arguments[1:]]
    options, overrides = parse_overrides(SlurmOptions, arguments)
    for field in fields(options):
        value = getattr(options, field.name)
        for text in value if isinstance(value, tuple) else [value]:
            if isinstance(text, str) and not text.isprintable() and field.name != "setup":
                raise UserError(f"{option_key(field)}: expected one line without control characters, got {text!r}")
    if seconds(options.time) < options.grace + MIN_TRAINING:
        raise UserError(
            f"TIME: {options.time} leaves no time to train, because the run saves {options.grace} seconds (GRACE) "
            "before the end; set a longer TIME"
        )
    return options, overrides


def _read_cluster() -> ClusterOptions:
    """Read cluster.yaml.

    In text for the shell, OmegaConf must only replace ${oc.env:NAME}. A ${NAME} may be escaped, but does not have to
    be.
    """
    content = OmegaConf.to_container(read_yaml(CLUSTER))
    setup = content.get("setup") or []
    lines = [setup] if isinstance(setup, str) else setup
    if not (isinstance(lines, list) and all(isinstance(line, str) for line in lines)):
        raise UserError(f"{CLUSTER}: setup: expected a shell command or a list of them, got {setup!r}")
    content["setup"] = "\n".join(lines)
    for key in FOR_THE_SHELL & content.keys():
        if isinstance(content[key], str):
            content[key] = re.sub(r"\\?\$\{(?!oc\.)", r"\\${", content[key])
    return structured(ClusterOptions, [OmegaConf.create(content)], str(CLUSTER))


def seconds(time: str) -> int:
    """Read a time as SLURM does: minutes[:seconds], hours:minutes:seconds, or days-hours[:minutes[:seconds]]."""
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?", time)
    if not form or any(int(part or 0) > 59 for part in form.groups()[2:]):
        raise UserError(
            f"TIME: expected minutes, hours:minutes:seconds or days-hours (90, 04:00:00, 2-12), got {time!r}"
        )
    days, first, second, third = (int(part) if part else None for part in form.groups())
    if days is not None:
        hours, minutes, rest = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, rest = first, second, third
    else:
        hours, minutes, rest = 0, first, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def plan_runs(options: SlurmOptions, overrides: Sequence[str]) -> list[Run]:
    """Return all trainings of the job, and check their configurations."""
    ranks = {
        "trainer.num_nodes": str(options.nodes),
        "trainer.devices": str(options.gpus or options.tasks),
        "trainer.accelerator": "gpu" if options.gpus else "cpu",
    }
    for text in overrides:
        key, _, value = text.partition("=")
        if ranks.get(key, value) != value:
            raise UserError(f"{text}: NODES, GPUS and TASKS set it to {ranks[key]}")
    for key, values in (("SEEDS", options.seeds), ("EXPS", options.exps)):
        if len(set(values)) < len(values):
            raise UserError(f"{key}: each may be named only once, got {','.join(values)}")
    experiments = options.exps or (options.experiment,)
    seeds = [[f"run.seed={seed}"] for seed in options.seeds] or [[]]
    runs = []
    for experiment, seed, trial in itertools.product(experiments, seeds, _trials(options, overrides)):
        arguments = [*overrides, *seed, *trial, *(f"{key}={value}" for key, value in ranks.items())]
        # This machine may have no GPU, so check the rest of the configuration as on a CPU.
        config = load_config(experiment, [*arguments, "trainer.accelerator=cpu"], option_keys(SlurmOptions))
        config.trainer.accelerator = ranks["trainer.accelerator"]
        runs.append(Run(experiment, tuple(arguments), folder_of(config)))
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("run.dir: each job of an array needs its own folder; leave out run.dir to give each job one")
    return runs


def _trials(options: SlurmOptions, overrides: Sequence[str]) -> list[list[str]]:
    """Return the arguments of each trial of SWEEP. Without SWEEP, return one run without arguments."""
    if not options.sweep:
        return [[]]
    if options.exps or options.seeds:
        raise UserError("SWEEP: cannot be combined with EXPS or SEEDS, because the array has one job per trial")
    sweep = read_sweep(options.sweep, options.experiment, overrides)
    if sweep.method == "bayes":
        raise UserError("SWEEP: method bayes needs the results of earlier trials; expected grid or random")
    if sweep.early_terminate:
        log.warning("%s: early_terminate has no effect, because the tasks of an array are not compared", sweep.name)
    return [trial.arguments(sweep) for trial in trials_of(sweep, sweep.folder)]


def _template_fields(options: SlurmOptions, runs: Sequence[Run], script: Path) -> dict[str, str]:
    """Return the values of {{...}} in the template."""
    array = ""
    if len(runs) > 1:
        array = f"0-{len(runs) - 1}" + (f"%{options.at_once}" if options.at_once else "")
    lines = [f"  {number}) run {shlex.join((run.experiment, *run.overrides))} ;;" for number, run in enumerate(runs)]
    values: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(options)} | {
        "what": f"{', '.join(dict.fromkeys(run.experiment for run in runs))}: made by make slurm, from {TEMPLATE.name}",
        "name": script.stem,
        "tasks": options.gpus or options.tasks,
        "gpus": options.gpus or None,
        "array": array,
        "output": script.with_name(f"{script.stem}-{'%A_%a' if array else '%j'}.out"),
        "root": shlex.quote(str(Path.cwd())),
        "setup": options.setup or "# (SETUP: shell commands before the run, such as module load)",
        "launch": _as_words("LAUNCH", options.launch or ""),
        "python": _as_words("PYTHON", options.python) if options.python else shlex.quote(sys.executable),
        "runs": "\n".join(lines),
    }
    return {name: "" if value is None else str(value) for name, value in values.items()}


def fill(template: str, values: Mapping[str, str]) -> str:
    """Fill in a template, leaving out options of sbatch without a value.

    Values of options are quoted, because sbatch reads quotes and backslashes like a shell, and # starts a comment.
    """
    lines = []
    for line in template.splitlines():
        is_option = line.startswith("#SBATCH")
        if not is_option or all(values[name] for name in FIELD.findall(line)):
            quote = shlex.quote if is_option else str
            lines.append(FIELD.sub(lambda field, quote=quote: quote(values[field[1]]), line))
    return "\n".join(lines) + "\n"


def _as_words(key: str, text: str) -> str:
    """Quote the words of a command for the shell. Environment variables such as $SCRATCH are still replaced."""
    with explained(f"{key}: {text!r} cannot be split into words", ValueError):
        words = shlex.split(text)
    return " ".join(word if PLAIN_WORD.fullmatch(word) else shlex.quote(word) for word in words)


def submit(script: Path) -> str:
    """Submit a job, and return its number. Raises UserError if SLURM is not installed or refuses the job."""
    try:
        result = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"SUBMIT: sbatch cannot be run here ({error}); the job is in {script}") from error
    if result.returncode:
        raise UserError(f"SUBMIT: sbatch refused {script} ({result.stderr.strip()})")
    return result.stdout.strip().split(";")[0]


if __name__ == "__main__":
    entry_point(main)
