"""The data modules of the three kinds of tasks, and their mining pools."""

import pytest

from datamodules.batches import BatchOptions
from datamodules.records import Collection, Task, UserError
from datamodules.tasks import KINDS, ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from tests.conftest import toy_collection


def test_only_link_prediction_treats_queries_as_documents(make_task):
    collection = toy_collection(6, 10, papers=True)
    links, searches = (make_task(k, collection=collection) for k in (LinkPredictionDataModule, SearchDataModule))
    assert [example.query for example in links.examples] == [0, 1, 2, 3, 4, 5]
    assert [example.query for example in searches.examples] == [10, 11, 12, 13, 14, 15]
    assert len(list(links.texts())) == 10
    assert len(list(searches.texts())) == 16


def test_only_the_train_split_is_trained_on(make_task):
    collection = toy_collection()
    split = Collection(collection.corpus, collection.queries, {"train": {"q1": {"d1": 1}}, "test": {"q2": {"d2": 1}}})
    data = make_task(SearchDataModule, collection=split)
    assert len(data.examples) == 1
    assert data.documents[data.examples[0].query].id == "q1"
    assert [list(b.queries) for b in data.benchmarks("test")] == [["q2"]]
    assert data.benchmarks("dev") == []


def test_only_link_prediction_excludes_the_query_from_its_ranking(make_task):
    for kind in KINDS.values():
        (benchmark,) = make_task(kind).benchmarks("test")
        assert benchmark.exclude_query == (kind is LinkPredictionDataModule)


def test_collections_of_a_task_have_separate_rows(make_backbone):
    _, tokenizer = make_backbone()
    readers = {"one": toy_collection(), "two": toy_collection()}
    data = SearchDataModule(Task("search", "search"), readers, BatchOptions(batch_size=24, max_length=32), tokenizer)
    data.setup()
    assert len(data.examples) == 24
    first, second = data.examples[0], data.examples[12]
    assert not set(first.not_negatives) & set(second.not_negatives)
    assert [b.name for b in data.benchmarks("test")] == ["one", "two"]


def test_task_without_positives_raises_user_error(make_task):
    collection = toy_collection()
    nothing = {query: dict.fromkeys(grades, 0) for query, grades in collection.qrels["train"].items()}
    with pytest.raises(UserError, match="task search: in toy .train., no query of a train split has a positive"):
        make_task(SearchDataModule, collection=Collection(collection.corpus, collection.queries, {"train": nothing}))


@pytest.mark.parametrize("kind", [ClassificationDataModule, LinkPredictionDataModule, SearchDataModule])
def test_pool_agrees_with_its_collection(make_task, kind):
    papers = kind is LinkPredictionDataModule
    collection = toy_collection(6, 10, papers=papers)
    qrels = {"train": collection.qrels["train"], "dev": {next(iter(collection.qrels["train"])): {"d9": 1, "d1": 1}}}
    data = make_task(kind, collection=Collection(collection.corpus, collection.queries, qrels))
    (pool,) = data.pools()
    assert [d.id for d in pool.corpus] == list(collection.corpus)
    assert [q.id for q in pool.queries] == list(qrels["train"])
    assert pool.document_of_query.tolist() == (list(range(6)) if papers else [-1] * 6)
    for i, grades in enumerate(qrels["train"].values()):
        positives = pool.positives[1][pool.positives[0][i] : pool.positives[0][i + 1]]
        assert {pool.corpus[row].id for row in positives} == {d for d, grade in grades.items() if grade > 0}
        assert [row + pool.first_row for row in positives] == sorted(data.examples[i].positives)
        shown = pool.judged_negatives[1][pool.judged_negatives[0][i] : pool.judged_negatives[0][i + 1]]
        assert [pool.corpus[row].id for row in shown] == [d for d, grade in grades.items() if grade == 0]
    known = set(qrels["train"][pool.queries[0].id])
    starts, revealed = pool.held_out_positives
    assert [pool.corpus[row].id for row in revealed[starts[0] : starts[1]]] == [
        d for d in ("d1", "d9") if d not in known or not qrels["train"][pool.queries[0].id][d]
    ]
    assert starts[-1] == starts[1]


def test_pools_of_several_collections_have_their_row_offsets(make_task):
    data = make_task(SearchDataModule)
    data.collections, data.readers = {}, {"one": data.readers["toy"], "two": data.readers["toy"]}
    data.documents, data.examples = type(data.documents)(), type(data.examples)()
    data.setup()
    one, two = data.pools()
    assert (one.first_row, one.first_example, two.first_row, two.first_example) == (0, 0, 22, 12)
    assert data.documents[two.first_row] == two.corpus[0]
    assert data.documents[data.examples[two.first_example].query] == two.queries[0]


def test_setup_after_an_error_repeats_the_error():
    """It returned silently, so a training had only the collections before the wrong one."""
    good = toy_collection()
    wrong = Collection(good.corpus, good.queries, {"train": {next(iter(good.queries)): {next(iter(good.corpus)): 0.5}}})
    data = SearchDataModule("search", {"good": good, "wrong": wrong})
    for _ in range(2):
        with pytest.raises(UserError, match="task search, collection wrong: .* grades must be whole numbers"):
            data.setup()
    data.readers["wrong"] = good
    data.setup()
    assert len(data.documents) == 2 * (len(good.corpus) + len(good.queries))
    assert data.examples_by_collection()["wrong"] == data.examples_by_collection()["good"] == len(data.examples) // 2
