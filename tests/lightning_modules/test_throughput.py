"""Useful operations equal those that torch counts on texts without padding, and the ceiling those per second."""

import types

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ModernBertConfig, ModernBertModel, MPNetConfig, MPNetModel, RobertaConfig, RobertaModel

from datamodules.packed import Tokens
from datamodules.records import Document
from lightning_modules import throughput
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.extend import add_tasks
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.throughput import forward_flops, gemm_ceiling, pads_attention, training_flops
from tests.conftest import TASKS

LENGTH, TEXTS = 20, 3
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BACKBONES = {
    "bert": None,
    "roberta": lambda: RobertaModel(RobertaConfig(**SHAPE, intermediate_size=96), add_pooling_layer=False),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SHAPE, intermediate_size=48, local_attention=60)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SHAPE, intermediate_size=96), add_pooling_layer=False),
}
ENCODERS = {
    "shared": lambda *arguments, **options: SharedEncoder(*arguments, TASKS, **options),
    "moe": lambda *arguments, **options: MoEEncoder(*arguments, TASKS, ffn=True, **options),
    "stitched": lambda *arguments, **options: CrossStitchEncoder(*arguments, TASKS, **options),
    "stitched_ffn": lambda *arguments, **options: CrossStitchEncoder(
        *arguments, TASKS, attention=False, ffn=True, **options
    ),
    "control": lambda *arguments, **options: ControlEncoder(*arguments, TASKS, ffn=True, **options),
    "routed": lambda *arguments, **options: RoutedEncoder(*arguments, TASKS, **options),
    "adapters": lambda *arguments, **options: AdapterEncoder(*arguments, TASKS, freeze_backbone=False, **options),
    "instruct": lambda *arguments, **options: InstructEncoder(
        *arguments, TASKS, dict.fromkeys(TASKS, "title text query"), **options
    ),
}


@pytest.fixture
def make(make_backbone):
    def make(kind="shared", backbone="bert", **options):
        bert, tokenizer = make_backbone()
        backbone = BACKBONES[backbone]() if BACKBONES[backbone] else bert
        return ENCODERS[kind](backbone, tokenizer, max_length=32, **options)

    return make


def counted(encoder, backward=False):
    """Return the operations that torch counts for texts of the same length, without the encoding of an instruction."""
    ids = torch.randint(5, 60, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    encoder.train(backward)
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH):
        conditions = {"search": encoder.condition("search")}
        with counter:
            vectors = encoder.forward_tasks(Tokens.pack(ids.numpy()), ["search"], conditions)["search"]
            if backward:
                vectors.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    ("kind", "backbone"),
    [(kind, "bert") for kind in ENCODERS]
    + [(kind, b) for kind in ("shared", "moe", "stitched") for b in ("roberta", "modernbert", "mpnet")],
)
def test_forward_operations_equal_those_that_torch_counts(make, kind, backbone, pooling):
    encoder = make(kind, backbone, pooling=pooling)
    gates = 2 * 2 * 32 * 3 * TEXTS if kind == "routed" else 0  # two linear maps to three experts are not counted
    assert forward_flops(encoder, [LENGTH] * TEXTS, "search") + gates == counted(encoder)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    ("kind", "backbone"),
    [("shared", "bert"), ("shared", "roberta"), ("shared", "modernbert"), ("moe", "bert"), ("stitched", "bert")],
)
def test_training_has_three_times_the_operations_of_a_forward_pass(make, kind, backbone, pooling):
    encoder, lengths = make(kind, backbone, pooling=pooling), [LENGTH] * TEXTS
    assert (
        training_flops(encoder, lengths, "search")
        == 3 * forward_flops(encoder, lengths)
        == counted(encoder, backward=True)
    )


@pytest.mark.parametrize("kind", ["adapters", "extend"])
def test_frozen_weights_need_no_gradients(make, make_backbone, kind):
    if kind == "adapters":
        encoder = AdapterEncoder(*make_backbone(), TASKS, max_length=32)
    else:
        encoder = make("moe")
        add_tasks(encoder, {"new": "new"}, {"new": "search"})
        encoder.tasks["search"] = "new"
    expected = counted(encoder, backward=True)
    # Within the first layer that is trained, only a part of the layer needs gradients.
    one_layer = forward_flops(encoder, [LENGTH] * TEXTS) / encoder.num_layers
    assert abs(training_flops(encoder, [LENGTH] * TEXTS, "search") - expected) < one_layer
    assert expected < 2.7 * forward_flops(encoder, [LENGTH] * TEXTS)


def test_only_parameters_that_serve_the_task_count_as_trained(make, make_backbone):
    """An added task trains its own expert or adapter, and not the first one. The other tasks train nothing."""
    lengths = [LENGTH] * TEXTS
    new = AdapterEncoder(*make_backbone(), TASKS, max_length=32)
    for kind in ("adapters", "moe"):
        encoder = make(kind)
        add_tasks(encoder, {"new": "new"}, {"new": "search"})
        assert training_flops(encoder, lengths, "search") == forward_flops(encoder, lengths)
        trained = training_flops(encoder, lengths, "new")
        if kind == "adapters":
            assert trained == training_flops(new, lengths, "search")
        else:
            assert trained > 1.5 * forward_flops(encoder, lengths)


def test_texts_of_different_lengths_add_up(make):
    encoder = make("moe")
    separate = [forward_flops(encoder, [length]) for length in (3, 9, 31)]
    assert forward_flops(encoder, np.array([3, 9, 31])) == sum(separate)
    assert forward_flops(encoder, np.array([], dtype=np.int64)) == 0


@pytest.mark.parametrize("kind", ENCODERS)
def test_encode_counts_what_torch_counts_for_several_tasks(make, kind):
    """Shared layers are computed once. In its last layer, an instruction needs only keys and values, hence 2 %."""
    encoder, text = make(kind), "title text query " * 4
    documents, tasks = [Document("", "", text) for _ in range(TEXTS)], ["classification", "search"]
    if kind == "instruct":
        encoder.instructions["search"] = "query"
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        encoder.encode(documents, tasks=tasks)
    instructions = sum(
        forward_flops(
            SharedEncoder(encoder.backbone, encoder.tokenizer, TASKS, pooling="mean", max_length=32), [length]
        )
        for length in ([5, 3] if kind == "instruct" else [])
    )
    gates = 2 * 2 * 32 * 3 * TEXTS if kind == "routed" else 0
    assert encoder.encoded["texts"] == TEXTS
    expected, tolerance = counter.get_total_flops() - instructions - gates, 0.02 if instructions else 0
    assert encoder.encoded["flops"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("length", [1, 5, 9, 10, 40])
def test_windows_limit_the_keys_of_attention(make_backbone, pooling, length):
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    settings = SHAPE | {"num_hidden_layers": 3, "local_attention": 16, "layer_types": kinds}
    backbone = ModernBertModel(ModernBertConfig(**settings, intermediate_size=48))
    encoder = SharedEncoder(backbone, make_backbone()[1], TASKS, max_length=64, pooling=pooling)
    wide = SharedEncoder(
        ModernBertModel(ModernBertConfig(**settings | {"local_attention": 128}, intermediate_size=48)),
        encoder.tokenizer,
        TASKS,
        max_length=64,
        pooling=pooling,
    )
    positions = np.arange(length)
    hidden = np.abs(positions[:, None] - positions) > 8  # pairs outside of the window
    pairs = hidden.sum() + (hidden.sum() if pooling == "mean" else hidden[0].sum())
    assert forward_flops(wide, [length]) - forward_flops(encoder, [length]) == 4 * 32 * pairs


def test_bias_needs_padded_attention_on_a_gpu(make):
    encoders = {name: make("shared", name).to("meta") for name in ("bert", "mpnet")}  # not a CPU, so like a GPU
    for encoder in encoders.values():
        encoder.backbone.config.attention_probs_dropout_prob = 0.0
    assert not pads_attention(encoders["bert"], torch.bfloat16)
    assert pads_attention(encoders["mpnet"], torch.bfloat16)
    assert not pads_attention(make("shared", "mpnet"), torch.bfloat16)


def test_operations_of_bert_base(make_backbone):
    """170 MFLOP per token for the products, and 0.0369 MFLOP per token and key."""
    config = types.SimpleNamespace(model_type="bert", intermediate_size=3072)
    base = types.SimpleNamespace(backbone=types.SimpleNamespace(config=config), dimension=768, num_layers=12)
    base.pools_one_position, base.tasks = False, {"search": "search"}
    short, long = (forward_flops(base, [length]) / length for length in (100, 200))
    assert (long - short) / 100 == pytest.approx(0.0369e6, rel=1e-2)
    assert short - 100 * (long - short) / 100 == pytest.approx(170e6, rel=1e-2)
    base.pools_one_position = True
    assert forward_flops(base, [200]) / 200 == pytest.approx(0.93 * long, rel=1e-2)


def test_ceiling_is_the_median_of_warm_products(monkeypatch):
    now = [0.0]
    durations = iter([9.0, 0.5, 0.1, 0.2, 0.3])  # the first one warms up

    def product(left, right, out):
        now[0] += next(durations)

    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch, "matmul", product)
    before = torch.get_rng_state()
    gemm_ceiling.cache_clear()
    first = gemm_ceiling(torch.device("cpu"), torch.float32, (8, 4, 16))
    gemm_ceiling.cache_clear()
    assert first == pytest.approx(2 * 8 * 4 * 16 / 0.2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceiling_is_measured_once_and_plausible(dtype):
    first = gemm_ceiling(torch.device("cpu"), dtype, (512, 64, 256))
    assert 1e7 < first < 1e14
    assert gemm_ceiling(torch.device("cpu"), dtype, (512, 64, 256)) == first
