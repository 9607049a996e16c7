"""Merge models into one: python -m experiments.merge --help"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.files import read_json, write_json
from datamodules.options import option
from datamodules.records import Benchmark, UserError
from experiments.build.benchmarks import BenchmarkOptions, SuiteOptions, collection_benchmarks, suite_benchmarks
from experiments.build.models import EncodingOptions, default_similarity, token_budget_option
from experiments.config.arguments import named_values, parse
from experiments.config.run_config import config_of_run, run_of
from experiments.config.schema import Config
from experiments.results.model_card import RECIPE, write_card
from experiments.shared.console import entry_point
from experiments.shared.output import whole_folder
from experiments.shared.table_formats import Column, Table, print_table
from lightning_modules.encoders.base import Encoder
from lightning_modules.merging import Method, Weights, check_members, greedy_soup, merge, narrowest_parts, sweep
from lightning_modules.retrieval.compute import describe_device, resolve_device
from lightning_modules.retrieval.evaluation import evaluate
from lightning_modules.retrieval.metrics import check_metric
from lightning_modules.retrieval.vector_cache import fingerprint

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class MergeOptions(SuiteOptions, EncodingOptions):
    """Merge models into one, by weighted averages of their parameters.

    With equal weights, the result is a uniform soup. choose= searches for the weights on dev data: a greedy soup of
    several models, or the best mixture of a trained model with the model it started from.
    """

    model: str = option(
        help="models to merge, separated by commas: run folders, checkpoints, exported folders, or "
        "pretrained models (folder, hub name, or package:NAME of an installed package). The first one determines class "
        "and tasks"
    )
    output: Path = option(help="new folder for the merged model")
    method: Method = option("linear", "linear, or slerp (along the arc between the tensors of two models)")
    weights: tuple[float, ...] = option((), "weight of each model, by default equal; scaled to sum to 1")
    parts: tuple[str, ...] = option(
        (),
        "weights for a part, as PART:WEIGHT:WEIGHT with one weight per model; parts are embeddings, shared, experts, "
        "and the name of each expert",
    )
    choose: Literal["no", "greedy", "sweep", "parts"] = option(
        "no",
        "choose weights on the dev data: greedy (add a model to the mean if the score does not fall), sweep (try the "
        "weights in sweep= for the first of two models), or parts (like sweep, and then again for one part after "
        "another)",
    )
    sweep: tuple[float, ...] = option(
        tuple(i / 10 for i in range(11)), "weights to try for the first model", minimum=0, maximum=1
    )
    dev: tuple[str, ...] = option(
        (),
        "dev data: run (collections of a model's run; the default with choose=), or TASK:FOLDER for a folder in BEIR "
        "layout or with JSON lines. The score is the mean over all of them",
    )
    split: str = option("dev", "split of the dev data")
    benchmarks: tuple[str, ...] = option((), "further dev data: benchmarks of make eval")
    metric: str = option("ndcg@10", "metric of the score, for dev data without its own metric")
    token_budget: int | None = token_budget_option()


def main(arguments: Sequence[str]) -> None:
    options = parse(MergeOptions, arguments)
    _check(options)
    if _is_complete(options, arguments):
        log.info("%s is complete: the same command has merged the same models", options.output)
        return
    with whole_folder(options.output) as folder:  # first, because the search takes long
        search = _search(options)
        weights = search.best()
        merged = merge(search.members, weights, options.method)
        recipe = search.recipe(weights)
        merged.save_pretrained(folder)
        write_json(folder / RECIPE, recipe | {"command": list(arguments)}, indent=2)
        write_card(folder, merged, options.model, None, merged.similarity)
    if search.trials:
        _show(recipe)
    log.info("weights %s: load_encoder(%r)", weights, str(options.output))


def _check(options: MergeOptions) -> None:
    """Check the options, before any model is loaded."""
    check_metric(options.metric)
    if options.choose != "no" and (options.weights or options.parts):
        raise UserError(f"weights, parts: leave them out, because choose={options.choose} finds them")
    options.check_suite()
    names = [name for name in options.model.split(",") if name]
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"model: expected two or more different models, separated by commas, got {options.model!r}")
    if options.choose in ("sweep", "parts") and len(names) != 2:
        raise UserError(f"choose: {options.choose} needs two models, got {len(names)}; use greedy")
    if options.choose in ("sweep", "parts") and not options.sweep:
        raise UserError("sweep: expected at least one weight, such as 0,0.5,1")
    if options.choose == "greedy" and options.method == "slerp":
        raise UserError("method: greedy soups are linear; remove method=slerp")


def _is_complete(options: MergeOptions, arguments: Sequence[str]) -> bool:
    """Return whether the same command has written the output, from models and dev data that are still the same."""
    path = options.output / RECIPE
    if not path.is_file() or (recipe := read_json(path)).get("command") != list(arguments):
        return False
    merged = [*(member["fingerprint"] for member in recipe["members"]), *(data["data"] for data in recipe["dev"])]
    return _search(options).fingerprints() == merged


def _search(options: MergeOptions) -> Search:
    """Load the models and the dev data."""
    names = [name for name in options.model.split(",") if name]
    run = next(filter(None, map(run_of, names)), None)
    config = config_of_run(run, options.packages)
    members = _load(options, names, config)
    first = members[names[0]]
    first.similarity = default_similarity(first, config)
    return Search(options, members, _dev_sets(options, config))


def _load(options: MergeOptions, names: Sequence[str], config: Config | None) -> dict[str, Encoder]:
    """Load the models. Pretrained models get the tasks and pooling of the first model."""
    members: dict[str, Encoder] = {}
    device, first = resolve_device(options.device), None
    for name in names:
        members[name] = replace(options, model=name).load(config, like=first).to(device)
        first = first or members[name]
    check_members(members)
    log.info("%d models on %s", len(members), describe_device(device))
    return members


def _parse_parts(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return part -> weights from texts such as search:0.8:0.2."""
    parts, expected = {}, "PART:WEIGHT:WEIGHT, such as search:0.8:0.2"
    for part, weights in named_values("parts", texts, expected).items():
        try:
            parts[part] = tuple(map(float, weights.split(":")))
        except ValueError:
            raise UserError(f"parts: expected {expected}, got '{part}:{weights}'") from None
    return parts


def _dev_sets(options: MergeOptions, config: Config | None) -> list[Benchmark]:
    """Return the dev data of a merge. config: configuration of a model's run, if any."""
    named = options.dev or (("run",) if options.choose != "no" and not options.benchmarks else ())
    sets: list[Benchmark] = []
    for name in named:
        task, colon, folder = name.partition(":")
        if not colon and name != "run":
            raise UserError(f"dev: expected run or TASK:FOLDER, separated by commas, got {name!r}")
        if not colon and config is None:
            raise UserError("dev: none of the models belongs to a run that has dev data; set dev=TASK:FOLDER")
        chosen = BenchmarkOptions(split=options.split, **({"beir": Path(folder), "task": task} if colon else {}))
        sets += collection_benchmarks(chosen, config)
    if options.benchmarks:
        suite = BenchmarkOptions(benchmarks=options.benchmarks, data_root=options.data_root, suite=options.suite)
        sets += suite_benchmarks(suite)
    names = [benchmark.name for benchmark in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"dev: two dev sets are called {twice}; rename one, because scores are stored by name")
    return sets


class Search:
    """Finds the weights of a merge, and remembers which weights were tried.

    trials: weights as text -> mean and scores, in the order of the trials.
    """

    def __init__(self, options: MergeOptions, members: Mapping[str, Encoder], sets: Sequence[Benchmark]):
        self.options, self.members, self.sets = options, members, sets
        self.trials: dict[str, dict[str, Any]] = {}

    def best(self) -> Weights:
        """Return the weights set by the options, or the best weights that were tried."""
        options, count = self.options, len(self.members)
        if options.choose == "greedy":
            return greedy_soup(count, self.score)
        if options.choose != "no":
            parts = narrowest_parts(next(iter(self.members.values()))) if options.choose == "parts" else ()
            return sweep(options.sweep, self.score, parts)
        weights = Weights(options.weights or (1.0,) * count, _parse_parts(options.parts))
        if self.sets:
            self.score(weights)
        return weights

    def score(self, weights: Weights) -> float:
        """Return the mean metric over the dev sets with these weights. Equal weights are only evaluated once."""
        key = str(weights)
        if key not in self.trials:
            encoder = merge(self.members, weights, self.options.method)
            scores = {benchmark.name: self._score_on(encoder, benchmark) for benchmark in self.sets}
            mean = sum(scores.values()) / len(scores)
            log.info("weights %s: %s %.4f", key, self.options.metric, mean)
            self.trials[key] = {"weights": key, "mean": mean, "scores": scores}
        return self.trials[key]["mean"]

    def _score_on(self, encoder: Encoder, benchmark: Benchmark) -> float:
        metrics = benchmark.metrics[:1] or (self.options.metric,)
        similarity, budget = encoder.similarity, self.options.token_budget
        result = evaluate(encoder, replace(benchmark, metrics=()), metrics, similarity=similarity, token_budget=budget)
        return result.metrics[metrics[0]]

    def fingerprints(self) -> list[str]:
        """Return the hashes of the models and of the dev data."""
        return [*map(fingerprint, self.members.values()), *(benchmark.fingerprint() for benchmark in self.sets)]

    def recipe(self, weights: Weights) -> dict[str, Any]:
        """Return the content of merge.json."""
        return {
            "members": [
                {
                    "model": name,
                    "checkpoint": encoder.origin,
                    "fingerprint": fingerprint(encoder),
                    "weight": weight / sum(weights.members),
                }
                for (name, encoder), weight in zip(self.members.items(), weights.members, strict=True)
            ],
            "parts": dict(weights.parts),
            "method": self.options.method,
            "choose": self.options.choose,
            "metric": self.options.metric,
            "dev": [{"name": b.name, "task": b.task, "split": b.split, "data": b.fingerprint()} for b in self.sets],
            "chosen": str(weights),
            "tried": list(self.trials.values()),
        }


def _show(recipe: Mapping[str, Any]) -> None:
    """Print the weights that were tried, with their scores."""
    sets = [entry["name"] for entry in recipe["dev"]]
    columns = [Column(name, ".4f", best="highest") for name in ("mean", *sets)]
    title = f"{recipe['metric']} on dev data, with weights in the order of model="
    table = Table([Column("weights", folds=True), *columns], title)
    for trial in recipe["tried"]:
        chosen = " *" if trial["weights"] == recipe["chosen"] else ""
        table.add(trial["weights"] + chosen, trial["mean"], *trial["scores"].values())
    print_table(table)


if __name__ == "__main__":
    entry_point(main)
