"""An encoder whose parameters, gradients and optimizer's state are shared out over the ranks: torch's FSDP2.

Every rank keeps a slice of each parameter, and of all that belongs to it. A layer's parameters, those of all its
experts, are gathered for as long as the layer is computed; after its backward pass their gradients are averaged over
ranks, and each keeps its slice (Rajbhandari et al., arXiv 1910.02054, stage 3).

The encoder's modules and their names stay as they are: what is gathered together is a Unit beside them, and the
encoder's methods go through it. So all ranks must compute the same layers in the same order. They do so in a training
step (gradcache.py); to encode, where each rank has texts of its own, they make a replica.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_modules.distributed.collectives import world_size
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import build, describe_architecture


class Unit(nn.Module):
    """Modules whose parameters are gathered together. Called, it calls what it is given, while they are."""

    def __init__(self, *members: nn.Module):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, compute: Callable, *arguments: Any) -> Any:
        return compute(*arguments)


def shard(encoder: Encoder, device: torch.device) -> None:
    """Leave this rank its slices. Parameters are then DTensors, and must be the same on all ranks before."""
    mesh = init_device_mesh(device.type, (world_size(),))
    layers = [fully_shard(Unit(*encoder.layer_modules(i)), mesh=mesh) for i in range(encoder.num_layers)]
    in_layers = {parameter for layer in layers for parameter in layer.parameters()}
    all_of_it = fully_shard(Unit(encoder, *layers), mesh=mesh, ignored_params=in_layers)
    for name in encoder.layer_methods:
        setattr(encoder, name, _through(layers, getattr(encoder, name)))
    encoder.forward_with_penalty = functools.partial(all_of_it, encoder.forward_with_penalty)
    encoder.sharded = True
    # Vectors and prefixes are views. Nothing here changes them in place, which is what it warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def _through(layers: Sequence[Unit], method: Callable) -> Callable:
    def computed(index: int, *arguments: Any) -> Any:
        return layers[index](method, index, *arguments)

    return computed


def replica(encoder: Encoder) -> Encoder:
    """An encoder with whole parameters on every rank, to encode with; the encoder itself where it is not sharded.

    All ranks make it together. It keeps the weights of now.
    """
    if not encoder.sharded:
        return encoder
    found = build(describe_architecture(encoder), encoder.tokenizer)
    found.load_state_dict({name: whole(tensor) for name, tensor in encoder.state_dict().items()}, assign=True)
    return found.to(encoder.device).eval()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the ranks have slices of. All ranks gather it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def slice_of(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """This rank's slices of a loss's gradients, means over ranks; None for parameters that the loss does not meet.

    The gradients that the parameters have are lost.
    """
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    found = [None if parameter.grad is None else slice_of(parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def gathered(state: Any, keep: bool) -> Any:
    """Plain containers with whole tensors, on the CPU, in place of slices. All ranks gather them together.

    keep: whether this rank is to have them; else it has None in their place.
    """
    if isinstance(state, DTensor):
        found = whole(state)
        return found.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: gathered(value, keep) for key, value in state.items()}
    return [gathered(value, keep) for value in state] if isinstance(state, list) else state


def sliced(tensor: Any, like: Tensor) -> Any:
    """This rank's slice of a whole tensor that belongs to a parameter, if the parameter is sharded and of its shape."""
    if not isinstance(like, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
