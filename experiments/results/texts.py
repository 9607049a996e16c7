"""The texts behind a result: its data, read again as they were read when it was measured."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from datamodules.files import read_json
from datamodules.records import Benchmark, UserError
from experiments.build.data import build_data
from experiments.build.models import run_of
from experiments.config.experiment import from_dict
from experiments.evaluate import KEYS, benchmarks_of, suite_of
from experiments.results.measured import Measured
from experiments.config.paths import read_config
from experiments.shared.console import key_values

log = logging.getLogger(__name__)


def benchmark_of(measured: Measured, name: str) -> Benchmark | None:
    """The benchmark that was measured; None, with a warning, where its data are no longer there or have changed."""
    try:
        found = _benchmark(measured.folder.resolve(), name, measured.benchmarks[name]["split"])
    except UserError as error:
        log.warning("%s: ids are shown without their texts (%s)", name, error)
        return None
    if found and found.fingerprint() != measured.benchmarks[name].get("data"):
        log.warning("%s: its data have changed since: ids are shown without their texts", name)
        return None
    return found


@functools.lru_cache(maxsize=2)
def _benchmark(folder: Path, name: str, split: str) -> Benchmark | None:
    if (folder / "config.yaml").is_file():
        return benchmarks_of_run(folder, split).get(name)
    values = key_values(read_json(folder / "results.json").get("command", ()), KEYS)
    if values["benchmarks"]:
        similarities = list(filter(None, values["similarity"].split(",")))
        return next(suite_of(values | {"benchmarks": name}, similarities), None)
    run = Path(values["run"]) if values["run"] else run_of(values["model"])
    config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
    return next((benchmark for benchmark in benchmarks_of(values, config) if benchmark.name == name), None)


@functools.lru_cache(maxsize=1)
def benchmarks_of_run(folder: Path, split: str) -> dict[str, Benchmark]:
    """What a run is measured on, by name. Raises UserError if its data cannot be read."""
    config = from_dict(read_config(folder), str(folder / "config.yaml"))
    return {benchmark.name: benchmark for benchmark in build_data(config).benchmarks(split)}
