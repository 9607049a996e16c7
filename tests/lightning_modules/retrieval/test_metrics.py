"""Metrics against pytrec_eval, scikit-learn and the loops of SciMult's authors.

Runs are random, with ties, grades, missing documents, and judged documents outside the corpus.
"""

import numpy as np
import pytest
import pytrec_eval
from sklearn.metrics import f1_score

from datamodules.records import Benchmark, Document, Probe, UserError
from lightning_modules.retrieval.evaluation import (
    QueryValues,
    mean_metrics,
    measure,
    measure_queries,
    merge_query_values,
)
from lightning_modules.retrieval.metrics import (
    CLASS_METRICS,
    NUMBER_METRICS,
    RANKING_METRICS,
    Run,
    check_metric,
    judge,
    parse_metric,
    sorted_run,
)

TREC = {
    "ndcg": "ndcg",
    "ndcg@5": "ndcg_cut_5",
    "ndcg@10": "ndcg_cut_10",
    "recall@3": "recall_3",
    "recall@10": "recall_10",
    "precision@5": "P_5",
    "map": "map",
    "map@7": "map_cut_7",
    "mrr": "recip_rank",
    "r_precision": "Rprec",
}
MEASURES = {"ndcg", "ndcg_cut.5,10", "recall.3,10", "P.5", "map", "map_cut.7", "recip_rank", "Rprec"}
NAMES = tuple(TREC)


def random_case(seed, num_queries=20, num_documents=40, depth=10):
    """Return a run and its judgements: ties, negative scores, missing documents and judgements, grades from -1 to 3."""
    rng = np.random.default_rng(seed)
    documents = [f"doc{i}" for i in rng.permutation(num_documents)]
    queries = [f"q{i}" for i in range(num_queries)]
    indices = np.stack([rng.permutation(num_documents)[:depth] for _ in queries])
    scores = rng.integers(-3, 3, indices.shape).astype(np.float32)
    indices[rng.random(indices.shape) < 0.1] = -1
    indices[rng.random(num_queries) < 0.05] = -1
    qrels = {}
    for query in queries:
        judged = rng.permutation(num_documents)[: rng.integers(1, 15)]
        qrels[query] = {documents[d]: int(rng.integers(-1, 4)) for d in judged}
        if rng.random() < 0.5:
            qrels[query]["not in the corpus"] = 1
    return sorted_run(queries, documents, indices, scores), qrels


def benchmark_of(run, qrels, **more):
    corpus, queries = ({id: Document(id) for id in ids} for ids in (run.documents, run.queries))
    return Benchmark("toy", "search", "test", corpus, queries, qrels, **more)


def test_metrics_equal_pytrec_eval_on_a_thousand_queries():
    compared = 0
    for seed in range(50):
        run, qrels = random_case(seed)
        as_dict = {
            query: {run.documents[i]: float(s) for i, s in zip(run.indices[q], run.scores[q], strict=True) if i >= 0}
            for q, query in enumerate(run.queries)
        }
        expected = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(as_dict)
        judged = judge(run, qrels)
        for name in NAMES:
            function, k = parse_metric(name)
            values = RANKING_METRICS[function](judged, k)
            for q, query in enumerate(run.queries):
                # pytrec_eval leaves out queries without any retrieved document
                value = expected[query][TREC[name]] if query in expected else 0.0
                assert values[q] == pytest.approx(value, abs=1e-9), (seed, name, query)
                compared += 1
    assert compared == 1000 * len(NAMES)


def test_exponential_gain_equals_linear_gain_of_transformed_grades():
    for seed in range(5):
        run, qrels = random_case(seed)
        raised = {q: {d: 2 ** max(g, 0) - 1 for d, g in grades.items()} for q, grades in qrels.items()}
        for name, linear in (("ndcg_exp@5", "ndcg@5"), ("ndcg_exp", "ndcg")):
            (exponential, k), (plain, _) = parse_metric(name), parse_metric(linear)
            values = RANKING_METRICS[exponential](judge(run, qrels), k)
            np.testing.assert_allclose(values, RANKING_METRICS[plain](judge(run, raised), k))


def test_f1_of_classes_equals_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        num, classes = 60, 7
        true, predicted = rng.integers(0, classes, num), rng.integers(1, classes, num)
        run = sorted_run([f"q{i}" for i in range(num)], list("abcdefg"), predicted[:, None], np.ones((num, 1)))
        qrels = {f"q{i}": {"abcdefg"[c]: 1} for i, c in enumerate(true)}
        metrics = measure(run, benchmark_of(run, qrels), ["macro_f1", "micro_f1", "precision@1"])
        assert metrics["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"), abs=1e-12)
        assert metrics["micro_f1"] == pytest.approx(f1_score(true, predicted, average="micro"), abs=1e-12)
        assert metrics["micro_f1"] == pytest.approx(metrics["precision@1"])


def test_f1_of_two_classes_and_of_labels_equals_scikit_learn():
    rng = np.random.default_rng(3)
    for _ in range(10):
        true, predicted = rng.integers(0, 2, (40, 5)), rng.integers(0, 2, (40, 5))
        true[:4], predicted[:2] = 0, 0  # papers without labels count too
        true[:, 4] = predicted[:, 4] = 0  # so does a label without papers
        queries, papers = [f"q{i}" for i in range(40)], {"p": Document("p")}
        order = np.argsort(-predicted, axis=1, kind="stable")
        margins = np.take_along_axis(predicted, order, axis=1).astype(np.float32)
        run = Run(queries, list("abcde"), np.where(margins > 0, order, -1), margins)
        qrels = {query: dict(zip("abcde", row.tolist(), strict=True)) for query, row in zip(queries, true, strict=True)}
        benchmark = benchmark_of(run, qrels, training=(papers, {}), probe=Probe("labels"))
        metrics = measure(run, benchmark, ["macro_f1", "micro_f1"])
        for average in ("macro", "micro"):
            assert metrics[f"{average}_f1"] == pytest.approx(
                f1_score(true, predicted, average=average, zero_division=0), abs=1e-12
            )
        shares = [measure_queries(run.slice(*rows), benchmark, ["macro_f1"]) for rows in ((20, 40), (0, 25))]
        merged = merge_query_values(shares)
        assert mean_metrics(merged, benchmark, ["macro_f1"])["macro_f1"] == metrics["macro_f1"], "of two ranks"

        run = Run(queries, ["0", "1"], predicted[:, :1], np.ones((40, 1)))
        qrels = {query: {str(row[0]): 1} for query, row in zip(queries, true, strict=True)}
        benchmark = benchmark_of(run, qrels, training=(papers, {}))
        assert measure(run, benchmark, ["f1"])["f1"] == pytest.approx(f1_score(true[:, 0], predicted[:, 0]), abs=1e-12)
    with pytest.raises(UserError, match="needs exactly two classes .*, but there are 3"):
        CLASS_METRICS["f1"](np.ones((3, 3)))


def test_kendalls_tau_counts_pairs():
    """tau-b is the number of concordant minus discordant pairs, over the geometric mean of the pairs without ties."""
    rng = np.random.default_rng(4)
    for ties in (3, 1000):
        predicted, true = rng.normal(size=50).round(1), rng.integers(0, ties, 50) - 0.5
        run = Run([f"q{i}" for i in range(50)], ["number"], np.zeros((50, 1), int), predicted[:, None])
        qrels = {query: {"number": float(number)} for query, number in zip(run.queries, true, strict=True)}
        benchmark = benchmark_of(run, qrels, training=({}, {}), probe=Probe("number"))
        one, other = (np.sign(np.subtract.outer(x, x)) for x in (predicted, true))
        expected = (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())
        assert measure(run, benchmark, ["kendall_tau"])["kendall_tau"] == pytest.approx(expected, abs=1e-12)
    assert NUMBER_METRICS["kendall_tau"](np.ones(5), np.arange(5)) == 0


def test_metric_must_apply_to_what_is_measured():
    for kind, name in (("ranking", "ndcg@10"), ("class", "f1"), ("labels", "macro_f1"), ("number", "kendall_tau")):
        check_metric(name, kind)
    for kind, name in (("ranking", "f1"), ("ranking", "kendall_tau"), ("class", "map"), ("number", "macro_f1")):
        with pytest.raises(UserError, match=f"metric '{name}': does not apply to a {kind}; expected one of"):
            check_metric(name, kind)


def test_recall_equals_the_loop_of_the_authors():
    """The loop sorts all ids of the corpus and looks them up in lists."""
    rng = np.random.default_rng(1)
    similarity = rng.permutation(40 * 200).reshape(40, 200).astype(np.float64)
    labels = [f"l{i}" for i in range(200)]
    gold = [[labels[i] for i in rng.permutation(200)[: rng.integers(1, 8)]] for _ in range(40)]
    order = np.argsort(-similarity, axis=1)
    run = sorted_run(
        [f"q{i}" for i in range(40)], labels, order[:, :100], np.take_along_axis(similarity, order, 1)[:, :100]
    )
    benchmark = benchmark_of(run, {f"q{i}": dict.fromkeys(gold[i], 1) for i in range(40)})
    metrics = measure(run, benchmark, ["recall@20", "recall@50", "recall@100"])
    for k in (20, 50, 100):
        total = 0.0
        for scores, truth in zip(similarity, gold, strict=True):
            ranked = [labels[i] for i in (-scores).argsort().tolist()]
            total += len([label for label in truth if label in ranked[:k]]) / len(truth)
        assert metrics[f"recall@{k}"] == pytest.approx(total / 40, abs=1e-12)


def test_ties_are_ordered_by_descending_id_and_missing_documents_come_last():
    run = sorted_run(["q"], ["a", "b", "c"], np.array([[0, -1, 2, 1]]), np.array([[1.0, 9.0, 1.0, 2.0]]))
    assert run.indices.tolist() == [[1, 2, 0, -1]]


def test_queries_without_relevant_documents_follow_the_policy():
    run, _ = random_case(0, num_queries=2)
    qrels = {"q0": dict.fromkeys(run.documents, 1), "q1": dict.fromkeys(run.documents, 0)}
    retrieved = (run.indices[0] >= 0).sum() / len(run.documents)
    for policy, expected in (("skip", retrieved), ("zero", retrieved / 2)):
        benchmark = benchmark_of(run, qrels, without_relevant=policy)
        assert measure(run, benchmark, ["recall@10"])["recall@10"] == pytest.approx(expected)
    with pytest.raises(UserError, match="1 queries have no relevant document .first: 'q1'"):
        measure(run, benchmark_of(run, qrels, without_relevant="error"), ["recall@10"])


def test_queries_of_several_ranks_count_once_and_in_any_order():
    run, qrels = random_case(1)
    benchmark = benchmark_of(run, qrels)
    whole = measure_queries(run, benchmark, NAMES)
    shares = [measure_queries(run.slice(start, stop), benchmark, NAMES) for start, stop in ((12, 20), (0, 15))]
    merged = merge_query_values(shares)
    assert (merged.queries == whole.queries).all()
    assert (merged.values == whole.values).all()
    assert mean_metrics(merged, benchmark, NAMES) == mean_metrics(whole, benchmark, NAMES)


def test_metrics_without_measured_queries_are_zero():
    run, qrels = random_case(2)
    empty = QueryValues(("ndcg@10",), np.zeros(0, dtype=int), *[np.zeros((0, 1))] * 3)
    assert mean_metrics(empty, benchmark_of(run, qrels), ["ndcg@10"]) == {"ndcg@10": 0.0}


@pytest.mark.parametrize("name", ["ndgc@10", "recall", "ndcg@0", "ndcg@ten", "@5", "r_precision@5", "macro_f1@1"])
def test_unknown_metric_raises_user_error(name):
    with pytest.raises(UserError, match="expected one of recall@K"):
        parse_metric(name)
    assert not set(RANKING_METRICS) & set(CLASS_METRICS)
