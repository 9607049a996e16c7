"""Lightning's strategy of a sharded encoder, whose checkpoints are those of every other training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import Optimizer

from lightning_modules.distributed.sharding import gathered, shard, sliced


class ShardedStrategy(DDPStrategy):
    """As DDP, with the encoder sharded (sharding.py) instead of copied.

    Checkpoints have whole tensors, and go through the trainer's CheckpointIO on the first rank: a training may go on
    with another strategy, or another number of ranks. Weights are read before the encoder is sharded.
    """

    def configure_ddp(self) -> None:
        for tensor in self.lightning_module.state_dict().values():
            dist.broadcast(tensor, 0)  # as DDP does
        shard(self.lightning_module.encoder, self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered(super().lightning_module_state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return gathered(super().optimizer_state(optimizer), self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            own = {
                place: {name: sliced(value, parameters[place]) for name, value in values.items()}
                for place, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": own})
