"""Mining from vectors to the report, compared with rankings from the encoder's own vectors."""

import dataclasses
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from datamodules.ragged import Ragged
from datamodules.records import Collection, Document, MinedNegatives, UserError
from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from lightning_modules.loggers import JsonlLogger, log_histograms
from lightning_modules.mining import mine as mine_module
from lightning_modules.mining.mine import Mined, Mining, MiningOptions, mine, text_numbers, without_negatives
from lightning_modules.mining.miners import BM25Miner, DenseMiner, RandomMiner
from lightning_modules.mining.report import FIGURES, check_false_negatives, histograms, metrics, report, svg, table
from lightning_modules.retrieval.search import Shards
from lightning_modules.retrieval.vector_cache import VectorCache
from tests.conftest import text_of, toy_collection
from tests.forked import Forked, run_all


def mining_of(tmp_path, miner=None, tasks=("search",), similarity="cosine", guide=None, **options):
    arguments = MiningOptions(**{"k": 10, "relative_margin": None, "num_negatives": 10} | options)
    return Mining(
        arguments, dict.fromkeys(tasks, miner or DenseMiner()), tmp_path, similarity=similarity, guide=guide, seed=3
    )


def lists_of(mined):
    negatives = mined.negatives
    return [row.tolist() for row in np.split(negatives.documents, negatives.starts[1:-1])]


def ranking(encoder, data, similarity="cosine"):
    """Rank all documents for each example by the encoder's own vectors, and return rows and scores."""
    task = data.task.name
    documents = encoder.encode(list(data.collections["toy"].corpus.values()), task)
    queries = encoder.encode([data.documents[example.query] for example in data.examples], task)
    if similarity == "cosine":
        documents, queries = (torch.nn.functional.normalize(v, dim=-1) for v in (documents, queries))
    scores = (queries.double() @ documents.double().T).numpy()
    return np.argsort(-scores, axis=1, kind="stable"), scores


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("kind", [ClassificationDataModule, LinkPredictionDataModule, SearchDataModule])
@pytest.mark.parametrize("block", [5, 8192])
def test_the_nearest_documents_below_the_margin_are_mined(
    make_task, make_encoder, tmp_path, monkeypatch, kind, similarity, block
):
    monkeypatch.setattr(mine_module, "BLOCK", block)
    papers = kind is LinkPredictionDataModule
    data = make_task(kind, collection=toy_collection(10, 10, papers=papers))
    encoder = make_encoder("attention")
    mining = mining_of(
        tmp_path, similarity=similarity, k=8, first_rank=1, relative_margin=0.01, num_negatives=3, positive="highest"
    )
    mined = mining.run(mining.cache(encoder), data.pools())["search"]
    order, scores = ranking(encoder, data, similarity)
    expected, margins = [], []
    for q, example in enumerate(data.examples):
        best = max(scores[q][list(example.positives)])
        limit = best - 0.01 * abs(best)
        left = [r for r in order[q][1:8] if r not in example.not_negatives and scores[q][r] < limit][:3]
        expected.append(left)
        margins += [best - scores[q][row] for row in left]
    assert sum(map(len, expected)) > 5
    assert lists_of(mined) == expected
    np.testing.assert_allclose(mined.margins, margins, atol=1e-5)
    flat = [(q, row) for q, rows in enumerate(expected) for row in rows]
    assert mined.negatives.ranks.tolist() == [order[q].tolist().index(row) for q, row in flat]
    np.testing.assert_allclose(mined.negatives.scores, [scores[q][row] for q, row in flat], atol=1e-5)


def test_margins_filter_candidates_of_any_miner(make_task, make_encoder, tmp_path):
    data, encoder = make_task(SearchDataModule), make_encoder("attention")
    mining = mining_of(tmp_path, RandomMiner(), absolute_margin=0.05, positive="lowest")
    mined = mining.run(mining.cache(encoder), data.pools())["search"]
    _, scores = ranking(encoder, data)
    for q, example in enumerate(data.examples):
        limit = min(scores[q][list(example.positives)]) - 0.05
        left = {r for r in range(10) if r not in example.not_negatives and scores[q][r] < limit}
        assert set(lists_of(mined)[q]) == left


def test_the_guide_removes_candidates_as_good_as_the_positive(make_task, make_encoder, tmp_path):
    data, encoder, guide = make_task(SearchDataModule), make_encoder("attention"), make_encoder("shared", seed=7)
    plain, guided = (mining_of(tmp_path, guide=g) for g in (None, guide))
    before, after = (lists_of(mining.run(mining.cache(encoder), data.pools())["search"]) for mining in (plain, guided))
    _, scores = ranking(guide, data)
    for q, example in enumerate(data.examples):
        limit = np.mean(scores[q][list(example.positives)])
        assert after[q] == [row for row in before[q] if scores[q][row] < limit]
    assert before != after


def test_copies_of_positives_and_of_other_documents_are_not_mined(make_task, make_encoder, tmp_path):
    collection = toy_collection()
    copies = {f"x{i}": Document(f"x{i}", d.title.upper(), d.text) for i, d in enumerate(collection.corpus.values())}
    data = make_task(
        SearchDataModule, collection=Collection(dict(collection.corpus) | copies, collection.queries, collection.qrels)
    )
    for same_text in (True, False):
        mining = mining_of(tmp_path, k=20, num_negatives=20, same_text=same_text)
        mined = mining.run(mining.cache(make_encoder("shared")), data.pools())["search"]
        for q, example in enumerate(data.examples):
            clean = set(range(10)) - set(example.positives)
            expected = clean if same_text else clean | set(range(10, 20))
            assert set(lists_of(mined)[q]) == expected
        assert (report(mined, 0).values["duplicates"] > 0) != same_text
        assert mined.negatives.removed.get("copies", 0) == (120 if same_text else 0)


def test_collections_of_a_task_keep_their_rows_and_examples(make_task, make_encoder, tmp_path):
    data = make_task(SearchDataModule)
    data.collections, data.readers = {}, {"one": data.readers["toy"], "two": data.readers["toy"]}
    data.documents, data.examples = type(data.documents)(), type(data.examples)()
    data.setup()
    mining = mining_of(tmp_path)
    mined = mining.run(mining.cache(make_encoder("shared")), data.pools())["search"]
    lists = lists_of(mined)
    assert len(lists) == 24
    for q, rows in enumerate(lists):
        assert set(rows).isdisjoint(data.examples[q].positives)
        assert {row // 22 for row in rows} == {q // 12}
    assert [[row + 22 for row in rows] for rows in lists[:12]] == lists[12:]
    assert len(mined.texts) == len(mined.negatives.documents)


def test_vectors_that_are_not_finite_raise_and_are_not_kept(make_task, make_encoder, tmp_path):
    encoder = make_encoder("shared")
    with torch.no_grad():
        encoder.backbone.embeddings.word_embeddings.weight.fill_(float("nan"))
    mining = mining_of(tmp_path)
    with pytest.raises(UserError, match="documents of toy: 10 of 10 vectors are not finite, the first is number 0"):
        mining.run(mining.cache(encoder), make_task(SearchDataModule).pools())
    assert not list(tmp_path.rglob("*.npy"))


def test_small_corpora_are_ranked_completely_unless_first_rank_is_beyond_them(
    make_task, make_encoder, tmp_path, caplog
):
    pools, encoder = make_task(SearchDataModule).pools(), make_encoder("shared")
    mining = mining_of(tmp_path, k=500)
    mined = mining.run(mining.cache(encoder), pools)["search"]
    assert {len(rows) for rows in lists_of(mined)} == {8}  # ten documents less two positives
    assert "toy has 10 documents, fewer than k, so all of them are candidates" in caplog.text
    mining = mining_of(tmp_path, k=500, first_rank=10)
    with pytest.raises(UserError, match="first_rank: expected a rank below the number of documents of toy, 10, got 10"):
        mining.run(mining.cache(encoder), pools)


def test_a_task_without_negatives_reports_what_each_filter_removed(make_task, make_encoder, tmp_path):
    pools = make_task(SearchDataModule).pools()
    mining = mining_of(tmp_path, first_rank=2, absolute_margin=5.0)
    mined = mining.run(mining.cache(make_encoder("shared")), pools)
    (message,) = without_negatives(mined)
    start = "search: no hard negatives are left. Candidates removed by each filter: known positives 24, first ranks "
    assert message.startswith(start)
    counts = [int(word.strip(".,")) for word in message.split("Raise k")[0].split() if word.strip(".,").isdecimal()]
    assert sum(counts) == 12 * 10
    task_report = report(mined["search"], 0, mined["search"].negatives)
    assert task_report.values == {"negatives": 0.0, "without": 1.0}
    assert not histograms({"search": task_report})
    assert "search: no negatives are left" in svg({"search": task_report}, "none")
    check_false_negatives({"search": task_report.values}, 0.0)
    assert not list(without_negatives(mining_of(tmp_path, BM25Miner()).run(None, pools)))


def test_a_miner_or_margin_that_needs_an_encoder_raises_without_one(make_task, tmp_path):
    pools = make_task(SearchDataModule).pools()
    assert mining_of(tmp_path, BM25Miner()).run(None, pools)["search"].negatives.documents.size
    for mining in (mining_of(tmp_path), mining_of(tmp_path, BM25Miner(), relative_margin=0.05)):
        with pytest.raises(UserError, match="needs an encoder; provide one, or choose a miner without an encoder"):
            mining.run(None, pools)


def test_text_numbers_ignore_case_and_spaces():
    corpus = [Document("a", "One", "two"), Document("b", "one", " Two "), Document("c", "", "one two three")]
    documents, queries = text_numbers(corpus, [Document("q", "", "ONE  two"), Document("p", "", "new")])
    assert documents[0] == documents[1] != documents[2]
    assert queries[0] == documents[0]
    assert queries[1] not in documents


def example_result(margins, lists, held_out=None, texts=None):
    starts, rows = Ragged.of(lists)
    margins = np.array(margins, dtype=np.float32)
    held_out = np.zeros(len(rows), bool) if held_out is None else np.array(held_out)
    texts = rows.astype(np.int64) if texts is None else np.array(texts)
    negatives = MinedNegatives(starts, rows, np.zeros(len(rows), np.int32), -margins, {"known positives": 4})
    return Mined(negatives, margins, held_out, texts, num_candidates=20, num_above=5)


def test_report_figures_match_their_definitions():
    mined = example_result([0.2, -0.1, 0.3, 0.4], [[1, 2], [], [3, 1]], [True, True, False, False], [1, 1, 3, 1])
    previous = MinedNegatives(*Ragged.of([[2, 9], [1], [1]]), np.zeros(4), np.zeros(4))
    values = report(mined, 60, previous, 40).values
    assert values == {
        "negatives": 4 / 3,
        "without": 1 / 3,
        "false_negative_rate": 0.5,
        "above_positive": 0.25,
        "revealed": 0.5,
        "candidates_above": 0.25,
        "margin_p10": pytest.approx(np.percentile([0.2, -0.1, 0.3, 0.4], 10), abs=1e-6),
        "margin_p50": pytest.approx(0.25, abs=1e-6),
        "margin_p90": pytest.approx(np.percentile([0.2, -0.1, 0.3, 0.4], 90), abs=1e-6),
        "duplicates": 0.25,
        "distinct": 0.75,
        "age": 20.0,
        "kept": 0.5,
    }
    first_report = report(mined, 60)
    assert "age" not in first_report.values
    assert first_report.histogram[0].sum() == 4
    assert metrics({"search": first_report.values})["mine/search/duplicates"] == 0.25
    text = "\n".join(table({"search": first_report, "classification": first_report}))
    assert "false_negative_rate" in text
    assert "  known positives" in text
    assert set(FIGURES) == {*first_report.values, "age", "kept", "dropped", "turned"}
    tiny = dataclasses.replace(
        first_report, values={"without": 0.25, "candidates_above": 4.7e-5, "margin_p10": -4.7e-5}
    )
    assert [line.split()[1] for line in table({"search": tiny})[1:4]] == ["0.25", "<0.0001", "0"]


def test_report_without_scores_has_no_margins():
    task_report = report(example_result([np.nan] * 2, [[1], [2]], [True, False]), 0)
    assert task_report.values["false_negative_rate"] == 0.5
    assert not {"above_positive", "candidates_above", "margin_p50"} & set(task_report.values)
    assert "no scores: mined without an encoder" in svg({"search": task_report}, "none")


def test_loggers_with_histograms_get_the_margins(tmp_path):
    class Plots(JsonlLogger):
        received = None

        def log_histograms(self, histograms, step):
            self.received = histograms, step

    reports = {
        "search": report(example_result([0.2, -0.1], [[1], [2]]), 0),
        "other": report(example_result([np.nan], [[1]]), 0),
    }
    margins, file, plots = histograms(reports), JsonlLogger(tmp_path / "a.jsonl"), Plots(tmp_path / "b.jsonl")
    log_histograms([file, plots], margins, 7)
    assert set(margins) == {"mine/search/margins"}
    assert plots.received == (margins, 7)
    assert not file.path.exists()


def test_too_many_false_negatives_raise():
    values = {"search": report(example_result([0.2, -0.1], [[1], [2]]), 0).values}
    for stop_at in (None, 0.5):
        check_false_negatives(values, stop_at)
    with pytest.raises(
        UserError, match=r"search: 50.0% of the mined .*, more than stop_at, 49.0% .*\. Raise relative_margin"
    ):
        check_false_negatives(values, 0.49)


def test_svg_has_a_bar_for_each_bin():
    reports = {name: report(example_result([0.2, -0.1, 0.3], [[1], [2, 3]]), 0) for name in ("search", "a & b")}
    root = ElementTree.fromstring(svg(reports, "at <step> 3"))
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("fill") != "white"]
    assert len(bars) == 2 * len(reports["search"].histogram[0])
    assert sum(float(bar.get("height")) > 0 for bar in bars) == 6
    red = [bar for bar in bars if bar.get("fill") == "#c0392b" and float(bar.get("height")) > 0]
    assert len(red) == 2
    assert any("a & b" in (e.text or "") for e in root.iter())


RANKS = """
import sys
from types import SimpleNamespace
import numpy as np, torch
import torch.distributed as dist
from datamodules.records import Document, MiningPool, Ragged, UserError
from lightning_modules.mining import mine as mine_module
from lightning_modules.mining.mine import Mining, MiningOptions
from lightning_modules.mining.miners import DenseMiner
from lightning_modules.retrieval import vector_cache

mine_module.BLOCK, vector_cache.MIN_SHARD = 7, 5
rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if world > 1:
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
embedded = []

def encode(documents, task, **options):
    embedded.extend(documents)
    rows = [np.random.default_rng(int(d.text)).standard_normal(8) for d in documents]
    return torch.tensor(np.array(rows), dtype=torch.float32)

class Numbers(torch.nn.Module):
    config, similarity, device = {}, None, torch.device("cpu")
    backbone = SimpleNamespace(config=SimpleNamespace(to_dict=dict))
    tokenizer = SimpleNamespace(get_vocab=dict, init_kwargs={})

    def __init__(self):
        super().__init__()
        self.weight, self.encode = torch.nn.Parameter(torch.ones(1)), encode

    def document_task(self, task):
        return task

    def encode_each(self, groups, task, **options):
        for documents in groups:
            yield self.encode(documents, task)

encoder = Numbers()
empty = Ragged(np.zeros(31, dtype=np.int64), np.zeros(0, dtype=np.int32))
pool = MiningPool(
    "search", "toy", [Document(f"d{i}", "", str(i)) for i in range(50)],
    [Document(f"q{i}", "", str(100 + i)) for i in range(30)], 0, 0, np.full(30, -1),
    Ragged(np.arange(31), np.arange(30, dtype=np.int32)), empty, empty,
)
mining = Mining(MiningOptions(k=20, relative_margin=0.05, sampling="random"), {"search": DenseMiner()}, folder)
mined = mining.run(mining.cache(encoder), [pool])["search"]
assert len(embedded) <= -(-80 // world) + 1, len(embedded)
print(mined.negatives.starts.tolist(), mined.negatives.documents.tolist(), mined.negatives.removed, mined.num_above)

class Failing(DenseMiner):
    def rank(self, pool, queries, k, context):
        if queries.start == 28:  # the last block, which only the first rank has
            raise UserError("this cannot be ranked")
        return super().rank(pool, queries, k, context)

def infinite(documents, task, **options):
    return encode(documents, task) / (0.0 if documents[-1].text == "49" else 1.0)

def print_error(miner):
    mining = Mining(MiningOptions(k=20), {"search": miner}, folder + ".other")
    try:
        mining.run(mining.cache(encoder), [pool])
    except UserError as error:
        print(error)

print_error(Failing())
encoder.encode, folder = infinite, folder + ".infinite"
print_error(DenseMiner())
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_share_the_work_and_get_the_result_of_one_process(tmp_path, free_port):
    (tmp_path / "ranks_of_mining.py").write_text(RANKS)
    outputs = []
    for world in (1, 2):
        folder = str(tmp_path / f"vectors{world}")
        command = [sys.executable, "-m", "ranks_of_mining"]
        ranks = [Forked([*command, rank, world, free_port, folder], cwd=tmp_path) for rank in range(world)]
        outputs += run_all(ranks, check=True)
    lines = [done.stdout.splitlines() for done in outputs]
    assert len(lines[0][0]) > 300
    assert lines[0][0] == lines[1][0] == lines[2][0]
    for _, ranking_error, vector_error in lines:  # both ranks raise the error of one
        assert ranking_error == "this cannot be ranked"
        assert "vectors are not finite" in vector_error


def test_excluded_documents_are_never_mined(make_task, make_encoder, tmp_path):
    data = make_task(SearchDataModule)
    data.strip(np.zeros(0, dtype=np.int64), np.array([4, 7]))
    mining = mining_of(tmp_path)
    mined = mining.run(mining.cache(make_encoder("shared")), data.pools())["search"]
    for q, example in enumerate(data.examples):
        assert set(lists_of(mined)[q]) == set(range(10)) - {4, 7} - set(example.positives)


@pytest.mark.parametrize("guided", [False, True])
def test_mining_in_memory_equals_mining_with_a_folder(make_task, make_encoder, tmp_path, guided):
    data, encoder = make_task(SearchDataModule), make_encoder("attention")
    guide = make_encoder("shared", seed=7) if guided else None
    mining = mining_of(tmp_path, guide=guide, relative_margin=0.01, sampling="random", num_negatives=2)
    from_folder = mining.run(mining.cache(encoder), data.pools())["search"]
    guide_vectors = VectorCache(guide, similarity="cosine") if guide else None
    (pool,) = data.pools()
    mined = mine(encoder, pool, None, mining.options, similarity="cosine", guide=guide_vectors, seeds=(3, 0))
    assert lists_of(mined) == lists_of(from_folder)
    np.testing.assert_array_equal(mined.margins, from_folder.margins)
    assert mined.negatives.removed == from_folder.negatives.removed


def test_documents_have_the_vectors_of_another_model(make_task, make_encoder):
    """An asymmetric student is never trained to encode documents, so its teacher's vectors are searched."""
    data, student, teacher = make_task(SearchDataModule), make_encoder("shared"), make_encoder("attention", seed=7)
    (pool,), options = data.pools(), MiningOptions(k=10, relative_margin=None, num_negatives=10)
    teachers = VectorCache(teacher, similarity="cosine")
    mined = mine(student, pool, None, options, similarity="cosine", document_vectors=teachers)
    texts = [student.encode([data.documents[example.query] for example in data.examples], "search")]
    texts.append(teacher.encode(list(data.collections["toy"].corpus.values()), "search"))
    queries, documents = (torch.nn.functional.normalize(vectors, dim=-1).double().numpy() for vectors in texts)
    for scores, rows, example in zip(queries @ documents.T, lists_of(mined), data.examples, strict=True):
        order = np.argsort(-scores, kind="stable").tolist()
        assert rows == [row for row in order if row not in example.positives]
    larger = VectorCache(make_encoder("shared", config={"hidden_size": 48}), similarity="cosine")
    with pytest.raises(UserError, match="document_vectors: expected 32 dimensions, .* got 48"):
        mine(student, pool, None, options, document_vectors=larger)


@pytest.mark.parametrize("guided", [False, True])
def test_memory_bounds_the_vectors_of_the_positives(make_task, make_encoder, monkeypatch, guided):
    """All positives of a block of queries were read at once, and converted to float64."""
    corpus = {f"d{i}": Document(f"d{i}", text_of(i), text_of(i, i + 3)) for i in range(10)}
    queries = {f"q{i}": Document(f"q{i}", "", f"{text_of(i, i + 7)} {i}") for i in range(200)}
    qrels = {query: {f"d{(i + j) % 10}": 1 for j in range(8)} for i, query in enumerate(queries)}
    (pool,) = make_task(SearchDataModule, collection=Collection(corpus, queries, {"train": qrels})).pools()
    encoder, counts, gather = make_encoder("shared"), [], Shards.gather

    def counting(shards, rows):
        counts.append(len(rows))
        return gather(shards, rows)

    monkeypatch.setattr(Shards, "gather", counting)
    guide = VectorCache(encoder, similarity="cosine") if guided else None
    mined = mine(encoder, pool, None, MiningOptions(k=10, memory_mb=1), similarity="cosine", guide=guide)
    assert len(pool.positives.values) == 1600
    assert max(counts) * 24 * encoder.dimension <= 1 << 20
    plain = mine(encoder, pool, None, MiningOptions(k=10), similarity="cosine", guide=guide)
    np.testing.assert_array_equal(mined.margins, plain.margins)
    assert lists_of(mined) == lists_of(plain)


@pytest.mark.parametrize("field", ["corpus", "queries"])
@pytest.mark.parametrize("miner", [DenseMiner(), RandomMiner(), BM25Miner()])
def test_empty_pool_raises_user_error(make_task, make_encoder, field, miner):
    pool = dataclasses.replace(make_task(SearchDataModule).pools()[0], **{field: []})
    name = {"corpus": "documents"}.get(field, field)
    with pytest.raises(UserError, match=f"nothing to mine, because it has no {name}"):
        mine(make_encoder("shared"), pool, miner, MiningOptions(k=5))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_similarity_of_the_training_is_the_default(make_task, make_encoder, similarity):
    pool, encoder = make_task(SearchDataModule).pools()[0], make_encoder("shared")
    encoder.similarity = similarity
    options = MiningOptions(k=5, relative_margin=None)
    mined, expected = (mine(encoder, pool, options=options, **o) for o in ({}, {"similarity": similarity}))
    np.testing.assert_array_equal(mined.negatives.scores, expected.negatives.scores)


def test_description_covers_the_weights_of_the_guide(make_encoder, tmp_path):
    """After a change of the guide in its folder, make mine kept the old negatives."""

    def description(guide):
        return Mining(MiningOptions(guide="folder"), {"search": DenseMiner()}, tmp_path, guide=guide).description

    assert description(make_encoder("shared", seed=1)) == description(make_encoder("shared", seed=1))
    assert description(make_encoder("shared", seed=1)) != description(make_encoder("shared", seed=2))
