"""Measure models: python -m experiments.evaluate model=M [benchmarks=all data.root=FOLDER | beir=FOLDER task=search]

model        a run's folder, a checkpoint, an exported folder, a plain BERT (folder, hub name, or package:NAME of an
             installed package), or bm25; several, with commas between, stand in one table
benchmarks   of experiments/benchmarks: all, names, or beginnings of names (scidocs*), with commas between; list shows
             them
suite        a file of benchmarks of your own, instead of these
data.root    the folder that holds the benchmarks' data
beir         instead of benchmarks: a folder in BEIR layout, ranked with the expert of task=NAME; without both, the
             collections of the run that the model belongs to, or of run=FOLDER
output       where results.json and the run files go; by default a folder for this model, data and split under
             evaluation/ in the run's folder, or under evaluations/
add          yes keeps what results.json there has of other systems and benchmarks
pooling      cls or mean, for a plain model; by default that of the run or of its sentence-transformers files, else cls
backbone     folder or hub name with configuration and tokenizer, for a checkpoint of SciMult's authors or of DPR
tower        query or document, for a checkpoint of DPR
adapters     task:FOLDER,... (or hub names) for a plain model with adapters, as SPECTER2 has them;
             search.documents:FOLDER where documents have another one than queries
similarity   dot, cosine or l2, or several with commas between; by default that of the run, dot with backbone=, else
             cosine. Against that of a benchmark's protocol it makes another protocol.
max_length   tokens of a text, by default the model's own; the paper evaluates with 512
precision    what encoders compute in: float32 or bfloat16; scores are in float32. The final table of a run trained in
             bf16 is measured in bf16, so its last digits may differ.
exclude      for beir=: whether a query's own id is left out of its ranking: yes, no, or auto (for tasks of the kind
             link_prediction, or where queries are documents word for word)
max_queries, max_documents    for a first look: of each benchmark the first queries alone, and a corpus of their
             relevant documents and the first others; makes another protocol; 0 for all
vectors      a folder in which documents' vectors are kept: for corpora that memory does not hold, and to go on after
             an interruption
metrics, token_budget    as in a training's configuration; benchmarks have their own metrics
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.readers.beir import BeirReader
from datamodules.records import Benchmark, UserError, plain_protocol
from experiments.build_data import build_data
from experiments.config import from_dict
from experiments.console import choice, entry_point, key_values, whole_number
from experiments.files import read_json, write_json
from experiments.models import MODEL_KEYS, run_of
from experiments.results import Results, combine
from experiments.run_folder import git_state, read_config, versions
from experiments.schema import Config, EvaluationConfig
from experiments.suite import Collections, Limits, build, choose, load_suite
from experiments.systems import PRECISIONS, load_systems, models_of, short_name
from experiments.table import show, show_suite
from lightning_modules.metrics import parse_metric
from lightning_modules.similarity import SIMILARITIES

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
    "precision": "float32",
    "vectors": "",
    "metrics": ",".join(EvaluationConfig().metrics),
    "token_budget": "8192",
}


def default_output(values: dict[str, str], run: Path | None) -> Path:
    """A folder of its own for each model, data and split."""
    own = run is not None and Path(values["model"]).resolve() == run.resolve()
    model = "" if own else "-".join(map(short_name, models_of(values)))
    if values["benchmarks"]:
        parts = (model, values["benchmarks"].replace(",", "-").replace("*", ""))
    else:
        parts = (model, Path(values["beir"]).name, values["task"], values["split"])
    return (run / "evaluation" if run else Path("evaluations")) / "-".join(part for part in parts if part)


def suite_of(values: Mapping[str, str], similarities: Sequence[str]) -> Iterator[Benchmark]:
    """The benchmarks that are asked for, one after the other, as each may fill the memory.

    Those whose data are not there are told with what to get; that is an error if they were named. Raises UserError.
    """
    wanted = values["benchmarks"].split(",")
    suite = choose(load_suite([Path(values["suite"])] if values["suite"] else ()), wanted)
    collections = Collections(Path(values["data.root"]))
    missing = {name: reason for name, config in suite.items() if (reason := collections.missing(config))}
    if named := next((name for name in missing if name in wanted), None):
        raise UserError(f"{missing[named]}. {named} needs {suite[named].source}, below data.root")
    if len(missing) == len(suite):
        raise UserError(f"data.root: {values['data.root']} has the data of none of these benchmarks")
    there = {name: config for name, config in suite.items() if name not in missing}
    log.info("%d benchmarks; for want of data without %s", len(there), ", ".join(missing) or "none")
    for source in dict.fromkeys(suite[name].source for name in missing):
        log.info("  to get: %s", source or "see the suite's file")
    limits = Limits(*(whole_number(key, values[key], least=0) for key in ("max_queries", "max_documents")))
    for name, config in there.items():
        benchmark = build(name, config, collections, limits)
        if similarities and benchmark.similarity:
            benchmark = replace(benchmark, similarity="", protocol=f"{benchmark.protocol}/similarity-of-the-command")
        yield benchmark


def benchmarks_of(values: dict[str, str], config: Config | None) -> list[Benchmark]:
    if values["beir"]:
        return [_beir_benchmark(values, config)]
    if config is None:
        raise UserError("which data? Give run=FOLDER of a run, or beir=FOLDER and task=NAME")
    found = build_data(config).benchmarks(values["split"])
    if values["task"]:
        found = [benchmark for benchmark in found if benchmark.task == values["task"]]
    if not found:
        of_task = f" of task {values['task']}" if values["task"] else ""
        raise UserError(f"split: the data{of_task} has no {values['split']!r} (usual are train, dev and test)")
    return found


def _beir_benchmark(values: dict[str, str], config: Config | None) -> Benchmark:
    folder, task, split = Path(values["beir"]), values["task"], values["split"]
    if not task:
        raise UserError(f"task: whose expert ranks {folder}? For instance task=search")
    collection = BeirReader(str(folder)).read()
    if split not in collection.qrels:
        raise UserError(f"split: {folder} has no {split!r}, it has {', '.join(collection.qrels)}")
    qrels = collection.qrels[split]
    queries = {query: collection.queries[query] for query in qrels}
    if values["exclude"] != "auto":
        exclude = values["exclude"] == "yes"
    elif config and task in config.task:
        exclude = config.task[task].kind == "link_prediction"
    else:  # ids alone do not tell: many collections number queries and documents alike
        exclude = all(collection.corpus.get(query) == document for query, document in queries.items())
    return Benchmark(
        name=folder.name,
        task=task,
        split=split,
        corpus=collection.corpus,
        queries=queries,
        qrels=qrels,
        exclude_query=exclude,
        protocol=plain_protocol(folder.name, split, exclude),
    )


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if values["benchmarks"] == "list":
        show_suite(load_suite([Path(values["suite"])] if values["suite"] else ()))
        return
    models = models_of(values)
    metrics = values["metrics"].split(",")
    for name in metrics:
        parse_metric(name)
    similarities = list(filter(None, values["similarity"].split(",")))
    for similarity in similarities:
        choice("similarity", similarity, SIMILARITIES)
    choice("exclude", values["exclude"], ("auto", "yes", "no"))
    choice("add", values["add"], ("yes", "no"))
    choice("precision", values["precision"], PRECISIONS)
    budget = whole_number("token_budget", values["token_budget"])
    if bool(values["benchmarks"]) != bool(values["data.root"]):
        raise UserError("benchmarks and data.root: give both, which benchmarks and where their data lie")

    run = Path(values["run"]) if values["run"] else run_of(models[0]) if len(models) == 1 else None
    config = from_dict(read_config(run), str(run / "config.yaml")) if run else None
    plain = len(models) == 1 and not values["benchmarks"]
    names = {model: "encoder" if plain else _name(model, models) for model in models}
    systems = load_systems(values, similarities, config, names)
    benchmarks = suite_of(values, similarities) if values["benchmarks"] else benchmarks_of(values, config)
    folder = Path(values["output"]) if values["output"] else default_output(values, run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {folder} cannot be used ({error})") from error

    about = {
        "model": values["model"],
        "similarity": values["similarity"] or ",".join(dict.fromkeys(system.similarity for system in systems)),
        "metrics": metrics,
        "versions": {"python": platform.python_version()} | versions(),
        "git": git_state(),
        "command": list(arguments),
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    path = folder / "results.json"
    results: Results = read_json(path)["benchmarks"] if values["add"] == "yes" and path.is_file() else {}
    for benchmark in benchmarks:
        for system in systems:
            if system.encoder and benchmark.task not in system.encoder.tasks and values["benchmarks"]:
                log.warning("%s has no expert for %s: the table is without it", system.name, benchmark.name)
                continue
            if benchmark.training is not None and not system.encoder:
                log.warning("%s has no vectors for an SVM: the table is without it for %s", system.name, benchmark.name)
                continue
            if system.encoder:
                system.encoder.expert_of(benchmark.task)
            found = system.evaluate([benchmark], metrics, folder / "runs", budget, values["precision"])
            results = combine(results, found)
            write_json(path, about | {"benchmarks": results})
    title = f"{values['model']}, {values['benchmarks'] or values['split'] + ' split'}"
    show(results, metrics, title)
    log.info("Results and run files lie in %s", folder)


def _name(model: str, models: Sequence[str]) -> str:
    """The end of a model's path, if no other has it, or else a longer name."""
    path = Path(model)
    alone = [other for other in models if Path(other).stem == path.stem] == [model]
    return path.stem if path.exists() and alone else short_name(model)


if __name__ == "__main__":
    entry_point(main)
