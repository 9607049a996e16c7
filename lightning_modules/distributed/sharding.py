"""Shard the parameters, gradients and optimizer state of an encoder over ranks, with torch's FSDP2.

Every rank keeps a slice of each parameter. The parameters of a layer, including all its experts, are gathered while the
layer is computed. After its backward pass, gradients are averaged over ranks, and each rank keeps its slice
(Rajbhandari et al., arXiv 1910.02054, stage 3).

The encoder's modules and their names do not change. Modules that are gathered together form a Unit outside the encoder,
which calls the encoder's methods. So all ranks must compute the same layers in the same order, as in a training step
(chunked.py). To encode different texts, ranks create a replica.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_modules.distributed.collectives import world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import with_weights


class ShardedStrategy(DDPStrategy):
    """Lightning's DDP strategy, with the encoder sharded instead of copied.

    The first rank writes checkpoints, with whole tensors. So a run can be resumed with a different strategy or number
    of ranks. Weights are loaded before the encoder is sharded.
    """

    def configure_ddp(self) -> None:
        module: Any = self.lightning_module
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)  # as DDP does
        shard(module.encoder, self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered(super().lightning_module_state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return gathered(super().optimizer_state(optimizer), self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                i: {name: sliced(value, parameters[i]) for name, value in values.items()}
                for i, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


class Unit(nn.Module):
    """Modules whose parameters are gathered together while `forward` calls a function."""

    def __init__(self, *members: nn.Module):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, compute: Callable, *arguments: Any) -> Any:
        return compute(*arguments)


def shard(encoder: Encoder, device: torch.device) -> None:
    """Replace the parameters of an encoder by DTensors with this rank's slices.

    The parameters must be equal on all ranks.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    layers: list[Any] = [fully_shard(Unit(*encoder.layer_modules(i)), mesh=mesh) for i in range(encoder.num_layers)]
    in_layers = {parameter for layer in layers for parameter in layer.parameters()}
    whole_encoder: Any = fully_shard(Unit(encoder, *layers), mesh=mesh, ignored_params=in_layers)
    for name in encoder.layer_methods:
        setattr(encoder, name, partial(_call_in_unit, layers, getattr(encoder, name)))
    encoder.forward_with_penalty = partial(whole_encoder, encoder.forward_with_penalty)  # type: ignore[method-assign]
    encoder.sharded = True
    # Vectors and prefixes are views. The warning is about in-place changes, which never happen here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def _call_in_unit(layers: Sequence[Unit], method: Callable, index: int, *arguments: Any) -> Any:
    """Call a method of the encoder while the parameters of the layer are gathered."""
    return layers[index](method, index, *arguments)


def replica(encoder: Encoder) -> Encoder:
    """Return a copy with whole parameters, for encoding, or the encoder itself if it is not sharded.

    All ranks must call this together. The copy does not follow later changes of the weights.
    """
    if not encoder.sharded:
        return encoder
    return with_weights(encoder, {name: whole(tensor) for name, tensor in encoder.state_dict().items()})


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor. All ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def slice_of(tensor: Tensor) -> Tensor:
    """Return this rank's slice of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return this rank's slices of the gradients of a loss, averaged over ranks.

    The result is None for parameters that the loss does not depend on. Existing gradients are deleted.
    """
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    gradients = [None if parameter.grad is None else slice_of(parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def gathered(state: Any, keep: bool) -> Any:
    """Return nested containers with sharded tensors replaced by whole ones on the CPU.

    All ranks must call this together.

    keep: whether this rank needs the tensors. If not, they are replaced by None, to save memory.
    """
    if isinstance(state, DTensor):
        tensor = whole(state)
        return tensor.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: gathered(value, keep) for key, value in state.items()}
    return [gathered(value, keep) for value in state] if isinstance(state, list) else state


def sliced(tensor: Any, like: Tensor) -> Any:
    """Shard a tensor like a parameter of the same shape. Return it unchanged if that parameter is not sharded."""
    if not isinstance(like, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
