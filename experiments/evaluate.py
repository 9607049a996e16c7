"""Measure models: python -m experiments.evaluate model=M [benchmarks=all data.root=FOLDER | beir=FOLDER task=search]

model        a run's folder, a checkpoint, an exported folder, a plain BERT (folder, hub name, or package:NAME of an
             installed package), or bm25; several, with commas between, stand in one table
benchmarks   of experiments/benchmarks: all, names, or beginnings of names (scidocs*), with commas between; list shows
             them
suite        a file of benchmarks of your own, instead of these
data.root    the folder that holds the benchmarks' data
beir         instead of benchmarks: a folder in BEIR layout or of our own JSON lines, ranked with the expert of
             task=NAME; without both, the collections of the run that the model belongs to, or of run=FOLDER
output       where results.json and the run files go; by default a folder for this model, data and way to measure
             under evaluation/ in the run's folder, or under evaluations/. The same evaluation renews its results there,
             another one is refused
add          yes keeps what results.json there has of other systems and benchmarks
pooling      cls or mean, for a plain model; by default that of the run or of its sentence-transformers files, else cls
backbone     folder or hub name with configuration and tokenizer, for a checkpoint of SciMult's authors or of DPR
tower        query or document, for a checkpoint of DPR
adapters     task:FOLDER,... (or hub names) for a plain model with adapters, as SPECTER2 has them;
             search.documents:FOLDER where documents have another one than queries
similarity   dot, cosine or l2, or several with commas between; by default that of the run, dot with backbone=, else
             cosine. Against that of a benchmark's protocol it makes another protocol.
max_length   tokens of a text, by default the model's own; the paper evaluates with 512
precision    what encoders compute in: fp32, bf16, or auto (bf16 on GPUs and CPUs that are made for it); scores are
             in fp32. A training's final table is in fp32, whatever it was trained in.
exclude      for beir=: whether a query's own id is left out of its ranking: yes, no, or auto (for tasks of the kind
             link_prediction, or where queries are documents word for word)
max_queries, max_documents    for a first look: of each benchmark so many queries, and a corpus of their relevant
             documents and others, evenly spaced; makes another protocol; 0 for all
vectors      a folder in which documents' vectors are kept: for corpora that memory does not hold, and to go on after
             an interruption
devices      processes on this machine that share the work, one for each GPU; torchrun and srun start their own
cost_per_hour    of one device, in any currency: what an evaluation costs then stands beside its seconds
metrics      as in a training's configuration; benchmarks have their own
token_budget padded tokens of a forward, by default 2,048 on a CPU, 65,536 on a GPU
"""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.files import read_json, write_json
from datamodules.records import Benchmark, UserError
from experiments.build.benchmarks import benchmarks_of, suite_of
from experiments.build.models import MODEL_KEYS, run_of
from experiments.build.suite import load_suite
from experiments.build.systems import System, load_systems, models_of, short_name
from experiments.config.experiment import from_dict
from experiments.config.schema import EvaluationConfig
from experiments.results.cost import with_money
from experiments.results.place import default_output, refuse_other_data, refuse_others
from experiments.results.results import Results, combine
from experiments.results.table import show, show_cost, show_suite
from experiments.run.folder import git_state, versions
from experiments.config.paths import read_config
from experiments.run.ranks import ranks
from experiments.shared.console import choice, entry_point, key_values, token_budget
from experiments.shared.output import writable_folder
from lightning_modules.distributed.collectives import rank
from lightning_modules.retrieval.compute import PRECISIONS
from lightning_modules.retrieval.metrics import check_metric
from lightning_modules.retrieval.similarity import SIMILARITIES

log = logging.getLogger(__name__)

KEYS = MODEL_KEYS | {
    "run": "",
    "exclude": "auto",
    "output": "",
    "add": "no",
    "split": "test",
    "beir": "",
    "benchmarks": "",
    "suite": "",
    "data.root": "",
    "max_queries": "0",
    "max_documents": "0",
    "task": "",
    "similarity": "",
    "max_length": "",
    "precision": "fp32",
    "vectors": "",
    "devices": "1",
    "metrics": ",".join(EvaluationConfig().metrics),
    "token_budget": "",
    "cost_per_hour": "",
}


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if values["benchmarks"] == "list":
        show_suite(load_suite([Path(values["suite"])] if values["suite"] else ()))
        return
    _check(values)
    with ranks("experiments.evaluate", arguments, values["devices"]):
        evaluate(arguments, values)


def evaluate(arguments: Sequence[str], values: dict[str, str]) -> None:
    """What the command line says, with all ranks; the first one writes and tells."""
    models, similarities = models_of(values), _similarities(values)
    run = Path(values["run"]) if values["run"] else run_of(models[0]) if len(models) == 1 else None
    config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
    plain = len(models) == 1 and not values["benchmarks"]
    names = {model: "encoder" if plain else _name(model, models) for model in models}
    systems = load_systems(values, similarities, config, names)
    benchmarks = suite_of(values, similarities) if values["benchmarks"] else benchmarks_of(values, config)
    read = () if values["benchmarks"] else benchmarks
    folder = Path(values["output"]) if values["output"] else default_output(values, KEYS, run, read)
    refuse_others(folder, values, KEYS)
    about = _about(arguments, values, systems)
    with writable_folder("output", folder):
        results = measured(systems, benchmarks, values, about, folder)
    if rank() == 0:
        show(results, about["metrics"], f"{values['model']}, {values['benchmarks'] or values['split'] + ' split'}")
        show_cost(results)
    log.info("Results and run files lie in %s", folder)


def _similarities(values: Mapping[str, str]) -> list[str]:
    return list(filter(None, values["similarity"].split(",")))


def _check(values: Mapping[str, str]) -> None:
    """Of what can be wrong, what is soon said."""
    models_of(values)
    for name in values["metrics"].split(","):
        check_metric(name)
    for similarity in _similarities(values):
        choice("similarity", similarity, SIMILARITIES)
    choice("exclude", values["exclude"], ("auto", "yes", "no"))
    choice("add", values["add"], ("yes", "no"))
    choice("precision", values["precision"], PRECISIONS)
    token_budget(values)
    _price(values)
    _check_data(values)


def _check_data(values: Mapping[str, str]) -> None:
    """What is measured is said in one way, and nothing that is said is ignored."""
    if values["suite"] and not Path(values["suite"]).is_file():
        raise UserError(f"suite: {values['suite']} is no file")
    if values["suite"] and not values["benchmarks"]:
        raise UserError("suite: which of its benchmarks? Give benchmarks=all (or names), and data.root=FOLDER")
    if values["beir"] and (values["benchmarks"] or values["data.root"]):
        raise UserError("beir: is measured instead of benchmarks=... data.root=...: give one of them")
    if bool(values["benchmarks"]) != bool(values["data.root"]):
        raise UserError("benchmarks and data.root: give both, which benchmarks and where their data lie")
    for key in ("split", "exclude") if values["benchmarks"] else ("max_queries", "max_documents"):
        if values[key] != KEYS[key]:
            own = "have their own" if values["benchmarks"] else "alone take it"
            raise UserError(f"{key}: got {values[key]}, but the benchmarks of benchmarks= {own}")


def _about(arguments: Sequence[str], values: Mapping[str, str], systems: Sequence[System]) -> dict[str, Any]:
    """What stands at the top of results.json."""
    return {
        "model": values["model"],
        "similarity": values["similarity"] or ",".join(dict.fromkeys(system.similarity for system in systems)),
        "metrics": values["metrics"].split(","),
        "versions": {"python": platform.python_version()} | versions(),
        "git": git_state(),
        "command": list(arguments),
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def measured(
    systems: Sequence[System],
    benchmarks: Iterable[Benchmark],
    values: Mapping[str, str],
    about: Mapping[str, Any],
    folder: Path,
) -> Results:
    """All systems on all benchmarks. What is measured is written at once, so that an interruption leaves it."""
    path, budget = folder / "results.json", token_budget(values)
    results: Results = read_json(path)["benchmarks"] if values["add"] == "yes" and path.is_file() else {}
    for benchmark in benchmarks:
        if values["add"] == "no":
            refuse_other_data(folder, benchmark)
        for system in systems:
            if lack := system.lacks(benchmark):
                if not values["benchmarks"]:
                    raise UserError(lack)
                log.warning("%s: %s: the table is without it", benchmark.name, lack)
                continue
            found = system.evaluate([benchmark], about["metrics"], folder / "runs", budget, values["precision"])
            results = combine(results, with_money(found, _price(values)))
            if rank() == 0:
                write_json(path, {**about, "benchmarks": results})
    return results


def _price(values: Mapping[str, str]) -> float | None:
    """Of an hour of a device."""
    if not values["cost_per_hour"]:
        return None
    try:
        price = float(values["cost_per_hour"])
    except ValueError:
        price = -1.0
    if not 0 <= price < math.inf:
        raise UserError(f"cost_per_hour: got {values['cost_per_hour']!r}, allowed are numbers from 0")
    return price


def _name(model: str, models: Sequence[str]) -> str:
    """The end of a model's path, if no other has it, or else a longer name."""
    path = Path(model)
    alone = [other for other in models if Path(other).stem == path.stem] == [model]
    return path.stem if path.exists() and alone else short_name(model)


if __name__ == "__main__":
    entry_point(main)
