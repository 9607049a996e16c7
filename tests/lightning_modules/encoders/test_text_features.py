"""Features of texts: found by the text's tokens, added to its first token, and saved with the encoder."""

import numpy as np
import pytest
import torch

from datamodules.packed import Tokens
from datamodules.records import Document, UserError
from lightning_modules.encoders.dual_prompt import DualPromptEncoder
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.loading import with_weights
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.encoders.text_features import POSITIONS, TextFeatures, token_keys
from lightning_modules.merging import Weights, check_members, merge
from lightning_modules.retrieval.vector_cache import VectorCache, encoder_state, fingerprint
from tests.conftest import TASKS, text_of, with_features

TEXTS = [Document(str(i), text_of(i), text_of(*range(i, 2 * i))) for i in range(8)]
KNOWN = TEXTS[::2]
LENGTH = 65  # of truncated texts


def random_texts(count, most=2 * LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 30_000, rng.integers(1, most)) for _ in range(count)]


def key_by_hand(ids):
    """Return the hash with Python's integers."""
    total = 0
    for position, token in enumerate(ids[: LENGTH - 1].tolist()):
        x = token * POSITIONS + position + 1
        for multiplier, shift in ((0x9E3779B97F4A7C15, 32), (0xBF58476D1CE4E5B9, 29)):
            x = x * multiplier % 2**64
            x -= 2**64 * (x >= 2**63)
            x ^= x >> shift
        total += x
    return (total + 2**63) % 2**64 - 2**63


def test_keys_equal_a_computation_with_exact_integers():
    texts = random_texts(20)
    assert token_keys(Tokens.pack(texts), LENGTH - 1).tolist() == [key_by_hand(text) for text in texts]


def test_different_texts_have_different_keys_whatever_the_batch():
    texts = random_texts(5000, most=6)
    keys = token_keys(Tokens.pack(texts), LENGTH)
    assert len(keys.unique()) == len({tuple(text) for text in texts})
    assert torch.equal(keys[17:18], token_keys(Tokens.pack(texts[17:18]), torch.tensor(LENGTH)))


def test_features_of_each_text_are_found_in_any_order():
    texts = random_texts(300)
    vectors = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)
    features = TextFeatures(3, 8)
    features.fill(texts[:200], vectors, 2 * LENGTH)
    rows, is_known = features.rows(Tokens.pack(texts[::-1]))
    assert is_known.tolist() == [False] * 100 + [True] * 200
    np.testing.assert_array_equal(features.vectors[rows][100:].numpy(), vectors[::-1])


def test_texts_that_were_truncated_have_their_features_where_more_of_them_is_read():
    text = np.arange(1000, 1000 + 3 * LENGTH)
    features = TextFeatures(1, 4)
    features.fill([np.append(text[: LENGTH - 1], 102)], np.ones((1, 1)), LENGTH)
    for length, expected in ((2 * LENGTH, True), (LENGTH + 1, True), (LENGTH, True), (LENGTH - 1, False)):
        (known,) = features.rows(Tokens.pack([np.append(text[: length - 1], 102)]))[1].tolist()
        assert known == expected


def test_texts_that_begin_equally_have_their_own_features(caplog):
    """Texts were recognised by their first 64 tokens: the second of these figures had the vector of the first."""
    opening = np.arange(1000, 1100)
    texts = [np.append(opening, word) for word in (1, 2, 3)]
    features = TextFeatures(1, 4)
    features.fill(texts, np.array([[1.0], [2.0], [3.0]]), 256)
    rows, is_known = features.rows(Tokens.pack([*texts, opening]))
    assert is_known.tolist() == [True, True, True, False]
    assert features.vectors[rows[:3], 0].tolist() == [1, 2, 3]
    assert not caplog.messages
    features.fill([texts[0], texts[1], texts[0], texts[1]], np.array([[1.0], [2.0], [3.0], [2.0]]), 256)
    assert caplog.messages == ["features: 1 of 4 texts get the features of a text with the same tokens"]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, 4)), r"expected 2 vectors of 3 numbers, got an array of shape \(2, 4\)"),
        (np.ones((3, 3)), "expected 2 vectors of 3 numbers"),
        (np.array([[0, 0, 0], [0, np.nan, 0]]), "the vector of text 1 contains a non-finite number"),
    ],
)
def test_wrong_vectors_raise_user_error(vectors, message):
    with pytest.raises(UserError, match=message):
        TextFeatures(3, 8).fill(random_texts(2), vectors, 256)


@pytest.fixture(params=["shared", "both", "routed", "instruct"])
def make(request, make_backbone, make_encoder):
    def make():
        if request.param in ("shared", "both"):
            return make_encoder(request.param, pooling="mean")
        if request.param == "routed":
            return RoutedEncoder(*make_backbone(), TASKS, max_length=32)
        return InstructEncoder(*make_backbone(), TASKS, dict.fromkeys(TASKS, "bara beli"), max_length=32)

    torch.manual_seed(0)
    return make


def test_texts_without_features_and_new_features_change_no_bit(make):
    encoder = make().eval()
    plain = encoder.encode(TEXTS, tasks=list(TASKS), batch_invariant=True)
    with_features(encoder, KNOWN)
    ours = encoder.encode(TEXTS, tasks=list(TASKS), batch_invariant=True)
    for task in TASKS:
        assert torch.equal(ours[task][1::2], plain[task][1::2])
        assert not any(torch.equal(a, b) for a, b in zip(ours[task][::2], plain[task][::2], strict=True))
    torch.nn.init.zeros_(encoder.features["positions"].projection.weight)
    again = encoder.encode(TEXTS, tasks=list(TASKS), batch_invariant=True)
    assert all(torch.equal(again[task], plain[task]) for task in TASKS)


def test_features_are_added_to_the_embedding_of_the_first_token(make_encoder):
    """The expected vector comes from transformers, with the sum as input of its layers."""
    encoder = with_features(make_encoder("shared"), KNOWN).double().eval()
    ids = encoder.tokenizer(["bara"], return_tensors="pt")["input_ids"]
    features = encoder.features["positions"]
    features.fill([ids[0].numpy()], np.array([[0.3, -1.0, 2.0]]), 32)
    with torch.no_grad():
        embedded = encoder.backbone.embeddings(input_ids=ids)
        row = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
        embedded[0, 0] += torch.tanh(features.projection.weight @ row + features.projection.bias)
        expected = encoder.backbone.encoder(embedded).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(Tokens.pack(ids.numpy()), "search"), expected, atol=1e-12, rtol=0)


def test_gradients_of_the_projection_are_those_of_finite_differences(make_encoder):
    encoder = with_features(make_encoder("shared", config={"num_hidden_layers": 1}), KNOWN).double().eval()
    tokens = Tokens.pack([encoder.tokenizer(text_of(i, i))["input_ids"] for i in range(3)])
    features = encoder.features["positions"]
    features.fill([np.array(encoder.tokenizer(text_of(1, 1))["input_ids"])], np.array([[0.3, -1.0, 2.0]]), 32)

    def vectors(weight, bias):
        parameters = {"features.positions.projection.weight": weight, "features.positions.projection.bias": bias}
        return torch.func.functional_call(encoder, parameters, (tokens, "search"))

    weight, bias = (p.detach().clone().requires_grad_() for p in features.projection.parameters())
    assert torch.autograd.gradcheck(vectors, (weight, bias), fast_mode=True)
    vectors(weight, bias)[[0, 2]].sum().backward()
    assert not weight.grad.any(), "texts without features do not train the projection"
    assert not bias.grad.any()


def test_caches_know_the_features(make_encoder, tmp_path):
    """Vectors of an encoder with other features are never read for this one."""
    plain, first, second = make_encoder(), with_features(make_encoder(), KNOWN), with_features(make_encoder(), TEXTS)
    assert len({fingerprint(encoder) for encoder in (plain, first, second)}) == 3
    before = encoder_state(first)
    first.features["positions"].vectors[0] += 1
    assert encoder_state(first) != before
    for encoder in (first, second):
        cache = VectorCache(encoder, tmp_path, similarity="dot")
        expected = encoder.encode(TEXTS, "search").numpy()
        np.testing.assert_allclose(cache.vectors(TEXTS, "search", "texts").gather(np.arange(8)), expected, atol=1e-6)


def test_merging_keeps_the_keys_and_refuses_features_of_other_texts(make_encoder, make_backbone):
    def make(documents):
        instructions = dict.fromkeys(TASKS, "bara")
        encoder = DualPromptEncoder(*make_backbone(), TASKS, instructions, num_anchors=3, max_length=32)
        return with_features(encoder, documents)

    one, two, other = make(KNOWN), make(KNOWN), make(TEXTS[1::2])
    merged = merge({"one": one, "two": two}, Weights((0.3, 0.7)))
    assert torch.equal(merged.features["positions"].keys, one.features["positions"].keys)
    torch.testing.assert_close(merged.encode(TEXTS, "search"), one.encode(TEXTS, "search"), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="keys belong to other texts"):
        check_members({"one": one, "other": other})
    assert torch.equal(with_weights(one, one.state_dict()).encode(TEXTS, "search"), one.encode(TEXTS, "search"))
