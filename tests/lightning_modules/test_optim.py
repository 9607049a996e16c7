"""Parameter groups and the learning-rate schedule."""

import typing

import pytest
import torch
import transformers

from lightning_modules.optim import OptimOptions, parameter_groups, schedule


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
