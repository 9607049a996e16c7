"""GradCache gives the same vectors, dropout and gradients as a plain step, with the graph of one chunk in memory."""

import weakref

import pytest
import torch

from datamodules.tasks import ClassificationDataModule, LinkPredictionDataModule, SearchDataModule
from lightning_modules.chunked import embed_chunk
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.backbone import set_dropout
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.optim import OptimOptions
from tests.conftest import TASKS, toy_collection, with_features
from tests.lightning_modules.quiet_trainer import quiet_trainer

INSTRUCTIONS = {"classification": "bara beli", "link_prediction": "bomu bito buna", "search": "cara celi"}
VARIANTS = {
    "instruct": (InstructEncoder, {"instructions": INSTRUCTIONS}),
    "prefix": (InstructEncoder, {"instructions": INSTRUCTIONS, "separate": True}),
    "adapters": (AdapterEncoder, {"freeze_backbone": False}),
    "stitched": (CrossStitchEncoder, {"ffn": True}),
    "control": (ControlEncoder, {"ffn": True}),
    "routed": (RoutedEncoder, {"entropy_weight": 0.3, "attention": True}),
    "routed tokens": (RoutedEncoder, {"entropy_weight": 0.3, "level": "token"}),
}
DENSE = ("shared", "attention", "ffn", "both")


@pytest.fixture
def make_module(make_encoder, make_backbone):
    """Return a function that makes a module in training mode, with dropout. The same kind has the same weights."""

    def make(kind, dropout=0.3, **arguments):
        if kind in DENSE:
            encoder = make_encoder(kind, pooling="mean")
            if kind == "both":
                with_features(encoder, list(toy_collection(10, 10, papers=True).corpus.values())[::2])
        else:
            encoder_class, settings = VARIANTS[kind]
            encoder = encoder_class(*make_backbone(), TASKS, max_length=32, pooling="mean", **settings)
        set_dropout(encoder.backbone, dropout, dropout)
        if kind == "prefix":
            set_dropout(encoder.instruction_backbone, dropout, dropout)
        options = {"similarity": "cosine", "temperature": 0.1} | arguments
        return ContrastiveModule(encoder, **options).train()

    return make


@pytest.fixture
def batch(make_task):
    """A batch with several chunks, hard negatives, and documents that are known positives of other queries."""
    data = make_task(LinkPredictionDataModule, "link_prediction", toy_collection(10, 10, papers=True), token_budget=16)
    batch = data.train_dataloader().batches[0]
    assert len(batch.chunks) > 3
    assert len(batch.document_ids) > len(batch.queries)
    assert (batch.known_positives[:, :, None] == batch.document_ids).sum() > len(batch.queries)
    return batch


def loss_and_gradients(module, batch):
    """Return the loss, and the gradient of every parameter."""
    module.zero_grad(set_to_none=True)
    loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters()}


def relative_error(ours, theirs):
    """Return the largest difference relative to the largest value. The same parameters must have a gradient."""
    assert {name for name, g in ours.items() if g is None} == {name for name, g in theirs.items() if g is None}
    pairs = [(ours[name], theirs[name]) for name in ours if ours[name] is not None]
    assert pairs
    return (max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs)).item()


@pytest.mark.parametrize("kind", [*DENSE, *VARIANTS])
def test_gradient_equals_the_plain_one(make_module, batch, kind):
    plain = loss_and_gradients(make_module(kind).double(), batch)
    cached = loss_and_gradients(make_module(kind, grad_cache=True).double(), batch)
    assert torch.equal(cached[0], plain[0])
    assert relative_error(cached[1], plain[1]) < 1e-12


def test_gradient_equals_the_plain_one_with_all_options(make_module, make_task):
    """With several positives, both directions, Matryoshka dimensions, and the gradient of a learned temperature."""
    data = make_task(SearchDataModule, "search", token_budget=16, num_positives=2)
    options = {"learn_temperature": "per_task", "symmetric": True, "matryoshka": [8], "temperature": 0.3}
    batch = data.train_dataloader().batches[0]
    assert batch.positives.shape[1] == 2
    plain, cached = (
        loss_and_gradients(make_module("both", grad_cache=on, **options).double(), batch) for on in (False, True)
    )
    assert torch.equal(cached[0], plain[0])
    assert relative_error(cached[1], plain[1]) < 1e-12
    assert cached[1]["objective.temperature.log.search"] != 0


@pytest.mark.parametrize("kind", DENSE)
def test_gradient_with_dropout_equals_the_plain_one_bit_for_bit(make_module, batch, kind):
    plain, cached = (
        loss_and_gradients(make_module(kind), batch),
        loss_and_gradients(make_module(kind, grad_cache=True), batch),
    )
    assert torch.equal(cached[0], plain[0])
    for name, gradient in plain[1].items():
        assert (cached[1][name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(cached[1][name], gradient), name
    without_dropout = loss_and_gradients(make_module(kind, dropout=0.0), batch)
    assert not torch.equal(without_dropout[0], plain[0])


def test_gradient_equals_that_of_one_chunk_with_all_texts(make_module, make_task):
    gradients = []
    for budget, cache in ((100_000, False), (40, True)):
        data = make_task(SearchDataModule, "search", token_budget=budget, num_hard_negatives=1)
        whole = data.train_dataloader().batches[0]
        assert (len(whole.chunks) == 1) == (not cache)
        gradients.append(loss_and_gradients(make_module("both", dropout=0.0, grad_cache=cache).double(), whole)[1])
    assert relative_error(*gradients) < 1e-12


def test_experts_of_other_tasks_have_no_gradient(make_module, batch):
    _, gradients = loss_and_gradients(make_module("both", grad_cache=True), batch)
    idle = {name for name, gradient in gradients.items() if gradient is None}
    assert idle == {n for n in gradients if ".experts.classification." in n or ".experts.search." in n}


def peak_of_saved(module, function):
    """Return the peak size of the tensors that graphs keep while a function runs, parameters aside, in bytes."""
    held, sizes = {"now": 0, "peak": 0}, {}
    known = {p.data_ptr() for p in module.parameters()}

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def release(key):
        held["now"] -= sizes.pop(key)

    def pack(tensor):
        saved = Saved(tensor)
        if tensor.data_ptr() not in known:
            sizes[id(saved)] = tensor.nbytes
            weakref.finalize(saved, release, id(saved))
            held["now"] += tensor.nbytes
            held["peak"] = max(held["peak"], held["now"])
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        function()
    return held["peak"]


def test_memory_of_graphs_is_that_of_one_chunk(make_module, make_task):
    options = {"batch_size": 64, "token_budget": 128}
    data = make_task(ClassificationDataModule, "classification", toy_collection(80, 80), **options)
    batch = data.train_dataloader().batches[0]
    assert len(batch.chunks) >= 6
    module = make_module("attention")
    largest = max(
        peak_of_saved(module, lambda i=i: embed_chunk(module.encoder, batch, i)) for i in range(len(batch.chunks))
    )
    assert peak_of_saved(module, lambda: loss_and_gradients(module, batch)) > 4 * largest
    module.grad_cache = True
    assert peak_of_saved(module, lambda: loss_and_gradients(module, batch)) < 1.05 * largest


def gradients_of(module, batch, gradients):
    """Return the gradient of every parameter from those of the vectors (U, D), chunk by chunk in bf16."""
    module.zero_grad(set_to_none=True)
    start = 0
    for index, chunk in enumerate(batch.chunks):
        torch.manual_seed(batch.seed + index)
        with torch.autocast("cpu", torch.bfloat16):
            part = module.encoder(chunk, batch.task)
        part.backward(gradients[start : start + len(chunk)])
        start += len(chunk)
    return {name: p.grad for name, p in module.named_parameters()}


def test_bf16_is_used_in_both_forward_passes_of_a_chunk(make_module, batch):
    module = make_module("ffn", grad_cache=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module.training_step(batch, 0)
    outputs["loss"].backward()
    ours = {name: p.grad for name, p in module.named_parameters()}

    module = make_module("ffn")
    with torch.no_grad():
        wide = module.embed(batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            vectors = module.embed(batch)[0]
    assert not torch.equal(vectors, wide)
    module.objective(vectors.requires_grad_(), batch)["loss"].backward()
    assert relative_error(ours, gradients_of(module, batch, vectors.grad)) < 1e-6


def test_gradient_checkpointing_can_be_combined(make_module, batch):
    plain, cached = make_module("ffn").double(), make_module("ffn", grad_cache=True).double()
    cached.encoder.gradient_checkpointing = True
    assert relative_error(loss_and_gradients(cached, batch)[1], loss_and_gradients(plain, batch)[1]) < 1e-12


def test_without_gradients_vectors_equal_the_plain_ones(make_module, batch):
    module = make_module("attention", grad_cache=True).eval()
    with torch.no_grad():
        vectors, _ = module.embed(batch)
    assert not vectors.requires_grad
    module.grad_cache = False
    assert torch.equal(vectors, module.embed(batch)[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_the_plain_one_bit_for_bit(make_module, make_task, tmp_path, accumulate):
    """With dropout, clipping, accumulation and AdamW, whose momentum would reveal any difference."""
    weights = []
    for cache in (False, True):
        data = make_task(ClassificationDataModule, "classification", token_budget=40)
        module = make_module("attention", grad_cache=cache, optim=OptimOptions(lr=0.01), total_steps=4)
        trainer = quiet_trainer(tmp_path, max_steps=4, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
        trainer.fit(module, data)
        assert trainer.global_step == 4
        weights.append(module.state_dict())
    start = make_module("attention").state_dict()
    assert any(not torch.equal(start[name], weights[0][name]) for name in start)
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
