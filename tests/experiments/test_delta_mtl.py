"""Delta_MTL of a joint model over single-task models, from the files of runs and evaluations."""

import csv
import io
import json

import numpy as np
import pytest

from datamodules.records import UserError
from experiments.compare import main
from experiments.train import train
from tests.experiments.test_compare import compared, measured, world
from tests.experiments.test_train import TINY

BENCHMARKS = {"fields": "classification", "citations": "link_prediction", "first": "search", "second": "search"}


@pytest.fixture
def models(tmp_path):
    """A joint model, and a model of each task, evaluated on all benchmarks. Names of tasks -> folder."""
    noises = {"joint": 0.5, "classification": 0.4, "link_prediction": 0.6, "search": 0.5}
    folders = {}
    for seed, (model, noise) in enumerate(noises.items()):
        for i, (name, task) in enumerate(BENCHMARKS.items()):
            benchmark = world(30, 60, name, task)
            folders[model] = measured(tmp_path / model, noise, 10 * seed + i, benchmark)
    return folders


def entries(models, tasks=("classification", "link_prediction", "search")):
    return "single=" + ",".join(f"{task}:{models[task]}" for task in tasks)


def delta(tmp_path, models, *arguments):
    main([f"A={models['joint']}", *arguments, f"output={tmp_path / 'out'}", "draws=500"])
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def value(folder, benchmark, metric="ndcg@10"):
    """Return the mean of a metric that make eval has written."""
    return json.loads((folder / "results.json").read_text())["benchmarks"][benchmark]["systems"]["encoder"][metric]


@pytest.mark.parametrize(("metric", "sign"), [("ndcg@10", 1), ("recall@20", -1)])
def test_delta_mtl_is_the_mean_over_tasks_of_relative_gains(tmp_path, models, metric, sign):
    """With lower_is_better, the gain has the other sign."""
    content = delta(tmp_path, models, entries(models), f"metric={metric}", f"lower_is_better={sign < 0}".lower())
    by_task = {}
    for name, task in BENCHMARKS.items():
        joint, single = value(models["joint"], name, metric), value(models[task], name, metric)
        by_task.setdefault(task, []).append(sign * (joint - single) / single)
        assert content["benchmarks"][name]["gain"] == pytest.approx(by_task[task][-1])
        assert content["benchmarks"][name]["mean_joint"] == pytest.approx(joint)
        assert content["benchmarks"][name]["mean_single"] == pytest.approx(single)
    means = {task: np.mean(gains) for task, gains in by_task.items()}
    assert {task: gain["gain"] for task, gain in content["tasks"].items()} == pytest.approx(means)
    assert content["delta_mtl"]["gain"] == pytest.approx(np.mean(list(means.values())))
    assert content["delta_mtl"]["low"] < content["delta_mtl"]["gain"] < content["delta_mtl"]["high"]
    assert content["left_out"] == {}


def test_equal_runs_have_a_delta_of_exactly_0(tmp_path, models):
    same = dict.fromkeys(models, models["joint"])
    content = delta(tmp_path, same, entries(same))
    assert content["delta_mtl"] == {"gain": 0.0, "low": 0.0, "high": 0.0}


def test_several_models_of_a_task_are_its_seeds(tmp_path, models):
    other = measured(tmp_path / "other", 0.9, 99, world(30, 60, "citations", "link_prediction"))
    content = delta(tmp_path, models, f"{entries(models)},link_prediction:{other}:encoder")
    expected = np.mean([value(models["link_prediction"], "citations"), value(other, "citations")])
    assert content["benchmarks"]["citations"]["mean_single"] == pytest.approx(expected)
    assert content["single"]["link_prediction"] == [f"{models['link_prediction']}:encoder", f"{other}:encoder"]


def test_benchmark_with_other_data_is_left_out_with_the_reason(tmp_path, models, capsys):
    path = models["search"] / "results.json"
    content = json.loads(path.read_text())
    content["benchmarks"]["second"]["data"] = "0123"
    path.write_text(json.dumps(content))
    assert delta(tmp_path, models, entries(models))["left_out"].keys() == {"second"}
    assert "not compared: second: different data" in capsys.readouterr().out
    content["benchmarks"]["first"]["split"] = "dev"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"models of search cannot be compared with A \(first: different splits"):
        delta(tmp_path, models, entries(models))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["single=search:{search},reviews:{search}"],
            r"TASK:FOLDER with a task that A has results on \(classification, link_prediction, search\), got reviews:",
        ),
        (["single={search}"], "expected TASK:FOLDER"),
        (["single=search:nowhere"], "single=search: nowhere does not exist"),
        (["single=search:{search},search:{search}"], "single=search: the same system is named twice"),
        (["single=search:{search}"], "single: has no model of classification.*; add classification:FOLDER"),
        (["single=search:{search}", "benchmark=third"], "benchmark: no results on third; choose from"),
        (["single=search:{fields_only}", "benchmark=first"], "single=search: .*fields_only has no results of search"),
    ],
)
def test_impossible_comparisons_raise_user_error(tmp_path, models, arguments, message):
    measured(tmp_path / "fields_only", 0.4, 1, world(30, 60, "fields", "classification"))
    names = models | {"fields_only": tmp_path / "fields_only"}
    with pytest.raises(UserError, match=message):
        delta(tmp_path, models, *(argument.format(**names) for argument in arguments))
    assert not (tmp_path / "out").exists()


def test_benchmarks_of_some_tasks_can_be_chosen(tmp_path, models):
    content = delta(tmp_path, models, entries(models, ["search"]), "benchmark=first,second")
    assert list(content["tasks"]) == ["search"]
    assert content["delta_mtl"] == content["tasks"]["search"]


@pytest.mark.parametrize("format", ["table", "markdown", "latex"])
def test_tables_show_benchmarks_tasks_and_delta_mtl(tmp_path, models, capsys, format):
    content = delta(tmp_path, models, entries(models), f"format={format}")
    printed = capsys.readouterr().out.replace("$-$", "-")
    for gain in (*content["benchmarks"].values(), content["tasks"]["search"], content["delta_mtl"]):
        for key in ("gain", "low", "high"):
            assert f"{100 * gain[key]:+.2f}" in printed
    assert "mean of 2" in printed
    name = {"table": "Delta_MTL", "markdown": r"Delta\_MTL", "latex": r"Delta\_MTL"}[format]
    assert name in printed


def test_machine_formats_have_a_row_for_each_benchmark_and_task_and_for_delta_mtl(tmp_path, models, capsys):
    content = delta(tmp_path, models, entries(models), "format=json")
    rows = json.loads(capsys.readouterr().out)
    delta(tmp_path, models, entries(models), "format=csv")
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == len(lines) == 4 + 3 + 1
    for row, line in zip(rows, lines, strict=True):
        of_task = content["benchmarks"].get(row["benchmark"]) or content["tasks"].get(row["task"])
        gain = content["delta_mtl"] if row["measure"] == "delta_mtl" else of_task
        assert [row["gain"], row["low"], row["high"]] == [gain["gain"], gain["low"], gain["high"]]
        assert float(line["gain"]) == row["gain"]
        assert line["task"] == (row["task"] or "")


def test_comparison_of_two_systems_still_has_its_own_file(tmp_path, models):
    content = compared(tmp_path, models["joint"], models["search"])
    assert set(content["benchmarks"]) == set(BENCHMARKS)
    assert "delta_mtl" not in content


@pytest.mark.slow
def test_training_runs_of_single_tasks_are_compared_with_a_joint_one(tmp_path):
    """Runs have the same names and data of benchmarks, whatever their tasks."""
    quick = [*TINY, "trainer.max_steps=2", "evaluation.every_n_steps=0", "evaluation.baselines=false"]
    quick += ["evaluation.metrics=[recall@100]"]  # no model scores 0
    tasks = ("classification", "link_prediction", "search")
    for name, chosen in [("joint", tasks), *((task, (task,)) for task in tasks)]:
        train("vanilla", [*quick, f"run.dir={tmp_path / name}", f"tasks=[{','.join(chosen)}]"])
    models = {name: tmp_path / name for name in ("joint", *tasks)}
    content = delta(tmp_path, models, entries(models))
    assert list(content["tasks"]) == list(tasks)
    assert content["left_out"] == {}
    with pytest.raises(UserError, match=r"single=search: .* has no results of search; evaluate it on that task"):
        delta(tmp_path, models, f"single=search:{models['classification']}")
