"""Ranking and measuring a benchmark, against loops and trec_eval."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import pytrec_eval
import torch

from datamodules.records import Benchmark, Collection, Document, UserError
from lightning_modules.retrieval import evaluation
from lightning_modules.retrieval.evaluation import (
    evaluate,
    evaluate_bm25,
    gather_run,
    measure,
    rank_benchmark,
    ranking_depth,
)
from lightning_modules.retrieval.ranking import rank_bm25, rank_vectors
from lightning_modules.retrieval.search import Shards
from lightning_modules.retrieval.trec import write_trec
from tests.conftest import toy_collection


def benchmark_of(collection, exclude_query=False, task="search"):
    return Benchmark(
        "toy", task, "test", collection.corpus, collection.queries, collection.qrels["test"], exclude_query
    )


@pytest.mark.parametrize("k", [3, 50])
def test_excluding_a_query_outside_the_corpus_changes_nothing(make_encoder, k):
    collection = toy_collection(4, 10)
    for exclude in (False, True):
        run = rank_benchmark(make_encoder("shared"), benchmark_of(collection, exclude), k)
        assert (run.indices >= 0).sum(1).tolist() == [min(k, 10)] * 4


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_ranking_and_ndcg_equal_those_of_a_loop(make_encoder, similarity):
    encoder = make_encoder("attention").eval()
    collection = toy_collection(10, 10, papers=True)
    benchmark = benchmark_of(collection, exclude_query=True)
    run = rank_benchmark(encoder, benchmark, 5, similarity=similarity)
    vectors = encoder.encode(list(collection.corpus.values()), "search")
    if similarity == "cosine":
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    scores = vectors @ vectors.T
    names = list(collection.corpus)
    for q, query in enumerate(run.queries):
        ranked = [names[i] for i in scores[names.index(query)].argsort(descending=True) if names[i] != query]
        assert [run.documents[i] for i in run.indices[q]] == ranked[:5]
    values = measure(run, benchmark, ["ndcg@5"])
    expected = []
    for q, query in enumerate(run.queries):
        grades = collection.qrels["test"][query]
        gains = [grades.get(run.documents[i], 0) for i in run.indices[q]]
        expected.append(sum(g / math.log2(r + 2) for r, g in enumerate(gains)) / (2 + 1 / math.log2(3)))
    assert values["ndcg@5"] == pytest.approx(np.mean(expected))
    result = evaluate(encoder, benchmark, ["ndcg@5"], similarity=similarity)
    assert result.metrics == values
    assert (result.run.indices == run.indices).all()
    assert result.query_values.values[:, 0].mean() == values["ndcg@5"]


def test_progress_adds_up_to_the_total_of_each_stage(make_encoder):
    steps = {}

    def advance(stage, count, total):
        done, _ = steps.get(stage, (0, 0))
        steps[stage] = done + count, total

    benchmark = benchmark_of(toy_collection(4, 10))
    result = evaluate(make_encoder("shared"), benchmark, ["ndcg@5"], advance=advance)
    assert steps == {"encode": (14, 14), "rank": (40, 40)}
    assert result.num_texts == 14
    assert list(result.seconds) == ["encode", "rank", "metrics"]


def test_k_limits_the_depth_of_the_ranking(make_encoder):
    benchmark = benchmark_of(toy_collection(4, 10))
    assert evaluate(make_encoder("shared"), benchmark, ["ndcg@5"]).run.indices.shape == (4, 5)
    assert evaluate(make_encoder("shared"), benchmark, ["ndcg@5"], k=7).run.indices.shape == (4, 7)
    assert evaluate_bm25(benchmark, ["ndcg@5"], k=3).run.indices.shape == (4, 3)


def test_trec_eval_reads_the_run_file(make_encoder, tmp_path):
    collection = toy_collection()
    benchmark = benchmark_of(collection)
    run = rank_benchmark(make_encoder("shared"), benchmark, 10)
    write_trec(run, tmp_path / "runs" / "toy.trec", "test")
    with open(tmp_path / "runs" / "toy.trec") as lines:
        read = pytrec_eval.parse_run(lines)
    values = pytrec_eval.RelevanceEvaluator(collection.qrels["test"], {"ndcg_cut.10"}).evaluate(read)
    expected = np.mean([v["ndcg_cut_10"] for v in values.values()])
    assert measure(run, benchmark, ["ndcg@10"])["ndcg@10"] == pytest.approx(expected, abs=1e-9)


def test_result_writes_the_run_the_judgements_and_the_values_of_each_query(make_encoder, tmp_path):
    benchmark = benchmark_of(toy_collection())
    result = evaluate(make_encoder("shared"), benchmark, ["ndcg@5", "mrr@5"])
    result.write(tmp_path, "model")
    assert {path.name for path in tmp_path.iterdir()} == {"toy.model.trec", "toy.model.queries.tsv", "toy.qrels"}
    write_trec(gather_run(result.run), tmp_path / "again", "model")
    assert (tmp_path / "again").read_text() == (tmp_path / "toy.model.trec").read_text()
    header, *lines = (tmp_path / "toy.model.queries.tsv").read_text().splitlines()
    assert header.split("\t") == ["query", "ndcg@5", "mrr@5"]
    assert np.mean([float(line.split("\t")[2]) for line in lines]) == pytest.approx(result.metrics["mrr@5"])


def test_rankings_of_ranks_whose_queries_have_fewer_candidates_are_joined(make_encoder, monkeypatch):
    """Each rank's array has the columns of its longest list, and joining arrays of different widths raised an error."""
    collection = toy_collection()
    candidates = {query: [f"d{i}" for i in range(5 - number % 2)] for number, query in enumerate(collection.queries)}
    benchmark = replace(benchmark_of(collection), candidates=candidates)
    encoder, shares = make_encoder("shared"), []
    whole = rank_benchmark(encoder, benchmark, 10)
    for size in (2, 20):  # of 20 ranks, some have no query
        monkeypatch.setattr(evaluation, "world_size", lambda size=size: size)
        for number in range(size):
            ids = list(collection.queries)[number::size]
            vectors = encoder.encode([collection.queries[query] for query in ids], "search").numpy()
            documents = encoder.encode(list(collection.corpus.values()), "search")
            shares.append(rank_vectors(benchmark, ids, vectors, Shards([documents]), 10))
        assert len({share.indices.shape[1] for share in shares}) > 1
        monkeypatch.setattr(evaluation, "gather_objects", lambda run: shares)
        joined = gather_run(shares[0])
        assert joined.queries == list(whole.queries)
        assert (joined.indices == whole.indices).all()
        shares.clear()


def test_bm25_finds_shared_words_and_leaves_out_the_query():
    collection = toy_collection(10, 10, papers=True)
    run = rank_bm25(benchmark_of(collection, exclude_query=True), 5)
    for q, query in enumerate(run.queries):
        assert query not in [run.documents[i] for i in run.indices[q] if i >= 0]
    plain = rank_bm25(benchmark_of(collection), 5)
    best = [plain.documents[i] for i in plain.indices[:, 0]]
    assert best == plain.queries


def test_bm25_retrieves_nothing_from_texts_without_words():
    collection = toy_collection()
    silent = {key: Document(key, "", "、") for key in collection.corpus}
    run = rank_bm25(benchmark_of(Collection(silent, collection.queries, collection.qrels)), 5)
    assert (run.indices == -1).all()


def test_split_without_relevant_documents_raises_user_error(make_encoder):
    collection = toy_collection()
    nothing = {"test": {query: dict.fromkeys(grades, 0) for query, grades in collection.qrels["test"].items()}}
    benchmark = benchmark_of(Collection(collection.corpus, collection.queries, nothing))
    with pytest.raises(UserError, match="toy: no query of the test split has a relevant document"):
        measure(rank_benchmark(make_encoder("shared"), benchmark, 5), benchmark, ["ndcg@5"])


def test_queries_without_judgements_count_as_queries_without_relevant_documents(make_encoder):
    """If all relevant documents belonged to other queries, all metrics were 0, and macro_f1 raised KeyError."""
    collection = toy_collection()
    whole = benchmark_of(collection)
    first, *others = whole.queries
    qrels = {query: whole.qrels[query] for query in others}
    unjudged = replace(whole, queries={first: whole.queries[first]}, qrels=qrels)
    run = rank_benchmark(make_encoder("shared"), unjudged, 5)
    with pytest.raises(UserError, match="toy: no query of the test split has a relevant document"):
        measure(run, unjudged, ["ndcg@5"])
    partly = replace(whole, qrels=qrels)
    run, metrics = rank_benchmark(make_encoder("shared"), partly, 5), ["ndcg@5", "micro_f1"]
    skipped, zero = (measure(run, replace(partly, without_relevant=w), metrics) for w in ("skip", "zero"))
    assert zero["ndcg@5"] == pytest.approx(skipped["ndcg@5"] * len(others) / (len(others) + 1))
    with pytest.raises(UserError, match=f"toy: 1 queries have no relevant document .first: '{first}'"):
        measure(run, replace(partly, without_relevant="error"), metrics)


def test_vectors_that_are_not_finite_raise_user_error(make_encoder):
    encoder = make_encoder("shared")
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        rank_benchmark(encoder, benchmark_of(toy_collection()), 5)


def test_ranking_depth_is_the_deepest_cut_off():
    benchmark = benchmark_of(toy_collection(4, 10))
    assert ranking_depth(["ndcg@3", "recall@7", "map@5"], benchmark) == 7
    assert ranking_depth(["recall@100"], benchmark) == ranking_depth(["ndcg"], benchmark) == 10
    assert ranking_depth(["r_precision"], benchmark) == 2  # the most relevant documents of a query
    assert ranking_depth(["ndcg"], replace(benchmark, candidates={"q": ["a", "b"]})) == 2


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["ndgc@10"]}, "metric 'ndgc@10': expected one of"),
        ({"metrics": ["ndcg@10", "kendall_tau"]}, "metric 'kendall_tau': does not apply to a ranking"),
        ({"metrics": []}, "toy: metrics is empty"),
        ({"similarity": "l1"}, "similarity: expected one of dot, cosine, l2, got 'l1'"),
    ],
)
def test_unknown_metric_or_similarity_raises_before_the_work(make_encoder, monkeypatch, options, message, k):
    encoder, benchmark = make_encoder("shared"), benchmark_of(toy_collection())
    monkeypatch.setattr(encoder, "encode", lambda *_, **__: pytest.fail("has encoded"))
    monkeypatch.setattr("lightning_modules.retrieval.evaluation.rank_bm25", lambda *_: pytest.fail("has ranked"))
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(encoder, benchmark, k=k, **options)
    if "metrics" in options:
        with pytest.raises(UserError, match=re.escape(message)):
            evaluate_bm25(benchmark, options["metrics"], k=k)
        if options["metrics"]:
            with pytest.raises(UserError, match=re.escape(message)):
                evaluate(encoder, replace(benchmark, metrics=tuple(options["metrics"])), k=k)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            rank_benchmark(encoder, benchmark, 5, **options)


@pytest.mark.parametrize("trained", ["dot", "cosine", None])
def test_similarity_of_the_training_is_the_default(make_encoder, trained):
    encoder, benchmark = make_encoder("shared"), benchmark_of(toy_collection())
    if trained:
        encoder.similarity = trained
    assert evaluate(encoder, benchmark, ["ndcg@10"]).similarity == (trained or "dot")
    assert evaluate(encoder, benchmark, ["ndcg@10"], similarity="l2").similarity == "l2"
    run, expected = (rank_benchmark(encoder, benchmark, 5, **o) for o in ({}, {"similarity": trained or "dot"}))
    np.testing.assert_array_equal(run.scores, expected.scores)
