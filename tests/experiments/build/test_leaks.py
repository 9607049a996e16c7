"""Evaluation texts in the training data, and what data.on_leak does about them."""

import logging
from dataclasses import replace

import pytest

from datamodules.batches import BatchOptions
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Collection, Document, Task, UserError
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from experiments.build import leaks
from experiments.build.data import build_data
from experiments.config.experiment import load_config
from experiments.config.schema import DataConfig
from tests.experiments.test_train import TINY

TEXT = "in which {} a question is asked at some length about the matter of {}"


@pytest.fixture
def leaking(tmp_path, beir_root):
    """A search collection whose first three training queries are, exactly or nearly, test queries; and their ids."""
    source = BeirReader(str(beir_root / "scitldr")).read()
    train, test = list(source.qrels["train"])[:3], list(source.qrels["test"])[:3]
    queries = dict(source.queries)
    for i, (a, b) in enumerate(zip(train, test, strict=True)):
        queries[a] = Document(a, "", TEXT.format("indeed", i))
        queries[b] = Document(b, "", TEXT.format("indeed", i) + " today" * (i == 2))
    write_beir(Collection(source.corpus, queries, source.qrels), tmp_path / "leaking")
    return tmp_path / "leaking", train


def make_config(folder, tmp_path, *settings):
    reader = f"task.search.data.searches={{_target_: datamodules.readers.beir.BeirReader, folder: {folder}}}"
    tiny = [setting for setting in TINY if not setting.startswith("task.search.")]
    return load_config("moe", [*tiny, "tasks=[search]", reader, f"data.cache={tmp_path / 'cache'}", *settings])


def build_task(config):
    (task,) = build_data(config, training=True).tasks
    return task


@pytest.mark.slow
def test_leaks_are_warned_about_stripped_or_refused(leaking, tmp_path, caplog):
    folder, train = leaking
    summary = "searches, test queries: 3 by text"
    task = build_task(make_config(folder, tmp_path, "data.on_leak=warn"))
    before = {task.documents[row].id for row in task.examples.query_rows()}
    assert before >= set(train)
    assert any(summary in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    task = build_task(make_config(folder, tmp_path, "data.on_leak=strip"))
    assert {task.documents[row].id for row in task.examples.query_rows()} == before - set(train)
    with pytest.raises(UserError, match=f"{summary}.*data.on_leak=strip trains without them"):
        build_task(make_config(folder, tmp_path, "data.on_leak=error"))
    caplog.clear()
    build_task(make_config(folder, tmp_path, "data.on_leak=ignore"))
    assert summary not in caplog.text
    build_data(make_config(folder, tmp_path, "data.on_leak=error"))  # for evaluation


def test_own_data_are_compared_at_the_scale_of_the_sample_and_the_sample_is_not(leaking, tmp_path, caplog):
    """The sample, in which a few titles are the same, once turned the warning off for own data too."""
    folder, _ = leaking
    both = [*TINY, "tasks=[search]", f"data.cache={tmp_path / 'cache'}"]
    build_data(load_config("moe", both), training=True)
    assert "comparing the training data" not in caplog.text
    build_data(load_config("moe", [*both, f"task.search.data.mine={folder}"]), training=True)
    (warning,) = (message for message in caplog.messages if message.startswith("evaluation texts are in"))
    assert "(mine, test queries: 3 by text)" in warning


def test_texts_of_other_folders_are_stripped_from_positives_too(leaking, tmp_path, monkeypatch):
    folder, _ = leaking
    config = make_config(folder, tmp_path, "data.on_leak=ignore")
    task = build_task(config)
    example = task.examples[5]
    document = task.documents[example.positives[0]]
    other = Collection({"x": replace(document, id="x")}, {"y": Document("y", "", "nothing")}, {"test": {"y": {"x": 1}}})
    write_beir(other, tmp_path / "other")
    settings = ("data.on_leak=strip", f"data.leaks_in=[{tmp_path / 'other'}]")
    left = build_task(make_config(folder, tmp_path, *settings))
    row = example.positives[0]
    assert row not in left.examples.judged_rows()
    assert row in task.examples.judged_rows()
    assert len(left.examples) >= len(task.examples) - 3 - 1
    monkeypatch.setattr(leaks, "find_leaks", None)  # cached for the same data
    assert list(build_task(make_config(folder, tmp_path, *settings)).examples) == list(left.examples)


def test_stripping_all_examples_raises_user_error(leaking, tmp_path):
    folder, _ = leaking
    with pytest.raises(UserError, match="no training examples remain after removing the evaluation texts"):
        build_task(make_config(folder, tmp_path, "data.on_leak=strip", f"data.leaks_in=[{folder}]"))


def two_collections(tmp_path, kind=SearchDataModule):
    """A task of two collections with equal ids. One test query of the first one is also a training query."""
    readers = {}
    for name in ("first", "second"):
        corpus = {f"d{i}": Document(f"d{i}", "", f"{name} document {i} of some words") for i in range(6)}
        queries = {f"q{i}": Document(f"q{i}", "", f"{name} asks {i}") for i in range(6)}
        train, test = (range(3), range(2, 4)) if name == "first" else (range(2, 6), range(2))
        qrels = {s: {f"q{i}": {f"d{i}": 1} for i in its} for s, its in (("train", train), ("test", test))}
        write_beir(Collection(corpus, queries, qrels), tmp_path / name)
        readers[name] = BeirReader(str(tmp_path / name))
    task = kind(Task("search", "search"), readers, BatchOptions(batch_size=2))
    task.setup()
    return task


def test_ids_are_compared_within_a_collection_only(tmp_path):
    result = leaks.find_leaks([two_collections(tmp_path)])
    counts = {name: evaluated.overlaps for name, evaluated in result.sets.items()}
    assert counts["first, test queries"] == {"id": 1, "title": 0, "text": 1}  # q2 is in train and test
    assert counts["second, test queries"] == {"id": 0, "title": 0, "text": 0}
    assert len(result.queries["search"]) == 1


def test_evaluation_corpora_are_compared_with_all_training_texts(tmp_path):
    """They are not compared with themselves or with test queries. Labels are not secret, so they are left out."""
    trained = two_collections(tmp_path).collections["first"]
    query = {"q": Document("q", "", "second asks 5 and more")}
    corpus = {"x": Document("x", "", trained.corpus["d5"].text), "y": Document("y", "", trained.queries["q3"].text)}
    write_beir(Collection(corpus, query, {"test": {"q": {"x": 1}}}), tmp_path / "tested")
    readers = {name: BeirReader(str(tmp_path / name)) for name in ("first", "tested")}
    for kind, counts in ((SearchDataModule, {"title": 0, "text": 1}), (ClassificationDataModule, None)):
        task = kind(Task("search", "search"), readers, BatchOptions(batch_size=2))
        task.setup()
        sets = leaks.find_leaks([task], corpora=True).sets
        assert (sets["tested, corpus"].overlaps if counts else sets.get("tested, corpus")) == counts
        assert sets["tested, test queries"].overlaps == {"id": 0, "title": 0, "text": 0}
        assert "tested, corpus" not in leaks.find_leaks([task]).sets


def test_nothing_is_compared_without_evaluation(tmp_path, monkeypatch):
    task = two_collections(tmp_path)
    monkeypatch.setattr(task, "benchmarks", lambda split: [])
    monkeypatch.setattr(leaks.Index, "overlaps", None)
    assert not leaks.find_leaks([task])


def test_cache_distinguishes_kinds_of_tasks(tmp_path):
    config = DataConfig(cache=str(tmp_path / "cache"), on_leak="strip")
    left = []
    for kind in (SearchDataModule, LinkPredictionDataModule):
        task = two_collections(tmp_path, kind)
        leaks.handle_leaks(config, [task])
        left.append(sorted(task.documents[row].text for row in task.examples.query_rows()))
    assert left[0] == left[1]
    assert len(left[0]) == 6


def test_stripping_covers_documents_that_are_only_mined_and_changes_the_fingerprint(tmp_path):
    task, other = two_collections(tmp_path), Document("x", "", "second document 0 of some words")
    write_beir(Collection({"x": other}, {"y": Document("y", "", "no")}, {"test": {"y": {"x": 1}}}), tmp_path / "other")
    before, num_examples = task.fingerprints(), len(task.examples)
    leaks.handle_leaks(DataConfig(cache=None, on_leak="strip", leaks_in=[str(tmp_path / "other")]), [task])
    (row,) = task.stripped.tolist()
    assert task.documents[row] == Document("d0", "", other.text)
    assert row not in two_collections(tmp_path).examples.judged_rows()
    assert len(task.examples) == num_examples - 1  # without q2, which is a test query too
    assert task.fingerprints() != before
    with pytest.raises(UserError, match="data.leaks_in.*nowhere: no such folder"):
        leaks.handle_leaks(DataConfig(cache=None, leaks_in=["nowhere"]), [task])
