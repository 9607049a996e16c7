"""The texts behind a result: its data, read again as they were read when it was measured."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from datamodules.records import Benchmark, UserError
from experiments.build_data import build_data
from experiments.config import from_dict
from experiments.console import key_values
from experiments.evaluate import KEYS, benchmarks_of
from experiments.files import read_json
from experiments.measured import Measured
from experiments.models import run_of
from experiments.run_folder import read_config

log = logging.getLogger(__name__)


def benchmark_of(measured: Measured, name: str) -> Benchmark | None:
    """The benchmark that was measured; None, with a warning, where its data are no longer there or have changed."""
    found = _benchmarks(measured.folder.resolve()).get(name)
    then = measured.results["benchmarks"][name].get("data")
    if found is not None and then and hasattr(found, "fingerprint") and found.fingerprint() != then:
        log.warning("%s: the data have changed since it was measured: ids are shown without their texts", name)
        return None
    return found


@functools.lru_cache(maxsize=4)
def _benchmarks(folder: Path) -> dict[str, Benchmark]:
    try:
        if (folder / "config.yaml").is_file():
            config = from_dict(read_config(folder), str(folder / "config.yaml"))
            found = build_data(config).benchmarks(config.evaluation.split)
        else:
            values = key_values(read_json(folder / "results.json")["command"][1:], KEYS)
            run = Path(values["run"]) if values["run"] else run_of(values["model"])
            config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
            found = benchmarks_of(values, config)
    except (UserError, KeyError) as error:
        log.warning("%s: ids are shown without their texts (%s)", folder, error)
        return {}
    return {benchmark.name: benchmark for benchmark in found}
