"""Every benchmark on data in its published format, compared with metrics computed by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import pytrec_eval
import torch

from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import UserError
from experiments.build.benchmarks import BenchmarkOptions, CollectionReader, build_benchmark, collection_benchmarks
from experiments.build.models import System
from experiments.build.suite import load_suite
from experiments.evaluate import main
from experiments.results.measuring import evaluate_system
from experiments.results.result_tables import cost_tables
from experiments.results.results import combine, tables_from_json, tables_to_json
from experiments.shared.table_formats import print_tables
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.retrieval.vector_cache import VectorCache
from lightning_modules.throughput import encoder_ceiling, forward_flops
from tests.conftest import toy_collection
from tests.experiments.benchmark_worlds import FIGURES, WORLDS, number_of, numbered

SUITE = load_suite()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    for world in WORLDS:
        world(folder)
    return folder


@pytest.fixture
def encoder(make_encoder, monkeypatch):
    """Return an encoder whose vectors are the number in the text."""
    encoder = make_encoder("shared")

    def encode_each(groups, task, **_):
        encoder.expert_of(task)
        for documents in groups:
            yield torch.tensor([[float(number_of(d.title, d.text))] for d in documents]).reshape(-1, 1)

    monkeypatch.setattr(encoder, "encode_each", encode_each)
    return encoder


def evaluated(encoder, benchmark, folder):
    system = System("numbers", "numbers", encoder, "dot", VectorCache(encoder, token_budget=1000))
    return tables_to_json(evaluate_system(system, benchmark, ["ndcg@1"], folder))[benchmark.name]


@pytest.mark.parametrize("name", SUITE)
def test_metrics_equal_those_computed_by_hand(name, root, encoder, tmp_path):
    encoder.tasks = {SUITE[name].task: SUITE[name].task}
    benchmark = build_benchmark(name, SUITE[name], CollectionReader(root))
    draws = min(3, benchmark.probe.draws)  # all draws are equal in this world
    benchmark = replace(benchmark, probe=replace(benchmark.probe, draws=draws))
    result = evaluated(encoder, benchmark, tmp_path)
    assert result["systems"]["numbers"] == pytest.approx(FIGURES[name])
    assert result["protocol"] == SUITE[name].protocol
    learns = "svr" if SUITE[name].probe.learns == "number" else "svm"
    similarity = learns if SUITE[name].train_on else SUITE[name].similarity or "dot"
    assert result["measured"]["numbers"]["similarity"] == similarity


def test_protocols_have_distinct_ids():
    assert set(FIGURES) == set(SUITE)
    assert len({config.protocol for config in SUITE.values()}) == len(SUITE)


@pytest.mark.parametrize("name", ["cs_conference_names", "recommendation", "scidocs_cite_without_own", "par"])
def test_metrics_follow_from_the_run_files(name, root, encoder, tmp_path):
    """This includes benchmarks whose scores are not similarities."""
    result = evaluated(encoder, build_benchmark(name, SUITE[name], CollectionReader(root)), tmp_path)
    with open(tmp_path / f"{name}.numbers.trec") as run, open(tmp_path / f"{name}.qrels") as qrels:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(qrels), {"recall.20", "ndcg", "ndcg_cut.10"})
        (values,) = evaluator.evaluate(pytrec_eval.parse_run(run)).values()
    trec = {"recall@20": "recall_20", "ndcg": "ndcg", "ndcg@10": "ndcg_cut_10"}
    header, line = (tmp_path / f"{name}.numbers.queries.tsv").read_text().splitlines()
    written = dict(zip(header.split("\t")[1:], map(float, line.split("\t")[1:]), strict=True))
    shared = [metric for metric in result["metrics"] if metric in trec]
    assert shared
    for metric in shared:
        assert values[trec[metric]] == pytest.approx(result["systems"]["numbers"][metric], abs=1e-9)
        assert written[metric] == result["systems"]["numbers"][metric]


@pytest.mark.slow
def test_several_models_share_a_table(root, tmp_path, make_backbone, capsys, caplog):
    for name in ("one", "two"):
        for component in make_backbone():
            component.save_pretrained(tmp_path / name)
    models = f"bm25,{tmp_path / 'one'},{tmp_path / 'two'}"
    chosen = ["benchmarks=scifact_all,recommendation,mag_nearest", f"data.root={root}", f"output={tmp_path / 'out'}"]
    with caplog.at_level("INFO"):
        main([f"model={models}", "similarity=dot,cosine", "precision=bf16", *chosen])
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(content["benchmarks"]) == ["scifact_all", "recommendation", "mag_nearest"]
    systems = ["bm25", "one-dot", "one-cosine", "two-dot", "two-cosine"]
    for result in content["benchmarks"].values():
        assert list(result["systems"]) == list(result["measured"]) == systems
    measured = content["benchmarks"]["scifact_all"]["measured"]
    assert (measured["one-dot"]["similarity"], measured["one-dot"]["precision"]) == ("dot", "bf16")
    assert measured["one-dot"]["fingerprint"] == measured["one-cosine"]["fingerprint"]
    shown = capsys.readouterr().out
    assert "scimult/scifact/all-splits" in shown
    assert "device seconds" in shown
    assert "money" not in shown

    main(["model=bm25", *chosen, "add=yes"])
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(again["benchmarks"]["scifact_all"]["systems"]) == systems
    with pytest.raises(UserError, match="differ in protocol cannot share a table .*/1-of-4-quer"):
        main(["model=bm25", *chosen, "add=yes", "max_queries=1"])


@pytest.mark.slow
def test_cost_counts_what_was_computed(root, tmp_path, make_backbone, capsys):
    """Tokens are those of the tokenizer, stored vectors cost nothing, and money follows from device seconds."""
    backbone, tokenizer = make_backbone()
    for component in (backbone, tokenizer):
        component.save_pretrained(tmp_path / "model")
    arguments = [f"model={tmp_path / 'model'}", f"data.root={root}", "benchmarks=scidocs_cite,scidocs_cocite"]
    main([*arguments, f"output={tmp_path}", "cost_per_hour=7.2", f"vectors={tmp_path / 'vectors'}"])
    benchmarks = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    first, second = (result["measured"]["model"] for result in benchmarks.values())
    texts = [f"{paper['title']} {tokenizer.sep_token} {paper['abstract']}" for paper in numbered("", "")]
    tokens = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert first["cost"]["texts"] == len(texts) + 1
    assert first["cost"]["tokens"] == sum(tokens) + tokens[29]
    seconds = first["seconds"]["encode"]
    assert first["cost"]["texts_per_second"] == pytest.approx(31 / seconds, rel=0.3)
    assert first["cost"]["tokens_per_second"] == pytest.approx(first["cost"]["tokens"] / seconds, rel=0.3)
    encoder = SharedEncoder(backbone, tokenizer, {"all": "all"}, max_length=64)
    flops = forward_flops(encoder, [*tokens, tokens[29]])
    assert first["cost"]["mfu"] == pytest.approx(flops / seconds / encoder_ceiling(encoder, torch.float32), rel=0.5)
    assert (second["cost"]["texts"], second["cost"]["tokens"]) == (0, 0)
    assert second["cost"]["texts_per_second"] is None
    assert "mfu" not in second["cost"]
    for measured in (first, second):
        cost = measured["cost"]
        assert cost["device_seconds"] == pytest.approx(sum(measured["seconds"].values()), abs=0.03)
        assert cost["money"] == pytest.approx(7.2 * cost["device_seconds"] / 3600, abs=1e-6)
        assert cost["devices"] == 1
        assert 100 < cost["memory_mb"] < 100_000
    row = next(line for line in capsys.readouterr().out.splitlines() if "1 x cpu" in line)
    assert f"{sum(tokens) + tokens[29]:,}" in row
    with pytest.raises(UserError, match="cost_per_hour: expected a number, got 'much'"):
        main([*arguments, "cost_per_hour=much"])


def test_total_cost_names_the_number_of_benchmarks(capsys):
    """The money is not added up if only some benchmarks have a price, because the seconds are those of all."""
    cost = {"texts": 1, "tokens": 9, "devices": 1, "device_seconds": 3.5, "memory_mb": 100}
    costs = [{"cost": cost | {"money": 0.25}}, {"cost": cost | {"money": 0.5}}, {"cost": cost}, {}]
    measured = {"device": "cpu", "seconds": {"encode": 1.0}}
    results = [{"systems": {"model": {}}, "measured": {"model": measured | entry}} for entry in costs]
    for count, expected in ((2, "model 7.0 0.7500"), (3, "model 10.5 (2 of 3)"), (4, "model (3 of 4) 10.5 (2 of 3)")):
        print_tables("table", cost_tables(tables_from_json(dict(zip("abcd", results[:count], strict=False)))), [])
        row = next(line for line in capsys.readouterr().out.splitlines() if "1 x cpu" in line)
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert f"{cells[0]} {cells[7]} {cells[9]}" == expected


@pytest.mark.slow
def test_vectors_on_disk_give_equal_results_and_are_reused(root, tmp_path, make_backbone, monkeypatch):
    for component in make_backbone():
        component.save_pretrained(tmp_path / "model")
    arguments = [f"model={tmp_path / 'model'}", "benchmarks=scidocs_c*", f"data.root={root}"]
    main([*arguments, f"output={tmp_path / 'a'}"])
    for folder in "bc":
        main([*arguments, f"output={tmp_path / folder}", f"vectors={tmp_path / 'vectors'}"])
    read = [json.loads((tmp_path / f / "results.json").read_text())["benchmarks"] for f in "abc"]
    metrics = [{name: result["systems"] for name, result in benchmarks.items()} for benchmarks in read]
    assert metrics[0] == metrics[1] == metrics[2]
    assert len(list((tmp_path / "vectors").rglob("*.npy"))) == 2  # four benchmarks, one corpus, the same queries


@pytest.mark.slow
def test_missing_data_are_listed_with_their_source(root, tmp_path, caplog):
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "beir").symlink_to(root / "beir")
    fine = partial / "scimult" / "classification_fine"
    fine.mkdir(parents=True)
    for kind in ("label", "papers_test"):  # without the file of matched names
        name = f"Geography_{kind}.json"
        (fine / name).symlink_to(root / "scimult" / "classification_fine" / name)
    with caplog.at_level("INFO"):
        main(["model=bm25", "benchmarks=all", f"data.root={partial}", f"output={tmp_path / 'out'}"])
    assert "to get: search of the evaluation data of SciMult's authors" in caplog.text
    measured = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    assert set(measured) == {"geography", *(n for n in SUITE if SUITE[n].protocol.startswith("beir/"))}
    with pytest.raises(UserError, match="scifact_all needs search of the evaluation data"):
        main(["model=bm25", "benchmarks=scifact_all", f"data.root={partial}", f"output={tmp_path / 'none'}"])
    caplog.clear()
    with caplog.at_level("INFO"), pytest.raises(UserError, match="has no data for any"):
        main(["model=bm25", "benchmarks=sci*", f"data.root={tmp_path}", f"output={tmp_path / 'none'}"])
    assert "to get: search of the evaluation data of SciMult's authors" in caplog.text
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_other_similarity_changes_the_protocol(root, tmp_path):
    arguments = ["model=bm25", f"data.root={root}", "benchmarks=cite_rerank", f"output={tmp_path}"]
    main([*arguments, "similarity=dot"])
    result = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["cite_rerank"]
    assert result["protocol"] == "scidocs/cite/rerank/similarity-of-the-command"


PROBE = """
benchmarks:
  mine:
    protocol: mine/test
    task: classification
    reader: {{_target_: datamodules.readers.beir.BeirReader, folder: beir/scifact}}
    metrics: [macro_f1]
    train_on: [train]
    probe: {{{}}}
"""
GOOD = """
    protocol: mine/test
    task: search
    reader: {_target_: datamodules.readers.beir.BeirReader, folder: beir/scifact}
    metrics: [ndcg@10]
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmarks: [1]", "expected the key benchmarks"),
        (
            "benchmarks: {mine: 3}",
            "benchmark 'mine': expected a mapping under its name and under defaults, got a value",
        ),
        (f"defaults: 3\nbenchmarks:\n  mine:{GOOD}", "defaults: expected a mapping, got 3"),
        (f"benchmarks:\n  1.5:{GOOD}", "benchmark 1.5: expected a name of a to z"),
        (f"benchmark:\n  mine:{GOOD}", "expected the key benchmarks"),
        (f"sources: x\nbenchmarks:\n  mine:{GOOD}", "unknown key sources; did you mean source"),
        (f"benchmarks:\n  My-set:{GOOD}", "benchmark 'My-set': expected a name of a to z"),
        (f"benchmarks:\n  mine:{GOOD}    metric: x", "unknown key mine.metric; did you mean mine.metrics"),
        ("benchmarks:\n  mine: {task: search}", "no value for mine.metrics, mine.protocol, mine.reader"),
        (f"benchmarks:\n  mine:{GOOD}    candidates: all", "candidates: expected one of corpus, own, got 'all'"),
        (f"benchmarks:\n  mine:{GOOD}    metrics: [f1]", "metric 'f1'"),
        (f"benchmarks:\n  mine:{GOOD}    names_first: published", "names_first: published needs reader=SciMultReader"),
        (f"benchmarks:\n  mine:{GOOD}    exclude_query: 7.5", "mine.exclude_query"),
        (f"benchmarks:\n  mine:{GOOD}    train_on: [test]", "train_on: test is also in splits"),
        (f"benchmarks:\n  mine:{GOOD}    train_on: [dev]", "metric 'ndcg@10': does not apply to a class"),
        (f"benchmarks:\n  mine:{GOOD}    metrics: [kendall_tau]", "metric 'kendall_tau': does not apply to a ranking"),
        (f"benchmarks:\n  mine:{GOOD}    probe: {{draws: 2}}", "probe: needs train_on"),
        (
            f"benchmarks:\n  mine:{GOOD}    probe: {{drawn: 2}}",
            "unknown key mine.probe.drawn; did you mean mine.probe.draws",
        ),
        (PROBE.format("learns: numbers"), "probe.learns: expected one of class, labels, number, got 'numbers'"),
        (PROBE.format("loss: log"), "probe.loss: expected one of squared_hinge, hinge, got 'log'"),
        (PROBE.format("costs: [0]"), r"probe.costs: expected positive numbers, at least one, got \[0.0\]"),
        (PROBE.format("samples: 5, draws: 0"), "probe: expected samples .* and draws of at least 1, got 5 and 0"),
        (f"benchmarks:\n  mine:{GOOD}    reader: {{folder: x}}", "reader: expected a node with _target_"),
    ],
)
def test_invalid_suite_raises_user_error(text, message, tmp_path):
    if text.count("    metrics:") == 2 or text.count("    reader:") == 2:  # the last one counts
        key = "metrics" if text.count("    metrics:") == 2 else "reader"
        lines = text.splitlines()
        del lines[next(i for i, line in enumerate(lines) if line.startswith(f"    {key}:"))]
        text = "\n".join(lines)
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(UserError, match=f"suite.yaml: .*{message}"):
        load_suite([tmp_path / "suite.yaml"])


def test_benchmarks_of_your_own_with_limits(root, tmp_path):
    (tmp_path / "suite.yaml").write_text(f"benchmarks:\n  mine:{GOOD}    splits: [train, test]\n")
    arguments = ["model=bm25", f"suite={tmp_path / 'suite.yaml'}", f"data.root={root}"]
    main([*arguments, "benchmarks=all", "max_queries=1", f"output={tmp_path / 'one'}"])
    result = json.loads((tmp_path / "one" / "results.json").read_text())["benchmarks"]["mine"]
    assert (result["split"], result["queries"]) == ("train+test", 1)
    assert result["protocol"] == "mine/test/1-of-2-queries"
    main([*arguments, "benchmarks=all", "max_documents=3", f"output={tmp_path / 'three'}"])
    result = json.loads((tmp_path / "three" / "results.json").read_text())["benchmarks"]["mine"]
    assert (result["documents"], result["protocol"]) == (3, "mine/test/3-documents")
    with pytest.raises(UserError, match=r"benchmarks: unknown 'mines'; did you mean mine\?"):
        main([*arguments, "benchmarks=mines"])


def test_another_split_replaces_that_of_the_benchmarks_and_changes_the_protocol(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    probed = PROBE.format("").replace("mine", "probed").removeprefix("\nbenchmarks:\n")
    Path("suite.yaml").write_text(f"benchmarks:\n  mine:{GOOD}{probed}")
    arguments = ["model=bm25", "suite=suite.yaml", f"data.root={root}", "benchmarks=mine"]
    collection = BeirReader(str(root / "beir" / "scifact")).read()
    for split in ("train", "test"):
        main([*arguments, f"split={split}"])
    folders = {path.parent.name.rsplit("-", 1)[0]: path for path in Path("evaluations").glob("*/results.json")}
    results = {name: json.loads(path.read_text())["benchmarks"]["mine"] for name, path in folders.items()}
    expected = {"bm25-mine-train": ("train", "mine/test/split-train"), "bm25-mine": ("test", "mine/test")}
    assert {name: (each["split"], each["protocol"]) for name, each in results.items()} == expected
    for split, _ in expected.values():
        (result,) = (each for each in results.values() if each["split"] == split)
        assert result["queries"] == len(collection.qrels[split])
    assert "train split" in capsys.readouterr().out
    with pytest.raises(UserError, match="mine: .*the data have no split 'other'; expected some of"):
        main([*arguments, "split=other"])
    with pytest.raises(UserError, match="split: got train, but the linear model of probed learns from it"):
        main([*arguments, "benchmarks=probed", "split=train"])


def test_results_of_other_data_are_not_combined():
    one = tables_from_json({"set": {"protocol": "a", "data": "1", "systems": {"x": {}}, "measured": {}}})
    other = tables_from_json({"set": {"protocol": "a", "data": "2", "systems": {"y": {}}, "measured": {}}})
    assert list(combine(one, one | {"more": other["set"]})) == ["set", "more"]
    with pytest.raises(UserError, match="set: results that differ in data cannot share a table"):
        combine(one, other)


@pytest.mark.parametrize("name", ["dev", "validation", "val"])
def test_split_of_a_folder_may_have_any_of_its_names(tmp_path, name):
    collection = toy_collection()
    write_beir(replace(collection, qrels={"validation": collection.qrels["dev"]}), tmp_path / "set")
    (benchmark,) = collection_benchmarks(BenchmarkOptions(beir=tmp_path / "set", task="search", split=name), None)
    assert (benchmark.split, benchmark.qrels) == ("dev", collection.qrels["dev"])
