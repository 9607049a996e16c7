"""Judges find planted false negatives: positives that the train split does not know."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from datamodules.records import DROP, KEEP, POSITIVE, Collection, Document, UserError
from datamodules.tasks import SearchDataModule
from lightning_modules.encoders.pretrained import save_encoder
from lightning_modules.mining.cross_encoder import CrossEncoderJudge, PairTable
from lightning_modules.mining.mine import Mining, MiningOptions, without_negatives
from lightning_modules.mining.mined import unrated
from lightning_modules.mining.miners import RandomMiner
from lightning_modules.mining.relabel import FileJudge, GuideJudge, Pairs
from lightning_modules.mining.report import report, reports_of, table, write_report
from tests.conftest import WORDS, toy_collection

TOPICS, WORDS_PER_TOPIC = 3, 4


def planted():
    """Return a collection in which all 8 papers of a query's topic are relevant, but only 4 are known."""
    rng = np.random.default_rng(0)

    def texts(kind, topic, length, count):
        """Return documents that differ in the order of a topic's words."""
        orders = list(itertools.permutations(WORDS[topic * WORDS_PER_TOPIC :][:WORDS_PER_TOPIC], length))
        chosen = rng.choice(len(orders), count, replace=False).tolist()
        ids = [f"{kind}{topic}-{i}" for i in range(count)]
        return {id: Document(id, "", " ".join(orders[i])) for id, i in zip(ids, chosen, strict=True)}

    corpus = {id: paper for topic in range(TOPICS) for id, paper in texts("d", topic, 4, 8).items()}
    queries = {id: query for topic in range(TOPICS) for id, query in texts("q", topic, 3, 20).items()}
    known = {q: {f"d{q[1]}-{i}": 1 for i in rng.permutation(8)[:4].tolist()} for q in queries}
    return Collection(corpus, queries, {"train": known})


@pytest.fixture
def data(make_task):
    return make_task(SearchDataModule, collection=planted())


@pytest.fixture
def guide(make_encoder, tmp_path):
    """An encoder in which words of a topic have similar vectors."""
    encoder = make_encoder("shared", pooling="mean", config={"num_layers": 1})
    vocabulary, embeddings = encoder.tokenizer.get_vocab(), encoder.backbone.embeddings.word_embeddings.weight
    with torch.no_grad():
        for topic in range(TOPICS):
            rows = [vocabulary[w] for w in WORDS[topic * WORDS_PER_TOPIC : (topic + 1) * WORDS_PER_TOPIC]]
            embeddings[rows] = embeddings[rows[0]] + 0.1 * embeddings[rows]
    return str(save_encoder(encoder, tmp_path / "guide"))


def mining_with(judge, folder, **options):
    arguments = {"k": 24, "num_negatives": 24, "relative_margin": None, "same_text": False} | options
    judges = {"search": judge} if judge else {}
    return Mining(MiningOptions(**arguments), {"search": RandomMiner()}, folder, judges=judges)


def pairs_of(mined, pool):
    """Return the ids of query and paper of each mined document."""
    queries = np.repeat(np.arange(len(pool.queries)), np.diff(mined.negatives.starts))
    rows = mined.negatives.documents - pool.first_row
    return [(pool.queries[q].id, pool.corpus[r].id) for q, r in zip(queries.tolist(), rows.tolist(), strict=True)]


def is_false(pair):
    """Return whether a mined pair is a planted false negative."""
    return pair[0][1] == pair[1][1]


def precision_and_recall(mined, pool, labels=(DROP, POSITIVE)):
    truth = np.array([is_false(pair) for pair in pairs_of(mined, pool)])
    found = np.isin(mined.negatives.labels, labels)
    assert truth.sum() == 20 * TOPICS * 4
    return (found & truth).sum() / max(1, found.sum()), (found & truth).sum() / truth.sum()


def test_guide_finds_planted_false_negatives(data, guide, tmp_path):
    pools = data.pools()
    mined = mining_with(GuideJudge(guide, -0.05, 0.0), tmp_path).run(None, pools)["search"]
    precision, recall = precision_and_recall(mined, pools[0])
    assert min(precision, recall) > 0.95
    precision, recall = precision_and_recall(mined, pools[0], [POSITIVE])
    assert precision > 0.95
    assert 0.2 < recall < 0.99, "only the best become positives"


def test_guide_decides_by_the_cosine_minus_that_of_the_positives(make_task, make_encoder, tmp_path):
    """Compare with a loop, for queries with several positives."""
    data, encoder = make_task(SearchDataModule, collection=toy_collection()), make_encoder("shared", seed=3)
    judge = GuideJudge(str(save_encoder(encoder, tmp_path / "guide")), drop_above=-0.2, positive_above=-0.05)
    mined = mining_with(judge, tmp_path, k=10).run(None, data.pools())["search"]
    vectors = torch.nn.functional.normalize(encoder.encode(list(data.documents), "search").double(), dim=-1).numpy()
    labels = []
    for q, rows in enumerate(np.split(mined.negatives.documents, mined.negatives.starts[1:-1])):
        query, positives = vectors[data.examples[q].query], vectors[list(data.examples[q].positives)]
        for row in rows.tolist():
            score = query @ vectors[row] - (positives @ query).mean()
            labels.append(POSITIVE if score >= -0.05 else DROP if score >= -0.2 else KEEP)
    assert set(labels) == {KEEP, DROP, POSITIVE}
    assert mined.negatives.labels.tolist() == labels


@pytest.mark.slow
def test_cross_encoder_finds_planted_false_negatives_of_queries_it_has_not_seen(
    data, make_backbone, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    for part in make_backbone(1, num_layers=1, initializer_range=0.1):
        part.save_pretrained(tmp_path / "bert")
    options = {"steps": 250, "lr": 3e-3, "max_length": 16, "positive_above": 0.8}
    judge, pools = CrossEncoderJudge(str(tmp_path / "bert"), **options), data.pools()
    mined = mining_with(judge, tmp_path).run(None, pools)["search"]
    precision, recall = precision_and_recall(mined, pools[0])
    assert min(precision, recall) > 0.95
    assert caplog.text.count("of its queries' known positives") == 2

    # the trained judges are stored, and another threshold does not train them again
    monkeypatch.setattr(CrossEncoderJudge, "_train", None)
    again = CrossEncoderJudge(str(tmp_path / "bert"), **options | {"positive_above": None})
    labels = mining_with(again, tmp_path).run(None, pools)["search"].negatives.labels
    assert np.array_equal(labels > 0, mined.negatives.labels > 0)
    assert again.description != judge.description
    for change in ({"seed": 1}, {"steps": 249}, {"folds": 3}):
        with pytest.raises(TypeError):  # it would have to train
            mining_with(CrossEncoderJudge(str(tmp_path / "bert"), **options | change), tmp_path).run(None, pools)


@pytest.mark.parametrize("folds", [2, 3])
def test_no_pair_is_judged_by_a_model_that_has_seen_its_texts(make_task, folds):
    """In link prediction, a paper may be the query of one pair and the document of another."""
    data = make_task(SearchDataModule, collection=toy_collection(10, 10, papers=True))
    (pool,) = data.pools()
    queries, documents = map(np.ravel, np.indices((10, 10)))
    known = set(zip(np.repeat(np.arange(10), np.diff(pool.positives.starts)), pool.positives.values, strict=True))
    is_mined = np.array([pair not in known for pair in zip(queries, documents, strict=True)])
    pairs = PairTable.of([Pairs(pool, queries[is_mined], documents[is_mined])])
    fold_of_pair = pairs.folds(folds, seed=0)
    assert len(set(fold_of_pair.tolist())) == folds
    num_left_out = 0
    for fold in range(folds):
        judged = np.flatnonzero(pairs.is_mined & (fold_of_pair == fold))
        rows = pairs.unseen(fold_of_pair != fold, judged)
        num_left_out += (fold_of_pair != fold).sum() - len(rows)
        seen, now = ({frozenset(texts) for texts in pairs.texts(part)} for part in (rows, judged))
        assert len(seen) > 5
        assert not seen & now
        queries_seen = {query for query, _ in pairs.texts(rows)}
        assert not queries_seen & {query for query, _ in pairs.texts(judged)}
    assert num_left_out > 0


def judgements(tmp_path, lines, name="judged.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["labels", "scores", "tsv"])
def test_file_of_the_truth_has_precision_and_recall_1(data, tmp_path, form):
    pools = data.pools()
    pairs = pairs_of(mining_with(None, tmp_path).run(None, pools)["search"], pools[0])
    lines, name = [], "judged.tsv" if form == "tsv" else "judged.jsonl"
    for query, paper in pairs:
        relevant = is_false((query, paper))
        if form == "labels":
            value = {"label": "positive" if relevant else "keep"}
        else:
            value = {"score": 0.9 if relevant else 0.3}
        line = json.dumps({"query": query, "paper": paper} | value)
        lines.append(f"{query}\t{paper}\t{value['score']}" if form == "tsv" else line)
    judge = FileJudge(str(judgements(tmp_path, ["query\tpaper\tscore"] * (form == "tsv") + lines, name)), 0.8, 0.8)
    mined = mining_with(judge, tmp_path).run(None, pools)["search"]
    assert precision_and_recall(mined, pools[0], [POSITIVE]) == (1, 1)
    assert mined.relabelled.counts == {"keep": len(pairs) - 240, "drop": 0, "positive": 240}
    judge = FileJudge(judge.path, 0.8)
    labels = mining_with(judge, tmp_path).run(None, pools)["search"].negatives.labels
    assert set(labels.tolist()) == ({KEEP, POSITIVE} if form == "labels" else {KEEP, DROP})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q9-9", "paper": "d0-1", "label": "drop"}', ":3: unknown query 'q9-9'"),
        ('{"query": "q0-1", "paper": "d9", "label": "drop"}', ":3: unknown paper 'd9'; expected .* of query 'q0-1'"),
        ('{"query": "q0-1", "paper": "d0-1", "label": "maybe"}', ":3: expected a JSON object .*maybe"),
        ('{"query": "q0-1", "paper": "d0-1", "score": NaN}', ":3: expected a JSON object .*a finite number"),
        ('{"query": "q0-1", "paper": "d0-1"}', ":3: expected a JSON object"),
        ('{"query": "q0-1", "paper": "d0-1", "label": "drop", "score": 1}', ":3: expected a JSON object"),
        ("[1, 2]", ":3: expected a JSON object"),
        ("not json", ":3: expected a JSON object"),
        (
            '{"query": "q0-0", "paper": "d0-0", "label": "keep"}',
            ":3: 'q0-0', 'd0-0': got 'keep' here, but 'drop' earlier",
        ),
    ],
)
def test_invalid_judgement_names_file_and_line(data, tmp_path, line, message):
    path = judgements(tmp_path, ['{"query": "q0-0", "paper": "d0-0", "label": "drop"}', "", line])
    with pytest.raises(UserError, match=message):
        mining_with(FileJudge(str(path)), tmp_path).run(None, data.pools())


def test_invalid_line_of_columns_names_file_and_line(data, tmp_path):
    path = judgements(tmp_path, ["q0-0\td0-0\tdrop", "q0-1\td0-1"], "judged.tsv")
    with pytest.raises(UserError, match=r"judged.tsv:2: expected three columns: .*got 'q0-1.*td0-1'"):
        mining_with(FileJudge(str(path)), tmp_path).run(None, data.pools())


def test_judgements_are_checked_before_mining(data, tmp_path, monkeypatch):
    """A wrong file once ended a training at its first mining, and `make mine` after its last search."""
    monkeypatch.setattr("lightning_modules.mining.mine.mine", None)
    with pytest.raises(UserError, match=":1: expected a JSON object"):
        FileJudge(str(judgements(tmp_path, ["not json"])))
    judge = FileJudge(str(judgements(tmp_path, ['{"query": "q9-9", "paper": "d0-1", "label": "drop"}'])))
    with pytest.raises(UserError, match=":1: unknown query 'q9-9'"):
        mining_with(judge, tmp_path).run(None, data.pools())


@pytest.mark.parametrize("name", ["judged.tsv", "judged.jsonl"])
def test_file_of_judgements_may_have_a_byte_order_mark(data, tmp_path, name):
    line = "q0-0\td0-0\tdrop" if name.endswith(".tsv") else '{"query": "q0-0", "paper": "d0-0", "label": "drop"}'
    FileJudge(str(judgements(tmp_path, ["\ufeff" + line], name))).check(data.pools())


def test_invalid_settings_raise_user_error(tmp_path):
    with pytest.raises(UserError, match="positive_above: expected at least drop_above, 0.5, got 0.4"):
        FileJudge("any", 0.5, 0.4)
    with pytest.raises(UserError, match="path: .*missing.jsonl cannot be read"):
        FileJudge(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="model: the package not_there is not installed"):
        GuideJudge("package:not_there")
    with pytest.raises(UserError, match="folds: expected at least 2"):
        CrossEncoderJudge("any", folds=1)


def test_a_judge_that_leaves_no_negatives_is_named(data, guide, tmp_path):
    mined = mining_with(GuideJudge(guide, -3), tmp_path).run(None, data.pools())
    assert list(without_negatives(mined)) == [
        "search: the judge leaves no negatives; raise drop_above and positive_above"
    ]
    assert report(mined["search"], 0).values == {"negatives": 0.0, "without": 1.0, "dropped": 1.0, "turned": 0.0}


def test_description_covers_model_and_thresholds(guide, make_encoder, tmp_path):
    other = str(save_encoder(make_encoder("shared", seed=4), tmp_path / "other"))
    judges = [GuideJudge(guide), GuideJudge(guide, 0.1), GuideJudge(guide, 0.0, 0.1), GuideJudge(other)]
    assert len({json.dumps(judge.description) for judge in judges}) == 4
    path = judgements(tmp_path, ['{"query": "q", "paper": "p", "label": "drop"}'])
    before = FileJudge(str(path)).description
    path.write_text('{"query": "q", "paper": "p", "label": "keep"}')
    assert FileJudge(str(path)).description != before


def test_report_describes_the_kept_negatives_and_the_decisions(data, tmp_path):
    pools = data.pools()
    plain = mining_with(None, tmp_path).run(None, pools)
    pairs = pairs_of(plain["search"], pools[0])
    labels = ["positive" if i % 4 == 0 else "drop" if i % 4 == 1 else "keep" for i in range(len(pairs))]
    lines = [json.dumps({"query": q, "paper": d, "label": x}) for (q, d), x in zip(pairs, labels, strict=True)]
    mining = mining_with(FileJudge(str(judgements(tmp_path, lines))), tmp_path)
    mined = mining.run(None, pools)
    (again,) = mining.relabelled({"search": unrated(plain["search"].negatives, pools)}, pools).values()
    assert again.negatives.labels.tolist() == mined["search"].negatives.labels.tolist()
    numbers = [np.unique(texts, return_inverse=True)[1] for texts in (again.texts, plain["search"].texts)]
    assert np.array_equal(*numbers)
    assert again.held_out.tolist() == plain["search"].held_out.tolist()
    reports, before = reports_of(mined, 0), reports_of(plain, 0)
    values = reports["search"].values
    assert values["dropped"] == pytest.approx(labels.count("drop") / len(labels))
    assert values["turned"] == pytest.approx(labels.count("positive") / len(labels))
    kept = labels.count("keep") / len(labels)
    assert values["negatives"] == pytest.approx(before["search"].values["negatives"] * kept)
    text = "\n".join(table(reports))
    assert f"decisions of FileJudge: keep {labels.count('keep')}, drop {labels.count('drop')}, positive" in text
    assert repr(pools[0].queries[0].text) in text
    write_report(tmp_path, reports, "title")
    written = json.loads((tmp_path / "report.json").read_text())["search"]["relabelled"]
    assert written["counts"] == {label: labels.count(label) for label in ("keep", "drop", "positive")}
    assert written["judge"] == mining.judging["judges"]["search"]
    assert [example["label"] for example in written["examples"]] == ["positive"] * 5 + ["drop"] * 5
    decisions = dict(zip(pairs, labels, strict=True))
    assert all(decisions[e["query"], e["paper"]] == e["label"] for e in written["examples"])
    assert not math.isnan(values["false_negative_rate"])
