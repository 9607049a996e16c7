"""Encoders of scientific papers, their contrastive training, retrieval and evaluation.

The names below are the public API. They are imported on first use, because torch and transformers take seconds to load.

    from lightning_modules import ContrastiveModule, evaluate, load_encoder
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.contrastive import ContrastiveModule
    from lightning_modules.encoders.adapters import AdapterEncoder
    from lightning_modules.encoders.base import Encoder
    from lightning_modules.encoders.instruct import InstructEncoder, PromptEncoder
    from lightning_modules.encoders.loading import load_encoder
    from lightning_modules.encoders.moe import MoEEncoder
    from lightning_modules.encoders.routed import RoutedEncoder
    from lightning_modules.encoders.shared import SharedEncoder
    from lightning_modules.mining.mine import MiningOptions, mine
    from lightning_modules.objective import FrozenEncoder
    from lightning_modules.objective_options import ObjectiveOptions
    from lightning_modules.optim import OptimOptions
    from lightning_modules.retrieval.evaluation import BenchmarkResult, evaluate

_MODULE_OF = {
    "ContrastiveModule": "lightning_modules.contrastive",
    "FrozenEncoder": "lightning_modules.objective",
    "ObjectiveOptions": "lightning_modules.objective_options",
    "OptimOptions": "lightning_modules.optim",
    "Encoder": "lightning_modules.encoders.base",
    "SharedEncoder": "lightning_modules.encoders.shared",
    "MoEEncoder": "lightning_modules.encoders.moe",
    "RoutedEncoder": "lightning_modules.encoders.routed",
    "InstructEncoder": "lightning_modules.encoders.instruct",
    "PromptEncoder": "lightning_modules.encoders.instruct",
    "AdapterEncoder": "lightning_modules.encoders.adapters",
    "load_backbone": "lightning_modules.encoders.backbone",
    "load_encoder": "lightning_modules.encoders.loading",
    "evaluate": "lightning_modules.retrieval.evaluation",
    "mine": "lightning_modules.mining.mine",
    "MiningOptions": "lightning_modules.mining.mine",
    "BenchmarkResult": "lightning_modules.retrieval.evaluation",
}

__all__ = [
    "AdapterEncoder",
    "BenchmarkResult",
    "ContrastiveModule",
    "Encoder",
    "FrozenEncoder",
    "InstructEncoder",
    "MiningOptions",
    "MoEEncoder",
    "ObjectiveOptions",
    "OptimOptions",
    "PromptEncoder",
    "RoutedEncoder",
    "SharedEncoder",
    "evaluate",
    "load_encoder",
    "mine",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
