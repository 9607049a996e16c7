"""What a loss that is added to InfoNCE provides.

Shapes
    U   distinct texts of a batch on this rank
    B   queries on this rank
    n   texts of a companion
    D   dimensions of a vector
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from datamodules.batches import CompanionSource, ContrastiveDataModule
from datamodules.packed import ContrastiveBatch
from datamodules.records import UserError


class AuxiliaryLoss(nn.Module, ABC):
    """A loss that is added to InfoNCE.

    Its parameters are trained along with the encoder and are part of checkpoints. Tables that `prepare` makes are
    buffers that are not persistent. Do not keep the data as an attribute: an average of the weights copies the module.

    Constructors may also take `tasks`, the names of the tasks in training, `dimension`, D, and `objective`, the
    ObjectiveOptions. An experiment then gives them to the loss.

    weight: factor of the loss. With 0, it is not computed.
    lr: peak learning rate of the loss's own parameters; by default that of the encoder.
    """

    def __init__(self, weight: float = 1.0, lr: float | None = None):
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise UserError(f"weight: expected a number of at least 0, got {weight}")
        if lr is not None and not 0 < lr < float("inf"):
            raise UserError(f"lr: expected a number above 0, got {lr}")
        self.weight, self.lr = weight, lr

    def prepare(self, data: ContrastiveDataModule) -> None:
        """Check the options against the data and make tables, on every rank before training. Raises UserError."""

    def companions(self, data: ContrastiveDataModule, task: str) -> Sequence[CompanionSource]:
        """Return the sources of further texts that this loss needs with each batch of a task."""
        return ()

    @abstractmethod
    def forward(self, batch: ContrastiveBatch, vectors: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """Return the mean of the loss over the queries of this rank, a scalar, without its weight.

        On a task that it does not concern, return a zero that has a graph, such as 0 * vectors.sum().

        batch: batch, whose companions are those of this loss. vectors: vectors of the batch, (U, D). companions:
        vectors of each companion's texts, (n, D). They are not normalised, and in at least float32.
        """
