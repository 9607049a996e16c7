"""Compare optimizer steps of a sharded encoder with those of DDP. test_ranks.py starts every rank.

    python -m tests.lightning_modules.distributed.sharded_on_ranks RANK WORLD_SIZE PORT

The setting is float64, dropout, accumulation over tasks, experts that are unused in one step, clipping, a different
number of chunks on each rank, and weights that cannot be divided evenly.
"""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import ModernBertConfig, ModernBertModel, MPNetConfig, MPNetModel

from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.collectives import largest
from lightning_modules.distributed.sharding import gathered, replica, shard, slice_of, sliced
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.backbone import random_backbone, set_dropout, word_vocabulary
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.dual_prompt import DualPromptEncoder
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.lora import LoraOptions, add_lora
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.optim import OptimOptions
from tests.conftest import TASKS, WORDS, text_of, with_features
from tests.lightning_modules.distributed.gradient_on_ranks import Step, batches, collection

SHAPE = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 51}
INSTRUCTIONS = {"instructions": {task: text_of(i, i + 1) for i, task in enumerate(TASKS)}}
ENCODERS = {
    "moe": (MoEEncoder, {"attention": True, "ffn": True}),
    "modernbert": (MoEEncoder, {"attention": True, "ffn": True}),
    "mpnet": (InstructEncoder, INSTRUCTIONS),
    "stitched": (CrossStitchEncoder, {"ffn": True}),
    "control": (ControlEncoder, {"ffn": True}),
    "routed": (RoutedEncoder, {"attention": True, "entropy_weight": 0.1}),
    "dual prompt": (DualPromptEncoder, INSTRUCTIONS | {"num_anchors": 3}),
    "prefix": (InstructEncoder, INSTRUCTIONS | {"separate": True}),
    "adapters": (AdapterEncoder, {"reduction_factor": 4}),
    "lora": (MoEEncoder, {"ffn": True}),
}
CASES = [  # encoder, GradCache, gradient checkpointing
    ("moe", False, False),
    ("moe", True, True),
    ("modernbert", False, True),
    ("mpnet", False, True),
    ("stitched", True, True),
    ("control", True, True),
    ("routed", True, False),
    ("dual prompt", False, False),
    ("prefix", True, False),
    ("adapters", False, False),
    ("lora", True, True),
]
PLAN = (["search"], ["classification", "search"])  # tasks of the batches of two optimizer steps


def module_of(kind, cached, checkpointing):
    """Return a module with the same weights every time."""
    torch.manual_seed(0)
    shape = SHAPE | {"max_position_embeddings": 64, "initializer_range": 0.2}
    backbone, tokenizer = random_backbone(shape, word_vocabulary([*WORDS, "title text query"], 400))
    if kind == "modernbert":
        own = {"vocab_size": 400, "pad_token_id": 0, "local_attention": 8}
        backbone = ModernBertModel(ModernBertConfig(**shape, **own))
    if kind == "mpnet":
        backbone = MPNetModel(MPNetConfig(**shape, vocab_size=400), add_pooling_layer=False)
    of_class, own = ENCODERS[kind]
    encoder = of_class(backbone, tokenizer, TASKS, pooling="mean", max_length=32, **own)
    if kind == "dual prompt":
        with_features(encoder, list(collection().corpus.values())[::2])
    set_dropout(encoder, 0.1, 0.1)
    if kind == "lora":
        add_lora(encoder, LoraOptions(rank=3, dropout=0.1))
    encoder.gradient_checkpointing = checkpointing
    options = {
        "optim": OptimOptions(lr=1e-3, eps=1e-4),
        "total_steps": 1000,
        "similarity": "cosine",
        "temperature": 0.1,
    }
    return ContrastiveModule(encoder, grad_cache=cached, **options).double()


def trained(module, step, plan_batches):
    """Return losses and gradients of two optimizer steps, then weights and optimizer. step: batch -> loss."""
    optimizer = module.train().configure_optimizers()["optimizer"]
    losses, gradients = [], []
    for own_batches in plan_batches:
        optimizer.zero_grad(set_to_none=True)
        for batch in own_batches:
            losses.append(step(batch) / len(own_batches))
            losses[-1].backward()
        gradients.append(gradients_of(module))
        module.configure_gradient_clipping(optimizer, 0.5)
        optimizer.step()
    return torch.stack(losses).detach(), gradients, gathered(module.state_dict(), True), optimizer


def gradients_of(module):
    slices = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    return gathered(slices, True)


def check(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (tensor is None) == (ours[name] is None), name
        if name.endswith(".keys"):
            assert torch.equal(tensor, ours[name])
    pairs = [(ours[name], x) for name, x in theirs.items() if x is not None and x.is_floating_point()]
    error = max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs)
    assert error < 1e-12, error


def check_optimizer(ours, theirs):
    """Check that the gathered state equals that of DDP, and that slicing it restores this rank's state."""
    whole, copied = gathered(ours.state_dict(), True), theirs.state_dict()
    assert whole["param_groups"] == copied["param_groups"]
    parameters = [parameter for group in ours.param_groups for parameter in group["params"]]
    assert whole["state"].keys() == copied["state"].keys()
    for i, state in whole["state"].items():
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, copied["state"][i][name], rtol=1e-9, atol=1e-15)
            again = sliced(tensor, parameters[i])
            assert torch.equal(slice_of(again), slice_of(ours.state[parameters[i]][name]))


def main(rank, world_size, port):
    dist.init_process_group(
        "gloo", store=dist.TCPStore("127.0.0.1", port, world_size, rank == 0), rank=rank, world_size=world_size
    )
    uneven = False
    for case in CASES:
        copied, module = module_of(*case), module_of(*case)
        plan_batches = [batches(module.encoder.tokenizer, plan, rank, world_size, 24) for plan in PLAN]
        chunks = [len(batch.chunks) for own_batches in plan_batches for batch in own_batches]
        uneven |= any(largest(number) != -largest(-number) for number in chunks)
        losses, gradients, weights, optimizer = trained(
            copied, nn.parallel.DistributedDataParallel(Step(copied), find_unused_parameters=True), plan_batches
        )
        shard(module.encoder, torch.device("cpu"))
        ours = trained(module, Step(module), plan_batches)
        torch.testing.assert_close(ours[0], losses, rtol=1e-12, atol=0)
        check(ours[1][0], gradients[0])
        check(ours[1][1], gradients[1])
        check(ours[2], weights)
        check_optimizer(ours[3], optimizer)
        for clipped, its_optimizer in ((copied, optimizer), (module, ours[3])):
            clipped.configure_gradient_clipping(its_optimizer, 1e-4, "value")
        check(gradients_of(module), gradients_of(copied))
        assert max(x.abs().max() for x in gradients_of(module).values() if x is not None) == 1e-4
        texts = [text_of(rank, i) for i in range(3 + rank)]  # a different number on each rank
        with pytest.raises(RuntimeError, match="replica"):
            module.encoder.encode(texts, "search")
        vectors, theirs = replica(module.encoder).encode(texts, "search"), copied.encoder.encode(texts, "search")
        torch.testing.assert_close(vectors, theirs)
        print("equal", flush=True)
    assert uneven
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
