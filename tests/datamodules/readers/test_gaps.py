"""What data sets lack without being damaged: texts under other keys, blank documents, missing judged documents."""

import logging

import numpy as np
import pytest
import pytrec_eval

from datamodules.conversion import stored
from datamodules.readers import tables
from datamodules.readers.beir import BeirReader
from datamodules.readers.beir_hub import BeirHubReader
from datamodules.readers.checks import check_grade
from datamodules.readers.jsonl import JsonlReader
from datamodules.readers.rows import BadLines
from datamodules.readers.scirepeval import SciRepEvalReader
from datamodules.readers.texts import documents_at, read_shards
from datamodules.records import Collection, Document, UserError
from datamodules.tasks import SearchDataModule
from datamodules.text import as_documents
from lightning_modules.retrieval.evaluation import evaluate, evaluate_bm25
from tests.datamodules.readers.test_contract import error_of
from tests.datamodules.readers.worlds import put

# The ways to write a paper whose abstract is its text.
PAPERS = (
    {"title": "A study", "abstract": "Stars collapse."},
    {"title": "A study", "text": "", "abstract": "Stars collapse."},
    {"title": "A study", "text": None, "abstract": "Stars collapse."},
    {"title": "A study", "text": " \n", "abstract": "Stars collapse."},
    {"title": "A study", "text": "Stars collapse.", "abstract": "Another text."},
    {"title": "A study", "text": "Stars collapse.", "abstract": None},
)


def beir_folder(folder, corpus, qrels, split="test", header="query-id\tcorpus-id\tscore"):
    put(folder / "corpus.jsonl", *corpus)
    put(folder / "queries.jsonl", *({"_id": q, "text": f"masks {q}"} for q in {line.split("\t")[0] for line in qrels}))
    put(folder / "qrels" / f"{split}.tsv", *([header] if header else []), *qrels)
    return folder


def through_jsonl(folder, paper):
    put(folder / "corpus.jsonl", {"id": "p"} | paper)
    put(folder / "test.jsonl", {"query": paper, "positives": ["p"]})
    collection = JsonlReader(str(folder)).read()
    return [collection.corpus["p"], collection.queries["test.1"]]


def through_beir(folder, paper):
    beir_folder(folder, [{"_id": "p"} | paper], ["q\tp\t1"])
    put(folder / "queries.jsonl", {"_id": "q"} | paper)
    collection = BeirReader(str(folder)).read()
    return [collection.corpus["p"], collection.queries["q"]]


def through_hub(folder, paper, monkeypatch):
    rows = {"corpus": [{"_id": "p"} | paper], "queries": [{"_id": "q"} | paper]}
    judged = {"test": [{"query-id": "q", "corpus-id": "p", "score": 1}]}
    load = {"corpus": {"corpus": rows["corpus"]}, "queries": {"queries": rows["queries"]}, "default": judged}
    for module in ("tables", "beir_hub"):
        monkeypatch.setattr(f"datamodules.readers.{module}.load_hub", lambda dataset, config: load[config])
    collection = BeirHubReader("x").read()
    return [collection.corpus["p"], collection.queries["q"]]


def through_file_of_texts(folder, paper):
    put(folder / "papers.jsonl", {"id": "p"} | paper)
    (_, embedded), *_ = read_shards([folder / "papers.jsonl"], 10, {0}, BadLines())
    return [*embedded, documents_at([folder / "papers.jsonl"], [0])[0]]


def through_scirepeval(folder, paper):
    candidates = [{"doc_id": "p", "score": 1} | paper]
    put(folder / "test.jsonl", {"query": {"doc_id": "q"} | paper, "candidates": candidates})
    collection = SciRepEvalReader("search", str(folder)).read()
    return [collection.corpus["p"], collection.queries["q"]]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_place_that_reads_papers_takes_the_same_text(paper, tmp_path, monkeypatch):
    documents = [
        *as_documents([paper]),
        *through_jsonl(tmp_path / "jsonl", paper),
        *through_beir(tmp_path / "beir", paper),
        *through_hub(tmp_path, paper, monkeypatch),
        *through_file_of_texts(tmp_path / "texts", paper),
    ]
    assert {(d.title, d.text) for d in documents} == {("A study", "Stars collapse.")}


def test_format_that_says_abstract_takes_the_text_where_the_abstract_is_missing(tmp_path):
    papers = ({"title": "A study", "text": "Stars."}, {"title": "A study", "text": "Stars.", "abstract": ""})
    for number, paper in enumerate(papers):
        documents = through_scirepeval(tmp_path / str(number), paper)
        assert {(d.title, d.text) for d in documents} == {("A study", "Stars.")}


@pytest.mark.parametrize("key", ["abstract_inverted_index", "abstractText", "paperAbstract", "summary", "Abstract"])
def test_text_under_another_known_key_is_named(key, tmp_path, caplog):
    value = {"Stars": [0]} if key == "abstract_inverted_index" else "Stars collapse."
    corpus = [{"_id": "p1", "title": "t", "abstract": "x"}, {"_id": "p2", "title": "A study", key: value}]
    BeirReader(str(beir_folder(tmp_path, corpus, ["q\tp1\t1"]))).read()
    assert f"corpus.jsonl: 1 document without a text have {key}, which is not read" in caplog.text
    caplog.clear()
    as_documents([{"title": "A study", key: value}])
    assert f"documents[0]: {key} is not read; the text is expected as text or abstract" in caplog.text


def test_corpus_of_titles_with_other_long_strings_warns_and_names_the_key(tmp_path, caplog):
    long = "A long sentence about the collapse of stars under their own gravity. " * 2
    corpus = [{"_id": f"p{i}", "title": "A study", "venue": "x", "notes": long} for i in range(3)]
    BeirReader(str(beir_folder(tmp_path, corpus, ["q\tp1\t1"]))).read()
    assert "no document has a text, but 3 of 3 have a long string as notes, which is not read" in caplog.text
    caplog.clear()
    put(tmp_path / "corpus.jsonl", *corpus, {"_id": "p9", "title": "A study", "text": "x"})
    BeirReader(str(tmp_path)).read()
    put(tmp_path / "corpus.jsonl", *({"_id": f"p{i}", "title": "Only a title", "year": 2001} for i in range(3)))
    BeirReader(str(tmp_path)).read()
    assert not caplog.records


TREC = [{"_id": "d1", "title": "Masks", "text": "On masks."}, {"_id": "d2", "text": "Trials of vaccines."}]
BLANK = {"_id": "d3", "title": "", "text": " "}


def benchmark_of(collection, tmp_path, is_stored, split="test"):
    data = SearchDataModule("search", {"toy": collection}, cache=str(tmp_path / "cache") if is_stored else None)
    data.setup()
    return data, next(b for b in data.benchmarks(split) if b.name == "toy")


@pytest.mark.parametrize("is_stored", [False, True])
def test_blank_document_is_never_found_and_still_counts_as_relevant(is_stored, tmp_path, make_encoder, caplog):
    qrels = ["1\td1\t2", "1\td2\t0", "1\td3\t1", "2\td2\t1"]
    folder = beir_folder(tmp_path / "set", [*TREC, BLANK], qrels)
    put(folder / "qrels" / "train.tsv", "1\td1\t1", "1\td3\t1", "2\td3\t1")
    reader = BeirReader(str(folder))
    collection = stored(reader, tmp_path / "cache") if is_stored else reader.read()
    assert "corpus.jsonl: 1 document without title and text" in caplog.text
    assert list(collection.corpus) == ["d1", "d2", "d3"]
    data, benchmark = benchmark_of(reader, tmp_path, is_stored)
    for result in (evaluate(make_encoder(), benchmark, ["recall@10"]), evaluate_bm25(benchmark, ["recall@10"])):
        found = {result.run.documents[i] for i in result.run.indices.ravel() if i >= 0}
        assert "d3" not in found
    assert evaluate(make_encoder(), benchmark, ["recall@10"]).metrics["recall@10"] == (1 / 2 + 1) / 2
    # In training, neither its judgements nor the document remain.
    assert [len(example.positives) for example in data.examples] == [1]
    (pool,) = data.pools()
    assert pool.excluded.tolist() == [2]


@pytest.mark.parametrize("is_stored", [False, True])
def test_judged_document_outside_the_corpus_counts_as_relevant_and_not_found(is_stored, tmp_path, caplog, make_encoder):
    """The figures are those of trec_eval on the published judgements."""
    qrels = {"1": {"d1": 1, "d9": 1}, "2": {"d8": 2, "d2": 1, "d7": 0}}
    lines = [f"{q}\t{d}\t{g}" for q, grades in qrels.items() for d, g in grades.items()]
    folder = beir_folder(tmp_path / "set", TREC, lines)
    put(folder / "qrels" / "train.tsv", *lines)
    reader = BeirReader(str(folder), on_error="skip", quarantine=str(tmp_path / "q"))
    data, benchmark = benchmark_of(reader, tmp_path, is_stored)
    assert benchmark.qrels == qrels
    assert not (tmp_path / "q").exists()
    assert "3 of 5 judgements are for documents that are not in the corpus (3 documents, first 'd9')" in caplog.text
    result = evaluate(make_encoder(), benchmark, ["ndcg@10", "recall@100"])
    run = {
        query: {result.run.documents[i]: float(score) for i, score in zip(rows, scores, strict=True) if i >= 0}
        for query, rows, scores in zip(result.run.queries, result.run.indices, result.run.scores, strict=True)
    }
    reference = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    for metric, name in (("ndcg@10", "ndcg_cut_10"), ("recall@100", "recall_100")):
        assert result.metrics[metric] == pytest.approx(np.mean([values[name] for values in reference.values()]))
    assert {example.query: len(example.positives) for example in data.examples} == {2: 1, 3: 1}


def test_judgements_of_another_corpus_raise_user_error(tmp_path):
    beir_folder(tmp_path, TREC, ["1\tx1\t1", "1\tx2\t1"])
    assert "test.tsv: none of the judged documents is in the corpus: 'x1', 'x2'" in error_of(BeirReader(str(tmp_path)))


def test_corpus_without_any_text_raises_user_error(tmp_path):
    beir_folder(tmp_path, [BLANK], ["1\td3\t1"])
    assert "corpus.jsonl: no document has a title or a text" in error_of(BeirReader(str(tmp_path)))


def test_blank_query_raises_user_error(tmp_path):
    beir_folder(tmp_path, TREC, ["1\td1\t1"])
    put(tmp_path / "queries.jsonl", {"_id": "1", "text": ""})
    assert "queries.jsonl, line 1: document '1' has neither title nor text" in error_of(BeirReader(str(tmp_path)))


def test_collection_of_python_leaves_out_missing_documents_of_training(tmp_path):
    corpus = {"a": Document("a", "", "x"), "b": Document("b")}
    queries = {"q": Document("q", "", "x")}
    collection = Collection(corpus, queries, {"train": {"q": {"a": 1, "b": 1, "c": 1}}})
    data = SearchDataModule("search", {"toy": collection})
    data.setup()
    assert data.examples[0].positives == (0,)


@pytest.mark.parametrize("name", ["dev", "validation", "valid", "val", "development"])
def test_other_names_of_the_dev_split_are_read(name, tmp_path):
    beir_folder(tmp_path / "beir", TREC, ["1\td1\t1"], split=name)
    assert list(BeirReader(str(tmp_path / "beir")).read().qrels) == ["dev"]
    put(tmp_path / "jsonl" / "corpus.jsonl", {"id": "d1", "text": "x"})
    put(tmp_path / "jsonl" / f"{name}.jsonl", {"query": "y", "positives": ["d1"]})
    assert list(JsonlReader(str(tmp_path / "jsonl")).read().qrels) == ["dev"]
    put(tmp_path / "rows" / f"{name}.jsonl", {"query": "y", "candidates": [{"doc_id": "p", "title": "t", "score": 1}]})
    assert list(SciRepEvalReader("search", str(tmp_path / "rows")).read().qrels) == ["dev"]
    assert tables.SPLIT_NAMES[name] == "dev"


def test_files_of_splits_that_are_not_read_are_named(tmp_path, caplog):
    beir_folder(tmp_path, TREC, ["1\td1\t1"])
    for name in ("dev", "validation", "test_hard"):
        put(tmp_path / "qrels" / f"{name}.tsv", "1\td1\t1")
    with caplog.at_level(logging.WARNING):
        assert list(BeirReader(str(tmp_path)).read().qrels) == ["dev", "test"]
    assert f"{tmp_path / 'qrels'}: not read: test_hard.tsv, validation.tsv" in caplog.text
    caplog.clear()
    put(tmp_path / "jsonl" / "corpus.jsonl", {"id": "d1", "text": "x"})
    for name in ("test", "extra"):
        put(tmp_path / "jsonl" / f"{name}.jsonl", {"query": "y", "positives": ["d1"]})
    JsonlReader(str(tmp_path / "jsonl")).read()
    assert "not read: extra.jsonl" in caplog.text


@pytest.mark.parametrize("header", ["query-id\tcorpus-id\tscore", "qid\tdocid\trel", "query_id\tdoc_id\tRelevance", ""])
@pytest.mark.parametrize("grade", ["1", "1.0", "1.", "+1", "1.00"])
def test_headers_and_whole_grades_of_any_spelling_are_accepted(header, grade, tmp_path):
    beir_folder(tmp_path, TREC, [f"1\td1\t{grade}"], header=header)
    assert BeirReader(str(tmp_path)).read().qrels == {"test": {"1": {"d1": 1}}}


@pytest.mark.parametrize("grade", ["1.5", "1e0", ".", "", "one", "0x1", "1_0", "1" * 30, float("nan"), True])
def test_grade_that_is_not_whole_raises_user_error(grade):
    with pytest.raises(UserError, match="the score must be an integer"):
        check_grade(grade)
