"""Where the results of an evaluation go, and that none of another evaluation are lost there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.files import read_json
from datamodules.records import Benchmark, UserError
from experiments.build.systems import models_of, short_name
from experiments.shared.output import shortened

# What decides a result, beside the data and what stands in the folder's name.
DECIDING = (
    *("metrics", "similarity", "max_length", "precision", "exclude", "max_queries", "max_documents"),
    *("backbone", "pooling", "tower", "adapters", "run", "suite", "data.root"),
)
PLACES = ("model", "run", "suite", "data.root", "backbone")


def default_output(
    values: Mapping[str, str], defaults: Mapping[str, str], run: Path | None, benchmarks: Sequence[Benchmark]
) -> Path:
    """A folder of its own for each model, data and way to measure; the same evaluation finds it again.

    benchmarks: of a folder in BEIR layout, told apart by their content; none where they are read one after the other.
    """
    own = run is not None and Path(values["model"]).resolve() == run.resolve()
    models = [short_name(model) for model in models_of(values)]
    if values["benchmarks"]:
        parts = ["" if own else "-".join(models), values["benchmarks"].replace(",", "-").replace("*", "")]
    else:
        parts = ["" if own else "-".join(models), Path(values["beir"]).name, values["task"], values["split"]]
    told = {key: _place(key, values[key]) for key in DECIDING if values[key] != defaults[key]}
    if values["beir"]:
        told["data"] = [benchmark.fingerprint() for benchmark in benchmarks]
    if told:
        parts.append(hashlib.blake2b(repr(sorted(told.items())).encode(), digest_size=3).hexdigest())
    return (run / "evaluation" if run else Path("evaluations")) / "-".join(shortened(part) for part in parts if part)


def _place(key: str, value: str) -> str:
    """A value, the same for the same place. Of a folder in BEIR layout the name is enough: its content is compared."""
    if key == "beir":
        return Path(value).name
    parts = value.split(",") if key in PLACES else []
    return ",".join(str(Path(part).resolve()) if part and Path(part).exists() else part for part in parts) or value


def refuse_others(folder: Path, values: Mapping[str, str], defaults: Mapping[str, str]) -> None:
    """Raise UserError if a folder holds results of another command, which would be lost; the same may be renewed."""
    results = _results(folder)
    if values["add"] == "yes" or not results:
        return
    then = dict(defaults) | dict(text.partition("=")[::2] for text in results.get("command", ()))
    differ = [
        f"{key}: {then.get(key) or 'none'} there, {values[key] or 'none'} now"
        for key in ("model", "benchmarks", "beir", "task", "split", *DECIDING)
        if _place(key, then.get(key, "")) != _place(key, values[key])
    ]
    if differ:
        raise UserError(
            f"output: {folder} holds results of another evaluation ({'; '.join(differ)}); name another output, "
            "or move it away (add=yes adds systems and benchmarks to it)"
        )


def refuse_other_data(folder: Path, benchmark: Benchmark) -> None:
    """Raise UserError if a folder holds results of a benchmark under another protocol, or on data that have changed."""
    there = _results(folder).get("benchmarks", {}).get(benchmark.name, {})
    for key, now in (("protocol", benchmark.protocol), ("data", benchmark.fingerprint())):
        if there.get(key, now) != now:
            raise UserError(
                f"output: {folder} holds results of {benchmark.name} on other {key} ({there[key]} there, {now} now); "
                "name another output, or move it away"
            )


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    return read_json(path) if path.is_file() else {}
