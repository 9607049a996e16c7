"""Data: records, readers, batches and the multi-task schedule. Does not import other packages of this project.

from datamodules import BeirReader, MultiTaskDataModule, SearchDataModule

data = MultiTaskDataModule([SearchDataModule("search", BeirReader("data/scifact"))], batch_size=16)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the redundant aliases mark re-exports
    from datamodules.batches import BatchOptions as BatchOptions
    from datamodules.batches import MultiTaskDataModule as MultiTaskDataModule
    from datamodules.readers.beir import BeirReader as BeirReader
    from datamodules.readers.jsonl import JsonlReader as JsonlReader
    from datamodules.readers.papers import PapersReader as PapersReader
    from datamodules.records import Collection as Collection
    from datamodules.records import Document as Document
    from datamodules.records import Task as Task
    from datamodules.records import UserError as UserError
    from datamodules.sample import SampleReader as SampleReader
    from datamodules.schedule import Phase as Phase
    from datamodules.tasks import ClassificationDataModule as ClassificationDataModule
    from datamodules.tasks import LinkPredictionDataModule as LinkPredictionDataModule
    from datamodules.tasks import SearchDataModule as SearchDataModule
    from datamodules.tasks import TaskDataModule as TaskDataModule

# Imported on first use, because Lightning takes seconds to import.
_MODULES = {
    "BatchOptions": "batches",
    "BeirReader": "readers.beir",
    "ClassificationDataModule": "tasks",
    "Collection": "records",
    "Document": "records",
    "JsonlReader": "readers.jsonl",
    "LinkPredictionDataModule": "tasks",
    "MultiTaskDataModule": "batches",
    "PapersReader": "readers.papers",
    "Phase": "schedule",
    "SampleReader": "sample",
    "SearchDataModule": "tasks",
    "Task": "records",
    "TaskDataModule": "tasks",
    "UserError": "records",
}
if not TYPE_CHECKING:  # type checkers cannot evaluate it, and would then not know any of the names
    __all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
