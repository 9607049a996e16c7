"""FAISS indexes, and the commands that use them, are compared with exact search."""

import json

import numpy as np
import pytest

from datamodules.records import UserError
from experiments.embed import main as embed
from experiments.find import main as find
from experiments.index import main as index
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.retrieval.faiss_index import IndexOptions, build_index, measure_recall, search_index
from lightning_modules.retrieval.search import Shards
from tests.conftest import text_of


def clustered(count, dimension=16, clusters=20, seed=0):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((clusters, dimension))[rng.integers(0, clusters, count)]
    vectors = (centres + rng.standard_normal(centres.shape)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivfpq"])
def test_recall_agrees_with_a_loop(kind):
    """At the largest nprobe, an index without quantization is exact."""
    vectors = clustered(600)
    shards = Shards([vectors[:250], vectors[250:]])
    options = IndexOptions(kind=kind, nlist=8, m=4).resolved(600, 16)
    faiss_index = build_index(shards, options)
    lines = measure_recall(faiss_index, shards, options, num_queries=600)
    assert [line["nprobe"] for line in lines] == ([0] if kind == "flat" else [1, 4, 8])
    rows, _ = search_index(faiss_index, vectors, 11, nprobe=options.nlist and 1)
    hits = 0
    for i, query in enumerate(vectors):
        exact = [row for row in np.argsort(-(vectors @ query), kind="stable") if row != i][:10]
        hits += len(set(exact) & set([row for row in rows[i] if row != i][:10]))
    assert lines[0]["recall"] == pytest.approx(hits / 6000, abs=0.01)
    if kind != "ivfpq":
        assert lines[-1]["recall"] == 1.0
    else:
        assert lines[-1]["recall"] < lines[-1]["reranked"] <= 1.0


def test_options_that_do_not_fit_the_vectors_raise():
    with pytest.raises(UserError, match="nlist: expected at most the number of vectors, 600, got 700"):
        IndexOptions(kind="ivf", nlist=700).resolved(600, 16)
    with pytest.raises(UserError, match="m: expected a divisor of the vectors' 16 dimensions, got 5"):
        IndexOptions(kind="pq", m=5).resolved(600, 16)
    with pytest.raises(UserError, match="pq needs at least 256 vectors to learn its codes, got 100"):
        IndexOptions(kind="pq").resolved(100, 16)


@pytest.fixture
def corpus(make_encoder, tmp_path):
    """A folder with 300 embedded papers."""
    make_encoder("attention").save_pretrained(tmp_path / "model")
    papers = [{"id": f"p{i}", "title": text_of(i, i // 7), "text": text_of(i + 1, i // 3)} for i in range(300)]
    (tmp_path / "papers.jsonl").write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    arguments = [f"model={tmp_path / 'model'}", "task=search", f"input={tmp_path / 'papers.jsonl'}", "shard_size=128"]
    embed([*arguments, f"output={tmp_path / 'vectors'}"])
    return tmp_path


def test_find_shows_the_nearest_papers_with_and_without_an_index(corpus, capsys):
    query = text_of(3, 4, 5)
    encoder = load_encoder(corpus / "model")
    matrix = np.load(corpus / "vectors" / "search.npy")
    query_vector = encoder.encode([query], "search").numpy()[0]
    best = [f"p{row}" for row in np.argsort(-(matrix @ query_vector))[:3]]
    sources = [f"embeddings={corpus / 'vectors'}"]
    for kind in ("flat", "ivf", "ivfpq"):
        output = corpus / f"{kind}.faiss"
        index([f"embeddings={corpus / 'vectors'}", f"output={output}", f"kind={kind}", "nlist=2", "m=8", "recall=1"])
        sources.append(f"index={output}")
    capsys.readouterr()
    for source in sources:
        find([source, f"query={query}", "k=3"])
        printed = capsys.readouterr().out
        assert [word for word in printed.split() if word in best] == best, source
        title = text_of(int(best[0][1:]), int(best[0][1:]) // 7)
        assert title.split()[0] in printed


def test_queries_of_a_folder_are_not_its_corpus(corpus):
    """A folder in BEIR layout ranked its documents, as if they were the queries."""
    (corpus / "beir").mkdir()
    (corpus / "beir" / "corpus.jsonl").write_text('{"_id": "d", "text": "a document"}\n')
    (corpus / "beir" / "queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    find([f"embeddings={corpus / 'vectors'}", f"queries={corpus / 'beir'}", f"output={corpus / 'run.trec'}"])
    assert {line.split()[0] for line in (corpus / "run.trec").read_text().splitlines()} == {"q"}


def test_printed_commands_quote_paths(corpus, caplog):
    """They ended at the first space when they were copied."""
    arguments = [f"model={corpus / 'model'}", "task=search", f"input={corpus / 'papers.jsonl'}"]
    with caplog.at_level("INFO"):
        embed([*arguments, f"output={corpus / 'my vectors'}"])
        index([f"embeddings={corpus / 'my vectors'}", f"output={corpus / 'my index'}", "kind=flat"])
    assert f"Next: make find embeddings='{corpus / 'my vectors'}' task=search" in caplog.text
    assert f"Next: make find index='{corpus / 'my index'}' query" in caplog.text


def test_rankings_of_many_queries_agree_with_a_loop(corpus):
    lines = [{"id": f"q{i}", "text": text_of(i, 2 * i)} for i in range(5)]
    (corpus / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    find([f"embeddings={corpus / 'vectors'}", f"queries={corpus / 'queries.jsonl'}", f"output={corpus / 'run.trec'}"])
    matrix, encoder = np.load(corpus / "vectors" / "search.npy"), load_encoder(corpus / "model")
    run = [line.split() for line in (corpus / "run.trec").read_text().splitlines()]
    for i, line in enumerate(lines):
        scores = matrix @ encoder.encode([line["text"]], "search").numpy()[0]
        ranking = [(document, float(score)) for query, _, document, _, score, _ in run if query == f"q{i}"]
        assert len(ranking) == 10
        expected_scores = scores / np.linalg.norm(encoder.encode([line["text"]], "search").numpy()[0])
        np.testing.assert_allclose([score for _, score in ranking], np.sort(expected_scores)[::-1][:10], atol=1e-5)
        np.testing.assert_allclose(
            [expected_scores[int(d[1:])] for d, _ in ranking], [s for _, s in ranking], atol=1e-5
        )


def test_another_model_or_damaged_files_raise(corpus, make_encoder):
    make_encoder("attention", seed=1).save_pretrained(corpus / "other")
    with pytest.raises(UserError, match="other is not the one that embedded the papers"):
        find([f"embeddings={corpus / 'vectors'}", "query=a", f"model={corpus / 'other'}"])
    output = corpus / "papers.faiss"
    index([f"embeddings={corpus / 'vectors'}", f"output={output}"])
    matrix = corpus / "vectors" / "search.npy"
    for key in ("index", "embeddings"):
        with pytest.raises(UserError, match="nowhere(: no such file| is not a file)"):
            find([f"{key}={corpus / 'nowhere'}", "query=a"])
    # The ids or scores of altered files were shown as results.
    for key, file in (("index", output), ("embeddings", matrix)):
        for path in (file, file.with_name(f"{file.name}.ids.txt")):
            good = path.read_bytes()
            for damaged in (good[:100], good[:-3] + bytes([good[-3] ^ 1]) + good[-2:], b""):
                path.write_bytes(damaged)
                with pytest.raises(UserError, match=f"{path.name}: damaged .its content differs from what was written"):
                    find([f"{key}={file}", "query=a"])
            path.write_bytes(good)
        find([f"{key}={file}", "query=a"])
        metadata = file.with_name(f"{file.name}.json")
        metadata.write_text(metadata.read_text().replace('"similarity": "cosine"', '"similarity": "l3"'))
        with pytest.raises(UserError, match="similarity: expected one of dot, cosine, got 'l3'"):
            find([f"{key}={file}", "query=a"])
        metadata.write_text(metadata.read_text().replace('"similarity"', '"other"'))
        with pytest.raises(UserError, match=f"{metadata.name}: expected a text as similarity, got None"):
            find([f"{key}={file}", "query=a"])


@pytest.mark.parametrize("kind", ["flat", "pq"])
def test_scores_of_an_index_never_come_from_other_vectors(corpus, kind, caplog):
    """A pq index took exact scores from the matrix, even if the papers had been embedded again after a change."""

    def ranking():
        caplog.clear()
        find([f"index={corpus / 'papers.faiss'}", "query=a", f"output={corpus / 'run.trec'}"])
        return (corpus / "run.trec").read_text()

    index([f"embeddings={corpus / 'vectors'}", f"output={corpus / 'papers.faiss'}", f"kind={kind}"])
    ranking()
    assert not caplog.messages
    (corpus / "vectors").rename(corpus / "moved")
    without_vectors = ranking()
    papers = (corpus / "papers.jsonl").read_text().splitlines(keepends=True)
    (corpus / "papers.jsonl").write_text("".join(reversed(papers)))
    arguments = [f"model={corpus / 'model'}", "task=search", f"input={corpus / 'papers.jsonl'}"]
    embed([*arguments, f"output={corpus / 'vectors'}"])
    assert ranking() == without_vectors
    assert "search.npy: has changed since the index was built" in caplog.text


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_recall_of_a_tiny_corpus_is_one(count, kind):
    shards = Shards([clustered(count)])
    options = IndexOptions(kind=kind).resolved(count, 16)
    lines = measure_recall(build_index(shards, options), shards, options)
    assert [line["recall"] for line in lines] == [1.0] * len(lines)
    assert lines[-1]["nprobe"] == options.nlist


def test_ranking_of_one_query_is_shown_and_written(corpus, capsys):
    find([f"embeddings={corpus / 'vectors'}", f"query={text_of(3, 4)}", f"output={corpus / 'run.trec'}", "k=3"])
    rows = [line.split() for line in (corpus / "run.trec").read_text().splitlines()]
    assert [row[0] for row in rows] == ["query"] * 3
    printed = capsys.readouterr().out.split()
    assert [word for word in printed if word in {row[2] for row in rows}] == [row[2] for row in rows]
