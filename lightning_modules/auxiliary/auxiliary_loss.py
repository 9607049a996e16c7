"""Interface of the losses that are added to InfoNCE.

Shapes: U distinct texts of a batch on this rank, B queries on this rank, n texts of a companion, D dimensions of a
vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from datamodules.options import check_number
from datamodules.packed import ContrastiveBatch

if TYPE_CHECKING:  # because Lightning takes seconds to import
    from datamodules.batches import CompanionSource, ContrastiveDataModule


class AuxiliaryLoss(nn.Module, ABC):
    """A loss that is added to InfoNCE.

    Its parameters are trained along with the encoder and saved in checkpoints. `prepare` keeps its tables in buffers
    that are not persistent. Do not store the data in an attribute, because averaging the weights copies the module.

    A constructor may also take `tasks` (names of the tasks in training), `dimension` (D) and `objective`
    (ObjectiveOptions), which experiments pass.

    weight: factor of the loss; 0: the loss is not computed.
    lr: peak learning rate of the loss's own parameters, by default the encoder's.
    """

    def __init__(self, weight: float = 1.0, lr: float | None = None):
        super().__init__()
        check_number("weight", weight, minimum=0, maximum=1e6)
        if lr is not None:
            check_number("lr", lr, above=0, maximum=10)
        self.weight, self.lr = weight, lr

    def prepare(self, data: ContrastiveDataModule) -> None:
        """Check the options against the data, and make tables, on each rank before training. Raises UserError."""

    def companions(self, data: ContrastiveDataModule, task: str) -> Sequence[CompanionSource]:
        """Return the sources of the extra texts that this loss needs in each batch of a task."""
        return ()

    @abstractmethod
    def forward(self, batch: ContrastiveBatch, vectors: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """Return the unweighted mean of the loss over this rank's queries, a scalar.

        If the loss does not apply to the batch's task, return a 0 that has a graph, such as 0 * vectors.sum().

        batch: batch with the companions of this loss.
        vectors: vectors of the batch, (U, D), not normalised, in at least float32.
        companions: vectors of each companion's texts, (n, D), not normalised, in at least float32.
        """
