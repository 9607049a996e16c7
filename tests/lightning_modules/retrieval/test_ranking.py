"""Rankings by every similarity, with own candidates and with named labels first, compared with plain loops."""

import numpy as np
import pytest

from datamodules.records import Benchmark, Document, UserError
from lightning_modules.retrieval.ranking import rank_bm25, rank_vectors
from lightning_modules.retrieval.search import Shards

NUM, QUERIES, DIMENSION = 60, 20, 8


@pytest.fixture
def world():
    """Queries (20, 8), documents (60, 8) of which some are equal, their ids, and a function that makes a benchmark."""
    rng = np.random.default_rng(0)
    queries, documents = (rng.standard_normal((n, DIMENSION)).astype(np.float32) for n in (QUERIES, NUM))
    documents *= rng.uniform(0.5, 3, (NUM, 1)).astype(np.float32)
    documents[40:44] = documents[7]
    ids, names = [f"q{i}" for i in range(QUERIES)], [f"d{i}" for i in rng.permutation(NUM)]

    def benchmark(**more):
        corpus, texts = ({id: Document(id) for id in group} for group in (names, ids))
        qrels = {query: {names[i % NUM]: 1} for i, query in enumerate(ids)}
        return Benchmark("toy", "search", "test", corpus, texts, qrels, **more)

    return queries, documents, ids, names, benchmark


def scored(query, document, similarity):
    query, document = query.astype(np.float64), document.astype(np.float64)
    if similarity == "l2":
        return -np.sqrt(((query - document) ** 2).sum())
    norm = np.linalg.norm(query) * np.linalg.norm(document) if similarity == "cosine" else 1.0
    return float(query @ document) / norm


def by_loop(query, documents, names, similarity):
    """Return all ids, best first and equal ones by descending id, and their scores."""
    scores = {n: float(np.float32(scored(query, d, similarity))) for n, d in zip(names, documents, strict=True)}
    return sorted(sorted(names, reverse=True), key=lambda name: -round(scores[name], 5)), scores


@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
def test_ranking_by_each_similarity(world, similarity):
    queries, documents, ids, names, benchmark = world
    run = rank_vectors(benchmark(), ids, queries, Shards(np.split(documents, [13, 40])), 10, similarity)
    for q, query in enumerate(queries):
        ranked, scores = by_loop(query, documents, names, similarity)
        assert [names[i] for i in run.indices[q]] == ranked[:10]
        np.testing.assert_allclose(run.scores[q], [scores[name] for name in ranked[:10]], atol=2e-6)


def test_similarity_of_the_benchmark_takes_precedence(world):
    queries, documents, ids, _, benchmark = world
    one = rank_vectors(benchmark(similarity="l2"), ids, queries, Shards([documents]), 10, "dot")
    other = rank_vectors(benchmark(), ids, queries, Shards([documents]), 10, "l2")
    assert (one.indices == other.indices).all()
    with pytest.raises(UserError, match="similarity: expected one of dot, cosine, l2, got 'l1'"):
        rank_vectors(benchmark(), ids, queries, Shards([documents]), 10, "l1")


def test_l2_orders_close_vectors_far_from_the_origin():
    """In float32, |q|^2 - 2 q.d + |d|^2 would lose all digits of such distances."""
    queries = np.full((1, DIMENSION), 1000.0, dtype=np.float32)
    documents = queries + np.linspace(0.01, 0.2, 20, dtype=np.float32)[::-1, None]
    ids = {f"d{i:02}": Document(f"d{i:02}") for i in range(20)}
    benchmark = Benchmark("far", "search", "test", ids, {"q": Document("q")}, {"q": {"d00": 1}})
    run = rank_vectors(benchmark, ["q"], queries, Shards([documents]), 20, "l2")
    assert run.indices[0].tolist() == list(range(20))[::-1]


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_only_own_candidates_are_ranked(world, similarity):
    queries, documents, ids, names, benchmark = world
    rng = np.random.default_rng(1)
    own = {query: list(rng.permutation(names)[: rng.integers(0, 9)]) for query in ids}
    run = rank_vectors(benchmark(candidates=own), ids, queries, Shards([documents]), 5, similarity)
    for q, query in enumerate(ids):
        ranked = [n for n in by_loop(queries[q], documents, names, similarity)[0] if n in own[query]]
        assert [names[i] for i in run.indices[q] if i >= 0] == ranked[:5]


def test_ranking_a_benchmark_of_a_probe_raises_user_error(world):
    """BM25 predicted the classes of its ranking, and a ranking by vectors mixed up classes and training papers."""
    queries, documents, ids, _, benchmark = world
    toy = benchmark(training=({}, {}))
    for rank in (lambda: rank_bm25(toy, 5), lambda: rank_vectors(toy, ids, queries, Shards([documents]), 5)):
        with pytest.raises(UserError, match="toy: has training papers, so a probe predicts its documents; they are no"):
            rank()


def test_repeated_candidate_is_ranked_once(world):
    """It was ranked twice, so recall could be 2."""
    queries, documents, ids, names, benchmark = world
    once = benchmark(candidates=dict.fromkeys(ids, names[:6]))
    twice = benchmark(candidates=dict.fromkeys(ids, names[:6] + names[2:4]))
    runs = [rank_vectors(toy, ids, queries, Shards([documents]), 5) for toy in (once, twice)]
    assert (runs[0].indices == runs[1].indices).all()


@pytest.mark.parametrize("k", [3, 20, NUM])
def test_named_labels_come_first_as_in_the_authors_program(world, k):
    """The program passes twice over the whole ranking and looks ids up in lists."""
    queries, documents, ids, names, benchmark = world
    rng = np.random.default_rng(2)
    named = {query: list(rng.permutation(names)[: rng.integers(0, 7)]) for query in ids}
    run = rank_vectors(benchmark(first=named), ids, queries, Shards([documents]), k)
    for q, query in enumerate(ids):
        ranked = by_loop(queries[q], documents, names, "dot")[0]
        moved = [n for n in ranked if n in named[query]] + [n for n in ranked if n not in named[query]]
        assert [names[i] for i in run.indices[q]] == moved[:k]
        assert (np.diff(run.scores[q]) < 0).all()


@pytest.mark.parametrize("settings", [{"first": {}}, {"candidates": {f"q{i}": [] for i in range(QUERIES)}}])
def test_lists_that_are_empty_for_all_queries_of_a_rank(world, settings):
    """An array without columns has no unknown dimension, so the command ended with a traceback."""
    queries, documents, ids, names, benchmark = world
    toy = benchmark(**settings)
    runs = rank_vectors(toy, ids, queries, Shards([documents]), 5), rank_bm25(toy, 5)
    ranked = by_loop(queries[0], documents, names, "dot")[0][:5] if "first" in settings else []
    assert [names[i] for i in runs[0].indices[0]] == ranked
    assert all(len(run.indices) == QUERIES and (run.indices[:, len(ranked) :] < 0).all() for run in runs)


def test_bm25_puts_named_labels_first_also_among_own_candidates():
    """They kept their places if queries had candidates, unlike in a ranking by vectors."""
    corpus = {f"d{i}": Document(f"d{i}", "", "word " * (i + 1) + "filler " * (4 - i)) for i in range(5)}
    queries = {"q": Document("q", "", "word")}
    first, candidates = {"q": ["d1"]}, {"q": ["d0", "d1", "d2", "d4"]}
    rankings = {}
    for name, own in (("all", None), ("own", candidates)):
        benchmark = Benchmark("toy", "t", "test", corpus, queries, {"q": {"d1": 1}}, candidates=own, first=first)
        run = rank_bm25(benchmark, 3)
        rankings[name] = [run.documents[i] for i in run.indices[0]]
    assert rankings == {"all": ["d1", "d4", "d3"], "own": ["d1", "d4", "d2"]}
