"""Cross-stitch units: an MoE at the start, the weighted sum of all experts later."""

import copy
import random

import numpy as np
import pytest
import torch

from datamodules.batches import BatchOptions, MultiTaskDataModule
from datamodules.records import Collection, Document, Task, UserError
from datamodules.tasks import SearchDataModule
from lightning_modules.callbacks.diagnostics import mean_stitches
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.export import dense, save_reference
from lightning_modules.encoders.extend import add_tasks
from lightning_modules.encoders.families import Experts
from lightning_modules.encoders.loading import continue_from
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.merging import Weights, merge
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from tests.conftest import TASKS, WORDS, packed, padded_tokens, separate
from tests.lightning_modules.encoders.test_checkpoints import scrambled
from tests.lightning_modules.paired import LONG, gain_of
from tests.lightning_modules.quiet_trainer import quiet_trainer

FORMS = [(True, False), (False, True), (True, True)]
TEXTS = ["bara beli", "bomu bito buna", "cara"]


@pytest.fixture
def make_stitched(make_backbone):
    def make(attention=True, ffn=True, kind=CrossStitchEncoder, tasks=TASKS, seed=0, num_layers=4, **arguments):
        return kind(*make_backbone(seed, num_layers), tasks, attention, ffn, **{"max_length": 32} | arguments)

    return make


@pytest.fixture
def tokens():
    return padded_tokens(2, 9, 20)


@pytest.mark.parametrize(("attention", "ffn"), FORMS)
def test_new_encoder_equals_the_moe_bit_for_bit(make_stitched, tokens, attention, ffn):
    ours, moe = (separate(make_stitched(attention, ffn, kind)) for kind in (CrossStitchEncoder, MoEEncoder))
    for task in TASKS:
        assert torch.equal(ours.eval()(packed(*tokens), task), moe.eval()(packed(*tokens), task))
    assert ours.num_shared_layers == moe.num_shared_layers
    assert [ours.served_by(task) for task in TASKS] == [moe.served_by(task) for task in TASKS]


def layer_of_expert(dense, encoder, index, expert):
    """Give a layer of a plain BERT the weights of an expert."""
    for name, module in encoder.family.layers[index].named_modules():
        if isinstance(module, Experts):
            dense.encoder.layer[index].get_submodule(name).load_state_dict(module.experts[expert].state_dict())
    return dense.encoder.layer[index]


@pytest.mark.parametrize(("attention", "ffn"), FORMS)
def test_outputs_are_sums_over_experts(make_stitched, make_encoder, tokens, attention, ffn):
    """The outputs of each expert come from the layers of Hugging Face, in float64."""
    encoder = scrambled(make_stitched(attention, ffn, layers=[3], pooling="mean")).double().eval()
    plain = make_encoder("shared").backbone.double().eval()
    shared = {k: v for k, v in encoder.backbone.state_dict().items() if ".experts." not in k}
    plain.load_state_dict(shared, strict=False)
    ids, mask = tokens
    bias = torch.where(mask[:, None, None, :].bool(), 0.0, -1e30).double()
    hidden = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[3]
    row = encoder.stitches["3"]["search"]
    weights = dict(zip(sorted(TASKS), row, strict=True))
    for compute, has_experts in (
        (lambda layer, x: layer.attention(x, attention_mask=bias)[0], attention),
        (lambda layer, x: layer.output(layer.intermediate(x), x), ffn),
    ):
        experts = weights if has_experts else {"search": 1.0}
        hidden = sum(w * compute(layer_of_expert(plain, encoder, 3, name), hidden) for name, w in experts.items())
    expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(encoder(packed(*tokens), "search"), expected, atol=1e-12, rtol=1e-12)


def test_gradients_of_the_matrices_are_right(make_stitched, tokens):
    encoder = scrambled(make_stitched(layers=[1, 3], pooling="mean")).double().eval()
    rows = [encoder.stitches[str(index)]["search"] for index in (1, 3)]

    def vectors(*_):
        return encoder(packed(*tokens), "search")

    assert torch.autograd.gradcheck(vectors, rows, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
def test_frozen_matrices_train_as_the_moe_bit_for_bit(make_stitched, three_tasks, tmp_path, attention_dropout):
    """With AdamW, weight decay, clipping and dropout. A small learning rate already makes a difference."""
    states = {}
    for name, kind, scale in (("moe", MoEEncoder, {}), *(("stitched", CrossStitchEncoder, x) for x in (0.0, 0.1))):
        encoder = make_stitched(kind=kind, pooling="mean")
        set_dropout(encoder.backbone, 0.2, attention_dropout)
        factors = {} if name == "moe" else {"stitches": scale}
        states[name, str(scale)] = fitted(encoder, three_tasks, tmp_path, factors).encoder.state_dict()
    moe, frozen, trained = states.values()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in moe.items())
    assert not all(torch.equal(trained[name], tensor) for name, tensor in moe.items())
    for name, row in make_stitched().neutral_weights().items():
        assert torch.equal(frozen[name], row)
        assert not torch.equal(trained[name], row)


def test_experts_that_frozen_matrices_mix_follow_new_weights(make_stitched):
    """They are read once, and again after a checkpoint is loaded, the encoder is copied, or an expert is added."""

    def mixed(encoder):
        return {name for weights in encoder.condition("search").mixtures.values() for name in weights}

    encoder = make_stitched()
    encoder.stitches.requires_grad_(False)
    assert mixed(encoder) == {"search"}
    state = copy.deepcopy(encoder.state_dict())
    encoder.load_state_dict(state | {f"stitches.{i}.search": torch.tensor([0.5, 0, 1]) for i in encoder.expert_layers})
    assert mixed(encoder) == {"classification", "search"}
    other = copy.deepcopy(encoder)
    other.load_state_dict(state)
    assert mixed(other) == {"search"}
    encoder.add_expert("a_reviewer", like="search")
    assert mixed(encoder) == {"classification", "search"}


def fitted(encoder, data, folder, lr_scale=None, resume=None, steps=6, **options):
    optim = OptimOptions(lr=0.01, schedule="constant", lr_scale=lr_scale or {})
    module = ContrastiveModule(encoder, optim=optim, total_steps=6, similarity="cosine", temperature=0.05, **options)
    trainer = quiet_trainer(folder, max_steps=steps, gradient_clip_val=0.5)
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


@pytest.mark.slow
@pytest.mark.parametrize("lr_scale", [{"stitches": 10.0}, {"stitches": 0.0}])
def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(make_stitched, three_tasks, tmp_path, lr_scale):
    whole = fitted(make_stitched(), three_tasks, tmp_path, lr_scale, grad_cache=True)
    fitted(make_stitched(), three_tasks, tmp_path, lr_scale, steps=4, grad_cache=True)
    resumed = fitted(make_stitched(seed=1), three_tasks, tmp_path, lr_scale, tmp_path / "4.ckpt", grad_cache=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_step_on_one_task_trains_all_experts_and_only_its_own_rows(make_stitched, tokens):
    encoder = scrambled(make_stitched())
    encoder(packed(*tokens), "search").square().sum().backward()
    for name, parameter in encoder.named_parameters():
        other_row = name.startswith("stitches.") and not name.endswith(".search")
        assert (parameter.grad is None) == other_row, name
        assert other_row or parameter.grad.any(), name


def test_columns_do_not_depend_on_the_order_of_tasks(make_stitched):
    encoder = scrambled(make_stitched())
    other = make_stitched(tasks=dict(reversed(TASKS.items())))
    continue_from(encoder, other, "the first")
    for task in TASKS:
        assert torch.equal(other.encode(TEXTS, task), encoder.encode(TEXTS, task))


@pytest.mark.parametrize("kind", ["shared", "both"])
def test_training_may_start_from_a_shared_encoder_or_an_moe(make_stitched, make_encoder, kind):
    source, target = scrambled(make_encoder(kind)), scrambled(make_stitched())
    continue_from(source, target, "the source")
    for task in TASKS:
        assert torch.equal(target.encode(TEXTS, task), source.encode(TEXTS, task))


def test_merging_with_the_start_moves_the_matrices_to_the_identity(make_stitched, make_encoder):
    encoder, start = scrambled(make_stitched()), make_encoder("shared")
    merged = merge({"trained": encoder, "start": start}, Weights((0.7, 0.3), {"stitches": (0.5, 0.5)}))
    identity = encoder.neutral_weights()
    for name, row in merged.state_dict().items():
        if name in identity:
            torch.testing.assert_close(row, (encoder.state_dict()[name] + identity[name]) / 2)
    equal = merge({"trained": encoder, "start": start}, Weights((0.0, 1.0)))
    assert torch.equal(equal.encode(TEXTS, "search"), start.encode(TEXTS, "search"))


def test_new_expert_is_read_by_its_own_task_alone(make_stitched):
    encoder = scrambled(make_stitched())
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items() if name.startswith("stitches.")}
    add_tasks(encoder, {"reviews": "a_reviewer"}, {"reviews": "search"})
    assert sorted(encoder.experts)[0] == "a_reviewer"  # the column is not the last one
    for index in encoder.expert_layers:
        own = encoder.stitch_weights(index, "a_reviewer")
        assert own["search"] == 0
        assert own["a_reviewer"] == before[f"stitches.{index}.search"][2]
        for expert in TASKS.values():
            assert encoder.stitch_weights(index, expert)["a_reviewer"] == 0
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad and name.startswith("stitches.")}
    assert trained == {f"stitches.{index}.a_reviewer" for index in encoder.expert_layers}


def test_diagnostics_show_how_much_each_task_takes_from_each_expert(make_stitched, make_encoder):
    encoder = make_stitched()
    assert mean_stitches(encoder) == {f"{a}/{b}": float(a == b) for a in TASKS for b in TASKS}
    with torch.no_grad():
        for index, weight in zip(encoder.expert_layers, (0.5, 0.1), strict=True):
            encoder.stitches[str(index)]["search"][0] = weight
    assert mean_stitches(encoder)["search/classification"] == pytest.approx(0.3)
    assert mean_stitches(make_encoder("both")) == {}


def test_encoder_has_no_plain_form(make_stitched, tmp_path):
    with pytest.raises(UserError, match="CrossStitchEncoder has no plain form"):
        dense(make_stitched(), "search")
    with pytest.raises(UserError, match="not CrossStitchEncoder"):
        save_reference(make_stitched(), tmp_path / "x.ckpt")


@pytest.mark.slow
def test_compiled_layers_give_the_same_vectors(make_stitched, tokens):
    torch._dynamo.reset()
    encoder = scrambled(make_stitched()).eval()
    expected = encoder(packed(*tokens), "search")
    compiled = copy.deepcopy(encoder)
    compiled.compile()
    torch.testing.assert_close(compiled(packed(*tokens), "search"), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


NUM_TOPICS = 5


def topics_of_words(rng):
    words = rng.sample(WORDS, len(WORDS))
    return {word: i % NUM_TOPICS for i, word in enumerate(words)}


def topic_collection(rng, topics, num_train, num_positives):
    """Return a collection in which texts with words of the same topic are relevant to each other.

    Each text has two words of its topic and a random one. num_positives: training positives of a query.
    """

    def text(number):
        own = [word for word in WORDS if topics[word] == number % NUM_TOPICS]
        return Document(str(number), "", " ".join([*rng.sample(own, 2), rng.choice(WORDS)]))

    corpus = {f"d{i}": text(i) for i in range(60)}
    queries = {f"q{i}": text(i) for i in range(num_train)} | {f"t{i}": text(i) for i in range(60)}
    relevant = {key: [f"d{i}" for i in range(int(key[1:]) % NUM_TOPICS, 60, NUM_TOPICS)] for key in queries}
    train = {key: dict.fromkeys(relevant[key][:num_positives], 1) for key in queries if key[0] == "q"}
    test = {key: dict.fromkeys(relevant[key], 1) for key in queries if key[0] == "t"}
    return Collection(corpus, queries, {"train": train, "test": test})


def values_of_arms(make_stitched, folder, seed, related):
    """Return nDCG@10 of each test query of the small task, (2, Q), and the mean cosine of its texts, both by arm.

    The expert of the large task is trained alone, then both tasks together: as an MoE, or with trained matrices.
    """
    rng = random.Random(seed)
    topics = topics_of_words(rng)
    collections = {"large": topic_collection(rng, topics, 300, 60)}
    collections["small"] = topic_collection(rng, topics if related else topics_of_words(rng), 10, 2)
    tasks = {name: name for name in collections}
    start = make_stitched(tasks=tasks, layers="all", pooling="mean", seed=seed, num_layers=2)
    set_dropout(start.backbone, 0.0, 0.0)
    options = BatchOptions(batch_size=8, num_batches=150, max_length=32)

    def train(encoder, stitches, *names):
        parts = [SearchDataModule(Task(x, x), {x: collections[x]}, options, encoder.tokenizer) for x in names]
        data = MultiTaskDataModule(parts, options, encoder.tokenizer)
        data.setup()
        optim = OptimOptions(lr=3e-3, lr_scale={"embeddings": 0.0, "shared": 0.0, "stitches": stitches})
        module = ContrastiveModule(encoder, optim=optim, total_steps=150, similarity="cosine", temperature=0.1)
        quiet_trainer(folder, max_steps=150, gradient_clip_val=1.0).fit(module, data)
        return parts[-1]

    train(start, 0.0, "large")
    values, cosines = [], []
    for stitches in (0.0, 30.0):
        encoder = copy.deepcopy(start).requires_grad_(True)
        small = train(encoder, stitches, "large", "small")
        result = evaluate(encoder, small.benchmarks("test")[0], ["ndcg@10"], similarity="cosine")
        values.append(result.query_values.values[:, 0].tolist())
        vectors = torch.nn.functional.normalize(encoder.encode(list(collections["small"].corpus.values()), "small"))
        cosines.append(((vectors.sum(0).square().sum() - 60) / (60 * 59)).item())
    return values, cosines


SEEDS = range(100, 105)  # none of them took part in the choice of this world


@pytest.mark.slow
@pytest.mark.parametrize("related", [True, False])
def test_stitching_helps_a_small_task_if_a_large_one_is_related(make_stitched, tmp_path, related):
    seeds = SEEDS if LONG else SEEDS[:3]
    results = [values_of_arms(make_stitched, tmp_path, seed, related) for seed in seeds]
    values, cosines = (np.array(parts) for parts in zip(*results, strict=True))  # (S, 2, Q), (S, 2)
    frozen, trained = values[:, 0], values[:, 1]
    gain = gain_of(trained, frozen)
    print(f"{gain}; by seed {(trained - frozen).mean(1).round(3)}; nDCG@10 and cosines, without and with matrices:")
    print(values.mean((0, 2)).round(3), cosines.round(2).T)
    assert cosines[:, 1].max() < 0.9
    assert (gain.mean > gain.of_queries) == related
