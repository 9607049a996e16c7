"""A user's own collections, instead of those of the scale or in addition to them."""

import itertools
import json
import shutil

import pytest

from datamodules.readers.beir import write_beir
from datamodules.readers.texts import text_files
from datamodules.records import UserError
from experiments.build.data import build_data
from experiments.config.experiment import as_dict, from_dict, load_config
from experiments.evaluate import main as evaluate
from experiments.import_papers import main as import_papers
from experiments.train import train
from tests.conftest import toy_collection
from tests.experiments.test_train import TINY

JSONL, BEIR = "datamodules.readers.jsonl.JsonlReader", "datamodules.readers.beir.BeirReader"


@pytest.fixture
def folders(tmp_path):
    """The same collection in both layouts: mine (JSON lines, train and test) and beir."""
    collection = toy_collection()
    write_beir(collection, tmp_path / "beir")
    mine = tmp_path / "mine"
    mine.mkdir()
    documents = [{"id": d.id, "title": d.title, "text": d.text} for d in collection.corpus.values()]
    (mine / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for split in ("train", "test"):
        examples = [
            {"query": {"text": collection.queries[query].text}, "positives": {d: g for d, g in grades.items() if g}}
            for query, grades in collection.qrels[split].items()
        ]
        (mine / f"{split}.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return tmp_path


def data_of(folders, *overrides):
    root = f"data.root={folders}"
    return load_config("moe", ["tasks=[search]", root, *overrides]).task["search"].data


def test_data_of_a_task_replaces_that_of_the_scale(folders):
    mine = {"_target_": JSONL, "folder": f"{folders}/mine"}
    beir = {"_target_": BEIR, "folder": f"{folders}/beir"}
    assert data_of(folders, f"task.search.data={folders}/mine") == {"mine": mine}
    assert data_of(folders, "task.search.data=${data.root}/mine") == {"mine": mine}
    assert data_of(folders, "scale=small", f"task.search.data={folders}/beir") == {"beir": beir}
    assert data_of(folders, f"task.search.data=[{folders}/mine, {folders}/beir]") == {"mine": mine, "beir": beir}
    node = f"{{_target_: jsonl.JsonlReader, folder: {folders}/mine, on_error: skip}}"
    assert data_of(folders, f"task.search.data={{own: {node}}}") == {"own": mine | {"on_error": "skip"}}


def test_single_collection_is_added_to_those_of_the_scale(folders):
    for override in (f"task.search.data.mine={folders}/mine", f"task.search.data.mine.folder={folders}/mine"):
        data = data_of(folders, override)
        assert list(data) == ["searches", "mine"]
        assert data["mine"]["_target_"] == JSONL
    config = load_config("moe", [f"task.search.data={folders}/mine", "tasks=[search]"])
    assert from_dict(as_dict(config), "config.yaml") == config


def test_the_order_of_keys_does_not_matter(folders):
    """make passes them in any order."""
    keys = [f"task.search.data={folders}/mine", "task.search.data.mine.dev_percent=7"]
    keys += [f"task.search.data.other={folders}/mine", "task.search.data.other.on_error=skip"]
    expected = {"_target_": JSONL, "folder": f"{folders}/mine"}
    for order in itertools.permutations(keys):
        data = data_of(folders, *order)
        assert data == {"mine": expected | {"dev_percent": 7}, "other": expected | {"on_error": "skip"}}
    assert data_of(folders, f"task.search.data.searches={folders}/mine") == {"searches": expected}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.search.data={root}/mines", "task.search.data.mines: {root}/mines: no such folder"),
        ("task.search.data={root}", "queries.jsonl and qrels/"),
        ("task.search.data=[{root}/mine, {root}/beir/../mine]", "two folders are called mine; give them names"),
        ("task.search.data=5", "expected FOLDER, [FOLDER, ...] or {{NAME: node of a reader, ...}}, got 5"),
        ("task.search.data=null", "expected FOLDER, [FOLDER, ...] or {{NAME: node of a reader, ...}}, got None"),
        ("task.serach.data={root}/mine", "unknown task 'serach'; did you mean search?"),
        (
            "task.search.data.mine._target_=jsnl.JsonlReader",
            "did you mean jsonl? Expected a class from datamodules or lightning_modules, got 'jsnl.JsonlReader'",
        ),
        ("task.search.data.mine.view=x", "with _target_, such as {{_target_: jsonl.JsonlReader, folder: FOLDER}}"),
    ],
)
def test_value_that_is_not_a_collection_raises_user_error(folders, override, message):
    with pytest.raises(UserError) as caught:
        data_of(folders, override.format(root=folders))
    assert message.format(root=folders) in str(caught.value)


def test_folder_in_both_layouts_needs_a_named_reader(folders):
    (folders / "mine" / "qrels").mkdir()
    with pytest.raises(UserError, match=r"files of two layouts, train.jsonl \(JSON lines\) and queries"):
        data_of(folders, f"task.search.data={folders}/mine")
    named = f"task.search.data={{mine: {{_target_: jsonl.JsonlReader, folder: {folders}/mine}}}}"
    assert data_of(folders, named)["mine"]["_target_"] == JSONL


def test_import_and_file_of_papers_serve_every_task(folders):
    library = folders / "papers.csv"
    rows = (f"p{i},T{i},Abstract {i},{'ab'[i % 2]},p{i - 1}" for i in range(40))
    library.write_text("\n".join(["id,title,abstract,keywords,references", *rows]))
    import_papers([str(library), f"output={folders / 'mylib'}"])
    tasks = ("classification", "link_prediction", "search")
    imported = load_config("moe", [f"task.{task}.data={folders / 'mylib'}" for task in tasks])
    for task in tasks:
        assert imported.task[task].data == {f"mylib_{task}": {"_target_": BEIR, "folder": f"{folders}/mylib/{task}"}}
    direct = load_config("moe", [f"task.{task}.data={library}" for task in tasks])
    views = {task: direct.task[task].data[f"papers_csv_{task}"] for task in tasks}
    assert [node["view"] for node in views.values()] == ["labels", "citations", "searches"]
    for config in (imported, direct):
        config.data.cache = None
    counts = [
        [(task.examples_by_collection().popitem()[1]) for task in build_data(c).tasks] for c in (imported, direct)
    ]
    assert counts[0] == counts[1]
    shutil.rmtree(folders / "mylib" / "search")
    with pytest.raises(UserError, match="mylib has no data for search; .*import.json says why"):
        data_of(folders, f"task.search.data={folders}/mylib")


def test_file_where_a_folder_is_expected_says_what_to_do(folders):
    (folders / "library.bib").write_text("@article{a, title={T}}")
    with pytest.raises(UserError, match="library.bib: is a file; expected a folder .* imported first"):
        evaluate(["model=bm25", f"beir={folders / 'library.bib'}", "task=search", f"output={folders / 'out'}"])
    with pytest.raises(UserError, match="queries: .*library.bib is a table or a library of papers; expected JSON"):
        text_files(folders / "library.bib", "queries")


def test_collections_of_two_tasks_need_different_names(folders):
    """Results are stored by the name of the collection, and one would replace the other."""
    both = [f"task.{task}.data={folders}/mine" for task in ("classification", "search")]
    with pytest.raises(UserError, match="task.search.data: classification also has a collection called mine"):
        load_config("moe", ["tasks=[classification,search]", *both])


def test_missing_folder_error_names_the_keys_that_set_it():
    with pytest.raises(UserError) as caught:
        build_data(load_config("moe", ["scale=small", "data.root=/nowhere"]))
    for part in (
        "task.classification.data=FOLDER",
        "data.root=FOLDER to the folder that contains arxiv_cats",
        "tasks=[...]",
    ):
        assert part in str(caught.value)


def test_sample_in_addition_to_own_data_is_warned_about(folders, caplog):
    sample = "task.search.data.searches.num_papers=500"
    both = ["tasks=[search]", sample, f"task.search.data.mine={folders}/mine", "data.cache=null"]
    build_data(load_config("moe", both), training=True)
    assert "best.ckpt is selected on the dev splits of searches" in caplog.text
    assert "task.search.data.searches=null" in caplog.text
    caplog.clear()
    build_data(load_config("moe", [*both, "task.search.data.searches=null"]), training=True)
    build_data(load_config("moe", ["tasks=[search]", sample, "data.cache=null"]), training=True)
    assert "sample" not in caplog.text


@pytest.mark.slow
def test_model_trained_on_json_lines_is_evaluated_on_their_folder(folders):
    run, out = folders / "run", folders / "out"
    steps = ["trainer.max_steps=1", "evaluation.every_n_steps=0", "evaluation.baselines=false"]
    tiny = [setting for setting in TINY if "num_papers" not in setting]  # of the sample
    train("moe", [f"run.dir={run}", *tiny, *steps, "tasks=[search]", f"task.search.data={folders}/mine"])
    trained = json.loads((run / "results.json").read_text())["benchmarks"]["mine"]["systems"]["trained"]
    metrics = "metrics=ndcg@10,recall@20"
    evaluate([f"model={run}", f"beir={folders}/mine", "task=search", metrics, f"output={out}"])
    assert json.loads((out / "results.json").read_text())["benchmarks"]["mine"]["systems"]["encoder"] == trained
