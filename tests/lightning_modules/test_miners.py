"""Miners: what they propose, against a loop."""

import inspect

import bm25s
import numpy as np
import pytest

from datamodules.records import Collection, Document, UserError
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from lightning_modules.mining import miners as module
from lightning_modules.mining.miners import (
    BM25Miner,
    CitedByCitedMiner,
    DenseMiner,
    LabelsOfCitedMiner,
    Miner,
    MiningContext,
    RandomMiner,
    RankBandMiner,
)
from lightning_modules.shards import Shards
from tests.conftest import toy_collection


def pool_of(make_task, kind=SearchDataModule, **options):
    (pool,) = make_task(kind, **options).pools()
    return pool


def context_of(pool, pools=()):
    rng = np.random.default_rng(0)
    queries, documents = (
        Shards([rng.standard_normal((n, 8)).astype(np.float32)]) for n in (len(pool.queries), len(pool.corpus))
    )
    return MiningContext(queries, documents, pools=pools)


PAPERS = toy_collection(10, 10, papers=True)
ALL = {
    DenseMiner: DenseMiner,
    RankBandMiner: lambda: RankBandMiner(2, 6),
    RandomMiner: RandomMiner,
    BM25Miner: BM25Miner,
    CitedByCitedMiner: CitedByCitedMiner,
    LabelsOfCitedMiner: LabelsOfCitedMiner,
}


def test_every_miner_is_tested():
    kinds = {c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Miner)}
    assert {c for c in kinds if not inspect.isabstract(c)} == set(ALL)


@pytest.mark.parametrize("kind", ALL)
def test_any_part_of_the_queries_is_ranked_alike_best_first(make_task, kind):
    pool = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS)
    context, miner = context_of(pool, [pool]), ALL[kind]()
    whole, scores = miner.rank(pool, range(10), 5, context)
    assert whole.shape == scores.shape
    assert whole.shape[1] <= 6
    assert (whole >= 0).any()
    assert (whole < 10).all()
    there = np.where(whole >= 0, scores, -np.inf)
    if kind is not RankBandMiner:  # whose first ranks are empty
        assert (np.diff(np.where(np.isinf(there), -1e9, there)) <= 0).all()
    for row in whole:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    for part in (range(3), range(3, 4), range(4, 10)):
        rows, values = miner.rank(pool, part, 5, context)
        assert (rows == whole[part.start : part.stop]).all()
        np.testing.assert_allclose(values, scores[part.start : part.stop])
    assert miner.about["miner"].endswith(kind.__name__)


def test_the_dense_ones_rank_by_vectors(make_task):
    pool = pool_of(make_task)
    context = context_of(pool)
    wanted = np.argsort(-(context.queries[0] @ context.documents[0].T), axis=1)
    assert (DenseMiner().rank(pool, range(12), 4, context)[0] == wanted[:, :4]).all()
    band = RankBandMiner(2, 6).rank(pool, range(12), 4, context)[0]
    assert (band[:, 2:] == wanted[:, 2:6]).all()
    assert (band[:, :2] == -1).all()
    with pytest.raises(UserError, match="toy: ranks from 10 on are asked for, and it has 10 documents"):
        RankBandMiner(10, 20).rank(pool, range(12), 4, context)
    with pytest.raises(UserError, match="got 6 and 6"):
        RankBandMiner(6, 6)


def test_random_ones_are_drawn_by_the_seed(make_task):
    pool = pool_of(make_task)
    one, other = (RandomMiner(seed).rank(pool, range(12), 5, context_of(pool))[0] for seed in (0, 1))
    assert (one == RandomMiner(0).rank(pool, range(12), 5, context_of(pool))[0]).all()
    assert (one != other).any()


def test_bm25_ranks_as_bm25s_does(make_task):
    pool = pool_of(make_task)
    rows, scores = BM25Miner().rank(pool, range(12), 3, context_of(pool))
    texts = [f"{d.title} {d.text}" for d in pool.corpus]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    for q, query in enumerate(pool.queries):
        tokens = bm25s.tokenize(query.text, stopwords="en", return_ids=False, show_progress=False)[0]
        every = index.get_scores(tokens)
        for row, score in zip(rows[q], scores[q], strict=True):
            if row >= 0:
                assert score == pytest.approx(every[row], rel=1e-5)
        assert (rows[q] >= 0).sum() == min(3, (every > 0).sum())


def test_bm25_finds_nothing_where_there_are_no_words(make_task):
    collection = toy_collection()
    silent = {key: Document(key, "", "、") for key in collection.corpus}
    pool = pool_of(make_task, collection=Collection(silent, collection.queries, collection.qrels))
    rows, _ = BM25Miner().rank(pool, range(12), 3, context_of(pool))
    assert (rows == -1).all()


def test_cited_by_cited(make_task):
    pool = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS)
    rows, ways = CitedByCitedMiner().rank(pool, range(10), 9, context_of(pool))
    cites = {q: {d for d, grade in grades.items() if grade > 0} for q, grades in PAPERS.qrels["train"].items()}
    names = list(PAPERS.corpus)
    for q, query in enumerate(cites):
        count = {}
        for near in cites[query]:
            for far in cites[near]:
                count[far] = count.get(far, 0) + 1
        wanted = sorted(count, key=lambda d: (-count[d], names.index(d)))
        assert [names[row] for row in rows[q] if row >= 0] == wanted
        assert ways[q][rows[q] >= 0].tolist() == [count[d] for d in wanted]
    with pytest.raises(UserError, match="CitedByCitedMiner is for papers that cite papers"):
        CitedByCitedMiner().rank(pool_of(make_task), range(3), 3, context_of(pool))


def test_labels_of_cited(make_task):
    labels = {f"l{i}": Document(f"l{i}", f"label {i}") for i in range(5)}
    judged = {f"d{i}": {f"l{i % 5}": 1, f"l{(i + 1) % 5}": 1} for i in range(0, 10, 2)}
    queries = {name: PAPERS.corpus[name] for name in judged}
    tagged = pool_of(make_task, ClassificationDataModule, collection=Collection(labels, queries, {"train": judged}))
    cited = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS)
    rows, _ = LabelsOfCitedMiner().rank(tagged, range(5), 5, context_of(tagged, [tagged, cited]))
    names, some = list(labels), False
    for q, paper in enumerate(queries):
        near = [d for d, grade in PAPERS.qrels["train"][paper].items() if grade > 0]
        wanted = {label for d in near if d in judged for label in judged[d]}
        assert {names[row] for row in rows[q] if row >= 0} == wanted
        some = some or bool(wanted)
    assert some
    with pytest.raises(UserError, match="knows citations from tasks of the kind link_prediction, and none"):
        LabelsOfCitedMiner().rank(tagged, range(5), 5, context_of(tagged, [tagged]))
