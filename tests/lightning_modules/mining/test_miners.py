"""The candidates of each miner are compared with a loop."""

import inspect
import json

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
    RandomWalkMiner,
    RankBandMiner,
    SharingMiner,
    ShownMiner,
)
from lightning_modules.retrieval.search import Shards
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
    ShownMiner: ShownMiner,
    RandomWalkMiner: lambda: RandomWalkMiner(3),
}


def test_every_miner_is_tested():
    kinds = {c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Miner)}
    assert {c for c in kinds if not inspect.isabstract(c)} == {*ALL, SharingMiner}  # SharingMiner has its own tests


@pytest.mark.parametrize("kind", ALL)
def test_rankings_are_sorted_and_do_not_depend_on_blocks(make_task, kind):
    pool = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS)
    context, miner = context_of(pool, [pool]), ALL[kind]()
    whole, scores = miner.rank(pool, range(10), 5, context)
    assert whole.shape == scores.shape
    assert whole.shape[1] <= 6
    assert (whole >= 0).any()
    assert (whole < 10).all()
    present = np.where(whole >= 0, scores, -np.inf)
    if kind is not RankBandMiner:  # its first ranks are empty
        assert (np.diff(np.where(np.isinf(present), -1e9, present)) <= 0).all()
    for row in whole:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    for block in (range(3), range(3, 4), range(4, 10)):
        rows, values = miner.rank(pool, block, 5, context)
        assert (rows == whole[block.start : block.stop]).all()
        np.testing.assert_allclose(values, scores[block.start : block.stop])
    assert miner.description["miner"].endswith(kind.__name__)


def test_dense_miners_rank_by_vectors(make_task):
    pool = pool_of(make_task)
    context = context_of(pool)
    expected = np.argsort(-(context.queries[0] @ context.documents[0].T), axis=1)
    assert (DenseMiner().rank(pool, range(12), 4, context)[0] == expected[:, :4]).all()
    band = RankBandMiner(2, 6).rank(pool, range(12), 4, context)[0]
    assert (band[:, 2:] == expected[:, 2:6]).all()
    assert (band[:, :2] == -1).all()
    with pytest.raises(UserError, match="first: expected a rank below the number of documents of toy, 10, got 10"):
        RankBandMiner(10, 20).rank(pool, range(12), 4, context)
    with pytest.raises(UserError, match="expected 0 <= first < last, got 6 and 6"):
        RankBandMiner(6, 6)


def test_random_candidates_depend_on_the_seed(make_task):
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


def test_cited_by_cited_counts_paths(make_task):
    pool = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS)
    rows, ways = CitedByCitedMiner().rank(pool, range(10), 9, context_of(pool))
    cites = {q: {d for d, grade in grades.items() if grade > 0} for q, grades in PAPERS.qrels["train"].items()}
    names = list(PAPERS.corpus)
    for q, query in enumerate(cites):
        count = {}
        for cited in cites[query]:
            for far in cites[cited]:
                count[far] = count.get(far, 0) + 1
        expected = sorted(count, key=lambda d: (-count[d], names.index(d)))
        assert [names[row] for row in rows[q] if row >= 0] == expected
        assert ways[q][rows[q] >= 0].tolist() == [count[d] for d in expected]
    with pytest.raises(UserError, match="CitedByCitedMiner needs papers that cite papers"):
        CitedByCitedMiner().rank(pool_of(make_task), range(3), 3, context_of(pool))


@pytest.mark.parametrize("steps", [2, 3])
def test_random_walks_visit_with_the_probabilities_of_powers_of_the_transition_matrix(make_task, steps):
    """Query q0 is a paper outside of the corpus, which walks pass through but which is never returned."""
    stranger = Document("q0", "", "another paper")
    judged = PAPERS.qrels["train"] | {"q0": {"d0": 1, "d5": 1}}
    collection = Collection(PAPERS.corpus, PAPERS.queries | {"q0": stranger}, {"train": judged})
    pool = pool_of(make_task, LinkPredictionDataModule, collection=collection)
    nodes = [*PAPERS.corpus, "q0"]
    links = np.zeros((11, 11))
    for query, grades in judged.items():
        for document, grade in grades.items():
            links[nodes.index(query), nodes.index(document)] = grade > 0
    links = np.maximum(links, links.T)
    step = links / links.sum(1, keepdims=True)
    mean = sum(np.linalg.matrix_power(step, n) for n in range(1, steps + 1)) / steps
    rows, shares = RandomWalkMiner(steps).rank(pool, range(11), 10, context_of(pool))
    for q, query in enumerate(pool.queries):
        start = nodes.index(query.id)
        reached = set(np.flatnonzero(mean[start, :10]).tolist()) - {start}
        assert set(rows[q][rows[q] >= 0].tolist()) == reached
        np.testing.assert_allclose(shares[q][: len(reached)], mean[start, rows[q][: len(reached)]])
    with pytest.raises(UserError, match="RandomWalkMiner needs papers that cite papers"):
        RandomWalkMiner().rank(pool_of(make_task), range(3), 3, context_of(pool))
    with pytest.raises(UserError, match="steps: expected a number of at least 2, got 1"):
        RandomWalkMiner(1)


def test_miners_that_share_prepared_data_have_relations_of_their_own(make_task):
    """The second miner ranked by the relations of the first."""
    pool, prepared = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS), {}
    for miner in (RandomWalkMiner(2), CitedByCitedMiner(), RandomWalkMiner(3)):
        alone, shared = (
            miner.rank(pool, range(10), 5, MiningContext(pools=[pool], prepared=data)) for data in ({}, prepared)
        )
        np.testing.assert_array_equal(shared, alone)


def test_shown_documents_keep_their_order(make_task):
    pool = pool_of(make_task)
    rows, _ = ShownMiner().rank(pool, range(2, 12), 3, context_of(pool))
    shown = [[int(d[1:]) for d, g in grades.items() if g == 0] for grades in toy_collection().qrels["train"].values()]
    assert [row[row >= 0].tolist() for row in rows] == shown[2:]
    none, _ = ShownMiner().rank(pool, range(0), 3, context_of(pool))  # an IndexError before
    assert none.shape == (0, 3)


def papers_file(path, values):
    path.write_text("".join(json.dumps({"id": f"d{i}", "author": value}) + "\n" for i, value in enumerate(values)))
    return str(path)


AUTHORS = [["a"], ["a", "b"], "b", ["b"], None, ["c"], [], ["a", "b"], ["d"], ["d"]]


def sharing(q):
    """Return the papers that share authors with paper q, and how many authors they share."""
    authors = [set(value if isinstance(value, list) else [value]) if value else set() for value in AUTHORS]
    return {p: len(authors[p] & authors[q]) for p in range(10) if p != q and authors[p] & authors[q]}


def test_sharing_miner_ranks_papers_by_shared_values(make_task, tmp_path):
    pool = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS)
    file = papers_file(tmp_path / "papers.jsonl", AUTHORS)
    rows, ways = SharingMiner(file, "author").rank(pool, range(10), 9, context_of(pool))
    for q in range(10):
        present = rows[q] >= 0
        assert dict(zip(rows[q][present].tolist(), ways[q][present].tolist(), strict=True)) == sharing(q)
        assert (np.diff(ways[q]) <= 0).all()
    block, _ = SharingMiner(file, "author").rank(pool, range(4, 10), 9, context_of(pool))
    assert (block == rows[4:]).all()
    few, _ = SharingMiner(file, "author", most=2).rank(pool, range(10), 9, context_of(pool))
    assert 0 < (few >= 0).sum() < (rows >= 0).sum()
    assert (SharingMiner(file, "author", seed=1).rank(pool, range(10), 9, context_of(pool))[0] != rows).any()


def test_sharing_miner_takes_labels_of_papers(make_task, tmp_path):
    labels = {f"l{i}": Document(f"l{i}", f"label {i}") for i in range(5)}
    judged = {f"d{i}": {f"l{i % 5}": 1, f"l{(i + 1) % 5}": 1} for i in range(10)}
    pool = pool_of(make_task, ClassificationDataModule, collection=Collection(labels, PAPERS.corpus, {"train": judged}))
    file = papers_file(tmp_path / "papers.jsonl", AUTHORS)
    rows, _ = SharingMiner(file, "author").rank(pool, range(10), 5, context_of(pool))
    for q in range(10):
        expected = {label % 5 for p in sharing(q) for label in (p, p + 1)}
        assert set(rows[q][rows[q] >= 0].tolist()) == expected


def test_unusable_paper_files_raise_user_errors(make_task, tmp_path):
    pool, file = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS), tmp_path / "papers.jsonl"

    def mined(field="author"):
        return SharingMiner(str(file), field).rank(pool, range(10), 9, context_of(pool))

    with pytest.raises(UserError, match="papers.jsonl cannot be read"):
        mined()
    papers_file(file, AUTHORS)
    with pytest.raises(UserError, match="toy: no two of its papers share a value of 'venue' in .*papers.jsonl"):
        mined("venue")
    for line in ("{", "[1]", '{"paper": 3}'):
        file.write_text('{"id": "d0"}\n' + line)
        with pytest.raises(UserError, match="papers.jsonl:2: expected a JSON object with 'id', got"):
            mined()
    with pytest.raises(UserError, match="most: expected a number above 0, got 0"):
        SharingMiner("x", "author", most=0)


def test_description_covers_the_content_of_the_paper_file(tmp_path):
    """After a change of the file, make mine kept the old negatives."""
    file = tmp_path / "papers.jsonl"
    papers_file(file, AUTHORS)
    before = SharingMiner(str(file), "author").description
    assert SharingMiner(str(file), "author").description == json.loads(json.dumps(before))
    file.write_text(file.read_text() + '{"id": "d99"}\n')
    assert SharingMiner(str(file), "author").description != before
    with pytest.raises(UserError, match="papers: .*missing.jsonl cannot be read"):
        SharingMiner(str(tmp_path / "missing.jsonl"), "author").description  # noqa: B018


def test_labels_of_cited_papers(make_task):
    labels = {f"l{i}": Document(f"l{i}", f"label {i}") for i in range(5)}
    judged = {f"d{i}": {f"l{i % 5}": 1, f"l{(i + 1) % 5}": 1} for i in range(0, 10, 2)}
    queries = {name: PAPERS.corpus[name] for name in judged}
    tagged = pool_of(make_task, ClassificationDataModule, collection=Collection(labels, queries, {"train": judged}))
    cited = pool_of(make_task, LinkPredictionDataModule, collection=PAPERS)
    rows, _ = LabelsOfCitedMiner().rank(tagged, range(5), 5, context_of(tagged, [tagged, cited]))
    names, any_label = list(labels), False
    for q, paper in enumerate(queries):
        cited = [d for d, grade in PAPERS.qrels["train"][paper].items() if grade > 0]
        expected = {label for d in cited if d in judged for label in judged[d]}
        assert {names[row] for row in rows[q] if row >= 0} == expected
        any_label = any_label or bool(expected)
    assert any_label
    with pytest.raises(UserError, match="needs citations from a link_prediction task, but no citation"):
        LabelsOfCitedMiner().rank(tagged, range(5), 5, context_of(tagged, [tagged]))
