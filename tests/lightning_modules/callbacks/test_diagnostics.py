"""Diagnostics equal a few lines of numpy, and do not affect training."""

import contextlib
import dataclasses
import itertools
import math
from types import SimpleNamespace
from xml.etree import ElementTree

import lightning as L
import numpy as np
import pytest
import torch

from datamodules.tasks import SearchDataModule
from lightning_modules.callbacks.diagnostics import (
    OF_TASK,
    Diagnostics,
    anisotropy,
    effective_negatives,
    expert_distances,
    masked_share,
    negative_figures,
)
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.loggers import JsonlLogger
from lightning_modules.objective import FrozenEncoder
from lightning_modules.objective_options import GuideOptions, VectorTeacherOptions
from lightning_modules.optim import OptimOptions
from lightning_modules.pictures import write_expert_picture
from tests.conftest import TASKS
from tests.lightning_modules.quiet_trainer import quiet_trainer


def test_effective_negatives_equal_numpy():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    excluded = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    excluded[4] = True
    perplexities = []
    for row, negatives in zip(logits.numpy(), ~excluded.numpy(), strict=True):
        p = np.exp(row[negatives]) / np.exp(row[negatives]).sum()
        perplexities.append(np.exp(-(p * np.log(p)).sum()) if negatives.any() else 0.0)
    assert effective_negatives(logits, excluded) == pytest.approx(np.mean(perplexities), rel=1e-6)
    assert effective_negatives(torch.zeros(2, 7), torch.zeros(2, 7, dtype=torch.bool)) == pytest.approx(7)
    assert effective_negatives(torch.eye(7) * 1e4, torch.zeros(7, 7, dtype=torch.bool)) == pytest.approx(1)


def test_masked_share_does_not_count_positives():
    positives = torch.tensor([[True, False, False, False], [False, True, False, False]])
    masked = torch.tensor([[True, True, False, False], [True, True, True, False]])
    assert masked_share(positives, masked) == pytest.approx(3 / 6)


@pytest.mark.parametrize("shape", [(7, 20), (30, 5), (1, 4)])
def test_anisotropy_equals_numpy(shape):
    vectors = np.random.default_rng(0).normal(size=shape) + 0.5
    mean_cosine, first_share = anisotropy(torch.from_numpy(vectors))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i, j in itertools.combinations(range(shape[0]), 2)]
    assert mean_cosine == pytest.approx(np.mean(pairs) if pairs else 0.0)
    values = np.linalg.svd(unit, compute_uv=False) ** 2
    assert first_share == pytest.approx(values[0] / values.sum())


def test_expert_distances_of_all_encoders(make_encoder, make_backbone):
    encoder = make_encoder("both")
    assert list(expert_distances(encoder).values()) == [0.0, pytest.approx(1.0)] * 3
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".experts.search." in name:
                parameter *= 3.0
    distances = expert_distances(encoder)
    assert len(distances) == 6
    assert distances["classification-search/distance"] == pytest.approx(1.0)  # |a - 3a| / |2a|
    assert distances["classification-search/cosine"] == pytest.approx(1.0)
    assert distances["classification-link_prediction/distance"] == 0
    assert expert_distances(make_encoder("shared")) == {}
    assert len(expert_distances(AdapterEncoder(*make_backbone(), TASKS, max_length=32))) == 6
    routed = RoutedEncoder(*make_backbone(), TASKS, num_experts=2, max_length=32)
    assert list(expert_distances(routed)) == ["expert0-expert1/distance", "expert0-expert1/cosine"]


def fitted(make_encoder, three_tasks, folder, *callbacks, kind="both", cache=False):
    """Train six steps with dropout, and return the module."""
    encoder = make_encoder(kind, pooling="mean")
    set_dropout(encoder.backbone, 0.2, 0.2)
    options = {"similarity": "cosine", "temperature": 0.05, "grad_cache": cache}
    module = ContrastiveModule(encoder, optim=OptimOptions(lr=0.01), total_steps=6, **options)
    logger = JsonlLogger(folder / "metrics.jsonl")
    trainer = quiet_trainer(folder, max_steps=6, accumulate_grad_batches=2, logger=logger, callbacks=list(callbacks))
    trainer.fit(module, three_tasks)
    return module


class Rows(L.Callback):
    """Collects logged metrics as (step, values)."""

    def __init__(self):
        self.rows = []

    def on_train_start(self, trainer, module):
        log_metrics = trainer.logger.log_metrics
        trainer.logger.log_metrics = lambda values, step: (self.rows.append((step, values)), log_metrics(values, step))


@pytest.mark.parametrize("cache", [False, True])
def test_diagnostics_do_not_change_training(make_encoder, three_tasks, tmp_path, cache):
    rows = Rows()
    without = fitted(make_encoder, three_tasks, tmp_path, cache=cache).state_dict()
    watched = fitted(make_encoder, three_tasks, tmp_path, rows, Diagnostics(2), cache=cache)
    assert [step for step, _ in rows.rows] == [2, 4, 6]
    assert watched.training
    for name, tensor in watched.state_dict().items():
        assert torch.equal(tensor, without[name]), name


def test_logged_values_equal_numpy(make_encoder, three_tasks, tmp_path):
    rows = Rows()
    module = fitted(make_encoder, three_tasks, tmp_path, rows, Diagnostics(6))
    ((step, values),) = rows.rows
    assert step == 6
    batches = {batch.task: batch for batch in map(three_tasks.train_dataloader().batches.__getitem__, range(12))}

    gradients = {}
    for task in TASKS:
        module.zero_grad(set_to_none=True)
        module.training_step(batches[task], 0)["loss"].backward()
        shared = [p.grad for n, p in module.named_parameters() if ".experts." not in n and p.grad is not None]
        gradients[task] = torch.cat([g.flatten() for g in shared]).double().numpy()
        assert values[f"diag/{task}/gradient_norm"] == pytest.approx(np.linalg.norm(gradients[task]), rel=1e-5)
    for one, other in itertools.combinations(sorted(TASKS), 2):
        a, b = gradients[one], gradients[other]
        expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert values[f"diag/{other}/gradient_cosine/{one}"] == pytest.approx(expected, abs=1e-5)

    module.eval()
    num_masked = 0
    for task, batch in batches.items():
        for other in TASKS:
            loss = module.training_step(dataclasses.replace(batch, task=other), 0)["loss"].item()
            assert values[f"diag/{task}/transplant/{other}"] == pytest.approx(loss, rel=1e-5)
        vectors = torch.nn.functional.normalize(module.embed(batch)[0].detach(), dim=1).numpy()
        ids, masked, total, effective = batch.document_ids.tolist(), 0, 0, []
        for b in range(len(batch.queries)):
            positive, known = int(batch.positives[b]), set(batch.known_positives[b].tolist())
            others = [m for m in range(len(ids)) if m != positive]
            negatives = [m for m in others if ids[m] not in known]
            masked, total = masked + len(others) - len(negatives), total + len(others)
            scores = vectors[batch.documents[negatives]] @ vectors[batch.queries[b]] / 0.05
            p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            effective.append(np.exp(-(p * np.log(p)).sum()))
        num_masked += masked
        assert values[f"diag/{task}/masked_share"] == pytest.approx(masked / total)
        assert values[f"diag/{task}/effective_negatives"] == pytest.approx(np.mean(effective), rel=1e-4)
    assert num_masked > 0
    of_tasks = {key.removeprefix("diag/").partition("/")[2] for key in values if key.count("/") == 2}
    assert of_tasks == set(OF_TASK)
    assert values["diag/experts/classification-search/distance"] > 0
    assert values["diag/seconds"] > 0


def test_negatives_are_those_of_the_loss_with_a_guide_and_an_asymmetric_student(make_encoder, make_task):
    """The student's own document vectors are never trained, and a document that the guide masks is not a negative."""
    batch = make_task(SearchDataModule, carry_texts=True, batch_size=6).train_dataloader().batches[0]
    teacher, guide = (FrozenEncoder(make_encoder("shared", seed=seed)) for seed in (5, 6))
    module = ContrastiveModule(
        make_encoder("shared"),
        similarity="cosine",
        temperature=0.05,
        guide=GuideOptions("guide"),
        guide_model=guide,
        vector_teacher=VectorTeacherOptions("teacher", asymmetric=True),
        vector_teacher_model=teacher,
    )
    vectors = module.embed(batch).vectors.detach()
    figures = negative_figures(module, vectors, batch, module.objective.supervise(batch))
    queries = torch.nn.functional.normalize(vectors[batch.queries], dim=1)
    logits, guided = queries @ teacher.embed(batch).documents.T / 0.05, guide.embed(batch)
    scores, ids = guided.queries @ guided.documents.T, batch.document_ids.tolist()
    masked, positives = torch.zeros(2, *scores.shape, dtype=torch.bool)
    for b, (positive, known) in enumerate(zip(batch.positives[:, 0].tolist(), batch.known_positives, strict=True)):
        positives[b, positive] = True
        masked[b] = torch.tensor([id in known.tolist() for id in ids]) | (scores[b] > scores[b, positive])
    assert figures["masked_share"] == pytest.approx(masked_share(positives, masked))
    assert figures["effective_negatives"] == pytest.approx(effective_negatives(logits, masked | positives), rel=1e-5)
    assert (masked & ~positives).sum() > sum(len(set(k.tolist()) & set(ids)) - 1 for k in batch.known_positives)


def test_a_guide_encodes_each_measured_batch_once(make_encoder, make_task, monkeypatch):
    """It encoded the texts again for each transplant, and again for the figures on negatives."""
    batch = make_task(SearchDataModule, carry_texts=True, batch_size=6).train_dataloader().batches[0]
    guide = FrozenEncoder(make_encoder("shared", seed=5))
    module = ContrastiveModule(make_encoder(), guide=GuideOptions("guide"), guide_model=guide)
    diagnostics, encoded = Diagnostics(1), []
    diagnostics.batches = {task: dataclasses.replace(batch, task=task) for task in TASKS}
    embed = FrozenEncoder.embed
    monkeypatch.setattr(FrozenEncoder, "embed", lambda self, batch: encoded.append(batch.task) or embed(self, batch))
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(train_step_context=contextlib.nullcontext))
    values = diagnostics._vectors(trainer, module, module.encoder)
    assert sum("/transplant/" in name for name in values) == 9
    assert encoded == sorted(TASKS)


def texts_of(content):
    return [element.text for element in ElementTree.fromstring(content).iter("{http://www.w3.org/2000/svg}text")]


def test_matrices_are_drawn_as_logged_at_evaluations_and_at_the_end(make_encoder, three_tasks, tmp_path, monkeypatch):
    rows, pictures = Rows(), []

    def log_picture(self, name, path, step):
        pictures.append((step, name, path.read_text()))

    monkeypatch.setattr(JsonlLogger, "log_picture", log_picture)
    fitted(make_encoder, three_tasks, tmp_path, rows, Diagnostics(3, 4, tmp_path / "experts.svg"))
    assert [(step, name) for step, name, _ in pictures] == [(4, "diag/experts"), (6, "diag/experts")]
    for (step, _, content), (measured_at, values) in zip(pictures, rows.rows, strict=True):
        texts = texts_of(content)
        assert texts[0] == f"tasks and experts at step {measured_at}", step
        drawn = [f"{value:.3f}" for key, value in values.items() if "/transplant/" in key]
        twice = [f"{v:.3f}" for k, v in values.items() if "gradient_cosine" in k or k.endswith("/distance")]
        assert len(drawn) == 9
        assert len(twice) == 6
        assert sorted(text for text in texts if "." in text) == sorted(drawn + 2 * twice)
    assert (tmp_path / "experts.svg").read_text() == pictures[-1][2]


def test_colours_of_cells(tmp_path):
    values = {"a/transplant/a": 1.0, "a/transplant/b": 3.0, "b/transplant/b": 1.0, "b/gradient_cosine/a": -0.5}
    assert write_expert_picture(tmp_path / "x.svg", values, ["a", "b"], ["a", "b"], "<now>")
    boxes = list(ElementTree.parse(tmp_path / "x.svg").getroot().iter("{http://www.w3.org/2000/svg}rect"))[1:]
    # The first matrix has only row a, because b has only one expert. The second is a conflict, in both orders.
    cells = [(box.get("fill"), float(box.get("fill-opacity"))) for box in boxes]
    assert [opacity for _, opacity in cells] == [0.0, 0.7, 0.35, 0.35]
    assert {fill for fill, opacity in cells if opacity} == {"#c0392b"}
    assert texts_of((tmp_path / "x.svg").read_text())[0] == "<now>"
    assert not write_expert_picture(tmp_path / "none.svg", {"a/gradient_norm": 1.0}, ["a"], [], "now")
    assert not (tmp_path / "none.svg").exists()


def test_cells_that_are_not_finite_are_grey_and_do_not_affect_others(tmp_path):
    a = {"a/transplant/a": 1.0, "a/transplant/b": 3.0, "a/transplant/c": math.inf, "b/gradient_cosine/a": math.nan}
    b = {"b/transplant/a": 1.0, "b/transplant/b": math.nan, "experts/a-b/distance": math.inf}
    more = {"experts/a-c/distance": 0.5}
    assert write_expert_picture(tmp_path / "x.svg", a | b | more, ["a", "b", "c"], ["a", "b", "c"], "x\x01y")
    boxes = list(ElementTree.parse(tmp_path / "x.svg").getroot().iter("{http://www.w3.org/2000/svg}rect"))[1:]
    grey, cells = ("#999", 0.35), [(box.get("fill"), float(box.get("fill-opacity"))) for box in boxes]
    assert cells[1:5] == [("#c0392b", 0.7), grey, grey, grey]
    assert sorted(cells[5:]) == [("#2e6da4", 0.7)] * 2 + [grey] * 4  # cosines and distances, in both orders
    assert texts_of((tmp_path / "x.svg").read_text())[0] == "x\ufffdy"
