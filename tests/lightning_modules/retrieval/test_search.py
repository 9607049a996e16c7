"""Top-k is compared with a loop in numpy, for every backend, sharding and memory."""

import inspect
import sys

import faiss
import numpy as np
import pytest
import torch

from datamodules.records import UserError
from lightning_modules.retrieval.search import Shards, pair_scores, top_k

BACKENDS = ("faiss", "torch")


def loop(queries, documents, k):
    """Return the k best documents of each query by float64 score and then row, and their scores."""
    results = []
    for query in queries.astype(np.float64):
        scores = np.array([(query * document).sum() for document in documents.astype(np.float64)])
        best = sorted(range(len(documents)), key=lambda row: (-scores[row], row))[:k]
        results.append(([*best], scores[best]))
    return np.array([rows for rows, _ in results]), np.array([scores for _, scores in results])


def world(num_queries=30, num_documents=300, dimension=24, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, dimension)).astype(np.float32) for n in (num_queries, num_documents)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", [1 << 12, 1 << 29])
@pytest.mark.parametrize("k", [1, 7, 90, 500])
def test_backends_agree_with_a_loop(backend, memory, k):
    queries, documents = world()
    rows, scores = top_k(queries, documents, k, backend=backend, memory=memory)
    expected, values = loop(queries, documents, k)
    assert (rows == expected).all()
    np.testing.assert_allclose(scores, values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pieces", [[300], [100, 1, 199], [50] * 6])
def test_ties_go_to_the_first_document_in_any_sharding(backend, pieces):
    """With about forty copies of each vector, more documents than PADDING tie for the k-th rank."""
    queries, documents = world(num_documents=8)
    documents = np.concatenate([documents] * 40)[:300]
    shards = Shards(np.split(documents, np.cumsum(pieces)[:-1]))
    rows, _ = top_k(queries, shards, 50, backend=backend, memory=1 << 14)
    assert (rows == loop(queries, documents, 50)[0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_equal_in_float32_are_ordered_by_float64(backend):
    """The documents are nearly equal, as from a collapsed encoder."""
    queries, documents = world(num_documents=400, dimension=64)
    documents = (1.0 + 1e-5 * documents).astype(np.float32)
    rows, _ = top_k(queries, documents, 20, backend=backend)
    assert (rows == loop(queries, documents, 20)[0]).all()


@pytest.mark.parametrize("memory", [1 << 13, 1 << 29])
@pytest.mark.parametrize("k", [40, 290, 300])
def test_deep_rankings_agree_with_a_loop(monkeypatch, memory, k):
    """With small blocks, documents stay pending before they are merged. Vectors are in float16, as on disk."""
    monkeypatch.setattr("lightning_modules.retrieval.search.DEEP", 30)
    queries, documents = world()
    documents = documents.astype(np.float16)
    compared = []
    shards = Shards(np.split(documents, [3, 150, 151]))
    rows, scores = top_k(queries, shards, k, memory=memory, advance=compared.append)
    expected, values = loop(queries, documents.astype(np.float32), k)
    assert (rows == expected).all()
    np.testing.assert_allclose(scores, values, rtol=1e-6, atol=1e-6)
    assert sum(compared) == queries.shape[0] * len(documents)


def test_progress_counts_all_pairs():
    queries, documents = world()
    compared = []
    top_k(queries, documents, 5, memory=1 << 12, advance=compared.append)
    assert len(compared) > 5
    assert sum(compared) == len(queries) * len(documents)


def test_torch_is_used_without_faiss(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "faiss", None)  # makes importing it fail
    queries, documents = world()
    assert (top_k(queries, documents, 9)[0] == loop(queries, documents, 9)[0]).all()
    with pytest.raises(UserError, match="faiss is not installed"):
        top_k(queries, documents, 9, backend="faiss")


def test_faiss_is_used_on_request_only(monkeypatch):
    calls = []
    original = faiss.knn
    monkeypatch.setattr(faiss, "knn", lambda *a, **k: calls.append(1) or original(*a, **k))
    top_k(*world(), 9)
    assert not calls
    top_k(*world(), 9, backend="faiss")
    assert calls


def test_training_precision_does_not_affect_rankings():
    queries, documents = world(num_documents=2000)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows, _ = top_k(queries, documents, 10, backend="torch")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (rows == loop(queries, documents, 10)[0]).all()


def test_faiss_searches_on_the_gpu_up_to_its_largest_k(monkeypatch):
    """Needs no GPU: checks the call against the signature of knn_gpu, and uses knn for its result."""
    calls, signature = [], inspect.signature(faiss.knn_gpu)

    class Resources:
        def setTempMemory(self, size):
            assert size == 1 << 20

    def knn_gpu(*given, **named):
        arguments = signature.bind(*given, **named).arguments
        assert (arguments["metric"], arguments["device"], type(arguments["res"])) == (
            faiss.METRIC_INNER_PRODUCT,
            1,
            Resources,
        )
        calls.append(arguments["k"])
        return faiss.knn(arguments["xq"], arguments["xb"], arguments["k"], metric=arguments["metric"])

    monkeypatch.setattr(faiss, "StandardGpuResources", Resources, raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu)
    queries, documents = world(num_documents=3000)
    for k, on_gpu in ((9, [25]), (2040, [])):  # 2040 + PADDING is more than GPU_K
        calls.clear()
        rows, _ = top_k(queries, documents, k, backend="faiss", memory=1 << 21, device="cuda:1")
        assert (calls, (rows == loop(queries, documents, k)[0]).all()) == (on_gpu, True)


def test_pair_scores_and_missing_rows():
    queries, documents = world()
    rows = np.array([[3, -1, 299]] * len(queries))
    shards = Shards(np.split(documents, [100, 250]))
    for memory in (1, 1 << 20):
        scores = pair_scores(queries, shards, rows, memory)
        np.testing.assert_allclose(scores[:, [0, 2]], queries @ documents[[3, 299]].T, atol=1e-4)
        assert (scores[:, 1] == -np.inf).all()


def test_vectors_that_are_not_finite_raise():
    queries, documents = world()
    documents[[17, 40]] = np.nan
    with pytest.raises(UserError, match="documents: 2 of 300 vectors are not finite, the first is number 17"):
        top_k(queries, documents, 5)
    documents[[17, 40]] = 0
    documents[200] = np.inf
    with pytest.raises(UserError, match="documents: 1 of 50 vectors are not finite, the first is number 200"):
        top_k(queries, Shards(np.split(documents, [200, 250])), 5)
    queries[2, 3] = np.nan
    with pytest.raises(UserError, match="queries: 1 of 30"):
        top_k(queries, documents[:17], 5)
