"""Metrics against pytrec_eval, on random runs with ties, grades, missing and surplus documents."""

import numpy as np
import pytest
import pytrec_eval
import torch

from datamodules.records import UserError
from lightning_modules.metrics import METRICS, MeanOverQueries, judge, parse_metric, sorted_run

NAMES = ("ndcg@5", "ndcg@10", "recall@3", "recall@10", "precision@5", "map@10", "mrr@10")
TREC = {
    "ndcg@5": "ndcg_cut_5",
    "ndcg@10": "ndcg_cut_10",
    "recall@3": "recall_3",
    "recall@10": "recall_10",
    "precision@5": "P_5",
    "map@10": "map_cut_10",
    "mrr@10": "recip_rank",
}


def random_case(seed, num_queries=20, num_documents=40, depth=10):
    rng = np.random.default_rng(seed)
    documents = [f"doc{i}" for i in rng.permutation(num_documents)]
    queries = [f"q{i}" for i in range(num_queries)]
    indices = np.stack([rng.permutation(num_documents)[:depth] for _ in queries])
    scores = rng.integers(-3, 3, indices.shape).astype(np.float32)  # many ties, many below 0
    missing = rng.random(indices.shape) < 0.1
    indices[missing] = -1
    qrels = {}
    for query in queries:
        judged = rng.permutation(num_documents)[: rng.integers(1, 15)]
        qrels[query] = {documents[d]: int(rng.integers(0, 4)) for d in judged} | {"not in the corpus": 1}
    return sorted_run(queries, documents, indices, scores), qrels


@pytest.mark.parametrize("seed", range(25))
def test_equal_pytrec_eval(seed):
    run, qrels = random_case(seed)
    as_dict = {
        query: {run.documents[i]: float(s) for i, s in zip(run.indices[q], run.scores[q], strict=True) if i >= 0}
        for q, query in enumerate(run.queries)
    }
    measures = {"ndcg_cut.5,10", "recall.3,10", "P.5", "map_cut.10", "recip_rank"}
    wanted = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(as_dict)
    judged = judge(run, qrels)
    for name in NAMES:
        function, k = parse_metric(name)
        values = function(judged, k)
        for q, query in enumerate(run.queries):
            if query in wanted:  # pytrec_eval leaves out queries without any retrieved document
                assert values[q] == pytest.approx(wanted[query][TREC[name]], abs=1e-12), (name, query)
            else:
                assert values[q] == 0


def test_ties_stand_by_descending_id_and_missing_documents_last():
    run = sorted_run(["q"], ["a", "b", "c"], np.array([[0, -1, 2, 1]]), np.array([[1.0, 9.0, 1.0, 2.0]]))
    assert run.indices.tolist() == [[1, 2, 0, -1]]


def test_queries_without_relevant_documents_are_left_out_of_the_mean():
    run, _ = random_case(0, num_queries=2)
    means = MeanOverQueries(["recall@10"])
    qrels = {"q0": dict.fromkeys(run.documents, 1), "q1": dict.fromkeys(run.documents, 0)}
    means.update(torch.arange(2), judge(run, qrels))
    found = (run.indices[0] >= 0).sum() / len(run.documents)
    assert means.compute()["recall@10"] == pytest.approx(found)


def test_a_query_seen_twice_counts_once():
    run, qrels = random_case(1)
    judged = judge(run, qrels)
    once, twice = MeanOverQueries(NAMES), MeanOverQueries(NAMES)
    once.update(torch.arange(20), judged)
    for _ in range(2):
        twice.update(torch.arange(20), judged)
    assert once.compute() == twice.compute()


def test_nothing_measured_is_zero():
    assert MeanOverQueries(["ndcg@10"]).compute() == {"ndcg@10": 0.0}


@pytest.mark.parametrize("name", ["ndgc@10", "ndcg", "ndcg@0", "ndcg@ten", "@5"])
def test_unknown_metrics_are_refused(name):
    with pytest.raises(UserError, match="allowed are recall@K"):
        parse_metric(name)
    assert set(METRICS) == {"recall", "precision", "ndcg", "mrr", "map"}
