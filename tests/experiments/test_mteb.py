"""The command mteb, and mteb's metrics of our encoders against our own."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch

from datamodules.readers.beir import BeirReader
from datamodules.records import Benchmark, Document, UserError
from experiments import mteb as entry
from experiments.mteb import MtebEncoder
from lightning_modules.retrieval.evaluation import evaluate

ROOT = Path(__file__).parents[2]
METRICS = {"ndcg@10": "ndcg_at_10", "recall@5": "recall_at_5", "map@10": "map_at_10", "mrr@10": "mrr_at_10"}


def local_task(benchmark, name="LocalPapers", kind="Retrieval"):
    """Return a task as mteb's users write them, with its data in memory instead of on the hub."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description="papers",
            type=kind,
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            dataset={"path": "none/local", "revision": "1"},
        )

        def load_data(self, **_):
            corpus = [{"id": d.id, "title": d.title, "text": d.text} for d in benchmark.corpus.values()]
            queries = [{"id": q.id, "text": q.text} for q in benchmark.queries.values()]
            split = {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list(queries),
                "relevant_docs": {query: dict(grades) for query, grades in benchmark.qrels.items()},
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return LocalTask()


@pytest.fixture
def benchmark(beir_root):
    collection = BeirReader(str(beir_root / "scitldr")).read()
    queries, qrels = collection.judged("test")
    return Benchmark("papers", "search", "test", collection.corpus, dict(list(queries.items())[:60]), qrels)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_metrics_of_mteb_equal_ours(benchmark, make_encoder, tmp_path, similarity):
    encoder = make_encoder()
    judged = {query: benchmark.qrels[query] for query in benchmark.queries}
    task = local_task(Benchmark("papers", "search", "test", benchmark.corpus, benchmark.queries, judged))
    model = MtebEncoder(encoder, "tiny", similarity)
    assert isinstance(model, mteb.EncoderProtocol)
    result = mteb.evaluate(model, task, cache=mteb.ResultCache(tmp_path), show_progress_bar=False)
    theirs = result.task_results[0].scores["test"][0]

    ours = evaluate(encoder, benchmark, list(METRICS), similarity=similarity).metrics
    assert {key: theirs[METRICS[key]] for key in ours} == pytest.approx(ours, abs=2e-5)  # mteb prints five digits
    other = evaluate(make_encoder(seed=1), benchmark, list(METRICS), similarity=similarity).metrics
    assert other["ndcg@10"] != pytest.approx(ours["ndcg@10"], abs=1e-3), "other weights have other metrics"

    written = next(tmp_path.rglob("LocalPapers.json"))
    assert f"{model.fingerprint}-{similarity}" in str(written)
    assert json.loads(written.read_text())["scores"]["test"][0]["main_score"] == theirs["ndcg_at_10"]


def test_type_of_the_task_chooses_the_expert(make_encoder):
    encoder = make_encoder()
    with torch.no_grad():  # experts start as copies of each other
        for name, parameter in encoder.named_parameters():
            if "experts" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = MtebEncoder(encoder, "tiny", experts={"SCIDOCS": "search"})
    texts = ["ba ra", "be li", "bo mu"]
    batches = [{"text": texts[:2]}, {"text": texts[2:]}]
    for kind, name, task in (
        ("Retrieval", "SciFact", "search"),
        ("Reranking", "SciDocsRR", "link_prediction"),
        ("Retrieval", "SCIDOCS", "search"),  # chosen by the user
        ("Clustering", "BiorxivClusteringP2P.v2", "classification"),
        ("STS", "BIOSSES", "link_prediction"),
    ):
        vectors = model.encode(batches, task_metadata=SimpleNamespace(type=kind, name=name), hf_split="test")
        alone = {other: encoder.encode(texts, other).numpy() for other in encoder.tasks}
        assert [other for other in alone if np.allclose(vectors, alone[other], atol=1e-6)] == [task], name
    titled = [{"title": ["Ba ra", ""], "body": ["be li", "bo mu"], "text": ["Ba ra be li", "bo mu"]}]
    metadata = SimpleNamespace(type="Retrieval", name="SciFact")
    vectors = model.encode(titled, task_metadata=metadata, prompt_type="document")
    documents = [Document("", "Ba ra", "be li"), Document("", "", "bo mu")]
    assert np.allclose(vectors, encoder.encode(documents, "search").numpy(), atol=1e-6)


def test_other_experts_or_similarities_have_other_revisions(make_encoder):
    encoder = make_encoder()
    models = [
        MtebEncoder(encoder, "tiny"),
        MtebEncoder(encoder, "tiny", "dot"),
        MtebEncoder(encoder, "tiny", experts={"SCIDOCS": "search"}),
        MtebEncoder(make_encoder(seed=1), "tiny"),
    ]
    assert len({model.mteb_model_meta.revision for model in models}) == 4


@pytest.mark.slow
def test_command_prints_a_row_per_task(benchmark, make_encoder, tmp_path, monkeypatch, capsys):
    judged = {query: benchmark.qrels[query] for query in benchmark.queries}
    data = Benchmark("papers", "search", "test", benchmark.corpus, benchmark.queries, judged)
    monkeypatch.setattr(mteb, "get_task", lambda name: local_task(data, name))
    make_encoder().save_pretrained(tmp_path / "model")
    arguments = [f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", "tasks=SciFact,Papers:classification"]
    entry.main(arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Retrieval" in line]
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in lines]
    assert [row[:3] for row in rows] == [["SciFact", "Retrieval", "search"], ["Papers", "Retrieval", "classification"]]
    assert {path.stem for path in (tmp_path / "out").rglob("*.json")} >= {"SciFact", "Papers"}


def test_tasks_that_cannot_run_raise_user_error(make_encoder, tmp_path):
    make_encoder().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="mteb has no task 'SciFac' .*Did you mean: 'SciFact'"):
        entry.main([f"model={tmp_path / 'model'}", "tasks=SciFac"])
    with pytest.raises(UserError, match="unknown task 'nothing'"):
        entry.main([f"model={tmp_path / 'model'}", "tasks=SciFact:nothing"])
    with pytest.raises(UserError, match="SciFact: cannot load its data"):
        entry.main([f"model={tmp_path / 'model'}", "tasks=SciFact", f"output={tmp_path / 'out'}"])


@pytest.mark.slow
def test_log_line_of_the_hub_is_printed_once():
    setup = (
        "import huggingface_hub, logging\ndef main(_): logging.getLogger('huggingface_hub.utils').warning('retrying')"
    )
    program = f"{setup}\nfrom experiments.shared.console import entry_point\nentry_point(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.stdout + done.stderr).count("retrying") == 1
