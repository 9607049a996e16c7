"""Parameter groups and the learning-rate schedule."""

import typing

import pytest
import torch
import transformers

from datamodules.records import UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.optim import ExpertDecay, OptimOptions, parameter_groups, schedule
from tests.conftest import TASKS


def test_every_parameter_is_in_one_group_and_biases_have_no_weight_decay(make_encoder):
    encoder = make_encoder("both")
    groups = parameter_groups(encoder, OptimOptions(weight_decay=0.01), 4)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(encoder.parameters()))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in encoder.named_parameters():
        no_decay = name.endswith("bias") or "LayerNorm" in name
        assert decay[id(parameter)] == (0 if no_decay else 0.01), name


def test_layer_wise_learning_rates(make_encoder):
    encoder = make_encoder("attention")
    groups = parameter_groups(encoder, OptimOptions(lr=1.0, layer_decay=0.5), 4)
    lr = {id(p): group["lr"] for group in groups for p in group["params"]}
    by_name = {name: lr[id(p)] for name, p in encoder.named_parameters()}
    assert by_name["backbone.embeddings.word_embeddings.weight"] == 0.5**4
    assert by_name["backbone.encoder.layer.0.intermediate.dense.weight"] == 0.5**3
    assert by_name["backbone.encoder.layer.3.attention.output.dense.experts.search.weight"] == 1.0


def test_learning_rates_by_part(make_encoder):
    """The narrowest part counts, and the factors of layer_decay and weight decay stay."""
    encoder = make_encoder("attention")
    scale = {"embeddings": 0.0, "experts": 3.0, "search": 5.0}
    groups = parameter_groups(encoder, OptimOptions(lr=2.0, layer_decay=0.5, lr_scale=scale), 4)
    lr = {id(p): group["lr"] for group in groups for p in group["params"]}
    by_name = {name: lr[id(p)] for name, p in encoder.named_parameters()}
    assert by_name["backbone.embeddings.word_embeddings.weight"] == 0
    assert by_name["backbone.encoder.layer.2.intermediate.dense.weight"] == 2 * 0.5
    assert by_name["backbone.encoder.layer.3.attention.output.dense.experts.search.weight"] == 2 * 5
    assert by_name["backbone.encoder.layer.1.attention.output.dense.experts.classification.bias"] == 2 * 3 * 0.5**2
    with pytest.raises(UserError, match="lr_scale: unknown part 'serach'; the parts of this encoder are .*, search"):
        parameter_groups(encoder, OptimOptions(lr_scale={"serach": 1.0}), 4)


def test_learning_rate_of_zero_freezes_a_part(make_encoder):
    encoder = make_encoder("attention")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    options = OptimOptions(lr=0.1, lr_scale={"embeddings": 0.0})
    optimizer = torch.optim.AdamW(parameter_groups(encoder, options, 4), fused=True)
    sum(parameter.sum() for parameter in encoder.parameters()).backward()
    optimizer.step()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".embeddings." in name), name


def test_parts_with_a_learning_rate_of_zero_get_no_gradients(make_encoder):
    """Their gradients would count when the norm of all gradients is clipped."""
    encoder = make_encoder("attention")
    module = ContrastiveModule(encoder, total_steps=10, optim=OptimOptions(lr_scale={"experts": 0.0, "search": 1.0}))
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in encoder.named_parameters() if ".experts." in name and ".search." not in name}
    grouped = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert not grouped & {id(parameter) for parameter in encoder.parameters() if not parameter.requires_grad}
    with pytest.raises(UserError, match="lr_scale: freezes all trained parts"):
        ContrastiveModule(make_encoder("shared"), optim=OptimOptions(lr_scale={"embeddings": 0.0, "shared": 0.0}))


def test_expert_decay_moves_experts_towards_their_mean(make_encoder):
    """Compared with the same step without it: the distance to the mean shrinks by the share lr * expert_decay."""

    def step(strength):
        encoder = make_encoder("attention")
        module = ContrastiveModule(
            encoder, total_steps=10, optim=OptimOptions(lr=0.05, warmup=0, expert_decay=strength)
        )
        optimizer = module.configure_optimizers()["optimizer"]
        torch.manual_seed(0)
        for parameter in encoder.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return encoder.state_dict()

    without, pulled = step(0.0), step(4.0)
    for name, tensor in without.items():
        if ".experts." not in name:
            assert torch.equal(pulled[name], tensor), name
            continue
        own = next(task for task in TASKS if f".{task}." in name)
        mean = sum(without[name.replace(own, task)] for task in TASKS) / 3
        torch.testing.assert_close(pulled[name] - mean, 0.8 * (tensor - mean), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["self", "layer", "output"])
def test_expert_may_have_the_name_of_a_module(make_backbone, name):
    """An expert `self` was looked for in `attention.self`, and then had no counterparts to move towards."""
    tasks = {name: name, "search": "search"}
    for kind in (MoEEncoder, AdapterEncoder):
        counterparts = ExpertDecay(kind(*make_backbone(), tasks, max_length=32), 1.0).counterparts
        assert {len(experts) for experts in counterparts} == {2}
        assert all(one.shape == other.shape for one, other in counterparts)


def test_layer_decay_does_not_read_the_name_of_an_expert(make_backbone):
    tasks = {task: task for task in ("layer", "embeddings", "search")}
    encoder = AdapterEncoder(*make_backbone(), tasks, max_length=32)
    groups = parameter_groups(encoder, OptimOptions(lr=1.0, layer_decay=0.5), 4)
    assert {group["lr"] for group in groups} == {1.0}


def test_expert_decay_needs_experts(make_encoder):
    with pytest.raises(UserError, match="expert_decay: this encoder has no experts"):
        ExpertDecay(make_encoder("shared"), 1.0)


def test_frozen_parameters_are_in_no_group(make_encoder):
    encoder = make_encoder("shared")
    encoder.backbone.embeddings.requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(encoder, OptimOptions(), 4) for p in group["params"]}
    assert not grouped & {id(p) for p in encoder.backbone.embeddings.parameters()}


def test_schedule_rises_and_falls():
    factor = schedule("linear", 0.1, 100)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(10) == 1.0
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == factor(200) == 0.0
    assert schedule("linear", 0.0, 10)(0) == 1.0


SCHEDULES = {
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
}


def test_schedules_equal_those_of_transformers():
    """Ours rises one step earlier, because a first step with a learning rate of 0 would be wasted."""
    assert set(SCHEDULES) == set(typing.get_args(typing.get_type_hints(OptimOptions)["schedule"]))
    for name, scheduler in SCHEDULES.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        (theirs,) = scheduler(optimizer, 20, 100).lr_lambdas
        ours = schedule(name, 0.2, 100)
        assert [ours(step) for step in range(19)] == pytest.approx([theirs(step + 1) for step in range(19)])
        assert [ours(step) for step in range(20, 101)] == pytest.approx([theirs(step) for step in range(20, 101)])
