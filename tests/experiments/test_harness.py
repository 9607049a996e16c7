"""The command harness. Its files are read as other evaluation programs read them."""

import json
from collections import defaultdict

import numpy as np
import pytest
import pytrec_eval
import torch

from datamodules.records import Benchmark, Document, UserError
from experiments.harness import main
from lightning_modules.retrieval.evaluation import evaluate
from tests.conftest import text_of, toy_collection


@pytest.fixture
def model(make_encoder, tmp_path):
    """Return an encoder whose experts differ, and the option that names its folder."""
    encoder = make_encoder()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "experts" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    encoder.save_pretrained(tmp_path / "model")
    return encoder, f"model={tmp_path / 'model'}"


def paper(number, key="paper_id"):
    return {key: f"p{number}", "title": text_of(number), "abstract": text_of(number + 1, number + 2)}


def documents(records, key):
    return [Document(record[key], record["title"], record["abstract"]) for record in records]


def load(path, key):
    """Read vectors like scidocs.embeddings and EmbeddingsGenerator.load_embeddings_from_jsonl."""
    records = map(json.loads, path.read_text().splitlines())
    return {record[key]: np.array(record["embedding"]) for record in records}


def is_encoded_by(loaded, encoder, texts, task):
    """Return whether these are the vectors of the task's expert, and of no other expert."""
    assert list(loaded) == [text.id for text in texts]
    vectors = np.stack(list(loaded.values()))
    return [t for t in encoder.tasks if np.allclose(vectors, encoder.encode(texts, t).numpy(), atol=1e-6)] == [task]


def test_scidocs_files_have_the_vectors_of_their_expert(model, tmp_path):
    encoder, model_option = model
    data = tmp_path / "data"
    data.mkdir()
    classes, links = [paper(i) for i in range(5)], [paper(i) for i in range(3, 9)]
    for name, papers in (("mag_mesh", classes), ("view_cite_read", links), ("recomm", links[:2])):
        (data / f"paper_metadata_{name}.json").write_text(json.dumps({p["paper_id"]: p for p in papers}))
    main(["format=scidocs", model_option, f"data={data}", f"output={tmp_path / 'out'}"])
    out = tmp_path / "out"
    for name, papers, task in (
        ("cls", classes, "classification"),
        ("user-citation", links, "link_prediction"),
        ("recomm", links[:2], "link_prediction"),
    ):
        assert is_encoded_by(load(out / f"{name}.jsonl", "paper_id"), encoder, documents(papers, "paper_id"), task)
    assert json.loads((out / "cls.jsonl").read_text().splitlines()[0])["title"] == classes[0]["title"]

    (data / "paper_metadata_recomm.json").unlink()
    main(["format=scidocs", model_option, f"data={data}", f"output={tmp_path / 'two'}"])
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"cls.jsonl", "user-citation.jsonl"}
    with pytest.raises(UserError, match="recomm.json: no such file"):
        main(["format=scidocs", model_option, f"data={data}", f"output={tmp_path / 'three'}", "only=recomm"])
    assert not (tmp_path / "three").exists()


@pytest.fixture
def scirepeval(tmp_path):
    """Make the data of three configs, and the tasks of four, as published."""
    data, papers = tmp_path / "scirepeval", [paper(i, "doc_id") for i in range(8)]
    rows = {
        "fos": papers[:4],
        "search": [
            {"query": text_of(1, 4), "doc_id": "q1", "candidates": papers[:3]},
            {"query": text_of(2, 5), "doc_id": "q2", "candidates": papers[2:5]},
        ],
        "same_author": [{"dataset": "x", "query": papers[0], "candidates": [papers[1], papers[0], papers[7]]}],
    }
    for config, lines in rows.items():
        (data / config).mkdir(parents=True)
        (data / config / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = []
    for name, kind, config in (
        ("Fields of study", "classification", "fos"),
        ("Years", "regression", "fos"),
        ("Search", "adhoc_search", "search"),
        ("Same Author Detection", "proximity", "same_author"),
        ("MeSH", "classification", "mesh_descriptors"),
    ):
        meta = {"name": "allenai/scirepeval", "config": config}
        task = {"name": name, "type": kind, "data": {"meta": meta, "test": {"config": "t"}}, "metrics": ["map"]}
        tasks.append(task | ({"embeddings": {"save": "embeddings/fos.jsonl"}} if config == "fos" else {}))
    (tmp_path / "scirepeval_tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return data, tasks


def test_scirepeval_files_have_the_vectors_of_their_expert(model, scirepeval, tmp_path):
    (encoder, model_option), (data, tasks) = model, scirepeval
    arguments = ["format=scirepeval", model_option, f"data={data}", f"tasks={tmp_path / 'scirepeval_tasks.jsonl'}"]
    main([*arguments, f"output={tmp_path / 'out'}"])
    written = [json.loads(line) for line in (tmp_path / "out" / "tasks.jsonl").read_text().splitlines()]
    assert [task["name"] for task in written] == [task["name"] for task in tasks[:4]], "mesh_descriptors is missing"
    for task, original in zip(written, tasks[:4], strict=True):
        assert {**task, "embeddings": 0} == {**original, "embeddings": 0}, "the rest is unchanged"
    vectors = {task["name"]: load((tmp_path / task["embeddings"]["load"]), "doc_id") for task in written}
    papers = documents([paper(i, "doc_id") for i in range(8)], "doc_id")
    assert is_encoded_by(vectors["Fields of study"], encoder, papers[:4], "classification")
    assert is_encoded_by(vectors["Years"], encoder, papers[:4], "classification")
    queries = [Document("q1", "", text_of(1, 4)), Document("q2", "", text_of(2, 5))]
    assert is_encoded_by(vectors["Search"], encoder, [*queries, *papers[:5]], "search")
    pair = [papers[0], papers[1], papers[7]]
    assert is_encoded_by(vectors["Same Author Detection"], encoder, pair, "link_prediction"), (
        "the query's paper occurs once"
    )

    main([*arguments, f"output={tmp_path / 'one'}", "only=Search"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"search.jsonl", "tasks.jsonl"}
    with pytest.raises(UserError, match="'MeSH' needs the folder .*mesh_descriptors, which does not exist"):
        main([*arguments, f"output={tmp_path / 'two'}", "only=MeSH"])


def test_config_with_two_types_of_tasks_has_two_files(model, scirepeval, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "experiments.harness.SCIREPEVAL",
        {"classification": "classification", "regression": "search"}
        | {"adhoc_search": "search", "proximity": "link_prediction"},
    )
    (encoder, model_option), (data, _) = model, scirepeval
    tasks = f"tasks={tmp_path / 'scirepeval_tasks.jsonl'}"
    only = "only=Fields of study,Years"
    main(["format=scirepeval", model_option, f"data={data}", tasks, f"output={tmp_path / 'out'}", only])
    papers = documents([paper(i, "doc_id") for i in range(4)], "doc_id")
    assert is_encoded_by(load(tmp_path / "out" / "fos.jsonl", "doc_id"), encoder, papers, "classification")
    assert is_encoded_by(load(tmp_path / "out" / "fos-regression.jsonl", "doc_id"), encoder, papers, "search")


def test_pmc_patients_rankings_measured_by_pytrec_eval_equal_our_metrics(model, tmp_path):
    """The program of the leaderboard measures the file with BEIR, which uses pytrec_eval."""
    encoder, model_option = model
    data, collection = tmp_path / "recds", toy_collection()
    (data / "queries").mkdir(parents=True)
    for task in ("PAR", "PPR"):
        (data / task).mkdir()
        corpus = [{"_id": d.id, "title": d.title, "text": d.text} for d in collection.corpus.values()]
        (data / task / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in corpus))
        qrels = [f"{q}\t{d}\t{g}" for q, grades in collection.qrels["test"].items() for d, g in grades.items() if g]
        (data / task / "qrels_test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *qrels]))
    queries = [{"_id": q.id, "text": q.text} for q in collection.queries.values()]
    (data / "queries" / "test_queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    arguments = ["format=pmc_patients", model_option, f"data={data}", f"output={tmp_path / 'out'}"]
    main([*arguments, "depth=6", "similarity=dot"])

    results = json.loads((tmp_path / "out" / "PAR.json").read_text())
    assert {len(ranking) for ranking in results.values()} == {6}
    assert json.loads((tmp_path / "out" / "PPR.json").read_text()) == results, "both have the same data here"
    judged = defaultdict(dict)
    for line in (data / "PAR" / "qrels_test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        judged[query][document] = int(grade)
    measured = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.5", "recall.5"}).evaluate(results)
    theirs = {name: np.mean([values[name] for values in measured.values()]) for name in ("ndcg_cut_5", "recall_5")}
    benchmark = Benchmark("x", "link_prediction", "test", collection.corpus, collection.queries, dict(judged))
    ours = evaluate(encoder, benchmark, ["ndcg@5", "recall@5"], k=6).metrics
    assert list(theirs.values()) == pytest.approx(list(ours.values()), abs=1e-9)
    assert 0 < theirs["recall_5"] < 1


def test_invalid_options_raise_user_error(model, scirepeval, tmp_path):
    (_, model_option), (data, _) = model, scirepeval
    out = f"output={tmp_path / 'out'}"
    for arguments, message in (
        (["format=beir", model_option, f"data={data}", out], "format: expected one of scidocs, .*, got 'beir'"),
        (["format=scirepeval", model_option, f"data={data}", out], "tasks: required with format=scirepeval"),
        (["format=scidocs", model_option, f"data={data}", out], "has none of paper_metadata_mag_mesh.json"),
        (["format=scidocs", model_option, f"data={data}", out, "only=mag"], "only: expected one of cls, .*, got 'mag'"),
        (["format=pmc_patients", model_option, f"data={data}", out], "has neither PAR nor PPR"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
    (tmp_path / "bad.jsonl").write_text('{"name": "x", "type": "poetry"}\n')
    with pytest.raises(UserError, match="bad.jsonl.*1: type: expected one of classification, .*, got 'poetry'"):
        main(["format=scirepeval", model_option, f"data={data}", out, f"tasks={tmp_path / 'bad.jsonl'}"])
