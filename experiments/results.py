"""The final table of a run: measured, written and shown."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datamodules.records import Benchmark, UserError
from experiments.files import read_json, write_json
from experiments.run_folder import RunFolder
from experiments.schema import Config
from lightning_modules.distributed import rank
from lightning_modules.encoders.base import Encoder
from lightning_modules.metrics import Run
from lightning_modules.retrieval import bm25_run, depth, measure, rank_benchmark, whole_run, write_trec
from lightning_modules.signals import leave_if_asked

log = logging.getLogger(__name__)
Results = dict[str, Any]


class FinalTable:
    """What a run comes to: BM25, the untrained and the trained encoder on the final split, all ranks sharing the work.

    content: what stands in results.json.
    """

    def __init__(self, config: Config, benchmarks: Sequence[Benchmark], folder: RunFolder):
        self.config, self.benchmarks, self.folder = config, list(benchmarks), folder
        if not self.benchmarks:
            raise UserError(f"evaluation.split: no task has a split {config.evaluation.split!r}")
        without = set(config.task) - {benchmark.task for benchmark in self.benchmarks}
        if without:
            missing = ", ".join(sorted(without))
            log.warning("no %s split for %s: the table is without it", config.evaluation.split, missing)
        self.kept = folder.path / "baselines.json"  # a resumed run does not measure them again
        self.content: dict[str, Any] = {}

    def measure(self, system: str, encoder: Encoder) -> Results:
        return evaluate_encoder(
            system,
            encoder,
            self.benchmarks,
            self.config.evaluation.metrics,
            self.folder.path / "runs",
            similarity=self.config.objective.similarity,
            token_budget=self.config.data.token_budget,
        )

    def baselines(self, encoder: Encoder) -> None:
        """Measure BM25 and the encoder as it starts: untrained, or what init_from or extend.model gave."""
        bm25 = evaluate_bm25(self.benchmarks, self.config.evaluation.metrics, self.folder.path / "runs")
        start = "start" if self.config.init_from or self.config.extend.model else "untrained"
        found = combine(bm25, self.measure(start, encoder))
        if rank() == 0:
            write_json(self.kept, self._protocol() | {"benchmarks": found})

    def _protocol(self) -> dict[str, Any]:
        return {"split": self.config.evaluation.split, "metrics": self.config.evaluation.metrics}

    def _measured_before(self) -> Results:
        """The baselines, if they were measured on the same split with the same metrics."""
        if not self.kept.is_file():
            return {}
        before = read_json(self.kept)
        if self._protocol() | {"benchmarks": before.get("benchmarks")} != before:
            log.warning("the baselines were measured on another split or with other metrics: the table is without them")
            return {}
        return before["benchmarks"]

    def finish(self, encoder: Encoder, checkpoint: str, checkpoint_step: int) -> None:
        """Measure the trained encoder and write results.json. checkpoint: the file it is from, of which step."""
        self.content = {
            "experiment": self.config.experiment,
            "scale": self.config.scale,
            "seed": self.config.run.seed,
            "steps": self.config.trainer.max_steps,
            "checkpoint": checkpoint,
            "checkpoint_step": checkpoint_step,
            **self._protocol(),
            "benchmarks": combine(self._measured_before(), self.measure("trained", encoder)),
        }
        if rank() == 0:
            write_json(self.folder.results, self.content)

    def flat(self) -> dict[str, float]:
        """The trained encoder's figures for loggers: <split>/<benchmark>/<metric>, and the mean of the first metric."""
        split, first = self.content["split"], self.content["metrics"][0]
        trained = {name: result["systems"]["trained"] for name, result in self.content["benchmarks"].items()}
        values = {f"{split}/{name}/{metric}": x for name, means in trained.items() for metric, x in means.items()}
        return values | {f"{split}/mean/{first}": sum(means[first] for means in trained.values()) / len(trained)}

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table, for loggers."""
        metrics = self.content["metrics"]
        rows = [
            [result["task"], name, system, *(means.get(metric) for metric in metrics)]
            for name, result in self.content["benchmarks"].items()
            for system, means in result["systems"].items()
        ]
        return ["task", "benchmark", "system", *metrics], rows

    @staticmethod
    def show(content: dict[str, Any]) -> None:
        """Print what stands in a results.json."""
        what = f"{content['experiment']}, scale {content['scale']}, seed {content['seed']}"
        step = f"{content['checkpoint']} of step {content['checkpoint_step']} of {content['steps']}"
        title = f"{what}, {step}, {content['split']} split"
        show(content["benchmarks"], content["metrics"], title)


def evaluate_encoder(
    system: str,
    encoder: Encoder,
    benchmarks: Sequence[Benchmark],
    metrics: Sequence[str],
    folder: Path,
    *,
    similarity: str,
    token_budget: int,
) -> Results:
    """Rank and measure all benchmarks with an encoder. system: its name in the table and in run files."""

    def ranked(benchmark: Benchmark) -> Run:
        total = len(benchmark.corpus) + len(benchmark.queries)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True, disable=not Console().is_terminal or rank() > 0) as progress:
            bar = progress.add_task(f"{system} on {benchmark.name}", total=total)

            def advance(count: int) -> None:
                progress.advance(bar, count)
                leave_if_asked()

            return rank_benchmark(
                encoder,
                benchmark,
                depth(metrics),
                similarity=similarity,
                token_budget=token_budget,
                advance=advance,
            )

    return _evaluate(system, ranked, benchmarks, metrics, folder)


def evaluate_bm25(benchmarks: Sequence[Benchmark], metrics: Sequence[str], folder: Path) -> Results:
    """The same for BM25; nothing where bm25s is not installed."""
    try:
        return _evaluate("bm25", lambda benchmark: bm25_run(benchmark, depth(metrics)), benchmarks, metrics, folder)
    except ImportError:
        log.warning("bm25s is not installed: the table is without BM25 (pip install bm25s)")
        return {}


def _evaluate(
    system: str,
    ranked: Callable[[Benchmark], Run],
    benchmarks: Sequence[Benchmark],
    metrics: Sequence[str],
    folder: Path,
) -> Results:
    """Benchmark name -> what was ranked, and under "systems" the means of this one."""
    results: Results = {}
    for benchmark in benchmarks:
        log.info(
            "%s on %s (%d queries, %d documents)", system, benchmark.name, len(benchmark.queries), len(benchmark.corpus)
        )
        run = ranked(benchmark)
        whole = whole_run(run)
        if rank() == 0:
            write_trec(whole, folder / f"{benchmark.name}.{system}.trec", system)
        results[benchmark.name] = {
            "task": benchmark.task,
            "split": benchmark.split,
            "queries": len(benchmark.queries),
            "documents": len(benchmark.corpus),
            "systems": {system: dict(measure(run, benchmark, metrics))},
        }
    return results


def combine(*parts: Results) -> Results:
    """The results of several systems on the same benchmarks as one."""
    combined: Results = {}
    for part in parts:
        for name, result in part.items():
            if name in combined:
                combined[name]["systems"] |= result["systems"]
            else:
                combined[name] = result | {"systems": dict(result["systems"])}
    return combined


def show(results: Results, metrics: Sequence[str], title: str) -> None:
    """The table: a block a benchmark, a row a system, and the means over benchmarks at the end.

    On a narrow terminal only the first metrics have room; results.json has all.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    systems = list(dict.fromkeys(system for result in results.values() for system in result["systems"]))
    names = {
        "task": max(len("task"), *(len(result["task"]) for result in results.values())),
        "benchmark": max(len("benchmark"), *map(len, results)),
        "system": max(len("system"), *map(len, systems)),
    }
    room = console.width - sum(names.values()) - 3 * len(names) - 1
    fitting = [m for i, m in enumerate(metrics) if i == 0 or sum(len(n) + 3 for n in metrics[: i + 1]) <= room]

    table = Table(title=title, title_justify="left")
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for metric in fitting:
        table.add_column(metric, justify="right", no_wrap=True)
    for name, result in results.items():
        for i, (system, means) in enumerate(result["systems"].items()):
            labels = (result["task"], name) if i == 0 else ("", "")
            table.add_row(*labels, system, *(f"{means[metric]:.4f}" if metric in means else "" for metric in fitting))
        table.add_section()
    for system in systems if len(results) > 1 else ():
        rows = [result["systems"][system] for result in results.values() if system in result["systems"]]
        means = (sum(row[metric] for row in rows) / len(rows) for metric in fitting)
        table.add_row("mean" if system == systems[0] else "", "", system, *(f"{mean:.4f}" for mean in means))
    console.print(table)
