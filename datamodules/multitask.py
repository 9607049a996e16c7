"""The combination of several tasks."""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.batches import BatchOptions, ContrastiveDataModule
from datamodules.records import UserError
from datamodules.tasks import TaskDataModule


class MultiTaskDataModule(ContrastiveDataModule):
    """Several tasks that take turns, one task a step (datamodules/schedule.py).

    options: of the batches, for all tasks.
    """

    def __init__(self, tasks: Sequence[TaskDataModule], options: BatchOptions | None = None, tokenizer=None):
        super().__init__()
        if not tasks:
            raise UserError("a multi-task data module needs at least one task")
        names = [task.task.name for task in tasks]
        if len(set(names)) < len(names):
            raise UserError(f"each task may be named once, got {', '.join(names)}")
        self._tasks = tuple(tasks)
        self.options, self.tokenizer = options or BatchOptions(), tokenizer

    @property
    def tasks(self) -> Sequence[TaskDataModule]:
        return self._tasks

    def setup(self, stage: str | None = None) -> None:
        names = [name for task in self.tasks for name in task.readers]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise UserError(f"results go by the name of the collection, and two tasks have {', '.join(doubles)}")
        for task in self.tasks:
            task.setup(stage)
