"""Cases of every loss that is added to InfoNCE, for tests that hold for all of them.

A new loss gets a line in CASES: its class and arguments for the tasks of partial_world (fields, topics and links, with
papers that are annotated for one or all of them). `tasks`, `dimension` and `objective` are given to losses that take
them, as in an experiment. test_all_losses.py fails for a loss without a case.
"""

from __future__ import annotations

import inspect
import pkgutil
from functools import cache
from importlib import import_module
from typing import Any

import torch

from lightning_modules import auxiliary
from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
from lightning_modules.auxiliary.consistency import CrossTaskConsistency
from lightning_modules.auxiliary.cross_task import CrossTaskDistillation
from lightning_modules.auxiliary.distribution_matching import DistributionMatching
from lightning_modules.auxiliary.group import GroupLoss
from lightning_modules.auxiliary.quadruplets import QuadrupletRanking
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.objective_options import ObjectiveOptions
from lightning_modules.optim import OptimOptions
from tests.conftest import separate
from tests.lightning_modules.auxiliary.worlds import PartialWorld, partial_world

TASKS = ("fields", "topics", "links")
OBJECTIVE = {"similarity": "cosine", "temperature": 0.1}
CASES: dict[str, tuple[type[AuxiliaryLoss], dict[str, Any]]] = {
    "consistency": (CrossTaskConsistency, {"candidates": 8, "hidden": 8, "warmup": 0}),
    "distillation": (CrossTaskDistillation, {"teachers": {"links": ["topics", "fields"], "fields": ["topics"]}}),
    "group": (GroupLoss, {"steps": 3}),
    "matching_labels": (DistributionMatching, {"source": "fields", "target": "topics"}),
    "matching_links": (DistributionMatching, {"source": "links", "target": "topics", "relation": "same"}),
    "matching_some_labels": (DistributionMatching, {"source": "fields", "target": "topics", "max_labels": 2}),
    "matching_known_labels": (DistributionMatching, {"source": "fields", "target": "topics", "known": True}),
    "matching_some_known_links": (
        DistributionMatching,
        {"source": "links", "target": "topics", "known": True, "max_labels": 2},
    ),
    "quadruplets": (QuadrupletRanking, {"labels": {"links": "topics"}}),
}


def all_losses() -> set[type[AuxiliaryLoss]]:
    """Return the classes of losses in lightning_modules/auxiliary."""
    modules = [import_module(f"{auxiliary.__name__}.{m.name}") for m in pkgutil.iter_modules(auxiliary.__path__)]
    classes = {c for module in modules for _, c in inspect.getmembers(module, inspect.isclass)}
    return {c for c in classes if issubclass(c, AuxiliaryLoss) and not inspect.isabstract(c)}


@cache
def world() -> PartialWorld:
    return partial_world(0, tasks=TASKS, num_papers=120, num_test=8, share_of_both=0.4)


def loss_of(case: str, weight: float = 1.0) -> AuxiliaryLoss:
    kind, arguments = CASES[case]
    provided = {"tasks": list(TASKS), "dimension": 32, "objective": ObjectiveOptions(**OBJECTIVE)}
    accepted = inspect.signature(kind).parameters
    return kind(**arguments, **{k: v for k, v in provided.items() if k in accepted}, weight=weight)


def module_of(case: str | None, weight: float = 1.0, dropout: float = 0.0, **options: Any) -> ContrastiveModule:
    """Return a module with the loss of a case, or without one, whose experts differ from each other."""
    backbone, tokenizer = world().backbone(3)
    set_dropout(backbone, dropout, dropout)
    encoder = MoEEncoder(backbone, tokenizer, {task: task for task in TASKS}, ffn=True, pooling="mean", max_length=32)
    with torch.random.fork_rng(devices=[]):
        separate(encoder)
    losses = {} if case is None else {"added": loss_of(case, weight)}
    optim = OptimOptions(lr=3e-3, schedule="constant")
    return ContrastiveModule(encoder, **OBJECTIVE, losses=losses, optim=optim, total_steps=6, **options)
