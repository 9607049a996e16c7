"""Packed texts: three kernels of attention, every family and variant, against Hugging Face's padded models."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from datamodules.packed import Tokens
from datamodules.text import length_sorted_chunks
from lightning_modules.encoders import attention
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.attention import AttentionContext, Prefix, Settings
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.instruct import InstructEncoder, PromptEncoder
from lightning_modules.encoders.lora import LoraOptions, add_lora
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.pipeline import PassShape
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.encoders.shared import SharedEncoder
from tests.conftest import TASKS, text_of

LENGTHS = [3, 5, 5, 5, 9, 21, 21, 40]
WINDOW = 4
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 120}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
KERNELS = ["runs", "padded", "varlen"]
FAMILIES = ["bert", "roberta", "modernbert", "mpnet"]


def make_family(family):
    torch.manual_seed(0)
    if family == "modernbert":
        config = ModernBertConfig(
            **SHAPE, **SPECIAL, num_hidden_layers=4, local_attention=2 * WINDOW, max_position_embeddings=64
        )
        return ModernBertModel(config)
    kinds = {
        "bert": (BertConfig, BertModel, 0),
        "roberta": (RobertaConfig, RobertaModel, 1),
        "mpnet": (MPNetConfig, MPNetModel, 1),
    }
    config_class, model, pad = kinds[family]
    config = config_class(**SHAPE, pad_token_id=pad, num_hidden_layers=3, max_position_embeddings=64)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return model(config, add_pooling_layer=False)


INSTRUCTIONS = {"classification": "bara beli", "link_prediction": "beli bomu bito", "search": "bomu"}
VARIANTS = {
    "shared": (SharedEncoder, {}),
    "attention experts": (MoEEncoder, {"attention": True, "layers": "mod2"}),
    "ffn experts": (MoEEncoder, {"attention": False, "ffn": True, "layers": "last2"}),
    "stitched": (CrossStitchEncoder, {"layers": "last2"}),
    "stitched ffn": (CrossStitchEncoder, {"attention": False, "ffn": True}),
    "control": (ControlEncoder, {"attention": True, "ffn": True}),
    "instruction": (InstructEncoder, {"instructions": INSTRUCTIONS}),
    "prefix": (InstructEncoder, {"instructions": INSTRUCTIONS, "separate": True}),
    "prompt": (PromptEncoder, {"instructions": INSTRUCTIONS, "pool_prompt": False}),
    "routed texts": (RoutedEncoder, {"attention": True}),
    "routed tokens": (RoutedEncoder, {"level": "token"}),
    "adapters": (AdapterEncoder, {"reduction_factor": 4}),
    "lora": (SharedEncoder, {}),
    "lora experts": (MoEEncoder, {"attention": True, "ffn": True, "layers": "last2"}),
    "lora prefix": (InstructEncoder, {"instructions": INSTRUCTIONS, "separate": True}),
    "lora stitched": (CrossStitchEncoder, {"ffn": True}),
}


def softmax_attention(query, key, value, offsets, key_offsets, longest, longest_key, *, window_size=(-1, -1), **_):
    """Attention as varlen_attn computes it, text by text. Like flash attention, it aligns windows at the end."""
    assert longest == int(offsets.diff().max())
    assert longest_key == int(key_offsets.diff().max())
    outputs = []
    for i in range(len(offsets) - 1):
        q, k, v = (x.transpose(0, 1) for x in (query[offsets[i] : offsets[i + 1]], *(
            x[key_offsets[i] : key_offsets[i + 1]] for x in (key, value)
        )))  # fmt: skip
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if window_size != (-1, -1):
            rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
            distance = columns - (rows + k.shape[1] - q.shape[1])
            seen = (distance >= -window_size[0]) & (distance <= window_size[1])
            scores = scores.masked_fill(~seen, float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Make all attention use one kernel. On a GPU, choose_kernel does so; varlen_attn itself needs a GPU."""
    monkeypatch.setattr(attention, "varlen_attn", softmax_attention)

    def choose(query, context, settings):
        dtype = torch.float32 if request.param == "padded" else torch.bfloat16
        return original(_OnGpu(dtype, len(query)), context, settings)

    original = attention.choose_kernel
    if request.param != "runs":
        monkeypatch.setattr(attention, "choose_kernel", choose)
    return request.param


class _OnGpu:
    """Stands for a query on a GPU, of which choose_kernel asks only device, type and length."""

    def __init__(self, dtype, length):
        self.device, self.dtype, self.length = torch.device("cuda"), dtype, length

    def __len__(self):
        return self.length


def make_tokens(pad, lengths=LENGTHS, seed=1):
    """Return texts as Tokens, and as padded ids and mask. One text contains a padding token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = torch.randint(5, 60, (length,), generator=generator), 1
    ids[4, 3] = pad
    return Tokens.from_padded(ids, mask), ids, mask


def pooled(states, mask, pooling):
    if pooling == "cls":
        return states[:, 0]
    if pooling == "lasttoken":
        return states[range(len(mask)), mask.sum(1) - 1]
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.fixture
def make(make_backbone):
    def make(variant, family="bert", **options):
        kind, arguments = VARIANTS[variant]
        encoder = kind(make_family(family), make_backbone()[1], TASKS, **arguments, max_length=48, **options)
        if variant.startswith("lora"):
            add_lora(encoder, LoraOptions(rank=4))
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return encoder

    return make


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_gradients_equal_those_of_transformers_in_float64(make, kernel, family, pooling):
    encoder = make("shared", family, pooling=pooling).double()
    backbone = copy.deepcopy(encoder.backbone)
    tokens, ids, mask = make_tokens(backbone.config.pad_token_id)
    expected = pooled(backbone(input_ids=ids, attention_mask=mask).last_hidden_state, mask, pooling)
    vectors = encoder(tokens, "search")
    # transformers rotates ModernBERT's queries and keys in float32
    tolerance = 1e-6 if family == "modernbert" else 1e-12
    torch.testing.assert_close(vectors, expected, atol=tolerance, rtol=0)
    weights = torch.randn(vectors.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (vectors * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, ours), theirs in zip(encoder.backbone.named_parameters(), backbone.parameters(), strict=True):
        largest = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=10 * tolerance * float(largest + 1), rtol=0, msg=name)


def run(encoder, tokens, seed=0):
    """Return the vectors of a training step and all gradients."""
    torch.manual_seed(seed)
    encoder.train().zero_grad()
    vectors, penalty = encoder.forward_with_penalty(tokens, "search")
    weights = torch.linspace(-1, 1, vectors.numel(), dtype=vectors.dtype).view(vectors.shape)
    ((vectors * weights).sum() + penalty).backward()
    return vectors.detach(), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_all_kernels_agree_for_every_family_and_variant(make, monkeypatch, request, family, variant, dtype, tolerance):
    if (variant, family) == ("adapters", "modernbert"):
        pytest.skip("adapters need the LayerNorm of a BERT layer")
    encoder = make(variant, family, pooling="mean" if variant == "prompt" else "cls").to(dtype)
    tokens = make_tokens(encoder.backbone.config.pad_token_id)[0]
    expected, expected_gradients = run(encoder, tokens)
    monkeypatch.setattr(attention, "varlen_attn", softmax_attention)
    original = attention.choose_kernel
    for kind in (torch.float32, torch.bfloat16):  # padded, varlen
        used = []

        def choose(query, *rest, kind=kind, used=used):
            used.append(original(_OnGpu(kind, len(query)), *rest))
            return used[-1]

        monkeypatch.setattr(attention, "choose_kernel", choose)
        vectors, gradients = run(encoder, tokens)
        has_varlen = kind == torch.bfloat16 and family != "mpnet"  # whose attention has a bias
        assert (attention.attend_varlen if has_varlen else attention.attend_padded) in used
        torch.testing.assert_close(vectors, expected, atol=tolerance, rtol=tolerance)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            limit = 10 * tolerance * (1 + float(expected_gradients[name].abs().max()))
            torch.testing.assert_close(gradient, expected_gradients[name], atol=limit, rtol=0, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_vectors_do_not_depend_on_the_other_texts(make, kernel, family, variant):
    encoder = make(variant, family).double().eval()
    tokens = make_tokens(encoder.backbone.config.pad_token_id)[0]
    together = encoder(tokens, "search")
    order = [5, 2, 7, 0, 4]
    torch.testing.assert_close(encoder(tokens.select(order), "search"), together[order], atol=1e-12, rtol=0)
    for text in (0, 7):
        torch.testing.assert_close(encoder(tokens.select([text]), "search")[0], together[text], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "variant", ["shared", "attention experts", "ffn experts", "stitched ffn", "control", "instruction"]
)
def test_bfloat16_is_near_float32(make, family, variant):
    encoder = make(variant, family)
    tokens = make_tokens(encoder.backbone.config.pad_token_id)[0]
    expected, expected_gradients = run(encoder, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        vectors, gradients = run(encoder, tokens)
        with torch.inference_mode():
            inferred = encoder(tokens, "search")
    assert F.cosine_similarity(vectors.float(), expected).min() > 0.9995
    assert F.cosine_similarity(inferred.float(), expected).min() > 0.9995
    assert gradients.keys() == expected_gradients.keys()
    ours = torch.cat([gradient.flatten() for gradient in gradients.values()])
    theirs = torch.cat([expected_gradients[name].flatten() for name in gradients])
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert (ours - theirs).norm() / theirs.norm() < 2e-2


def test_norms_are_only_cast_in_inference_mode(make):
    """Both passes of GradCache must compute the same vectors, although the first one has no gradients."""
    encoder = make("ffn experts")
    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    for mode, types in ((torch.no_grad, {torch.float32}), (torch.inference_mode, {torch.float32, torch.bfloat16})):
        with mode(), torch.autocast("cpu", torch.bfloat16), encoder.casting():
            assert {norm.weight.dtype for norm in norms} == types, "that of the embeddings stays in float32"


def test_positions_of_roberta_start_after_the_padding_id_in_every_packed_text(make):
    """sentence-transformers issue 3879: packed texts of RoBERTa with the positions of BERT, or of one long text."""
    encoder = make("shared", "roberta")
    seen = []
    encoder.backbone.embeddings.position_embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(Tokens.pack([[5, 6, 7], [5, 1, 7, 8], [9]]), "search")
    assert seen[0].tolist() == [[2, 3, 4, 2, 1, 3, 4, 2]]


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize(("window", "has_bias"), [(WINDOW, False), (None, True), (WINDOW, True)])
def test_windows_and_biases_depend_on_the_distance_in_every_kernel(kernel, first_only, with_prefix, window, has_bias):
    """Positions of a text and of a prefix both start at 0. The gradient of the bias is that of its formula.

    A window of flash attention is aligned with the last key, and the first position sees only one side.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens.pack([list(range(length)) for length in LENGTHS])
    query, key, value = torch.randn(3, tokens.num_tokens, 2, 4, generator=generator, dtype=torch.float64)
    prefix = Prefix(*torch.randn(2, 45, 2, 4, generator=generator, dtype=torch.float64)) if with_prefix else None
    bias = torch.randn(2, 99, generator=generator, dtype=torch.float64, requires_grad=True)  # distances -49, ..., 49
    context = AttentionContext(tokens, tokens.positions(), {}, bias if has_bias else None)
    if first_only:
        query = query[tokens.offsets[:-1]]
    ours = attention.attend(query, key, value, context, Settings(window, prefix=prefix))
    rows, start = [], 0
    for length in LENGTHS:
        for position in range(1 if first_only else length):
            near = [i for i in range(length) if window is None or abs(i - position) <= window]
            keys, values = key[start : start + length][near], value[start : start + length][near]
            distances = torch.tensor([i - position for i in near])
            if prefix:
                keys, values = torch.cat([prefix.keys, keys]), torch.cat([prefix.values, values])
                distances = torch.cat([torch.arange(45) - position, distances])
            scores = torch.einsum("hd,shd->hs", query[len(rows)], keys) / 4**0.5
            scores = scores + bias[:, 49 + distances] if has_bias else scores
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values).flatten())
        start += length
    torch.testing.assert_close(ours, torch.stack(rows), atol=1e-12, rtol=0)
    if has_bias:
        weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((ours * weights).sum(), bias)
        (expected,) = torch.autograd.grad((torch.stack(rows) * weights).sum(), bias)
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_kernels_are_chosen_by_device_precision_dropout_and_window():
    tokens = Tokens.pack([[1, 2, 3], [1, 2]])
    context = AttentionContext(tokens, tokens.positions(), {})
    biased = AttentionContext(tokens, tokens.positions(), {}, torch.zeros(1, 9))
    prefix = Prefix(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))

    def name(dtype, length=5, context=context, **settings):
        return attention.choose_kernel(_OnGpu(dtype, length), context, Settings(**settings)).__name__

    for each in (context, biased):
        assert attention.choose_kernel(torch.zeros(5, 1, 1), each, Settings(dropout=0.1)) is attention.attend_runs
    assert name(torch.bfloat16) == name(torch.float16, 2) == name(torch.bfloat16, 2, prefix=prefix) == "attend_varlen"
    assert name(torch.bfloat16, window=4) == "attend_varlen"
    assert name(torch.float32) == name(torch.bfloat16, dropout=0.1) == "attend_padded"
    assert name(torch.bfloat16, 2, window=4) == name(torch.bfloat16, window=4, prefix=prefix) == "attend_padded"
    assert name(torch.bfloat16, context=biased) == name(torch.bfloat16, 2, context=biased) == "attend_padded"


def test_dropout_of_attention_keeps_the_mean(kernel):
    """The kernel with dropout, on any device, keeps the expected value of the output."""
    tokens = Tokens.pack([list(range(6))] * 2)
    context = AttentionContext(tokens, tokens.positions(), {})
    query, key, value = torch.randn(3, 12, 2, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    expected = attention.attend(query, key, value, context, Settings())
    outputs = torch.stack([attention.attend(query, key, value, context, Settings(dropout=0.2)) for _ in range(2000)])
    assert outputs.std(0).min() > 0
    torch.testing.assert_close(outputs.mean(0), expected, atol=0.06, rtol=0)


@pytest.mark.parametrize(
    "variant", ["attention experts", "ffn experts", "stitched", "control", "adapters", "instruction", "prompt"]
)
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_batch_of_several_tasks_equals_one_task_at_a_time(make, kernel, family, variant):
    encoder = make(variant, family).double().eval()
    tokens = make_tokens(encoder.backbone.config.pad_token_id)[0]
    tasks = [list(TASKS)[i % 3] for i in (0, 1, 1, 2, 0, 2, 2, 1)]
    mixed = encoder(tokens, tasks)
    for row, task in enumerate(tasks):
        torch.testing.assert_close(mixed[row], encoder(tokens, task)[row], atol=1e-12, rtol=0)


def test_experts_of_a_mixed_batch_compute_views_and_no_module_without_experts_is_split(make):
    encoder = make("attention experts").eval()
    tokens = make_tokens(0)[0]
    experts = [m for n, m in encoder.named_modules() if ".experts." in n and isinstance(m, nn.Linear)]
    plain = [m for n, m in encoder.named_modules() if n.endswith("intermediate.dense")]
    sizes = {}
    for module in (*experts, *plain):
        module.register_forward_pre_hook(lambda m, inputs: sizes.setdefault(m, []).append(inputs[0]))
    encoder(tokens, ["search"] * 3 + ["classification"] * 5)
    assert all(len(calls) == 1 for module, calls in sizes.items() if module in plain)
    keys = [sizes[m][0] for n, m in encoder.named_modules() if ".experts." in n and n.endswith(".key") and m in sizes]
    storages = {x.untyped_storage().data_ptr() for x in keys}
    assert len(keys) == 2
    assert len(storages) == 1  # both experts read the same tensor


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_gradient_checkpointing_recomputes_with_the_cast_weights(make, family):
    gradients = []
    for checkpointing in (False, True):
        encoder = make("attention experts", family)
        encoder.gradient_checkpointing = checkpointing
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(run(encoder, make_tokens(encoder.backbone.config.pad_token_id)[0])[1])
        assert all(isinstance(p, nn.Parameter) for module in encoder.modules() for p in module._parameters.values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_weights_are_cast_once_for_all_chunks(make, monkeypatch):
    encoder = make("shared").eval()
    norms = encoder.family.half_norms()
    weights = [p for m in encoder.modules() if isinstance(m, nn.Linear) or m in norms for p in m.parameters()]
    casts = []
    original = torch.Tensor.to

    def to(tensor, *arguments, **options):
        if torch.bfloat16 in arguments and isinstance(tensor, nn.Parameter):
            casts.append(tensor)
        return original(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with torch.autocast("cpu", torch.bfloat16):
        encoder.encode(["bara beli"] * 9, "search", token_budget=8)
    assert len(casts) == len(set(casts)) == len(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    ("variant", "family"),
    [
        ("shared", "bert"),
        ("attention experts", "bert"),
        ("instruction", "bert"),
        ("lora", "bert"),
        ("instruction", "mpnet"),
    ],
)
def test_batch_invariant_vectors_have_the_same_bits_in_every_packing(make, variant, family, pooling, dtype):
    torch.set_num_threads(2)  # threads divide the rows of a product, and a row's bits depend on where it is
    encoder = make(variant, family, pooling=pooling).eval()
    rng = random.Random(0)
    texts = [text_of(*(rng.randrange(60) for _ in range(rng.choice((1, 2, rng.randint(1, 40)))))) for _ in range(60)]

    def encode(texts, **options):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return encoder.encode(texts, "search", token_budget=256, **options)

    expected = encode(texts, batch_invariant=True)
    torch.testing.assert_close(expected, encode(texts), atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    for size in (60, 17, 3, 1):
        order = rng.sample(range(60), 60)
        for start in range(0, 60, size)[:8]:
            rows = order[start : start + size]
            assert torch.equal(encode([texts[row] for row in rows], batch_invariant=True), expected[rows])


@pytest.mark.parametrize("token_budget", [1, 27, 49, 2048])
@pytest.mark.parametrize("longest", [3, 64])
def test_batch_invariant_passes_on_gpus_have_one_shape(token_budget, longest):
    shape = PassShape.invariant(token_budget, 64, torch.device("cuda"))
    rng = random.Random(0)
    lengths = [rng.randint(2, longest) for _ in range(700)]
    passes = []
    for chunk in length_sorted_chunks(lengths, shape.token_budget, shape.most_texts):
        tokens = Tokens.pack([[5] * lengths[row] for row in chunk])
        filled = shape.fill(tokens)
        assert filled.lengths[: len(tokens)] == tokens.lengths
        passes.append((len(filled), filled.num_tokens, max(filled.lengths)))
    assert len(passes) > 1
    assert set(passes) == {shape.filled}


def test_fillers_give_a_batch_its_shape_and_leave_its_texts_alone():
    tokens = Tokens.pack([[5, 6, 7], [8]])
    filled = tokens.fill(5, 24, 9)
    assert filled.lengths == (3, 1, 9, 9, 2)
    assert filled.offsets.tolist() == [0, 3, 4, 13, 22, 24]
    assert filled.input_ids.tolist()[:4] == [5, 6, 7, 8]
    assert filled.num_tokens == 24
