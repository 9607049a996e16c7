"""The data: records, readers, batches and the multi-task schedule. Imports no other package of this project.

from datamodules import BeirReader, MultiTaskDataModule, SearchDataModule

data = MultiTaskDataModule([SearchDataModule("search", BeirReader("data/scifact"))], batch_size=16)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.batches import BatchOptions, MultiTaskDataModule
    from datamodules.readers.beir import BeirReader
    from datamodules.readers.jsonl import JsonlReader
    from datamodules.records import Collection, Document, Task, UserError
    from datamodules.sample import SampleReader
    from datamodules.schedule import Phase
    from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule

# Imported when they are first used, because Lightning takes seconds to import.
_MODULES = {
    "BatchOptions": "batches",
    "BeirReader": "readers.beir",
    "ClassificationDataModule": "tasks",
    "Collection": "records",
    "Document": "records",
    "JsonlReader": "readers.jsonl",
    "LinkPredictionDataModule": "tasks",
    "MultiTaskDataModule": "batches",
    "Phase": "schedule",
    "SampleReader": "sample",
    "SearchDataModule": "tasks",
    "Task": "records",
    "UserError": "records",
}
__all__ = [
    "BatchOptions",
    "BeirReader",
    "ClassificationDataModule",
    "Collection",
    "Document",
    "JsonlReader",
    "LinkPredictionDataModule",
    "MultiTaskDataModule",
    "Phase",
    "SampleReader",
    "SearchDataModule",
    "Task",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
