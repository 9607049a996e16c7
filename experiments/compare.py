"""Compare two systems query by query, or a joint model with one model per task."""

from __future__ import annotations

import dataclasses
import logging
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.files import write_json
from datamodules.options import option
from datamodules.records import UserError, explained
from experiments.config.arguments import parse
from experiments.config.run_config import packages_option
from experiments.results.comparison import (
    MeasuredSystem,
    aligned_values,
    chosen_benchmarks,
    incomparable,
    largest_differences,
    open_systems,
    seeds_of,
)
from experiments.results.delta_mtl import (
    compare_with_single_tasks,
    gain_records,
    gain_table,
    open_single_task_models,
)
from experiments.shared.console import PlainConsole, entry_point, table_console
from experiments.shared.output import shortened
from experiments.shared.plain import say
from experiments.shared.table_formats import Column, Format, Table, format_option, print_tables, reserve_stdout
from lightning_modules.retrieval.significance import compare, holm

log = logging.getLogger(__name__)

EXAMPLES = 3


@dataclass(kw_only=True)
class CompareOptions:
    """Compare two systems query by query, or a joint model with one model per task (Delta_MTL).

    The interval comes from a paired bootstrap over queries, or over queries and seeds if there are several seeds. p
    comes from a paired randomisation test over queries, after averaging over seeds, and is corrected for the number of
    benchmarks (Holm). Benchmarks whose protocols, data, splits or tasks differ are left out, and the reason is shown.

    With single=..., the gain of A on each task is relative to the value of that task's single-task model. Delta_MTL is
    the mean over tasks.
    """

    A: tuple[str, ...] = option(
        help="run folder or output of make eval, such as A=runs/RUN; FOLDER:SYSTEM selects a "
        "system (default: the trained encoder); separate the seeds of a system by commas"
    )
    B: tuple[str, ...] = option((), "system to compare with, such as B=runs/RUN:bm25; or set single")
    single: tuple[str, ...] = option(
        (),
        "TASK:FOLDER of the single-task models to compare the joint model A with, such as "
        "single=classification:runs/C,search:runs/S; several folders of one task are its seeds",
    )
    lower_is_better: bool = option(False, "whether lower values of the metric are better (only with single)")
    metric: str | None = option(None, "metric to compare, by default the main metric of each benchmark")
    benchmark: tuple[str, ...] = option((), "benchmarks, by default all on which both systems were evaluated")
    output: Path | None = option(None, "folder for compare.json, by default a new folder in comparisons/")
    level: float = option(0.95, "confidence level of the interval, and of the marked differences", minimum=0.5, below=1)
    draws: int = option(10_000, "number of draws for the bootstrap and the randomisation test", minimum=1)
    seed: int = option(0, "seed for the draws", minimum=0)
    examples: int | None = option(
        None,
        f"number of queries to show in favour of each side, largest differences first; by default {EXAMPLES} if the "
        f"difference is marked",
        minimum=0,
    )
    format: Format = format_option()
    packages: tuple[str, ...] = packages_option()


def main(arguments: Sequence[str]) -> None:
    options = parse(CompareOptions, arguments)
    reserve_stdout(options.format)
    _check(options)
    a = open_systems("A", options.A, options.packages)
    if options.single:
        single = open_single_task_models(options.single, a, options.packages)
        names = ("lower_is_better", "level", "draws", "seed")
        content = compare_with_single_tasks(
            a,
            single,
            benchmarks=options.benchmark,
            metric=options.metric,
            **{name: getattr(options, name) for name in names},
        )
        _write(content, options, a, [system for systems in single.values() for system in systems])
        _show_gains(content, options.format)
    else:
        b = open_systems("B", options.B, options.packages)
        content = _compare(a, b, options)
        if not content["benchmarks"]:
            reasons = "; ".join(_group_by_reason(content["left_out"]))
            metric = f" metrics={options.metric}" if options.metric else ""
            raise UserError(
                f"nothing could be compared ({reasons}). To evaluate both on the same data: make eval "
                f"{shlex.quote(f'model={a[0].folder},{b[0].folder}')} beir=FOLDER task=NAME (or benchmarks=all "
                f"data.root=FOLDER){metric}"
            )
        _write(content, options, a, b)
        _show(content, options.format, always_examples=bool(options.examples))


def _check(options: CompareOptions) -> None:
    if not options.B and not options.single:
        raise UserError(
            "B: required; name the system to compare with, such as B=runs/RUN:bm25, or set single=TASK:FOLDER,..."
        )
    if options.B and options.single:
        raise UserError("B and single: set only one of them")
    if options.single and options.examples is not None:
        raise UserError("examples: shows queries of A and B; leave it out with single")
    if options.B and options.lower_is_better:
        raise UserError("lower_is_better: only used with single")


def _write(
    content: Mapping[str, Any], options: CompareOptions, a: Sequence[MeasuredSystem], b: Sequence[MeasuredSystem]
) -> None:
    """Write compare.json, and log where it is."""
    folder = options.output or _default_output(a, b)
    with explained(f"output: {folder} cannot be used"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "compare.json", content)
    log.info("The comparison is in %s", folder / "compare.json")


def _compare(a: Sequence[MeasuredSystem], b: Sequence[MeasuredSystem], options: CompareOptions) -> dict[str, Any]:
    """Return the content of compare.json: the comparison on each benchmark, and why benchmarks were left out."""
    measured = dict.fromkeys(name for system in (*a, *b) for name in system.benchmarks)
    compared, left_out = {}, {}
    for name in chosen_benchmarks(options.benchmark, measured):
        try:
            compared[name] = _compare_on(name, a, b, options)
        except UserError as error:
            left_out[name] = str(error)
    for comparison, p in zip(compared.values(), holm([c["p"] for c in compared.values()]), strict=True):
        comparison["p_holm"] = p
    return {
        "A": list(map(str, a)),
        "B": list(map(str, b)),
        **{key: getattr(options, key) for key in ("level", "draws", "seed")},
        "benchmarks": compared,
        "left_out": left_out,
    }


def _compare_on(
    name: str, a: Sequence[MeasuredSystem], b: Sequence[MeasuredSystem], options: CompareOptions
) -> dict[str, Any]:
    """Compare on one benchmark. Raises UserError if that is not possible."""
    if reason := incomparable((*a, *b), name):
        raise UserError(reason)
    table, metric = a[0].benchmarks[name], options.metric or a[0].main_metric(name)
    values_a, values_b, queries = aligned_values(a, b, name, metric)
    comparison = compare(
        values_a,
        values_b,
        level=options.level,
        draws=options.draws,
        seed=options.seed,
        paired_seeds=seeds_of(a) == seeds_of(b) != (),
    )
    count = EXAMPLES if options.examples is None else options.examples
    examples = largest_differences(a[0], b[0], name, queries, values_a.mean(0), values_b.mean(0), count)
    return {
        **{key: getattr(table, key) for key in ("task", "split", "protocol", "data")},
        "metric": metric,
        **dataclasses.asdict(comparison),
        "examples": examples,
    }


def _show(content: Mapping[str, Any], format: Format, always_examples: bool) -> None:
    """Print the content of a compare.json. always_examples: show queries even if a difference is not marked."""
    level, compared = content["level"], content["benchmarks"]
    sides = {side: ", ".join(content[side]) for side in ("A", "B")}
    note = say if format == "table" else log.info
    for side, systems in sides.items():
        note(f"{side} = {systems}")
    marked = {name for name, comparison in compared.items() if comparison["p_holm"] < 1 - level}
    if compared:
        records = [{"benchmark": name, **comparison, **sides} for name, comparison in compared.items()]
        for record in records:
            del record["examples"]
        print_tables(format, [_table(compared, marked, level)], records)
    for name, comparison in compared.items():
        is_shown = format == "table" and (always_examples or name in marked)
        for side, examples in comparison["examples"].items() if is_shown else ():
            for example in examples:
                _show_example(table_console(), name, side, comparison["metric"], example)
    for line in _group_by_reason(content["left_out"]):
        note(f"not compared: {line}")


def _show_gains(content: Mapping[str, Any], format: Format) -> None:
    """Print the content of a compare.json for a joint model and single-task models."""
    note = say if format == "table" else log.info
    note(f"A = {', '.join(content['A'])}")
    for task, systems in content["single"].items():
        note(f"single, {task} = {', '.join(systems)}")
    print_tables(format, [gain_table(content)], gain_records(content))
    for line in _group_by_reason(content["left_out"]):
        note(f"not compared: {line}")


def _table(compared: Mapping[str, Any], marked: Collection[str], level: float) -> Table:
    headings = ("metric", "queries", "A", "B", "A - B", f"{level:.0%} interval", "p", "p (Holm)", "won/tied/lost")
    forms = {"queries": "d", "p": ".4f", "p (Holm)": ".4f"}
    columns = [Column("benchmark", folds=True), *(Column(heading, forms.get(heading, "")) for heading in headings)]
    table = Table(columns, title=f"A against B (*: p (Holm) below {1 - level:.2g})")
    for name, comparison in compared.items():
        table.add(
            *(name, comparison["metric"], comparison["queries"], _mean(comparison, "a"), _mean(comparison, "b")),
            f"{comparison['difference']:+.4f}{'*' if name in marked else ' '}",
            f"{comparison['low']:+.4f} {comparison['high']:+.4f}",
            *(comparison["p"], comparison["p_holm"]),
            f"{comparison['wins']}/{comparison['ties']}/{comparison['losses']}",
        )
    return table


def _group_by_reason(left_out: Mapping[str, str]) -> list[str]:
    """Return one line per reason, with its benchmarks."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(benchmarks)}: {reason}" for reason, benchmarks in names.items()]


def _mean(comparison: Mapping[str, Any], side: str) -> str:
    spread = comparison[f"spread_{side}"]
    return f"{comparison[f'mean_{side}']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _show_example(console: PlainConsole, name: str, side: str, metric: str, example: Mapping[str, Any]) -> None:
    lines = [f"{name}, {side} is better ({metric} A {example['A']:.3f}, B {example['B']:.3f}): {example['text']}"]
    for system in ("A", "B"):
        first = example[f"first_{system}"]
        relevance = " (relevant)" if first and first["grade"] else ""
        lines.append(f"  {system} ranks first  {first['text'] if first else 'nothing'}{relevance}")
    lines.append(f"  relevant       {'; '.join(document['text'] for document in example['relevant'])}")
    for line in lines:
        console.print(line)


def _default_output(a: Sequence[MeasuredSystem], b: Sequence[MeasuredSystem]) -> Path:
    """Return a folder named after both systems. Long names are cut and end in a hash."""
    names = [re.sub(r"[^\w.-]+", "-", f"{side[0].folder.resolve().name}-{side[0].system}") for side in (a, b)]
    names = [name + (f"-and{len(side) - 1}" if len(side) > 1 else "") for name, side in zip(names, (a, b), strict=True)]
    return Path("comparisons") / "-vs-".join(shortened(name) for name in names)


if __name__ == "__main__":
    entry_point(main)
