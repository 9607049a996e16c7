"""The command evaluate, with any model on any data."""

import csv
import io
import json
import sys

import pytest

from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Collection, Document, UserError
from datamodules.sample import SampleReader
from experiments import embed, export, mine, sample
from experiments.evaluate import main
from experiments.train import train
from lightning_modules.encoders.loading import load_encoder
from tests import forked
from tests.experiments.test_train import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    overrides = [f"run.dir={folder}", "trainer.max_steps=2", "evaluation.baselines=false"]
    train("moe", [*TINY, *overrides])
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())["benchmarks"]


@pytest.mark.slow
def test_run_checkpoint_and_exported_folder_have_equal_results(run, tmp_path):
    load_encoder(run).save_pretrained(tmp_path / "model")
    arguments = ["metrics=ndcg@10,recall@20"]
    main([f"model={run}", f"output={tmp_path / 'a'}", *arguments])
    main([f"model={run / 'checkpoints' / 'best.ckpt'}", f"output={tmp_path / 'b'}", *arguments])
    main([f"model={tmp_path / 'model'}", f"run={run}", f"output={tmp_path / 'c'}", *arguments])
    measured = [{name: r["systems"] for name, r in results(tmp_path / folder).items()} for folder in "abc"]
    assert measured[0] == measured[1] == measured[2]
    trained = {name: result["systems"]["trained"] for name, result in results(run).items()}
    assert {name: result["systems"]["encoder"] for name, result in results(tmp_path / "a").items()} == trained


@pytest.mark.slow
def test_split_and_task_choose_the_benchmarks(run):
    main([f"model={run}", "split=dev", "task=search"])
    measured = results(run / "evaluation" / "search-dev")
    assert list(measured) == ["searches"]
    assert measured["searches"]["split"] == "dev"
    assert (run / "evaluation" / "search-dev" / "runs" / "searches.encoder.trec").is_file()


@pytest.mark.slow
def test_folder_in_beir_layout_has_the_results_of_the_run(run, beir_root, tmp_path, capsys):
    main([f"model={run}", f"beir={beir_root / 'mlcite'}", "task=link_prediction", f"output={tmp_path}"])
    ours = results(tmp_path)["mlcite"]["systems"]["encoder"]["ndcg@10"]
    assert ours == pytest.approx(results(run)["citations"]["systems"]["trained"]["ndcg@10"])
    assert "mlcite" in capsys.readouterr().out


@pytest.mark.slow
def test_own_document_is_excluded_by_the_kind_of_the_task(run, beir_root, tmp_path):
    collection = BeirReader(str(beir_root / "mlcite")).read()
    spaced = {key: Document(key, d.title, d.text + " ") for key, d in collection.queries.items()}
    write_beir(Collection(collection.corpus, spaced, collection.qrels), tmp_path / "links")
    arguments = [f"model={run}", f"beir={tmp_path / 'links'}", "task=link_prediction"]
    for exclude in ("auto", "yes", "no"):
        main([*arguments, f"exclude={exclude}", f"output={tmp_path / exclude}"])
    measured = {exclude: results(tmp_path / exclude)["links"]["systems"] for exclude in ("auto", "yes", "no")}
    assert measured["auto"] == measured["yes"] != measured["no"]


@pytest.mark.slow
def test_pooling_option_changes_a_plain_bert(run, beir_root, make_backbone, tmp_path):
    backbone, tokenizer = make_backbone()
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    arguments = [f"model={tmp_path / 'bert'}", f"beir={beir_root / 'scitldr'}", "task=search"]
    for pooling in ("cls", "mean"):
        main([*arguments, f"pooling={pooling}", f"output={tmp_path / pooling}"])
    cls, mean = (results(tmp_path / pooling)["scitldr"]["systems"] for pooling in ("cls", "mean"))
    assert cls != mean


def test_run_next_to_bm25_is_evaluated_on_its_own_data(run, tmp_path):
    main([f"model={run},bm25", f"output={tmp_path}/both", "metrics=ndcg@10"])
    main([f"model={run}", f"output={tmp_path}/alone", "metrics=ndcg@10"])
    both, alone = results(tmp_path / "both"), results(tmp_path / "alone")
    assert {name: table["systems"]["run"] for name, table in both.items()} == {
        name: table["systems"]["encoder"] for name, table in alone.items()
    }
    assert all("bm25" in table["systems"] for table in both.values())


def test_bm25_is_named_where_an_encoder_is_needed(run, tmp_path, monkeypatch):
    """The hub was asked for a model of this name, several times."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects to the hub"))
    for command, arguments in (
        (mine.main, ["moe", f"output={tmp_path}/mined"]),
        (embed.main, ["task=search", f"input={tmp_path}", f"output={tmp_path}/vectors"]),
        (export.main, []),
    ):
        (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a"}\n')
        with pytest.raises(UserError, match=r"model: bm25 has no encoder. make eval compares with it"):
            command([*arguments, "model=bm25"])


def test_bm25_needs_no_encoder(beir_root, tmp_path):
    main(["model=bm25", f"beir={beir_root / 'scitldr'}", "task=search", f"output={tmp_path}"])
    assert results(tmp_path)["scitldr"]["systems"]["bm25"]["ndcg@10"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model: required"),
        (["model=x", "modle=y"], "unknown key 'modle'; did you mean model"),
        (["MODEL=x"], "unknown key 'MODEL'; did you mean model"),
        (["model"], "expected key=value"),
        (["model=bm25"], "run, beir: no data to evaluate on"),
        (["model=runs/nope", "beir={beir}/scitldr", "task=search"], "model: runs/nope does not exist. The runs in "),
        (["model=bm25", "beir={beir}/scitldr"], "task=search"),
        (["model=bm25", "beir={beir}/scitldr", "task=search", "split=other"], "no 'other'; expected one of train, dev"),
        (["model=bm25", "beir={beir}/nothing", "task=search"], "no such folder"),
        (["model=m", "exclude=maybe"], "exclude: expected one of auto, yes, no, got 'maybe'"),
        (["model=m", "similarity=l1"], "similarity: expected one of dot, cosine, l2, got 'l1'"),
        (["model=m", "metrics=recall"], "metrics: metric 'recall'"),
        (["model=m", "metrics="], "metrics: name at least one"),
        (["model=m", "token_budget=many"], "token_budget: expected a whole number, got 'many'"),
        (["model=m", "max_length=2"], "max_length: expected a number of at least 3, got 2"),
        (["model=m,m"], "model: each model may be named only once"),
        (["model=bm25", "benchmarks=all"], "benchmarks, data.root: set both"),
        (["model=m", "suite={beir}/nope.yaml"], "suite: .*nope.yaml is not a file"),
        (["model=m", "suite={beir}/scitldr/corpus.jsonl"], "suite: set benchmarks=all"),
        (["model=m", "suite={beir}/scitldr/corpus.jsonl", "data.root={beir}"], "suite: set benchmarks=all"),
        (["model=bm25", "beir={beir}/scitldr", "benchmarks=all", "data.root={beir}"], "beir: cannot be used"),
        (
            ["model=bm25", "beir={beir}/scitldr", "task=search", "max_queries=9"],
            "max_queries: got 9, but it needs benchmarks=",
        ),
        (["model=bm25", "benchmarks=all", "data.root={beir}", "exclude=no"], "exclude: got no, but .* have their own"),
    ],
)
def test_invalid_options_raise_user_error(beir_root, tmp_path, arguments, message):
    arguments = [argument.format(beir=beir_root) for argument in arguments]
    with pytest.raises(UserError, match=message):
        main([*arguments, *([f"output={tmp_path}"] if len(arguments) > 1 else [])])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split=none"], "split: the data has no split 'none'"),
        (["beir={beir}/scitldr", "task=serach"], "unknown task 'serach'"),
        (["max_length=9999"], "max_length: .* supports at most .* tokens, got 9999"),
    ],
)
def test_options_that_a_run_cannot_serve_raise_user_error(run, beir_root, tmp_path, arguments, message):
    arguments = [argument.format(beir=beir_root) for argument in arguments]
    with pytest.raises(UserError, match=message):
        main([f"model={run}", *arguments, f"output={tmp_path}"])


@pytest.fixture
def twins(tmp_path, monkeypatch):
    """Make two folders of the same name with different queries, and an empty working directory."""
    whole = SampleReader("searches", num_papers=500).read()
    for name, first in (("one", 0), ("two", 5)):
        test = dict(list(whole.qrels["test"].items())[first : first + 5])
        queries = {query: whole.queries[query] for query in test}
        write_beir(Collection(whole.corpus, queries, {"test": test}), tmp_path / name / "search")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_default_output_differs_for_other_data_and_metrics_only(twins):
    def folders(*arguments):
        main(["model=bm25", "task=search", *arguments])
        return {path.parent: path.read_text() for path in twins.rglob("results.json")}

    first = folders(f"beir={twins / 'one' / 'search'}")
    assert len(first) == 1
    assert len(folders(f"beir={twins / 'two' / 'search'}")) == 2
    third = folders(f"beir={twins / 'one' / 'search'}", "metrics=ndcg@5,recall@5")
    assert len(third) == 3
    assert third.items() >= first.items()  # the old results are untouched
    assert len(folders("beir=../one/search", "token_budget=99")) == 3


def test_results_of_another_evaluation_are_never_overwritten(twins):
    one, two, out = (twins / name for name in ("one/search", "two/search", "out"))
    common = ["model=bm25", "task=search", f"output={out}"]
    main([*common, f"beir={one}"])
    before = (out / "results.json").read_text()
    for arguments, message in (
        ([f"beir={two}"], "has results on search with different data"),
        ([f"beir={one}", "metrics=recall@5"], "another evaluation .metrics: .* there, recall@5 now"),
    ):
        with pytest.raises(UserError, match=message):
            main([*common, *arguments])
    assert (out / "results.json").read_text() == before
    main([*common, f"beir={one}"])


def test_two_models_never_share_a_row_of_a_table(twins, make_encoder):
    """With add=yes, results of a new checkpoint replaced those of the old one, or were averaged with them."""
    common = [f"model={twins / 'model'}", "task=search", f"output={twins / 'out'}"]
    (twins / "two" / "search").rename(twins / "two" / "other")
    make_encoder("attention").save_pretrained(twins / "model")
    main([*common, f"beir={twins / 'one/search'}"])
    main([*common, f"beir={twins / 'two/other'}", "add=yes"])
    before = (twins / "out" / "results.json").read_text()
    make_encoder("attention", seed=1).save_pretrained(twins / "model")
    for folder in ("one/search", "two/other"):
        with pytest.raises(UserError, match="out has results of another model called encoder on search"):
            main([*common, f"beir={twins / folder}", "add=yes"])
    assert (twins / "out" / "results.json").read_text() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["metrics=[ndcg@10,mrr@10]"],
        ["metrics=ndcg@10, mrr@10", "exclude=yes"],
        ["split=test", "max_length=0512", "precision=fp32"],
        ["similarity=[]", "suite=", "add=off"],
    ],
)
def test_the_same_evaluation_may_be_repeated_however_its_options_are_written(twins, arguments):
    for _ in range(2):
        main(["model=bm25", "task=search", f"beir={twins / 'one/search'}/", *arguments])


def test_results_of_a_version_with_other_options_are_never_overwritten(twins):
    common = ["model=bm25", "task=search", f"beir={twins / 'one/search'}", f"output={twins / 'out'}"]
    main(common)
    content = json.loads((twins / "out" / "results.json").read_text())
    content["command"] += ["former=option", "metrics=recall@5"]
    (twins / "out" / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another evaluation .metrics: recall@5 there, .* now"):
        main(common)


@pytest.mark.slow
def test_failed_evaluation_leaves_no_folder(run, twins):
    with pytest.raises(UserError, match="unknown task"):
        main([f"model={run / 'checkpoints' / 'best.ckpt'}", "run=", f"beir={twins / 'one' / 'search'}", "task=serach"])
    with pytest.raises(UserError, match="scifact_all needs"):
        main(["model=bm25", "benchmarks=scifact_all", f"data.root={twins}"])
    assert list((twins / "here").iterdir()) == []
    assert not (run / "evaluation" / "scifact_all").exists()
    assert not list((run / "evaluation").glob("*serach*"))


def test_sample_command_writes_beir_folders(tmp_path):
    sample.main([f"output={tmp_path}", "papers=500"])
    for view in SampleReader.VIEWS:
        assert BeirReader(str(tmp_path / view)).read() == SampleReader(view, num_papers=500).read()
    with pytest.raises(UserError, match="output: required"):
        sample.main([])


@pytest.mark.slow
def test_machine_formats_have_the_results_and_nothing_else_on_stdout(beir_root, tmp_path):
    command = [sys.executable, "-m", "experiments.evaluate", "model=bm25", f"beir={beir_root / 'mlcite'}"]
    command += ["task=link_prediction", f"output={tmp_path / 'out'}"]
    printed = {}
    for format in ("json", "csv", "markdown"):
        process = forked.run([*command, f"format={format}"], check=True)
        printed[format] = process.stdout
        assert "Results and run files are in" in process.stderr
    (table,) = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"].values()
    (record,) = json.loads(printed["json"])
    metrics = table["systems"]["bm25"]
    assert metrics.items() <= record.items()
    assert (record["benchmark"], record["system"], record["queries"]) == ("mlcite", "bm25", table["queries"])
    (row,) = csv.DictReader(io.StringIO(printed["csv"]))
    assert {metric: float(row[metric]) for metric in metrics} == metrics
    assert [f"{value:.4f}" in printed["markdown"] for value in metrics.values()] == [True] * len(metrics)


def test_list_of_benchmarks_is_printed_in_every_format(capsys):
    main(["benchmarks=list", "format=json"])
    names = [record["benchmark"] for record in json.loads(capsys.readouterr().out)]
    main(["benchmarks=list"])
    printed = capsys.readouterr().out
    assert len(names) > 20
    assert all(name in printed for name in names)
    assert max(map(len, printed.splitlines())) <= 160
