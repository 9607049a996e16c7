import math
from dataclasses import replace

import numpy as np
import pytest
import pytrec_eval
import torch

from datamodules.records import Benchmark, Collection, Document, UserError
from lightning_modules.retrieval.evaluation import bm25_run, hide_own, rank_benchmark
from lightning_modules.retrieval.measure import depth, measure, write_trec
from tests.conftest import toy_collection


def benchmark_of(collection, exclude_query=False, task="search"):
    return Benchmark(
        "toy", task, "test", collection.corpus, collection.queries, collection.qrels["test"], exclude_query
    )


def test_own_document_is_hidden():
    assert hide_own(np.array([[4, 2, 9], [4, 2, 9]]), [2, 7]).tolist() == [[4, -1, 9], [4, 2, 9]]


@pytest.mark.parametrize("k", [3, 50])
def test_a_query_that_is_no_document_loses_none(make_encoder, k):
    collection = toy_collection(4, 10)
    for exclude in (False, True):
        run = rank_benchmark(make_encoder("shared"), benchmark_of(collection, exclude), k)
        assert (run.indices >= 0).sum(1).tolist() == [min(k, 10)] * 4


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_benchmark_is_ranked_as_by_hand(make_encoder, similarity):
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
    wanted = []
    for q, query in enumerate(run.queries):
        grades = collection.qrels["test"][query]
        gains = [grades.get(run.documents[i], 0) for i in run.indices[q]]
        wanted.append(sum(g / math.log2(r + 2) for r, g in enumerate(gains)) / (2 + 1 / math.log2(3)))
    assert values["ndcg@5"] == pytest.approx(np.mean(wanted))


def test_run_files_are_read_by_trec_eval(make_encoder, tmp_path):
    collection = toy_collection()
    benchmark = benchmark_of(collection)
    run = rank_benchmark(make_encoder("shared"), benchmark, 10)
    write_trec(run, tmp_path / "runs" / "toy.trec", "test")
    with open(tmp_path / "runs" / "toy.trec") as lines:
        read = pytrec_eval.parse_run(lines)
    values = pytrec_eval.RelevanceEvaluator(collection.qrels["test"], {"ndcg_cut.10"}).evaluate(read)
    wanted = np.mean([v["ndcg_cut_10"] for v in values.values()])
    assert measure(run, benchmark, ["ndcg@10"])["ndcg@10"] == pytest.approx(wanted, abs=1e-9)


def test_bm25_finds_shared_words_and_leaves_out_the_query():
    collection = toy_collection(10, 10, papers=True)
    run = bm25_run(benchmark_of(collection, exclude_query=True), 5)
    for q, query in enumerate(run.queries):
        found = [run.documents[i] for i in run.indices[q] if i >= 0]
        assert query not in found
    plain = bm25_run(benchmark_of(collection), 5)
    best = [plain.documents[i] for i in plain.indices[:, 0]]
    assert best == plain.queries


def test_bm25_without_any_word_finds_nothing():
    collection = toy_collection()
    silent = {key: Document(key, "", "、") for key in collection.corpus}
    run = bm25_run(benchmark_of(Collection(silent, collection.queries, collection.qrels)), 5)
    assert (run.indices == -1).all()


def test_a_split_without_relevant_documents_is_refused(make_encoder):
    collection = toy_collection()
    nothing = {"test": {query: dict.fromkeys(grades, 0) for query, grades in collection.qrels["test"].items()}}
    benchmark = benchmark_of(Collection(collection.corpus, collection.queries, nothing))
    with pytest.raises(UserError, match="toy: no query of the test split has a relevant document"):
        measure(rank_benchmark(make_encoder("shared"), benchmark, 5), benchmark, ["ndcg@5"])


def test_vectors_that_are_not_finite_are_refused(make_encoder):
    encoder = make_encoder("shared")
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        rank_benchmark(encoder, benchmark_of(toy_collection()), 5)


def test_depth_is_the_deepest_cut_off():
    benchmark = benchmark_of(toy_collection(4, 10))
    assert depth(["ndcg@3", "recall@7", "map@5"], benchmark) == 7
    assert depth(["recall@100"], benchmark) == depth(["ndcg"], benchmark) == 10
    assert depth(["r_precision"], benchmark) == 2  # the most relevant documents of a query
    assert depth(["ndcg"], replace(benchmark, candidates={"q": ["a", "b"]})) == 2
