"""Diagnostics against a few lines of numpy; a training with them is the training without."""

import dataclasses
import itertools

import lightning as L
import numpy as np
import pytest
import torch

from lightning_modules.callbacks.diagnostics import Diagnostics
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.diagnostics import anisotropy, effective_negatives, expert_distances, masked_share
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.loggers import JsonlLogger
from lightning_modules.optim import OptimOptions
from tests.conftest import TASKS


def test_effective_negatives_equal_numpy():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    out = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    out[4] = True
    wanted = []
    for row, left in zip(logits.numpy(), ~out.numpy(), strict=True):
        p = np.exp(row[left]) / np.exp(row[left]).sum()
        wanted.append(np.exp(-(p * np.log(p)).sum()) if left.any() else 0.0)
    assert effective_negatives(logits, out) == pytest.approx(np.mean(wanted), rel=1e-6)
    assert effective_negatives(torch.zeros(2, 7), torch.zeros(2, 7, dtype=torch.bool)) == pytest.approx(7)
    assert effective_negatives(torch.eye(7) * 1e4, torch.zeros(7, 7, dtype=torch.bool)) == pytest.approx(1)


def test_masked_share_counts_others_alone():
    own = torch.tensor([[True, False, False, False], [False, True, False, False]])
    known = torch.tensor([[True, True, False, False], [True, True, True, False]])
    assert masked_share(own, known) == pytest.approx(3 / 6)


@pytest.mark.parametrize("shape", [(7, 20), (30, 5), (1, 4)])
def test_anisotropy_equals_numpy(shape):
    vectors = np.random.default_rng(0).normal(size=shape) + 0.5
    mean_cosine, first_share = anisotropy(torch.from_numpy(vectors))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i, j in itertools.combinations(range(shape[0]), 2)]
    assert mean_cosine == pytest.approx(np.mean(pairs) if pairs else 0.0)
    values = np.linalg.svd(unit, compute_uv=False) ** 2
    assert first_share == pytest.approx(values[0] / values.sum())


def test_experts_of_all_kinds_are_compared(make_encoder, make_backbone):
    encoder = make_encoder("both")
    assert list(expert_distances(encoder).values()) == [0.0, pytest.approx(1.0)] * 3
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".experts.search." in name:
                parameter *= 3.0
    found = expert_distances(encoder)
    assert len(found) == 6
    assert found["classification-search/distance"] == pytest.approx(1.0)  # |a - 3a| / |2a|
    assert found["classification-search/cosine"] == pytest.approx(1.0)
    assert found["classification-link_prediction/distance"] == 0
    assert expert_distances(make_encoder("shared")) == {}
    assert len(expert_distances(AdapterEncoder(*make_backbone(), TASKS, max_length=32))) == 6
    routed = RoutedEncoder(*make_backbone(), TASKS, num_experts=2, max_length=32)
    assert list(expert_distances(routed)) == ["expert0-expert1/distance", "expert0-expert1/cosine"]


def fitted(make_encoder, three_tasks, folder, *callbacks, kind="both", cache=False):
    """The module after six steps with dropout, and the rows of its metrics."""
    encoder = make_encoder(kind, pooling="mean")
    set_dropout(encoder.backbone, 0.2, 0.2)
    options = {"similarity": "cosine", "temperature": 0.05, "grad_cache": cache}
    module = ContrastiveModule(encoder, optim=OptimOptions(lr=0.01), total_steps=6, **options)
    logger = JsonlLogger(folder / "metrics.jsonl")
    trainer = L.Trainer(
        max_steps=6,
        accelerator="cpu",
        accumulate_grad_batches=2,
        logger=logger,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, three_tasks)
    return module


class Rows(L.Callback):
    """What is logged, and the module as it was then."""

    def __init__(self):
        self.rows = []

    def on_train_start(self, trainer, module):
        log_metrics = trainer.logger.log_metrics
        trainer.logger.log_metrics = lambda values, step: (self.rows.append((step, values)), log_metrics(values, step))


@pytest.mark.parametrize("cache", [False, True])
def test_training_is_the_same_with_and_without(make_encoder, three_tasks, tmp_path, cache):
    rows = Rows()
    without = fitted(make_encoder, three_tasks, tmp_path, cache=cache).state_dict()
    watched = fitted(make_encoder, three_tasks, tmp_path, rows, Diagnostics(2), cache=cache)
    assert [step for step, _ in rows.rows] == [2, 4, 6]
    assert watched.training
    for name, tensor in watched.state_dict().items():
        assert torch.equal(tensor, without[name]), name


def test_what_is_logged_is_what_was_measured(make_encoder, three_tasks, tmp_path):
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
        wanted = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert values[f"diag/{other}/gradient_cosine/{one}"] == pytest.approx(wanted, abs=1e-5)

    module.eval()
    some = 0
    for task, batch in batches.items():
        for other in TASKS:
            loss = module.training_step(dataclasses.replace(batch, task=other), 0)["loss"].item()
            assert values[f"diag/{task}/transplant/{other}"] == pytest.approx(loss, rel=1e-5)
        vectors = torch.nn.functional.normalize(module.embed(batch)[0].detach(), dim=1).numpy()
        ids, masked, total, effective = batch.document_ids.tolist(), 0, 0, []
        for b in range(len(batch.queries)):
            own, known = int(batch.positives[b]), set(batch.known_positives[b].tolist())
            others = [m for m in range(len(ids)) if m != own]
            negatives = [m for m in others if ids[m] not in known]
            masked, total = masked + len(others) - len(negatives), total + len(others)
            scores = vectors[batch.documents[negatives]] @ vectors[batch.queries[b]] / 0.05
            p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            effective.append(np.exp(-(p * np.log(p)).sum()))
        some += masked
        assert values[f"diag/{task}/masked_share"] == pytest.approx(masked / total)
        assert values[f"diag/{task}/effective_negatives"] == pytest.approx(np.mean(effective), rel=1e-4)
    assert some > 0
    assert values["diag/experts/classification-search/distance"] > 0
    assert values["diag/seconds"] > 0
