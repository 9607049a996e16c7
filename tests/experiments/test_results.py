"""results.json as dataclasses."""

import json
from types import SimpleNamespace

import pytest

from datamodules.records import Benchmark, UserError
from experiments.config.experiment import load_config
from experiments.results.final_table import FinalTable
from experiments.results.result_tables import result_tables
from experiments.results.results import EvaluationInfo, Results, RunInfo, combine, read_results, tables_from_json

COST = {"texts": 9, "tokens": 99, "texts_per_second": None, "devices": 1, "device_seconds": 1.5, "memory_mb": 100}
MEASURED = {
    "model": "runs/x",
    "fingerprint": "f1",
    "max_length": 256,
    "similarity": "dot",
    "expert": "search",
    "instruction": "",
    "precision": "fp32",
    "device": "cpu",
    "texts": 12,
    "seconds": {"encode": 1.0, "rank": 0.4, "metrics": 0.1},
    "cost": COST,
}
BM25 = {"model": "bm25", "fingerprint": None, "max_length": None, "similarity": "bm25", "expert": None}
BM25 |= {"instruction": "", "precision": "fp32", "device": "cpu", "seconds": {"encode": 0.0}, "cost": COST}
TABLE = {
    "task": "search",
    "split": "test",
    "queries": 3,
    "documents": 9,
    "protocol": "toy/test",
    "metrics": ["ndcg@10"],
    "data": "d1",
    "options": {"candidates": "corpus"},
    "systems": {"encoder": {"ndcg@10": 0.5}, "bm25": {"ndcg@10": 0.25}},
    "measured": {"encoder": MEASURED, "bm25": BM25},
}
FEW_SHOT = TABLE | {
    "systems": {"encoder": {"f1": 0.5}},
    "measured": {"encoder": MEASURED | {"draws": 4, "spread": {"f1": 0.1}, "cost": COST | {"money": 0.25}}},
}
EVALUATION = {
    "model": "runs/x",
    "similarity": "dot",
    "metrics": ["ndcg@10"],
    "versions": {"python": "3.11"},
    "git": None,
    "command": ["model=runs/x"],
    "created": "2026-11-26 12:00:00",
}
RUN = {
    "experiment": "moe",
    "scale": "sample",
    "seed": 0,
    "steps": 9,
    "checkpoint": "best.ckpt",
    "checkpoint_step": 6,
    "stopped_at": None,
    "split": "test",
    "metrics": ["ndcg@10"],
}


@pytest.mark.parametrize(("info", "kind"), [(EVALUATION, EvaluationInfo), (RUN, RunInfo)])
def test_results_survive_reading_and_writing(info, kind, tmp_path):
    content = info | {"benchmarks": {"toy": TABLE, "few": FEW_SHOT}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    results = read_results(tmp_path / "results.json")
    assert isinstance(results.info, kind)
    assert results.benchmarks["few"].systems["encoder"].cost.money == 0.25
    results.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content


def test_means_are_of_systems_on_all_benchmarks(tmp_path):
    only_encoder = TABLE | {"systems": {"encoder": {"ndcg@10": 1.0}}}
    content = RUN | {"benchmarks": {"a": TABLE, "b": only_encoder}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    results = read_results(tmp_path / "results.json")
    assert results.systems == ["encoder", "bm25"]
    assert results.means() == {"encoder": 0.75}


def test_a_metric_that_a_system_lacks_has_no_mean():
    """After add=yes with other metrics, the table ended in KeyError."""
    old = tables_from_json(dict.fromkeys("ab", TABLE))
    new = tables_from_json(dict.fromkeys("ab", TABLE | {"systems": {"encoder": {"map": 0.125}}, "metrics": ["map"]}))
    tables = combine(old, new)
    assert tables["a"].metrics == ["ndcg@10", "map"]
    (table,) = result_tables(tables, ["map"], "")
    means = [row.cells[2:5] for row in table.rows if row.group == ("mean",)]
    assert means == [("encoder", None, 0.125), ("bm25", 0.25, None)]
    assert Results(info=EvaluationInfo(metrics=["map"]), benchmarks=tables).means() == {"encoder": 0.125}
    assert combine(new, new)["a"].metrics == ["map"]


def test_old_results_without_costs_and_protocols_are_read(tmp_path):
    old = {"task": "search", "split": "test", "systems": {"trained": {"ndcg@10": 0.5}}}
    (tmp_path / "results.json").write_text(json.dumps(RUN | {"benchmarks": {"toy": old}}))
    table = read_results(tmp_path / "results.json").benchmarks["toy"]
    assert (table.protocol, table.systems["trained"].cost) == (None, None)


@pytest.mark.parametrize("metrics", [{"f1": "high"}, {"f1": None}, 3])
def test_damaged_baselines_are_left_out_of_the_final_table(metrics, tmp_path, caplog):
    """Text in place of a number ended a run in a traceback, after its training."""
    benchmark = Benchmark("toy", "search", "test", {}, {}, {})
    table = FinalTable(load_config("vanilla"), [benchmark], SimpleNamespace(path=tmp_path))
    (tmp_path / "baselines.json").write_text(json.dumps({"benchmarks": {"toy": {"systems": {"bm25": metrics}}}}))
    assert table._read_baselines() == {}
    assert "the final table has no baselines" in caplog.text


@pytest.mark.parametrize(
    ("info", "table", "system", "message"),
    [
        (RUN | {"metrics": []}, {}, {}, r"metrics cannot be \[\]"),
        (EVALUATION | {"metrics": []}, {}, {}, r"metrics cannot be \[\]"),
        (RUN | {"metrics": [1]}, {}, {}, r"metrics cannot be \[1\]"),
        (RUN | {"steps": "9"}, {}, {}, "steps cannot be '9'"),
        (RUN | {"seed": True}, {}, {}, "seed cannot be True"),
        (RUN, {"metrics": "ndcg@10"}, {}, "metrics cannot be 'ndcg@10'"),
        (RUN, {"metrics": []}, {}, r"metrics cannot be \[\]"),
        (RUN, {"queries": "3"}, {}, "queries cannot be '3'"),
        (RUN, {"systems": []}, {}, ""),
        (RUN, {}, {"seconds": {"rank": "fast"}}, "seconds cannot be {'rank': 'fast'}"),
        (RUN, {}, {"spread": 3}, "spread cannot be 3"),
        (RUN, {}, {"cost": COST | {"texts": None}}, "texts cannot be None"),
        (RUN, {}, {"cost": {}}, "texts"),
    ],
)
def test_value_of_another_type_raises_user_error(info, table, system, message, tmp_path):
    """An empty list of metrics was read, and listing the run raised IndexError."""
    measured = {"encoder": MEASURED | system}
    content = info | {"benchmarks": {"toy": TABLE | {"measured": measured} | table}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"results\.json: damaged.*{message}.* Delete it"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize("content", ["[]", "{}", '{"benchmarks": {"toy": 1}}', "{"])
def test_other_file_raises_user_error(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="results.json"):
        read_results(tmp_path / "results.json")
