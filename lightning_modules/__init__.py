"""Encoders of scientific papers, their contrastive training, retrieval and evaluation.

The names below are the public API. They are imported on first use, because torch and transformers take seconds to load.

    from lightning_modules import ContrastiveModule, evaluate, load_encoder
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the redundant aliases mark re-exports
    from lightning_modules.contrastive import ContrastiveModule as ContrastiveModule
    from lightning_modules.encoders.adapters import AdapterEncoder as AdapterEncoder
    from lightning_modules.encoders.backbone import load_backbone as load_backbone
    from lightning_modules.encoders.backbone import random_backbone as random_backbone
    from lightning_modules.encoders.backbone import word_vocabulary as word_vocabulary
    from lightning_modules.encoders.base import Encoder as Encoder
    from lightning_modules.encoders.control import ControlEncoder as ControlEncoder
    from lightning_modules.encoders.cross_stitch import CrossStitchEncoder as CrossStitchEncoder
    from lightning_modules.encoders.dual_prompt import DualPromptEncoder as DualPromptEncoder
    from lightning_modules.encoders.instruct import InstructEncoder as InstructEncoder
    from lightning_modules.encoders.instruct import PromptEncoder as PromptEncoder
    from lightning_modules.encoders.loading import load_encoder as load_encoder
    from lightning_modules.encoders.moe import MoEEncoder as MoEEncoder
    from lightning_modules.encoders.routed import RoutedEncoder as RoutedEncoder
    from lightning_modules.encoders.shared import SharedEncoder as SharedEncoder
    from lightning_modules.frozen import FrozenEncoder as FrozenEncoder
    from lightning_modules.merging import Weights as Weights
    from lightning_modules.merging import merge as merge
    from lightning_modules.mining.mine import mine as mine
    from lightning_modules.mining.mining_options import MiningOptions as MiningOptions
    from lightning_modules.objective_options import ObjectiveOptions as ObjectiveOptions
    from lightning_modules.optim_options import OptimOptions as OptimOptions
    from lightning_modules.retrieval.evaluation import BenchmarkResult as BenchmarkResult
    from lightning_modules.retrieval.evaluation import evaluate as evaluate

_MODULES = {
    "AdapterEncoder": "encoders.adapters",
    "BenchmarkResult": "retrieval.evaluation",
    "ContrastiveModule": "contrastive",
    "ControlEncoder": "encoders.control",
    "CrossStitchEncoder": "encoders.cross_stitch",
    "DualPromptEncoder": "encoders.dual_prompt",
    "Encoder": "encoders.base",
    "FrozenEncoder": "frozen",
    "InstructEncoder": "encoders.instruct",
    "MiningOptions": "mining.mining_options",
    "MoEEncoder": "encoders.moe",
    "ObjectiveOptions": "objective_options",
    "OptimOptions": "optim_options",
    "PromptEncoder": "encoders.instruct",
    "RoutedEncoder": "encoders.routed",
    "SharedEncoder": "encoders.shared",
    "Weights": "merging",
    "evaluate": "retrieval.evaluation",
    "load_backbone": "encoders.backbone",
    "load_encoder": "encoders.loading",
    "merge": "merging",
    "mine": "mining.mine",
    "random_backbone": "encoders.backbone",
    "word_vocabulary": "encoders.backbone",
}
if not TYPE_CHECKING:  # type checkers cannot evaluate this, and would miss all names
    __all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
