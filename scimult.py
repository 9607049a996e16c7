"""Contrastive multi-task encoders of scientific papers: the public API in one module.

    import scimult

    encoder = scimult.load_encoder("runs/RUN")
    vectors = encoder.encode(["A paper"], "search")

The names are those of datamodules (reading papers, batches) and lightning_modules (encoders, training, evaluation).
They are imported on first use, because torch and transformers take seconds to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datamodules
import lightning_modules

if TYPE_CHECKING:
    from datamodules import *  # noqa: F403
    from lightning_modules import *  # noqa: F403

__version__ = "0.2.0"
if not TYPE_CHECKING:
    __all__ = sorted([*datamodules.__all__, *lightning_modules.__all__])


def __getattr__(name: str) -> Any:
    for package in (datamodules, lightning_modules):
        if name in package.__all__:
            return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *datamodules.__all__, *lightning_modules.__all__})
