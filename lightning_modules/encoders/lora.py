"""LoRA (Hu et al., arXiv 2106.09685), with the layers of the package peft.

A linear layer of the backbone computes W x + alpha / rank * B A x instead of W x. W is frozen; A (rank, in) and B (out,
rank) are trained. B starts at 0, so a new encoder equals its backbone.

Encoders have these matrices only in training. Loading and exporting merge them into W, without peft.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.records import UserError
from lightning_modules.encoders.backbone_options import LoraOptions, check_peft
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.families import Experts, family_of
from lightning_modules.parts import without_expert


def add_lora(encoder: Encoder, options: LoraOptions) -> None:
    """Freeze the backbone, and add matrices to all linear layers that were trainable.

    Parameters outside the backbone, such as gates, are trained as before. Raises UserError for invalid targets.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    backbones = [module for module in encoder.children() if isinstance(module, PreTrainedModel)]
    families = [family_of(backbone) for backbone in backbones]
    layers = [(layer, family.attention_modules) for family in families for layer in family.layers]
    linear = {layer: _trained_linear(layer) for layer, _ in layers}
    _check_targets(options.targets, linear.values(), type(encoder).__name__)
    for backbone in backbones:
        backbone.requires_grad_(False)
    for layer, attention in layers:
        names = [name for name, plain in linear[layer].items() if _is_chosen(name, plain, options.targets, attention)]
        if names:
            # A pattern, because with a list, peft would also match longer names with the same ending.
            pattern = "|".join(map(re.escape, names))
            settings: dict[str, Any] = {"r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.dropout}
            inject_adapter_in_model(LoraConfig(target_modules=pattern, **settings), layer)
            _start_experts_equal(layer)
    encoder.lora_scale = options.alpha / options.rank


def _start_experts_equal(layer: nn.Module) -> None:
    """Copy A of the first expert to the other experts. B is 0 in all of them."""
    for module in layer.modules():
        if isinstance(module, Experts):
            first, *others = module.experts.values()
            matrices = {name: tensor for name, tensor in first.state_dict().items() if "lora_A.default" in name}
            for other in others:
                other.load_state_dict(matrices, strict=False)


def _trained_linear(layer: nn.Module) -> dict[str, str]:
    """Return the trained linear modules of a layer: name -> name without the expert."""
    return {
        name: without_expert(name)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }


def _is_chosen(name: str, plain: str, targets: Sequence[str], attention: Sequence[str]) -> bool:
    """Return whether a linear module gets matrices. attention: names of the attention modules."""
    if targets:
        return any(f".{plain}".endswith(f".{target}") for target in targets)
    return name != plain or any(f"{plain}.".startswith(f"{module}.") for module in attention)


def _check_targets(targets: Sequence[str], linear: Collection[Mapping[str, str]], encoder: str) -> None:
    """Raise UserError if a target is not trained, or if no target is inside the experts.

    linear: modules of each layer, as returned by _trained_linear.
    encoder: class name of the encoder, for the error.
    """
    names = {name: plain for layer in linear for name, plain in layer.items()}
    if not names:
        raise UserError(f"lora.rank: {encoder} does not train any linear layer of its backbone; set it to 0")
    for target in targets:
        if not any(_is_chosen(name, plain, [target], ()) for name, plain in names.items()):
            known = ", ".join(sorted(set(names.values())))
            raise UserError(
                f"lora.targets: unknown linear layer {target!r}; expected one of {known}, or the end of such a name"
            )
    experts = {name: plain for name, plain in names.items() if name != plain}
    if targets and experts and not any(_is_chosen(name, plain, targets, ()) for name, plain in experts.items()):
        known = ", ".join(sorted(set(experts.values())))
        raise UserError(f"lora.targets: the experts would stay equal; add one of their layers ({known})")


def unfreeze(module: nn.Module) -> None:
    """Make all parameters of a module trainable; with LoRA, only its matrices."""
    matrices = [parameter for name, parameter in module.named_parameters() if re.search(r"lora_[AB]\.default", name)]
    for parameter in matrices or module.parameters():
        parameter.requires_grad_(True)


def merge_lora(weights: Mapping[str, Tensor], scale: Any, source: str) -> dict[str, Tensor]:
    """Merge the matrices in a state_dict into the weights.

    scale: alpha / rank, or None without LoRA.
    source: name of the file, for error messages.
    Raises UserError if the matrices do not fit the weights.
    """
    merged = dict(weights)
    for key in weights if scale is not None else ():
        if not (match := re.fullmatch(r"(.+)\.lora_B\.default\.weight", key)):
            continue
        layer = match[1]
        try:
            names = (f"{layer}.{name}.weight" for name in ("lora_B.default", "lora_A.default", "base_layer"))
            up, down, weight = (merged.pop(name) for name in names)
            if (len(up), *down.shape[1:]) != weight.shape:  # before a product that may not fit into memory
                raise ValueError(f"{tuple(up.shape)} and {tuple(down.shape)} for {tuple(weight.shape)}")
            merged[f"{layer}.weight"] = weight + scale * (up @ down)
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{source}: the matrices of LoRA do not fit the weights of {layer} ({error})") from error
        if f"{layer}.base_layer.bias" in merged:
            merged[f"{layer}.bias"] = merged.pop(f"{layer}.base_layer.bias")
    return merged
