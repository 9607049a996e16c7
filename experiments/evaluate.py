"""Evaluate models: on benchmarks, on a folder of your own, or on the collections of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.options import option, option_key
from datamodules.records import Benchmark, UserError, check_name
from experiments.build.benchmarks import BenchmarkOptions, collection_benchmarks, suite_benchmarks
from experiments.build.models import EncodingOptions, System, load_systems, short_name, stem, token_budget_option
from experiments.build.suite import load_suite
from experiments.config.arguments import as_argument, parse
from experiments.config.run_config import config_of_run, run_of
from experiments.config.schema import Config, check_metrics
from experiments.results.measuring import evaluate_system
from experiments.results.result_tables import cost_tables, result_records, result_tables, suite_table
from experiments.results.results import Benchmarks, EvaluationInfo, Results, combine, read_results
from experiments.run.folder import git_state, versions
from experiments.run.processes import run_on_ranks
from experiments.shared.console import entry_point
from experiments.shared.output import name_of, shortened, writable_folder
from experiments.shared.table_formats import Format, format_option, print_tables, reserve_stdout
from lightning_modules.distributed.collectives import rank
from lightning_modules.retrieval.evaluation import METRICS

log = logging.getLogger(__name__)

# Options that change the results. The name of the default folder ends in a hash of those that are set.
HASHED_OPTIONS = (
    *("metrics", "similarity", "max_length", "precision", "exclude", "max_queries", "max_documents"),
    *("backbone", "pooling", "tower", "adapters", "run", "suite", "data.root", "document_model"),
)
PATHS = ("model", "document_model", "run", "suite", "data.root", "backbone")
FOR_BENCHMARKS, FOR_COLLECTIONS = ("max_queries", "max_documents"), ("exclude",)


@dataclass(kw_only=True)
class EvaluateOptions(BenchmarkOptions, EncodingOptions):  # --help lists the options of the last base first
    """Evaluate models: on benchmarks, on a folder of your own, or on the collections of a run."""

    model: str = option(
        "",
        "model to evaluate: run folder, checkpoint, exported folder, plain BERT (folder, hub name, or package:NAME for "
        "an installed package), or bm25; separate several by commas to get them in one table",
    )
    document_model: str = option(
        "",
        "model that encodes the documents, if the evaluated models only encode queries (trained with a vector teacher)",
    )
    output: Path | None = option(
        None,
        "folder for results.json and the run files; by default, one named after model, data and protocol, in "
        "evaluation/ of the run's folder or in evaluations/",
    )
    add: bool = option(False, "keep other systems and benchmarks that are already in the output's results.json")
    metrics: tuple[str, ...] = option(METRICS, "metrics for data that define none, the main metric first")
    max_length: int | None = option(
        None, "maximum number of tokens per text, by default the model's; the paper uses 512", minimum=3
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option(
        "fp32", "precision of the encoder; auto: bf16 on hardware where it is fast, else fp32. Scores are always fp32"
    )
    token_budget: int | None = token_budget_option()
    vectors: Path | None = option(
        None, "folder for cached vectors, for corpora larger than memory, and to resume an interrupted evaluation"
    )
    devices: int = option(
        1, "number of processes on this machine, one per GPU; torchrun and srun start their own", minimum=1
    )
    cost_per_hour: float | None = option(None, "price of one device per hour, in any currency", minimum=0)
    format: Format = format_option()

    @property
    def models(self) -> dict[str, EncodingOptions]:
        """The models, keyed by their names in tables."""
        models = list(filter(None, self.model.split(",")))
        if not models:
            raise UserError("model: required; expected a run folder, checkpoint, exported folder, plain BERT, or bm25")
        if len(set(models)) < len(models):
            raise UserError(f"model: each model may be named only once, got {self.model}")
        alone = len(models) == 1 and not self.benchmarks
        return {
            "encoder" if alone else _table_name(model, models): dataclasses.replace(self, model=model)
            for model in models
        }

    @property
    def named_split(self) -> str:
        """The split as part of names, or "" for the test split of benchmarks, which their protocols already name."""
        return "" if self.benchmarks and self.split == "test" else self.split


def main(arguments: Sequence[str]) -> None:
    options = parse(EvaluateOptions, arguments)
    reserve_stdout(options.format)
    if options.benchmarks == ("list",):
        suite = load_suite([options.suite] if options.suite else ())
        records = [{"benchmark": name} | dataclasses.asdict(config) for name, config in suite.items()]
        print_tables(options.format, [suite_table(suite)], records)
        return
    _check(options)
    run_on_ranks(lambda: _evaluate(options, arguments), "experiments.evaluate", arguments, options.devices)


def _evaluate(options: EvaluateOptions, arguments: Sequence[str]) -> None:
    """Evaluate on all ranks. The first one writes and prints the results."""
    encoders = [model.model for model in options.models.values() if model.model != "bm25"]
    run = options.run or (run_of(encoders[0]) if len(encoders) == 1 else None)
    config = config_of_run(run, options.packages)
    systems = _load_systems(options, config)
    if options.benchmarks:
        benchmarks, read = suite_benchmarks(options), []
    else:
        benchmarks = read = collection_benchmarks(options, config)
    folder = options.output or _default_output(options, run, read)
    _refuse_other_evaluation(folder, options)
    info = EvaluationInfo(
        model=options.model,
        similarity=",".join(options.similarity or dict.fromkeys(system.similarity for system in systems)),
        metrics=list(options.metrics),
        versions={"python": platform.python_version()} | versions(),
        git=git_state(),
        command=list(arguments),
        created=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    with writable_folder("output", folder):
        tables = _evaluate_all(systems, benchmarks, options, info, folder)
    if rank() == 0:
        split = f"{options.named_split} split" if options.named_split else ""
        title = ", ".join(filter(None, [options.model, ",".join(options.benchmarks), split]))
        shown = [*result_tables(tables, info.metrics, title), *cost_tables(tables)]
        print_tables(options.format, shown, result_records(tables))
    log.info("Results and run files are in %s", folder)


def _load_systems(options: EvaluateOptions, config: Config | None) -> list[System]:
    """Load the models. config: configuration of their run, if any."""
    document_model = None
    if options.document_model:
        document_model = EncodingOptions(model=options.document_model, device=options.device, packages=options.packages)
    return load_systems(
        options.models,
        config,
        options.similarity,
        task=options.task,
        max_length=options.max_length,
        token_budget=options.token_budget,
        vectors_folder=options.vectors,
        document_model=document_model,
    )


def _evaluate_all(
    systems: Sequence[System],
    benchmarks: Iterable[Benchmark],
    options: EvaluateOptions,
    info: EvaluationInfo,
    folder: Path,
) -> Benchmarks:
    """Evaluate all systems on all benchmarks. Results are written immediately, so an interruption loses nothing."""
    path = folder / "results.json"
    tables = read_results(path).benchmarks if options.add and path.is_file() else {}
    _refuse_other_models(folder, tables, systems)
    for benchmark in benchmarks:
        if not options.add:
            _refuse_other_data(folder, benchmark)
        for system in systems:
            if obstacle := system.obstacle(benchmark):
                if not options.benchmarks:
                    raise UserError(obstacle)
                log.warning("%s: left out of the table: %s", benchmark.name, obstacle)
                continue
            table = evaluate_system(
                system,
                benchmark,
                options.metrics,
                folder / "runs",
                token_budget=options.token_budget,
                precision=options.precision,
            )
            if options.cost_per_hour is not None and table:  # BM25 has no table if bm25s is not installed
                table[benchmark.name].systems[system.name].cost.price(options.cost_per_hour)
            tables = combine(tables, table)
            if rank() == 0:
                Results(info=info, benchmarks=tables).write(path)
    return tables


def _check(options: EvaluateOptions) -> None:
    """Check the options, before any model or data is loaded."""
    _ = options.models  # raises UserError for an invalid model=
    check_metrics("metrics", options.metrics)
    for key, value in (("task", options.task), ("split", options.split)):  # both are part of the default output's name
        if value:
            check_name(key, value)
    if options.beir and (options.benchmarks or options.data_root):
        raise UserError("beir: cannot be used together with benchmarks or data.root; set only one of them")
    options.check_suite()
    for key, value in _changed_options(options).items():
        if key in (FOR_COLLECTIONS if options.benchmarks else FOR_BENCHMARKS):
            reason = "benchmarks= have their own" if options.benchmarks else "it needs benchmarks="
            raise UserError(f"{key}: got {value}, but {reason}")


def _table_name(model: str, models: Sequence[str]) -> str:
    """Return the stem of a model's path if no other model has the same stem, else a longer name."""
    alone = [other for other in models if stem(other) == stem(model)] == [model]
    return stem(model) if Path(model).exists() and alone else short_name(model)


def _as_arguments(options: EvaluateOptions) -> dict[str, str]:
    """Return all options as written on the command line."""
    return {option_key(field): as_argument(getattr(options, field.name)) for field in dataclasses.fields(options)}


def _changed_options(options: EvaluateOptions) -> dict[str, str]:
    """Return the options that differ from their defaults, as written on the command line."""
    defaults = _as_arguments(EvaluateOptions())
    return {key: value for key, value in _as_arguments(options).items() if value != defaults[key]}


def _default_output(options: EvaluateOptions, run: Path | None, benchmarks: Sequence[Benchmark]) -> Path:
    """Return the folder for this model, data and protocol. The same evaluation always gets the same folder.

    benchmarks: the benchmarks of beir=; their content is part of the name.
    """
    is_run = run is not None and Path(options.model).resolve() == run.resolve()
    names = "" if is_run else "-".join(short_name(model.model) for model in options.models.values())
    data = name_of(options.beir) if options.beir else "-".join(options.benchmarks).replace("*", "")
    parts = [names, data, options.task, options.named_split]
    changed = _changed_options(options)
    hashed = {key: _normal(key, changed[key]) for key in HASHED_OPTIONS if key in changed}
    if options.beir:
        hashed["data"] = [benchmark.fingerprint() for benchmark in benchmarks]
    if hashed:
        parts.append(hashlib.blake2b(repr(sorted(hashed.items())).encode(), digest_size=3).hexdigest())
    return (run / "evaluation" if run else Path("evaluations")) / "-".join(shortened(part) for part in parts if part)


def _normal(key: str, value: str) -> str:
    """Make equal paths compare equal. For a BEIR folder, only the name counts, because its data are compared too."""
    if key == "beir":
        return name_of(value) if value else ""
    parts = value.split(",") if key in PATHS else []
    return ",".join(str(Path(part).resolve()) if part and Path(part).exists() else part for part in parts) or value


def _refuse_other_evaluation(folder: Path, options: EvaluateOptions) -> None:
    """Raise UserError if the folder has results of another evaluation, which would be lost."""
    path = folder / "results.json"
    if options.add or not path.is_file():
        return
    command = getattr(read_results(path).info, "command", ())
    try:
        then = _as_arguments(parse(EvaluateOptions, command))
    except UserError:  # another version wrote the command, so compare the texts
        then = _as_arguments(EvaluateOptions()) | dict(text.partition("=")[::2] for text in command)
    now = _as_arguments(options)
    differences = [
        f"{key}: {then.get(key) or 'none'} there, {now[key] or 'none'} now"
        for key in ("model", "benchmarks", "beir", "task", "split", *HASHED_OPTIONS)
        if _normal(key, then.get(key, "")) != _normal(key, now[key])
    ]
    if differences:
        raise UserError(
            f"output: {folder} has the results of another evaluation ({'; '.join(differences)}); choose another "
            "output, or move the folder (add=yes adds systems and benchmarks to it)"
        )


def _refuse_other_models(folder: Path, tables: Benchmarks, systems: Sequence[System]) -> None:
    """Raise UserError if a table has results of another model with the name of a system, because the results of two
    models would share a row.

    tables: results in the folder.
    """
    for system in systems:
        for name, table in tables.items():
            then = table.systems[system.name].fingerprint if system.name in table.systems else None
            if then and system.vectors and then != (now := system.vectors.fingerprint):
                raise UserError(
                    f"output: {folder} has results of another model called {system.name} on {name} (fingerprint {then} "
                    f"there, {now} now); choose another output, or evaluate both models in one command (model=A,B)"
                )


def _refuse_other_data(folder: Path, benchmark: Benchmark) -> None:
    """Raise UserError if the folder has results of the benchmark with another protocol or other data."""
    path = folder / "results.json"
    table = read_results(path).benchmarks.get(benchmark.name) if path.is_file() else None
    for key, now in (("protocol", benchmark.protocol), ("data", benchmark.fingerprint())):
        then = getattr(table, key, None)
        if then not in (None, now):
            raise UserError(
                f"output: {folder} already has results on {benchmark.name} with different {key} ({then} there, {now} "
                "now); choose another output, or move the folder"
            )


if __name__ == "__main__":
    entry_point(main)
