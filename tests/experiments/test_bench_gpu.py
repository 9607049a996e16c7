"""`make bench BENCH=gpu`: each part on a tiny encoder, the time limit, failures, and what is reported."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from itertools import chain

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

from datamodules.records import UserError
from datamodules.text import input_text, token_ids
from experiments.bench import gpu, gpu_parts, gpu_results, peer
from experiments.bench.gpu import PARTS, SIZES, GpuOptions, build_workload, run_parts
from experiments.bench.gpu_checks import FAMILIES, Check, batch_invariance, equality, recompilations, synchronisation
from experiments.bench.gpu_parts import OURS, Figure
from experiments.bench.gpu_results import Results, best_of, plot
from experiments.bench.peer import PEER, Peer
from experiments.bench.workload import KINDS, Workload, synthetic_documents, synthetic_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return synthetic_tokenizer()


@pytest.fixture(scope="module", autouse=True)
def tiny_sizes():
    """Measure once, on a few texts."""
    kept = dict(SIZES["small"])
    SIZES["small"] |= {"texts": 8, "cached_pairs": 4, "vectors": 300}
    yield
    SIZES["small"].update(kept)


@pytest.fixture
def workload(tmp_path) -> Workload:
    return build_workload(GpuOptions(small=True, tokens=24, max_length=32), CPU, tmp_path)


def test_synthetic_texts_have_the_mean_length_and_at_most_max_length(tokenizer):
    documents = synthetic_documents(500, 209, 256, tokenizer)
    ids = token_ids([input_text(d, "[SEP]") for d in documents], tokenizer, 256)
    lengths = np.array([len(text) for text in ids])
    assert abs(lengths.mean() - 209) < 2
    assert lengths.max() == 256
    assert not any(tokenizer.unk_token_id in text for text in ids)
    assert all(d.title and d.text for d in documents)
    pieces = np.concatenate([tokenizer.convert_ids_to_tokens(text) for text in ids])
    assert 0.05 < np.mean([piece.startswith("##") for piece in pieces]) < 0.3, "words of several pieces, as in English"


def test_mean_length_out_of_reach_raises_user_error(tokenizer):
    with pytest.raises(UserError, match=r"tokens: .*less than max_length \(64\), got 100"):
        synthetic_documents(4, 100, 64, tokenizer)


def test_sentence_transformers_gets_the_same_vectors(workload):
    pytest.importorskip("sentence_transformers")
    ours = workload.encoder().encode(workload.documents, gpu_parts.TASK).numpy()
    np.testing.assert_allclose(Peer(workload).encode(workload.texts, 4), ours, atol=2e-5)


def test_sentence_transformers_starts_with_the_same_loss(workload, monkeypatch):
    """Both train on the same pairs, with the same temperature."""
    pytest.importorskip("sentence_transformers")
    losses = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (losses.append(self.item()), backward(self)))
    Peer(workload).training_step(workload.queries, dropout=0.0)()
    workload.training_step(workload.encoder(), [workload.batch(workload.queries)])()
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("part", [name for name in PARTS if name not in ("make_train", "checks")])
def test_part_measures_positive_speeds(part, workload, monkeypatch):
    monkeypatch.setattr(gpu_parts, "compiled", lambda encoder: encoder)  # a minute on a busy CPU
    figures = list(PARTS[part][0](workload))
    assert figures
    assert all(figure.speed > 0 for figure in figures)
    if part not in ("gemm", "search", "tokenizer"):
        assert all(figure.mfu > 0 and figure.flops > 0 for figure in figures)
        assert {OURS, PEER} == {figure.system for figure in figures} or not peer.peer_version()
    if part in ("encode", "train"):
        assert all(any(kind in figure.setting for figure in figures) for kind in KINDS)


@pytest.mark.slow
def test_real_training_is_measured_with_checkpoints_and_wandb(workload, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    bare, real = gpu_parts.make_train(workload)
    assert bare.speed > 0
    assert real.speed > 0
    assert bare.unit == real.unit
    run = workload.folder / "training" / "run"
    assert list(run.rglob("last.ckpt"))
    assert list(run.rglob("*.wandb"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/tokens_per_second" in row for row in rows) == 3


@pytest.mark.slow
def test_packed_texts_equal_padded_ones_in_every_family(workload):
    results = list(equality(dataclasses.replace(workload, documents=workload.documents[:4])))
    assert len(results) == len(KINDS) + len(FAMILIES)
    for check in results:
        assert "runs in bf16" in check.detail, "the packed path on a CPU"
        assert check.passed, check.detail


def test_difference_finds_wrong_attention(workload, monkeypatch):
    """The check of equality fails if packed texts attend to each other."""
    from lightning_modules.encoders import attention

    correct = attention.attend_runs
    monkeypatch.setattr(attention, "attend_runs", lambda *arguments: -correct(*arguments))
    assert not next(iter(equality(workload))).passed


@pytest.mark.slow
def test_recompilations_are_counted(workload):
    check = recompilations(workload)
    assert check.passed
    assert int(check.detail.split()[0]) > 0


def test_checks_that_need_a_gpu_are_skipped_with_the_reason(workload):
    results = list(synchronisation(workload))
    assert len(results) == len(KINDS) + 1
    assert all(check.passed is None and "GPU" in check.detail for check in results)
    assert batch_invariance(workload).passed is not False


def run(monkeypatch, workload: Workload, known: dict, **options) -> Results:
    monkeypatch.setattr(gpu, "PARTS", {name: (part, 1 / len(known)) for name, part in known.items()})
    results = Results(workload)
    run_parts(GpuOptions(**options), workload, results)
    return results


def figures_of(part: str, count: int, seconds: float = 0.0):
    def measured(_):
        for number in range(count):
            time.sleep(seconds)
            yield Figure(OURS, f"setting {number}", 1.0, "texts/s")

    return measured


def failing(_):
    yield Figure(OURS, "one", 1.0, "texts/s")
    raise RuntimeError("out of memory")


def test_part_is_stopped_when_its_time_is_over_and_later_ones_are_skipped(workload, monkeypatch):
    parts = {"slow": figures_of("slow", 50, 0.1), "late": figures_of("late", 1)}
    results = run(monkeypatch, workload, parts, budget=0.5)
    assert 1 < len([f for f in results.figures if f.part == "slow"]) < 10
    assert dict(results.skipped)["slow"].startswith("stopped here")
    assert [f.part for f in results.figures][-1] == "late", "the first part leaves the second its share"
    results = run(
        monkeypatch, workload, {"slow": figures_of("slow", 1, 0.2), "late": figures_of("late", 1)}, budget=0.1
    )
    assert dict(results.skipped)["late"] == "not measured, because the budget is used up"


def test_failing_part_is_reported_and_the_others_are_measured(workload, monkeypatch):
    results = run(monkeypatch, workload, {"failing": failing, "other": figures_of("other", 1)})
    assert dict(results.skipped) == {"failing": "failed: RuntimeError: out of memory"}
    assert [figure.part for figure in results.figures] == ["failing", "other"]


def test_only_chosen_parts_are_measured(workload, monkeypatch):
    parts = {name: figures_of(name, 1) for name in ("gemm", "encode", "search")}
    results = run(monkeypatch, workload, parts, parts=("search", "gemm"))
    assert [figure.part for figure in results.figures] == ["gemm", "search"]


FIGURES = [
    Figure(OURS, "Vanilla", 300.0, "texts/s", 3e12, 0.6, part="encode"),
    Figure(PEER, "batch 128", 100.0, "texts/s", 1e12, 0.2, part="encode"),
    Figure(PEER, "batch 32 (default)", 50.0, "texts/s", 5e11, 0.1, is_default=True, part="encode"),
    Figure(OURS, "top 100", 7.0, "queries/s", part="search"),
]


def test_report_has_tables_json_and_a_plot(workload, tmp_path, capsys):
    results = Results(workload)
    for figure in FIGURES:
        results.add(figure)
    results.add(Check("bits <b>", False, "3 of 4 differ"))
    results.skip("train", "not measured")
    results.write(tmp_path)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [Figure(**figure) for figure in content["figures"]] == FIGURES
    assert content["checks"][0]["passed"] is False
    assert content["skipped"] == {"train": "not measured"}
    assert content["facts"]["device"] == "cpu"
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if "Vanilla" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]][3:] == ["300", "texts/s", "3", "0.60", "3.00"]
    assert "FAIL" in output
    assert "3 of 4 differ" in output
    page = (tmp_path / "gpu.html").read_text()
    assert "<svg" in page
    assert "bits &lt;b&gt;" in page
    assert "<b>" not in page
    style, body = page.split("</style>")
    classes = set(chain.from_iterable(map(str.split, re.findall(r'class="([^"]+)"', body))))
    assert not {name for name in classes if f".{name}" not in style}, "its tables did not scroll on narrow pages"


def test_plot_shows_the_best_and_the_default():
    assert best_of(FIGURES, "encode", "texts/s") is FIGURES[1]
    assert best_of(FIGURES, "search", "texts/s") is None
    chart = plot(FIGURES)
    assert re.findall(r": (.*?)</title>", "".join(chart.shapes)) == ["0.6000", "0.2000", "0.1000"]
    assert plot(FIGURES[3:]) is None


def test_missing_sentence_transformers_is_reported_and_nothing_fails(workload, monkeypatch):
    for module in (gpu_parts, gpu_results):
        monkeypatch.setattr(module, "peer_version", lambda: None)
    assert "not installed" in Results(workload).facts[PEER]
    assert {figure.system for figure in gpu_parts.search(workload)} == {OURS}


def test_file_of_texts_replaces_synthetic_ones(tmp_path):
    lines = [{"id": "a", "title": f"Title {i}", "text": "some words"} for i in range(5)]
    path = tmp_path / "papers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workload = build_workload(GpuOptions(small=True, input=path, texts=4), CPU, tmp_path)
    assert [document.title for document in workload.documents] == [f"Title {i}" for i in range(4)]
    path.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(UserError, match="has 1 texts"):
        build_workload(GpuOptions(small=True, input=path), CPU, tmp_path)
