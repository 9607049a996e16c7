"""Adapters: a new one equals the backbone, a trained one its formula; files in SPECTER2's form are read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from datamodules.records import Benchmark, Document, UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.retrieval.evaluation import rank_benchmark
from tests.conftest import TASKS, packed

FORM = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_layer": False,
    "reduction_factor": 4,
    "residual_before_ln": True,
    "scaling": 1.0,
}


def adapter_files(folder, seed, label="[PRX]", prefix="bert.", layers=4, safe=False, **changes):
    """Write an adapter as the library `adapters` does, and return its weights."""
    torch.manual_seed(seed)
    shapes = {"adapter_down.0.weight": (8, 32), "adapter_down.0.bias": (8,)}
    shapes |= {"adapter_up.weight": (32, 8), "adapter_up.bias": (32,)}
    weights = {
        f"{prefix}encoder.layer.{i}.output.adapters.{label}.{name}": 0.3 * torch.randn(shape)
        for i in range(layers)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    config = {"config": FORM | changes, "hidden_size": 32, "model_type": "bert", "name": label}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if safe:
        save_file(weights, folder / "adapter.safetensors")
    else:
        torch.save(weights, folder / "pytorch_adapter.bin")
    return list(weights.values())


def by_formula(bert, ids, mask, weights):
    """Compute the layers of Hugging Face with each output sub-layer spelled out."""
    bias = torch.where(mask[:, None, None, :].bool(), 0.0, -1e30)
    hidden = bert.embeddings(input_ids=ids)
    for i, layer in enumerate(bert.encoder.layer):
        down, down_bias, up, up_bias = weights[4 * i : 4 * i + 4]
        middle = layer.attention(hidden, attention_mask=bias)[0]
        dense, norm = layer.output.dense(layer.intermediate(middle)), layer.output.LayerNorm
        bottleneck = torch.relu(norm(dense + middle) @ down.T + down_bias)
        hidden = norm(bottleneck @ up.T + up_bias + dense + middle)
    return hidden[:, 0]


@pytest.fixture
def bert(make_backbone, tmp_path):
    backbone, tokenizer = make_backbone()
    with torch.no_grad():  # LayerNorms that differ from one another
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    ids, lengths = torch.randint(5, 60, (4, 20)), torch.tensor([2, 9, 20, 12])
    mask = (torch.arange(20) < lengths[:, None]).long()
    return ids * mask, mask


def test_new_adapters_equal_the_backbone_and_are_all_that_is_trained(make_backbone, make_encoder, tokens):
    encoder = AdapterEncoder(*make_backbone(), TASKS, max_length=32).eval()
    expected = make_encoder("shared").eval()(packed(*tokens), "search")
    torch.testing.assert_close(encoder(packed(*tokens), "search"), expected, atol=2e-6, rtol=1e-5)
    encoder(packed(*tokens), "search").square().sum().backward()
    learned = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert learned
    assert all(name.startswith("adapters.search.") for name in learned)
    trained = AdapterEncoder(*make_backbone(), TASKS, freeze_backbone=False, max_length=32)
    trained(packed(*tokens), "search").square().sum().backward()
    assert trained.backbone.embeddings.word_embeddings.weight.grad is not None


def test_adapters_of_specter2_compute_their_formula(bert, tokens, tmp_path):
    files = {
        "classification": adapter_files(tmp_path / "clf", 1, "[CLF]"),
        "link_prediction": adapter_files(tmp_path / "prx", 2, prefix="", safe=True),
        "search": adapter_files(tmp_path / "qry", 3, "[QRY]"),
    }
    folders = dict(zip(files, ("clf", "prx", "qry"), strict=True))
    adapters = {task: str(tmp_path / folder) for task, folder in folders.items()}
    adapters["search.documents"] = adapters["link_prediction"]
    encoder = load_encoder(bert, adapters=adapters)
    plain = load_encoder(bert)
    assert plain(packed(*tokens), "search").shape == (4, 32)
    for task, weights in files.items():
        expected = by_formula(plain.backbone, *tokens, weights)
        torch.testing.assert_close(encoder(packed(*tokens), task), expected, atol=1e-5, rtol=1e-5)
    again = load_encoder(encoder.save_pretrained(tmp_path / "ours"))
    assert torch.equal(again(packed(*tokens), "search"), encoder(packed(*tokens), "search"))

    # Queries use the adapter of search, documents another one.
    paper, query = Document("d", "bara", "beli"), Document("q", "", "bomu")
    benchmark = Benchmark("toy", "search", "test", {"d": paper}, {"q": query}, {"q": {"d": 1}})
    score = rank_benchmark(again, benchmark, 1).scores[0, 0]
    expected = encoder.encode([query], "search")[0] @ encoder.encode([paper], "link_prediction")[0]
    assert float(score) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(UserError, match="not trained"):
        ContrastiveModule(again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mh_adapter": True}, "mh_adapter must be False, got True"),
        ({"original_ln_before": False}, "original_ln_before must be True, got False"),
        ({"scaling": "learned"}, "scaling must be 1.0, got 'learned'"),
        ({"reduction_factor": {"0": 2}}, "reduction_factor must be a whole number"),
        ({"reduction_factor": 8}, "expected an adapter for 4 layers of dimension 32, with bottleneck 4"),
        ({"layers": 3}, "expected an adapter for 4 layers"),
        ({"non_linearity": "square_dance"}, "activation: expected one of .*, got 'square_dance'"),
    ],
)
def test_adapters_of_another_form_raise_user_error(bert, tmp_path, changes, message):
    layers = changes.pop("layers", 4)
    adapter_files(tmp_path / "other", 1, layers=layers, **changes)
    with pytest.raises(UserError, match=message):
        load_encoder(bert, adapters={"search": str(tmp_path / "other")})


def test_folders_without_adapters_and_encoders_with_experts_raise_user_error(bert, make_encoder, tmp_path):
    with pytest.raises(UserError, match="adapters.search: '/no/where' is not an existing file or folder"):
        load_encoder(bert, adapters={"search": "/no/where"})
    with pytest.raises(UserError, match="adapters.search: .* cannot be loaded"):
        load_encoder(bert, adapters={"search": str(bert)})
    adapter_files(tmp_path / "prx", 1)
    folder = make_encoder("attention").save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match="expected a plain model to add them to, got a MoEEncoder"):
        load_encoder(folder, adapters={"search": str(tmp_path / "prx")})
