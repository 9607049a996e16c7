"""Run a study, and write its page: python -m experiments.study study=NAME [key=value ...]"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from datamodules.files import read_json, write_json, write_text
from datamodules.options import option
from datamodules.records import UserError, counted
from experiments.__main__ import command_names
from experiments.config.arguments import parse
from experiments.config.structured import unknown
from experiments.config.study_file import Job, Study, read_study, studies
from experiments.results.study_page import collect, page, plot_of, records, tables
from experiments.run.jobs import JobRunner, is_complete
from experiments.shared.console import entry_point, relative_path
from experiments.shared.output import writable_folder
from experiments.shared.table_formats import (
    Column,
    Format,
    Table,
    format_option,
    print_table,
    print_tables,
    reserve_stdout,
)
from lightning_modules.distributed.signals import Preempted

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StudyOptions:
    """Train and evaluate the arms of a study, and write a page with tables, intervals, tests and a plot.

    The same command continues a study that was interrupted or ran out of minutes.
    """

    study: str = option("", "name of a file in experiments/studies, or a path")
    values: tuple[str, ...] = option((), "values of the file to replace, as NAME=TEXT, such as values=data=../data")
    arms: tuple[str, ...] = option((), "arms to run, together with the arms they need; by default all")
    seeds: tuple[int, ...] = option((), "seeds to run, by default all")
    parallel: int = option(
        1, "number of jobs to run at a time; they take turns on the GPUs, if there are any", minimum=1
    )
    minutes: float | None = option(None, "number of minutes after which running commands save and end", above=0)
    output: Path | None = option(None, "folder of the study, by default runs/study-NAME")
    page: Path | None = option(None, "folder for the page, study.json and the plot, by default the study's folder")
    run: bool = option(True, "run missing jobs; no: only write the page, from complete jobs")
    format: Format = format_option()
    list: bool = option(False, "only list the jobs, and whether they are complete")


def main(arguments: Sequence[str]) -> None:
    options = parse(StudyOptions, arguments)
    if not options.study:
        raise UserError(f"study: expected one of {', '.join(studies())}, or a path (make study STUDY=papers)")
    reserve_stdout(options.format)
    study = read_study(options.study, options.output, options.values)
    _check_commands(study)
    jobs = _chosen(study, options)
    if options.list:
        _show_jobs(study, jobs)
        return
    runner = JobRunner(study.folder, jobs, options.parallel, options.minutes)
    try:
        if options.run:
            with writable_folder("output", study.folder):
                _run(runner, study)
    finally:
        if any(is_complete(study.folder, job) for job in study.jobs):
            content = write_page(study, options.page or study.folder)
            shown = [replace(table, title=heading) for heading, table in tables(content).items() if heading != "Arms"]
            print_tables(options.format, shown, records(content))
    if runner.failed:
        raise UserError(
            f"failed: {', '.join(job.name for job in runner.failed)}; their logs are in {relative_path(study.folder)}"
        )


def _check_commands(study: Study) -> None:
    """Raise UserError for a command that does not exist, because `evaluate` only runs after hours of training."""
    for job in study.jobs:
        for number, words in enumerate(job.commands, start=1):
            name = words[0] if words else ""
            if name not in command_names():
                key = "evaluate" if number == len(job.commands) else f"arms.{job.arm}"
                raise UserError(f"{study.name}: {key}: {unknown('command', name, command_names())}")


def _run(runner: JobRunner, study: Study) -> None:
    missing = [job for job in runner.jobs if not is_complete(study.folder, job)]
    log.info(
        "%s: %d of %s to run, in %s",
        study.name,
        len(missing),
        counted(len(runner.jobs), "job"),
        relative_path(study.folder),
    )
    try:
        runner.run()
    except Preempted as preempted:
        left = sum(not is_complete(study.folder, job) for job in runner.jobs)
        log.info("%s: %s left; the same command continues", preempted, counted(left, "job"))
        sys.exit(preempted.status)


def write_page(study: Study, folder: Path) -> Mapping[str, Any]:
    """Write NAME.json, NAME.md and NAME.svg from all complete jobs, and return the content of NAME.json."""
    with writable_folder("page", folder):
        write_json(folder / f"{study.name}.json", collect(study))
        content = read_json(folder / f"{study.name}.json")  # read it back, so that the page depends on nothing else
        if content["gains"]:
            write_text(folder / f"{study.name}.svg", plot_of(content))
        write_text(folder / f"{study.name}.md", page(content, quote(f"{study.name}.svg")))
    log.info("The page is %s", relative_path(folder / f"{study.name}.md"))
    return content


def _chosen(study: Study, options: StudyOptions) -> list[Job]:
    """Return the jobs of the chosen arms and seeds, and those they need."""
    for key, chosen, known in (
        ("arms", options.arms, list(study.arms)),
        ("seeds", options.seeds, sorted({job.seed for job in study.jobs if job.seed is not None})),
    ):
        if unknown := [each for each in chosen if each not in known]:
            raise UserError(f"{key}: expected some of {', '.join(map(str, known))}, got {unknown[0]}")
    wanted = {
        job.name
        for job in study.jobs
        if job.arm in (options.arms or study.arms) and (job.seed is None or job.seed in (options.seeds or (job.seed,)))
    }
    for job in reversed(study.jobs):
        if job.name in wanted:
            wanted |= job.needs
    return [job for job in study.jobs if job.name in wanted]


def _show_jobs(study: Study, jobs: Sequence[Job]) -> None:
    table = Table([Column("job"), Column("state"), Column("needs", folds=True)], title=study.settings.title)
    for job in jobs:
        table.add(job.name, "complete" if is_complete(study.folder, job) else "missing", ", ".join(sorted(job.needs)))
    print_table(table)


if __name__ == "__main__":
    entry_point(main)
