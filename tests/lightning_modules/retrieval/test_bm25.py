"""BM25 is compared on real papers with an independent implementation in numpy, which has its own tokeniser."""

import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from datamodules.readers.beir import BeirReader
from datamodules.records import Benchmark, Document
from lightning_modules.retrieval.bm25 import Bm25Index
from lightning_modules.retrieval.evaluation import measure
from lightning_modules.retrieval.metrics import sorted_run
from lightning_modules.retrieval.ranking import rank_bm25

DATA = Path(os.environ.get("SCIMULT_DATA", Path(__file__).parents[4] / "shared" / "data"))
STOP = re.compile(
    "an?|and|are|as|at|be|but|by|for|if|into?|is|it|no|not|of|on|or|such|that|the|their|then|there|these|they|this|to"
    "|was|will|with"
)


def words(document):
    text = f"{document.title} {document.text}".lower()
    return [word for word in re.findall(r"\w\w+", text) if not STOP.fullmatch(word)]


def by_numpy(benchmark, k, k1=1.5, b=0.75):
    """Robertson's formula with Lucene's idf: log(1 + (N - n + 0.5) / (n + 0.5))."""
    counts = [Counter(words(document)) for document in benchmark.corpus.values()]
    lengths = np.array([sum(count.values()) for count in counts])
    postings: dict[str, list[tuple[int, int]]] = {}
    for row, count in enumerate(counts):
        for word, times in count.items():
            postings.setdefault(word, []).append((row, times))
    scores = np.zeros((len(benchmark.queries), len(counts)))
    for query, document in enumerate(benchmark.queries.values()):
        for word in words(document):
            rows, times = np.array(postings.get(word, []), dtype=int).reshape(-1, 2).T
            idf = np.log(1 + (len(counts) - len(rows) + 0.5) / (len(rows) + 0.5))
            scores[query, rows] += idf * times / (times + k1 * (1 - b + b * lengths[rows] / lengths.mean()))
    best = np.argsort(-scores, axis=1)[:, :k]
    return sorted_run(list(benchmark.queries), list(benchmark.corpus), best, np.take_along_axis(scores, best, axis=1))


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real papers in {DATA} (or SCIMULT_DATA=FOLDER)")
@pytest.mark.parametrize("name", ["cranfield", "cystic", "cisi", "cacm", "scitldr"])
def test_bm25_metrics_are_within_two_points_of_another_implementation(name):
    collection = BeirReader(str(DATA / name)).read()
    qrels = dict(list(collection.qrels["test"].items())[:200])
    queries = {query: collection.queries[query] for query in qrels}
    benchmark = Benchmark(name, "search", "test", collection.corpus, queries, qrels)
    metrics = ["ndcg@10", "recall@100"]
    ours, other = (measure(run, benchmark, metrics) for run in (rank_bm25(benchmark, 100), by_numpy(benchmark, 100)))
    for metric in metrics:
        assert ours[metric] == pytest.approx(other[metric], abs=0.02), (metric, ours, other)


def test_bm25_does_not_import_jax(tmp_path, monkeypatch):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").touch()
    (tmp_path / "jax" / "lax.py").write_text("def top_k(*_): raise AssertionError('it would take the GPU memory')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("bm25s", "jax")]:
        monkeypatch.delitem(sys.modules, name)
    documents = [Document("a", "red fox", ""), Document("b", "blue whale", "")]
    index = Bm25Index(documents)
    assert "jax" not in sys.modules
    import jax  # a program can still import it, before or after

    rows, _ = index.top_k([Document("q", "the blue whale", "")], 1)
    assert rows.tolist() == [[1]]
    del sys.modules[jax.__name__]
