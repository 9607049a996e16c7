"""What test_sharding.py starts on every rank: optimizer steps of a sharded encoder, against those of DDP.

    python -m tests.lightning_modules.sharded_on_ranks RANK WORLD_SIZE PORT

Float64, dropout, chunks of which ranks have different numbers, weights that cannot be shared out evenly.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.backbone import random_backbone, set_dropout, word_vocabulary
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.optim import OptimOptions
from lightning_modules.sharding import gathered, replica, shard
from tests.conftest import TASKS, WORDS
from tests.lightning_modules.gradient_on_ranks import Step, batches

INSTRUCTIONS = {"instructions": {task: f"{WORDS[i]} {WORDS[i + 1]}" for i, task in enumerate(TASKS)}}
ENCODERS = {
    "moe": (MoEEncoder, {"attention": True, "ffn": True}),
    "routed": (RoutedEncoder, {"attention": True, "entropy_weight": 0.1}),
    "instruct": (InstructEncoder, INSTRUCTIONS),
    "prefix": (InstructEncoder, INSTRUCTIONS | {"separate": True}),
    "adapters": (AdapterEncoder, {"reduction_factor": 4}),
}
PLAN = (["search"], ["classification", "search", "classification"])  # tasks of the batches of two optimizer steps


def module_of(kind, checkpointing=False, cached=False, model_type="bert"):
    """The same weights every time."""
    torch.manual_seed(0)
    shape = {
        "model_type": model_type,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 51,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    backbone, tokenizer = random_backbone(shape, word_vocabulary([*WORDS, "title text query"], 400))
    of_class, own = ENCODERS[kind]
    encoder = of_class(backbone, tokenizer, TASKS, pooling="mean", max_length=32, **own)
    for part in (backbone, *([encoder.instruction_backbone] if kind == "prefix" else [])):
        set_dropout(part, 0.1, 0.1)
    encoder.gradient_checkpointing = checkpointing
    options = OptimOptions(lr=1e-3, eps=1e-4, warmup=0.0)
    return ContrastiveModule(encoder, grad_cache=cached, optim=options, similarity="cosine", temperature=0.1).double()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(module, steps, step):
    """Losses, gradients of both steps by name, and weights afterwards. step: what computes the loss of a batch."""
    optimizer = module.configure_optimizers()["optimizer"]
    losses, found = [], []
    for own in steps:
        optimizer.zero_grad(set_to_none=True)
        for batch in own:
            loss = step(batch) / len(own)
            loss.backward()
            losses.append(loss.detach())
        found.append({n: None if p.grad is None else whole(p.grad).clone() for n, p in module.named_parameters()})
        module.configure_gradient_clipping(optimizer, 0.5)
        optimizer.step()
    return torch.stack(losses), found, {n: whole(t).clone() for n, t in module.state_dict().items()}, optimizer


def check(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (tensor is None) == (ours[name] is None), name
    pairs = [(ours[name], tensor) for name, tensor in theirs.items() if tensor is not None]
    error = max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs)
    assert error < 1e-12, error


def main(rank, world_size, port):
    dist.init_process_group(
        "gloo", store=dist.TCPStore("127.0.0.1", port, world_size, rank == 0), rank=rank, world_size=world_size
    )
    cases = [{"kind": kind, "cached": cached} for kind in ENCODERS for cached in (False, True)]
    cases += [{"kind": "moe", "cached": cached, "checkpointing": True} for cached in (False, True)]
    cases += [{"kind": "moe", "model_type": "modernbert"}]
    for case in cases:
        copied, module = module_of(**case), module_of(**case)
        steps = [batches(module.encoder.tokenizer, plan, rank, world_size, 24) for plan in PLAN]
        step = nn.parallel.DistributedDataParallel(Step(copied), find_unused_parameters=True)
        losses, gradients, weights, optimizer = trained(copied, steps, step)
        state = optimizer.state_dict()
        del step
        shard(module.encoder, torch.device("cpu"))
        ours = trained(module, steps, Step(module))
        torch.testing.assert_close(ours[0], losses, rtol=1e-12, atol=1e-12)
        for i in (0,1): check(ours[1][i], gradients[i])
        check(ours[2], weights)
        print(case, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
