"""Learned routing: one expert per text or token, gradients for the gate, and its entropy in the loss."""

import pytest
import torch

from datamodules.records import UserError
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.families import Experts
from lightning_modules.encoders.routed import RoutedEncoder
from tests.conftest import TASKS, packed

FORMS = [("sequence", False, True), ("sequence", True, False), ("sequence", True, True), ("token", False, True)]


@pytest.fixture
def make_routed(make_backbone):
    def make(level="sequence", attention=False, ffn=True, separate=True, **arguments):
        backbone, tokenizer = make_backbone()
        set_dropout(backbone, 0.0, 0.0)
        encoder = RoutedEncoder(
            backbone, tokenizer, TASKS, level=level, attention=attention, ffn=ffn, **{"max_length": 32} | arguments
        )
        torch.manual_seed(3)
        with torch.no_grad():
            for gate in encoder.gates.values():
                gate.weight.normal_(std=1.0)
            for name, parameter in encoder.named_parameters():
                if separate and ".experts." in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return encoder

    return make


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    ids, lengths = torch.randint(5, 60, (8, 20)), torch.tensor([2, 3, 9, 20, 20, 12, 7, 15])
    mask = (torch.arange(20) < lengths[:, None]).long()
    return ids * mask, mask


def balance(gate, states):
    """Choose the bias of a gate so that it sends texts to different experts."""
    with torch.no_grad():
        gate.weight.mul_(20.0)
        gate.bias.copy_(-gate.weight @ states.mean(0))


@pytest.mark.parametrize(("level", "attention", "ffn"), FORMS)
def test_new_routed_encoder_equals_the_backbone(make_routed, make_encoder, tokens, level, attention, ffn):
    routed, shared = make_routed(level, attention, ffn, separate=False), make_encoder("shared")
    expected = shared.eval()(packed(*tokens), "search")
    torch.testing.assert_close(routed.eval()(packed(*tokens), "search"), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(routed.train()(packed(*tokens), "search"), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("attention", "ffn"), [(False, True), (True, False), (True, True)])
def test_each_text_is_computed_by_the_expert_its_gate_prefers(make_routed, make_encoder, tokens, attention, ffn):
    """The expected vectors come from a BERT of Hugging Face with the weights of the preferred expert."""
    encoder = make_routed(attention=attention, ffn=ffn, layers=[2]).eval()
    dense = make_encoder("shared").eval().backbone
    states = dense(input_ids=tokens[0], attention_mask=tokens[1], output_hidden_states=True).hidden_states
    balance(encoder.gates["2"], states[2][:, 0])
    choice = encoder.gates["2"](states[2][:, 0]).argmax(-1)
    assert len(choice.unique()) == 3
    ours = encoder(packed(*tokens), "search")
    for row, expert in enumerate(choice.tolist()):
        for name, module in encoder.backbone.named_modules():
            if isinstance(module, Experts):
                dense.get_submodule(name).load_state_dict(module.experts[f"expert{expert}"].state_dict())
        expected = dense(input_ids=tokens[0], attention_mask=tokens[1]).last_hidden_state[row, 0]
        torch.testing.assert_close(ours[row], expected, atol=2e-6, rtol=1e-5)


def test_each_token_is_computed_by_the_expert_its_gate_prefers(make_routed, make_encoder, tokens):
    encoder = make_routed("token", layers=[1], pooling="mean").eval()
    dense = make_encoder("shared").eval().backbone
    ids, mask = tokens
    states = dense(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    balance(encoder.gates["1"], states[1][mask.bool()])
    choice = encoder.gates["1"](states[1]).argmax(-1)
    assert len(choice[mask.bool()].unique()) == 3
    layer = dense.encoder.layer[1]
    bias = torch.where(mask[:, None, None, :].bool(), 0.0, -1e30)
    middle = layer.attention(states[1], attention_mask=bias)[0]
    routed = torch.empty_like(middle)
    experts = encoder.family.layers[1]
    for row in range(8):
        for column in range(20):
            name = f"expert{choice[row, column]}"
            up = experts.intermediate.experts[name](middle[row, column])
            routed[row, column] = experts.output.experts[name](up, middle[row, column])
    for later in dense.encoder.layer[2:]:
        routed = later(routed, attention_mask=bias)
        routed = routed[0] if isinstance(routed, tuple) else routed
    expected = (routed * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(encoder(packed(*tokens), "search"), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("level", "attention", "ffn"), FORMS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_gates_and_experts_get_gradients(make_routed, tokens, level, attention, ffn, checkpointing):
    encoder = make_routed(level, attention, ffn).train()
    encoder.gradient_checkpointing = checkpointing
    torch.manual_seed(0)
    vectors, penalty = encoder.forward_with_penalty(packed(*tokens), "search")
    assert float(penalty.detach()) == 0.0
    vectors.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
    assert all(gate.weight.grad.abs().sum() > 0 for gate in encoder.gates.values())


def test_gradient_checkpointing_does_not_change_gradients_of_gates(make_routed, tokens):
    grads = []
    for checkpointing in (False, True):
        encoder = make_routed("sequence", entropy_weight=0.5).train()
        encoder.gradient_checkpointing = checkpointing
        torch.manual_seed(0)
        vectors, penalty = encoder.forward_with_penalty(packed(*tokens), "search")
        (vectors.square().sum() + penalty).backward()
        grads.append({n: p.grad for n, p in encoder.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("per_layer", [True, False])
def test_penalty_is_the_weighted_mean_negative_entropy(make_routed, tokens, level, per_layer):
    encoder = make_routed(level, entropy_weight=2.0, gate_per_layer=per_layer, layers=[0], separate=False).eval()
    _, penalty = encoder.forward_with_penalty(packed(*tokens), "search")
    chosen = packed(*tokens)
    states, _ = encoder.family.begin(chosen)
    states = states if level == "token" else states[chosen.offsets[:-1]]
    p = encoder.gates["0" if per_layer else "all"](states).softmax(-1).detach().numpy()
    entropy = -(p * torch.tensor(p).log().numpy()).sum(-1).mean()
    assert float(penalty.detach()) == pytest.approx(-2.0 * entropy, rel=1e-5)
    penalty.backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in encoder.gates.values())


def test_gate_learns_which_expert_is_better(make_routed, tokens):
    """One of two experts gives the target vectors. After some steps the gate sends all texts to it."""
    encoder = make_routed(num_experts=2, layers=[3], separate=False, pooling="mean")
    with torch.no_grad():
        encoder.gates["3"].weight.zero_()
        encoder.family.layers[3].output.experts["expert1"].LayerNorm.bias.add_(3.0)
    expected = encoder.eval()(packed(*tokens), "search").detach() + 3.0
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    encoder.gates.requires_grad_(True)
    optimizer = torch.optim.SGD(encoder.gates.parameters(), lr=0.05)
    torch.manual_seed(0)
    encoder.train()
    for _ in range(60):
        optimizer.zero_grad()
        (encoder(packed(*tokens), "search") - expected).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(encoder.eval()(packed(*tokens), "search"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 1}, "num_experts: expected 2 to 1,024, got 1"),
        ({"level": "word"}, "level: expected one of sequence, token, got 'word'"),
        ({"level": "token", "attention": True}, "set attention=false"),
        ({"ffn": False}, "attention, ffn: both are false"),
        ({"gumbel_temperature": 0.0}, "gumbel_temperature: expected a number of at least 1e-06"),
    ],
)
def test_invalid_arguments_raise_user_error(make_routed, arguments, message):
    with pytest.raises(UserError, match=message):
        make_routed(**arguments)
