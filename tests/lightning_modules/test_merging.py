"""Merging encoders: weighted averages, soups, and what cannot be merged."""

import copy
import math

import pytest
import torch

from datamodules.records import UserError
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.merging import Weights, greedy_soup, merge, narrowest_parts, sweep
from tests.conftest import TASKS
from tests.lightning_modules.encoders.test_checkpoints import scrambled

KINDS = ("shared", "attention", "ffn", "both")


def test_linear_average_equals_a_few_lines_of_torch(make_encoder):
    members = {str(seed): scrambled(make_encoder("both"), seed) for seed in range(3)}
    merged = merge(members, Weights((1.0, 2.0, 5.0))).state_dict()
    states = [encoder.state_dict() for encoder in members.values()]
    for name, tensor in merged.items():
        expected = (states[0][name] + 2 * states[1][name] + 5 * states[2][name]) / 8
        torch.testing.assert_close(tensor, expected, atol=1e-7, rtol=1e-6)


def test_members_stay_unchanged(make_encoder):
    members = {str(seed): scrambled(make_encoder(), seed) for seed in range(2)}
    before = copy.deepcopy([encoder.state_dict() for encoder in members.values()])
    merge(members, Weights((0.5, 0.5)))
    for encoder, state in zip(members.values(), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("member", [0, 1])
def test_a_member_with_all_the_weight_is_copied_bit_for_bit(make_encoder, method, member):
    members = [scrambled(make_encoder("both"), seed) for seed in range(2)]
    with torch.no_grad():
        members[member].backbone.embeddings.word_embeddings.weight[0] = -0.0  # 1 * -0.0 + 0 * x is 0.0
    weights = Weights((0.7, 0.0) if member == 0 else (0.0, 0.7))
    merged = merge({"a": members[0], "b": members[1]}, weights, method).state_dict()
    for name, tensor in members[member].state_dict().items():
        assert torch.equal(merged[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_slerp_follows_the_arc(make_encoder, share):
    """On a plane, slerp turns one vector towards the other by a share of the angle, and interpolates their lengths."""
    a, b = make_encoder("shared"), make_encoder("shared")
    with torch.no_grad():
        for encoder, angle in ((a, 0.3), (b, 1.7)):
            encoder.backbone.embeddings.word_embeddings.weight.zero_()
            encoder.backbone.embeddings.word_embeddings.weight[0, :2] = torch.tensor([math.cos(angle), math.sin(angle)])
    merged = merge({"a": a, "b": b}, Weights((1 - share, share)), "slerp")
    angle = 0.3 + share * (1.7 - 0.3)
    expected = torch.tensor([math.cos(angle), math.sin(angle)])
    torch.testing.assert_close(merged.backbone.embeddings.word_embeddings.weight[0, :2], expected)


def test_slerp_of_parallel_opposite_and_zero_tensors_is_linear(make_encoder):
    a = scrambled(make_encoder("shared"))
    for factor in (3.0, -3.0, 0.0):
        b = copy.deepcopy(a)
        with torch.no_grad():
            for parameter in b.parameters():
                parameter.mul_(factor)
        merged = merge({"a": a, "b": b}, Weights((0.75, 0.25)), "slerp").state_dict()
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(merged[name], (0.75 + 0.25 * factor) * tensor, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_is_merged_with_the_layer_of_a_shared_encoder(make_encoder, kind):
    tuned, start = scrambled(make_encoder(kind)), make_encoder("shared")
    merged = merge({"tuned": tuned, "start": start}, Weights((0.7, 0.3))).state_dict()
    origin = dict(start.backbone.named_parameters())
    for name, tensor in tuned.state_dict().items():
        plain = name.removeprefix("backbone.")
        for task in TASKS:
            plain = plain.replace(f".experts.{task}", "")
        torch.testing.assert_close(merged[name], 0.7 * tensor + 0.3 * origin[plain], atol=1e-7, rtol=1e-6)


def test_parts_have_weights_of_their_own(make_encoder):
    a, b = scrambled(make_encoder("attention"), 1), scrambled(make_encoder("attention"), 2)
    parts = {"embeddings": (1.0, 0.0), "experts": (0.25, 0.75), "search": (0.0, 1.0)}
    merged = merge({"a": a, "b": b}, Weights((0.5, 0.5), parts)).state_dict()
    first, second = a.state_dict(), b.state_dict()
    for name, tensor in merged.items():
        share = 0.5
        if ".embeddings." in name:
            share = 1.0
        if ".experts." in name:
            share = 0.0 if ".experts.search." in name else 0.25
        torch.testing.assert_close(tensor, share * first[name] + (1 - share) * second[name], atol=1e-7, rtol=1e-6)
    assert set(narrowest_parts(a)) == {"embeddings", "shared", *TASKS}


def test_averages_keep_the_dtype_of_the_members(make_encoder):
    members = {str(seed): scrambled(make_encoder("shared"), seed).bfloat16() for seed in range(3)}
    merged = merge(members, Weights((1, 1, 1))).state_dict()
    states = [encoder.state_dict() for encoder in members.values()]
    for name, tensor in merged.items():
        assert torch.equal(tensor, (sum(state[name].double() for state in states) / 3).bfloat16())


def test_a_merged_encoder_is_saved_and_loaded_like_any_other(make_encoder, tmp_path):
    members = {"tuned": scrambled(make_encoder("attention")), "start": make_encoder("shared")}
    merged = merge(members, Weights((0.5, 0.5)))
    merged.save_pretrained(tmp_path)
    assert torch.equal(load_encoder(tmp_path).encode(["bara"], "search"), merged.encode(["bara"], "search"))


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (
            {"kind": "attention"},
            {"kind": "ffn"},
            "b cannot be merged with a: attention is False, not True; ffn is True",
        ),
        (
            {"kind": "shared"},
            {"kind": "attention"},
            "it is a MoEEncoder, not a SharedEncoder; name the MoEEncoder first",
        ),
        ({}, {"layers": "all"}, "layers is all, not mod2"),
        ({"kind": "shared"}, {"kind": "shared", "tasks": {"other": "x"}}, r"tasks is \['other'\], not"),
        ({}, {"tasks": dict.fromkeys(TASKS, "one")}, "tasks is"),
        ({}, {"kind": "shared", "pooling": "mean"}, "pooling is mean, not cls"),
        ({}, {"kind": "shared", "config": {"hidden_act": "relu"}}, "hidden_act is relu, not gelu"),
        (
            {},
            {"kind": "shared", "config": {"intermediate_size": 32}},
            r"intermediate.dense.weight has the shape \(32, 32\), not",
        ),
        ({}, {"kind": "shared", "config": {"num_layers": 2}}, "it has no parameter backbone.encoder.layer.2"),
        ({"kind": "shared", "config": {"num_layers": 2}}, {"kind": "shared"}, "it also has the parameter .*layer.2"),
    ],
)
def test_what_differs_between_members_is_named(make_encoder, first, other, message):
    with pytest.raises(UserError, match=message):
        merge({"a": make_encoder(**first), "b": make_encoder(**other)}, Weights((1, 1)))


def test_members_with_another_tokenizer_are_refused(make_encoder, make_backbone):
    other = make_encoder("shared")
    other.tokenizer = copy.deepcopy(other.tokenizer)
    other.tokenizer.backend_tokenizer.normalizer.lowercase = not other.tokenizer.backend_tokenizer.normalizer.lowercase
    with pytest.raises(UserError, match="b cannot be merged with a: it has another tokenizer"):
        merge({"a": make_encoder("shared"), "b": other}, Weights((1, 1)))


@pytest.mark.parametrize(
    ("weights", "method", "message"),
    [
        (Weights((1.0,)), "linear", "weights: expected 2 weights, one per model, got 1"),
        (Weights((1.0, -1.0)), "linear", "weights: expected weights of at least 0, and one above 0, got 1 -1"),
        (Weights((0.0, 0.0)), "linear", "one above 0"),
        (Weights((float("nan"), 1.0)), "linear", "one above 0"),
        (Weights((1.0, 1.0), {"search": (1.0,)}), "linear", "search: expected 2 weights"),
        (Weights((1.0, 1.0), {"serach": (1.0, 0.0)}), "linear", "unknown part 'serach'; .* search"),
    ],
)
def test_weights_that_do_not_fit_are_refused(make_encoder, weights, method, message):
    with pytest.raises(UserError, match=message):
        merge({"a": make_encoder(), "b": make_encoder()}, weights, method)


def test_slerp_of_three_and_a_merge_of_one_are_refused(make_encoder):
    with pytest.raises(UserError, match="slerp merges two models, got 3"):
        merge({name: make_encoder() for name in "abc"}, Weights((1, 1, 1)), "slerp")
    with pytest.raises(UserError, match="expected at least two models"):
        merge({"a": make_encoder()}, Weights((1,)))


def test_greedy_soup_adds_members_that_do_not_lower_the_score():
    """Alone, members score 3, 5, 4 and 4. With member 1, member 2 helps, member 3 does not matter, and 0 harms."""
    scores = {(0,): 3, (1,): 5, (2,): 4, (3,): 4, (1, 2): 6, (1, 2, 3): 6, (0, 1, 2, 3): 5}
    tried = []

    def score(weights):
        members = tuple(i for i, weight in enumerate(weights.members) if weight)
        assert {weights.members[i] for i in members} == {1.0}
        tried.append(members)
        return scores[members]

    assert greedy_soup(4, score).members == (0.0, 1.0, 1.0, 1.0)
    assert tried == [(0,), (1,), (2,), (3,), (1, 2), (1, 2, 3), (0, 1, 2, 3)]


def test_sweep_finds_the_best_weight_of_each_part():
    """The score falls with the distance from the best weights, which differ by part."""
    optimum = {"embeddings": 0.25, "search": 1.0}

    def score(weights):
        assert all(sum(pair) == 1 for pair in (weights.members, *weights.parts.values()))
        return -sum(abs(weights.parts.get(part, weights.members)[0] - best) for part, best in optimum.items())

    values = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert sweep(values, lambda weights: -abs(weights.members[0] - 0.75)).members == (0.75, 0.25)
    best = sweep(values, score, ["embeddings", "shared", "search"])
    assert best.members == (0.25, 0.75)  # the first of equal ones
    assert best.parts == {"search": (1.0, 0.0)}  # the others keep the weights of the members
