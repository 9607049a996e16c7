"""The command compare, with systems of known difference: a model, and the same model with noise in its vectors."""

import csv
import io
import json
import shutil
import sys

import numpy as np
import pytest

from datamodules.records import Benchmark, Document, UserError
from experiments.compare import main
from lightning_modules.retrieval.evaluation import BenchmarkResult, mean_metrics, measure_queries
from lightning_modules.retrieval.ranking import rank_vectors
from lightning_modules.retrieval.search import Shards
from lightning_modules.retrieval.significance import compare
from tests import forked
from tests.experiments.test_results import RUN

METRICS = ("ndcg@10", "recall@20")
DIMENSIONS = 16


def world(num_queries: int = 150, num_documents: int = 300, name: str = "generated", task: str = "search") -> Benchmark:
    """Return a benchmark in which documents i (grade 2) and i + 1 are relevant to query i."""
    corpus = {f"d{i}": Document(f"d{i}", f"paper {i}") for i in range(num_documents)}
    queries = {f"q{i}": Document(f"q{i}", "", f"query {i}") for i in range(num_queries)}
    qrels = {f"q{i}": {f"d{i}": 2, f"d{i + 1}": 1} for i in range(num_queries)}
    return Benchmark(name, task, "test", corpus, queries, qrels, protocol="generated/test", metrics=METRICS)


def ranked(benchmark: Benchmark, noise: float, seed: int):
    """Return the run of a model with noise in its vectors."""
    truth, error = np.random.default_rng(0), np.random.default_rng([1, seed])
    documents = truth.normal(size=(len(benchmark.corpus), DIMENSIONS))
    queries = documents[: len(benchmark.queries)] + 0.7 * truth.normal(size=(len(benchmark.queries), DIMENSIONS))
    documents, queries = (x + noise * error.normal(size=x.shape) for x in (documents, queries))
    return rank_vectors(
        benchmark, list(benchmark.queries), queries.astype(np.float32), Shards([documents.astype(np.float32)]), 50
    )


def measured(folder, noise: float, seed: int, benchmark: Benchmark | None = None, system: str = "encoder"):
    """Make a folder with the files of make eval, for a model with noise in its vectors."""
    benchmark = benchmark or world()
    run = ranked(benchmark, noise, seed)
    values = measure_queries(run, benchmark, METRICS)
    means = mean_metrics(values, benchmark, METRICS)
    BenchmarkResult(benchmark, means, "dot", 0, {}, run, values).write(folder / "runs", system)
    table = {key: getattr(benchmark, key) for key in ("task", "split", "protocol")} | {"metrics": list(METRICS)}
    table |= {"data": benchmark.fingerprint(), "systems": {system: means}}
    path = folder / "results.json"
    others = json.loads(path.read_text())["benchmarks"] if path.is_file() else {}
    path.write_text(json.dumps({"benchmarks": others | {benchmark.name: table}}))
    return folder


def compared(tmp_path, a, b, *arguments):
    main([f"A={a}", f"B={b}", f"output={tmp_path / 'out'}", "draws=2000", *arguments])
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def test_noise_is_significant_and_equal_models_are_not(tmp_path, capsys):
    model, twin = (measured(tmp_path / f"noise{seed}", 0.3, seed) for seed in (1, 2))
    worse = measured(tmp_path / "worse", 0.6, 3)
    comparison = compared(tmp_path, model, worse)["benchmarks"]["generated"]
    assert comparison["low"] > 0
    assert comparison["p"] == comparison["p_holm"] < 0.01
    assert comparison["wins"] > comparison["losses"] > 0
    assert comparison["wins"] + comparison["ties"] + comparison["losses"] == comparison["queries"] == 150
    assert "*" in capsys.readouterr().out.split("generated")[1]
    same = compared(tmp_path, model, twin)["benchmarks"]["generated"]
    assert same["low"] < 0 < same["high"]
    assert same["p"] > 0.05


@pytest.mark.slow
def test_false_alarms_over_200_pairs_of_equal_models_stay_within_the_level():
    """At a level of 5 %, more than 20 of 200 have a chance of 0.1 %. Most unequal pairs are significant."""
    benchmark = world(60, 100)

    def values(noise: float, seed: int) -> np.ndarray:
        return measure_queries(ranked(benchmark, noise, seed), benchmark, METRICS[:1]).values.T

    models = [values(0.5, seed) for seed in range(400)]
    equal = [compare(a, b, draws=499).p < 0.05 for a, b in zip(models[::2], models[1::2], strict=True)]
    assert sum(equal) <= 20
    better = [compare(values(0.3, 1000 + i), a, draws=499).p < 0.05 for i, a in enumerate(models[:200])]
    assert sum(better) > 100


def test_seeds_are_averaged_for_each_query(tmp_path):
    a = [measured(tmp_path / f"a{seed}", 0.3, seed) for seed in range(3)]
    b = [measured(tmp_path / f"b{seed}", 0.6, 10 + seed) for seed in range(2)]
    comparison = compared(tmp_path, ",".join(map(str, a)), ",".join(map(str, b)))["benchmarks"]["generated"]
    tables = [json.loads((folder / "results.json").read_text())["benchmarks"]["generated"] for folder in (*a, *b)]
    values = [table["systems"]["encoder"]["ndcg@10"] for table in tables]
    assert comparison["mean_a"] == pytest.approx(np.mean(values[:3]))
    assert comparison["spread_a"] == pytest.approx(np.std(values[:3], ddof=1))
    assert comparison["difference"] == pytest.approx(np.mean(values[:3]) - np.mean(values[3:]))


def test_runs_with_the_same_seeds_are_compared_seed_by_seed(tmp_path):
    """Two copies of three runs: what a seed does cancels if the seeds are paired, and not otherwise."""
    folders = [measured(tmp_path / f"run{seed}", (0.2, 0.5, 0.8)[seed], seed) for seed in range(3)]

    def compared_with(names, seeds):
        for folder, seed in zip(folders, seeds, strict=True):
            content = json.loads((folder / "results.json").read_text())
            path = shutil.copytree(folder, folder.with_name(f"copy of {folder.name}"), dirs_exist_ok=True)
            (path / "results.json").write_text(json.dumps(content | RUN | {"seed": seed}))
        copies = ",".join(str(tmp_path / f"copy of run{i}") for i in names)
        return compared(tmp_path, ",".join(map(str, folders)), copies)["benchmarks"]["generated"]

    for seed, folder in enumerate(folders):
        content = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(content | RUN | {"seed": seed}))
    for names in ((0, 1, 2), (2, 0, 1)):
        paired = compared_with(names, seeds=(0, 1, 2))
        assert (paired["low"], paired["high"]) == pytest.approx((0, 0), abs=1e-12)
    unpaired = compared_with((0, 1, 2), seeds=(1, 2, 3))
    assert unpaired["high"] - unpaired["low"] > 0.1


def test_queries_with_the_largest_differences_are_described(tmp_path):
    a, b = measured(tmp_path / "a", 0.3, 1), measured(tmp_path / "b", 0.9, 2)
    comparison = compared(tmp_path, a, b, "examples=2", "metric=recall@20")["benchmarks"]["generated"]
    assert comparison["metric"] == "recall@20"
    first = comparison["examples"]["A"][0]
    assert first["A"] - first["B"] == 1.0  # all relevant documents against none
    query = int(first["query"][1:])
    assert [document["id"] for document in first["relevant"]] == [f"d{query}", f"d{query + 1}"]
    lines = (a / "runs" / "generated.encoder.trec").read_text().splitlines()
    assert first["first_A"]["id"] == next(line.split()[2] for line in lines if line.startswith(first["query"] + " "))
    assert len(comparison["examples"]["B"]) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": "generated/all"}, "different protocols: generated/test and generated/all"),
        ({"data": "0123"}, "different data"),
        ({"split": "dev"}, "different splits: test and dev"),
        ({"protocol": None}, "evaluate it again"),
        ({"systems": {}}, "which system"),
    ],
)
def test_benchmark_that_differs_is_left_out(tmp_path, change, reason):
    a, b = measured(tmp_path / "a", 0.3, 1), measured(tmp_path / "b", 0.3, 2)
    content = json.loads((b / "results.json").read_text())
    content["benchmarks"]["generated"] |= change
    (b / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="nothing could be compared|which system") as error:
        compared(tmp_path, a, b)
    assert reason in str(error.value)
    assert not (tmp_path / "out").exists()


def test_results_of_other_queries_are_not_compared(tmp_path):
    a, b = measured(tmp_path / "a", 0.3, 1), measured(tmp_path / "b", 0.3, 2)
    path = b / "runs" / "generated.encoder.queries.tsv"
    *lines, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, f"other{last}"]))
    with pytest.raises(UserError, match=r"nothing could be compared \(generated: .* measured different queries"):
        compared(tmp_path, a, b)


def test_single_queries_are_shown_if_the_difference_is_marked_or_on_request(tmp_path, capsys):
    model, twin, worse = (measured(tmp_path / f"m{i}", noise, i) for i, noise in ((1, 0.3), (2, 0.3), (3, 0.9)))
    for other, arguments, shown in ((worse, [], 6), (twin, [], 0), (twin, ["examples=2"], 4)):
        content = compared(tmp_path, model, other, *arguments)
        assert capsys.readouterr().out.count("is better (ndcg@10") == shown
        assert len(content["benchmarks"]["generated"]["examples"]["A"]) == (2 if arguments else 3)


def test_reasons_are_grouped_and_folders_have_short_names(tmp_path, monkeypatch):
    a, b = (measured(tmp_path / i, 0.3, int(i)) for i in "12")
    for folder, names in ((a, ("x", "y", "generated")), (b, ("generated",))):
        content = json.loads((folder / "results.json").read_text())["benchmarks"]["generated"]
        (folder / "results.json").write_text(json.dumps({"benchmarks": dict.fromkeys(names, content)}))
    with pytest.raises(
        UserError, match=rf"\(x, y: {b} has no results of encoder on this benchmark\). .*make eval model={a},{b}"
    ):
        main([f"A={a}", f"B={b}", "benchmark=x,y"])
    long = [measured(tmp_path / (letter * 200), 0.3, i) for i, letter in enumerate("cd")]
    monkeypatch.chdir(tmp_path)
    main([f"A={long[0]}", f"B={long[1]}", "draws=99"])
    assert [len(folder.name) < 150 for folder in (tmp_path / "comparisons").iterdir()] == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "A: required, run folder"),
        (["A={a}"], "B: required; name the system to compare with, .* or set single=TASK:FOLDER"),
        (["A={a}", "B={a}", "single=search:{a}"], "B and single: set only one"),
        (["A={a}", "B={a}", "lower_is_better=yes"], "lower_is_better: only used with single"),
        (["A={a}", "single=search:{a}", "examples=2"], "examples: .*leave it out with single"),
        (["A={a}", "B=nowhere"], "B: nowhere does not exist. The runs in runs/ are: "),
        (["A={a}:bm25", "B={a}"], "A: which system of .*Expected one of .*:encoder"),
        (["A={a}", "B={a}", "benchmark=other"], "benchmark: no results on other; choose from generated"),
        (["A={a}", "B={a}", "metric=ndcg@7"], "nothing could be compared .*data.root=FOLDER. metrics=ndcg@7$"),
        (["A={a},{a}", "B={a}"], "A: the same system is named twice"),
        (["A={a}", "B={a}", "level=95"], "level: expected a number .* below 1, got 95"),
        (["A={a}", "B={a}", "draws=0"], "draws: expected a number of at least 1, got 0"),
    ],
)
def test_invalid_options_raise_user_error(tmp_path, arguments, message):
    a = measured(tmp_path / "a", 0.3, 1)
    with pytest.raises(UserError, match=message):
        main([*(argument.format(a=a) for argument in arguments), f"output={tmp_path / 'out'}"])


@pytest.mark.slow
def test_machine_formats_have_the_figures_of_compare_json_and_nothing_else_on_stdout(tmp_path):
    names = dict(zip("AB", (measured(tmp_path / "a_%$", 0.3, 1), measured(tmp_path / "b", 0.6, 2)), strict=True))
    command = [sys.executable, "-m", "experiments.compare", f"output={tmp_path / 'out'}", "draws=200"]
    command += [f"{side}={folder}" for side, folder in names.items()]
    printed = {}
    for format in ("json", "csv"):
        process = forked.run([*command, f"format={format}"], check=True)
        printed[format] = process.stdout
        assert f"A = {names['A']}:encoder" in process.stderr
    expected = json.loads((tmp_path / "out" / "compare.json").read_text())["benchmarks"]["generated"]
    del expected["examples"]
    expected |= {"benchmark": "generated"} | {side: f"{folder}:encoder" for side, folder in names.items()}
    assert json.loads(printed["json"]) == [expected]
    (row,) = csv.DictReader(io.StringIO(printed["csv"]))
    for key, value in expected.items():
        assert (float(row[key]) if isinstance(value, float) else row[key]) == (
            value if isinstance(value, float) else "" if value is None else str(value)
        )


@pytest.mark.parametrize("format", ["markdown", "latex"])
def test_tables_for_papers_have_the_marks_of_the_screen(tmp_path, capsys, format):
    a, b = measured(tmp_path / "a", 0.3, 1), measured(tmp_path / "b", 0.6, 2)
    comparison = compared(tmp_path, a, b, f"format={format}")["benchmarks"]["generated"]
    mark = {"markdown": "\\*", "latex": "{*}"}[format]
    assert f"{comparison['difference']:+.4f}{mark}" in capsys.readouterr().out
