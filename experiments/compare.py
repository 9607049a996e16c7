"""Compare two systems query by query: python -m experiments.compare A=RUN B=RUN [metric=ndcg@10] [benchmark=NAME,...]

A, B        folders of runs or of make eval. FOLDER:SYSTEM names a system within (A=runs/RUN B=runs/RUN:bm25), by
            default a run's trained encoder. FOLDER,FOLDER,... are seeds of one system
metric      by default each benchmark's own main one
benchmark   by default all that both were measured on
output      folder for compare.json, by default under comparisons/
level       of the confidence interval, and of what is marked as a difference
draws, seed of the bootstrap and the randomisation test
examples    queries with the largest differences, for each side; by default 3, shown where the difference is marked

The interval is of a paired bootstrap over queries, and with several seeds over queries and seeds. p is of a paired
randomisation test over queries, whose values are averaged over the seeds first; it is corrected for the number of
benchmarks (Holm). Benchmarks whose protocol, data, split or task differ are left out, with the reason.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from datamodules.files import write_json
from datamodules.records import UserError
from experiments.results.differences import largest
from experiments.results.measured import Measured, aligned, open_measured, why_not
from experiments.shared.console import entry_point, key_values, table_console, whole_number
from experiments.shared.output import shortened
from lightning_modules.retrieval.significance import compare, holm

log = logging.getLogger(__name__)

EXAMPLES = 3
KEYS = {
    **{"A": "", "B": "", "metric": "", "benchmark": "", "output": ""},
    **{"level": "0.95", "draws": "10000", "seed": "0", "examples": ""},
}


def compared(a: Sequence[Measured], b: Sequence[Measured], values: Mapping[str, str]) -> dict[str, Any]:
    """What goes into compare.json: each benchmark's comparison, and why others are left out."""
    level, draws, seed = level_of(values["level"]), whole_number("draws", values["draws"]), int(values["seed"])
    names = list(dict.fromkeys(name for part in (*a, *b) for name in part.benchmarks))
    wanted = values["benchmark"].split(",") if values["benchmark"] else names
    if unknown := set(wanted) - set(names):
        raise UserError(f"benchmark: {', '.join(sorted(unknown))} was not measured, there are {', '.join(names)}")
    found, left_out = {}, {}
    for name in wanted:
        if reason := why_not((*a, *b), name):
            left_out[name] = reason
            continue
        of = a[0].benchmarks[name]
        metric = values["metric"] or of["metrics"][0]
        try:
            rows_a, rows_b, queries = aligned(a, b, name, metric)
        except UserError as error:
            left_out[name] = str(error)
            continue
        told = compare(rows_a, rows_b, level=level, draws=draws, seed=seed)
        about = {key: of[key] for key in ("task", "split", "protocol", "data")} | {"metric": metric}
        count = whole_number("examples", values["examples"] or str(EXAMPLES), 0)
        examples = largest(a[0], b[0], name, queries, rows_a.mean(0), rows_b.mean(0), count)
        found[name] = about | dataclasses.asdict(told) | {"examples": examples}
    for of, p in zip(found.values(), holm([of["p"] for of in found.values()]), strict=True):
        of["p_holm"] = p
    return {
        "A": [f"{part.folder}:{part.system}" for part in a],
        "B": [f"{part.folder}:{part.system}" for part in b],
        **{"level": level, "draws": draws, "seed": seed, "benchmarks": found, "left_out": left_out},
    }


def level_of(text: str) -> float:
    try:
        level = float(text)
    except ValueError:
        level = 0.0
    if not 0.5 <= level < 1:
        raise UserError(f"level: got {text!r}, allowed are numbers from 0.5 to below 1")
    return level


def show(content: Mapping[str, Any], examples: bool) -> None:
    """Print what stands in a compare.json. examples: single queries also where the difference is not marked."""
    console = table_console()
    level = content["level"]
    console.print(f"A = {', '.join(content['A'])}\nB = {', '.join(content['B'])}", highlight=False, soft_wrap=True)
    table = Table(title=f"A against B (* p after Holm below {1 - level:.2g})", title_justify="left")
    table.add_column("benchmark", overflow="fold")
    for heading in ("metric", "queries", "A", "B", "A - B", f"{level:.0%} interval", "p", "p (Holm)", "won/tied/lost"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, of in content["benchmarks"].items():
        interval = f"{of['low']:+.4f} {of['high']:+.4f}"
        mark = "*" if of["p_holm"] < 1 - level else " "
        table.add_row(
            *(name, of["metric"], str(of["queries"]), _mean(of, "a"), _mean(of, "b")),
            *(f"{of['difference']:+.4f}{mark}", interval, f"{of['p']:.4f}", f"{of['p_holm']:.4f}"),
            f"{of['wins']}/{of['ties']}/{of['losses']}",
        )
    if content["benchmarks"]:
        console.print(table)
    marked = {name for name, of in content["benchmarks"].items() if of["p_holm"] < 1 - level}
    for name, of in content["benchmarks"].items():
        for side, found in of["examples"].items() if examples or name in marked else ():
            for example in found:
                _show_example(console, name, side, of["metric"], example)
    for line in _left_out(content["left_out"]):
        console.print(f"not compared: {line}", highlight=False, markup=False, soft_wrap=True)


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    """Each reason once, with the benchmarks that it is of."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(of)}: {reason}" for reason, of in names.items()]


def _mean(of: Mapping[str, Any], side: str) -> str:
    spread = of[f"spread_{side}"]
    return f"{of[f'mean_{side}']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _show_example(console: Console, name: str, side: str, metric: str, example: Mapping[str, Any]) -> None:
    lines = [f"{name}, {side} is better ({metric} A {example['A']:.3f}, B {example['B']:.3f}): {example['text']}"]
    for which in ("A", "B"):
        first = example[f"first_{which}"]
        lines.append(f"  {which} ranks first  {first['text'] if first else 'nothing'}"
                     + (" (relevant)" if first and first["grade"] else ""))  # fmt: skip
    lines.append(f"  relevant is    {'; '.join(document['text'] for document in example['relevant'])}")
    console.print("\n".join(lines), highlight=False, markup=False)


def default_output(a: Sequence[Measured], b: Sequence[Measured]) -> Path:
    """A folder named by the two; long names end in digits."""
    names = [re.sub(r"[^\w.-]+", "-", f"{side[0].folder.resolve().name}-{side[0].system}") for side in (a, b)]
    names = [name + (f"-and{len(side) - 1}" if len(side) > 1 else "") for name, side in zip(names, (a, b), strict=True)]
    return Path("comparisons") / "-vs-".join(shortened(name) for name in names)


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    for key in ("A", "B"):
        if not values[key]:
            raise UserError(f"{key}: which folder? For instance make compare A=runs/RUN B=runs/RUN:bm25")
    whole_number("seed", values["seed"], 0)
    a, b = open_measured("A", values["A"]), open_measured("B", values["B"])
    content = compared(a, b, values)
    if not content["benchmarks"]:
        raise UserError(
            f"nothing could be compared ({'; '.join(_left_out(content['left_out']))}). To measure both on the same: "
            f"make eval model={a[0].folder},{b[0].folder} beir=FOLDER task=NAME (or benchmarks=all data.root=FOLDER)"
        )
    folder = Path(values["output"]) if values["output"] else default_output(a, b)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "compare.json", content)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be used ({error})") from error
    show(content, bool(values["examples"]))
    log.info("The comparison lies in %s", folder / "compare.json")


if __name__ == "__main__":
    entry_point(main)
