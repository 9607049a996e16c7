"""Saving and loading all encoders, also with transformers' AutoModel, and encoding for several tasks at once."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from datamodules.records import Document, UserError
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.distributed.sharding import replica
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.dual_prompt import DualPromptEncoder
from lightning_modules.encoders.export import average, save_dense
from lightning_modules.encoders.instruct import InstructEncoder, PromptEncoder
from lightning_modules.encoders.loading import build, describe, load_encoder, load_weights
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.encoders.shared import SharedEncoder
from tests.conftest import TASKS, packed, text_of, with_features

INSTRUCTIONS = {"classification": "tag bara beli", "link_prediction": "cite bomu", "search": "find bito buna"}
KINDS = {
    "shared": (SharedEncoder, {}),
    "attention": (MoEEncoder, {"layers": [0, 2]}),
    "ffn": (MoEEncoder, {"attention": False, "ffn": True, "layers": "last1"}),
    "both": (MoEEncoder, {"ffn": True}),
    "stitched": (CrossStitchEncoder, {"ffn": True}),
    "control": (ControlEncoder, {"layers": "last2"}),
    "routed": (RoutedEncoder, {"num_experts": 2, "level": "token"}),
    "instruction": (InstructEncoder, {"instructions": INSTRUCTIONS}),
    "prefix": (InstructEncoder, {"instructions": INSTRUCTIONS, "separate": True}),
    "prompt": (PromptEncoder, {"instructions": INSTRUCTIONS, "pool_prompt": False}),
    "dual prompt": (DualPromptEncoder, {"instructions": INSTRUCTIONS, "num_anchors": 3}),
    "adapters": (AdapterEncoder, {"reduction_factor": 4, "activation": "gelu"}),
}
TEXTS = [Document(str(i), text_of(i), text_of(*range(i, 2 * i))) for i in range(6)]


@pytest.fixture(params=KINDS)
def encoder(request, make_backbone):
    """Each kind of encoder, with changed weights."""
    kind, arguments = KINDS[request.param]
    encoder = kind(*make_backbone(), TASKS, pooling="mean", normalize=True, max_length=32, **arguments)
    if encoder.features:
        with_features(encoder, TEXTS[::2])
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.eval()


def vectors(encoder):
    return torch.stack([encoder.encode(TEXTS, task) for task in TASKS])


def test_saved_folder_loads_as_the_same_encoder_of_the_same_class(encoder, tmp_path):
    folder = encoder.save_pretrained(tmp_path / "model")
    for loaded in (load_encoder(folder), type(encoder).from_pretrained(folder)):
        assert type(loaded) is type(encoder)
        assert loaded.config == encoder.config
        assert torch.equal(vectors(loaded), vectors(encoder))
        assert not loaded.training
        trainable = {n for n, p in loaded.named_parameters() if p.requires_grad}
        assert trainable == {n for n, p in encoder.named_parameters() if p.requires_grad}
    other = MoEEncoder if isinstance(encoder, SharedEncoder) else SharedEncoder
    with pytest.raises(UserError, match=f"contains a {type(encoder).__name__}, not a {other.__name__}"):
        other.from_pretrained(folder)


@pytest.mark.parametrize(
    "write", [lambda e, folder: e.save_pretrained(folder), lambda e, folder: save_dense(e, "search", folder)]
)
def test_flipped_bit_in_the_weights_raises_user_error(make_encoder, tmp_path, write):
    """Safetensors has no checksum: the model was loaded with another weight."""
    path = write(make_encoder("attention"), tmp_path / "model") / "model.safetensors"
    content = bytearray(path.read_bytes())
    load_encoder(path.parent)
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors: was changed or damaged after the export"):
        load_encoder(path.parent)
    (path.parent / "checksum.json").unlink()
    load_encoder(path.parent)


def test_automodel_loads_and_saves_encoders(encoder, tmp_path):
    folder = encoder.save_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(folder)
    tokens = encoder.tokenizer(["bara beli bomu bito buna cara"], return_tensors="pt")
    for task in TASKS:
        ours = encoder(packed(tokens["input_ids"], tokens["attention_mask"]), task)
        assert torch.equal(model(tokens["input_ids"], tokens["attention_mask"], task=task).pooler_output, ours)
    model.save_pretrained(tmp_path / "again")
    model.encoder.tokenizer.save_pretrained(tmp_path / "again")
    assert torch.equal(vectors(load_encoder(tmp_path / "again")), vectors(encoder))


def test_encoder_is_built_from_a_json_description(encoder):
    description = describe(encoder)
    assert json.loads(json.dumps(description)) == description
    again = build(description)
    assert again.config == encoder.config
    load_weights(again, encoder.state_dict(), "again")
    assert torch.equal(vectors(again.eval()), vectors(encoder))


def test_state_dict_is_read_with_weights_only(encoder, tmp_path):
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    assert torch.load(tmp_path / "weights.pt", weights_only=True).keys() == encoder.state_dict().keys()


def test_encoding_for_several_tasks_equals_encoding_for_each(encoder):
    together = encoder.encode(TEXTS, tasks=list(TASKS), token_budget=64)
    assert list(together) == list(TASKS)
    for task in TASKS:
        torch.testing.assert_close(together[task], encoder.encode(TEXTS, task), atol=2e-6, rtol=1e-5)
    assert list(encoder.encode(TEXTS, tasks=["search"])) == ["search"]
    with pytest.raises(UserError, match="unknown task 'serach'"):
        encoder.encode(TEXTS, tasks=["search", "serach"])
    with pytest.raises(TypeError, match="either task or tasks"):
        encoder.encode(TEXTS)
    with pytest.raises(TypeError, match="expected a list of tasks"):
        encoder.encode(TEXTS, tasks="search")


@pytest.mark.parametrize(
    ("layers", "passes"), [("mod2", 1 + 3 * 11), ("last2", 10 + 3 * 2), ("mod12", 11 + 3), ("all", 3 * 12)]
)
def test_layers_below_the_first_expert_are_computed_once(make_backbone, layers, passes):
    encoder = MoEEncoder(*make_backbone(num_layers=12), TASKS, layers=layers, pooling="mean", max_length=32).eval()
    ids = torch.randint(5, 60, (4, 24))
    mask = torch.ones_like(ids)

    def flops(tasks):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            encoder.forward_tasks(packed(ids, mask), tasks)
        return counter.get_total_flops()

    assert flops(list(TASKS)) * 12 == flops(["search"]) * passes


def test_tasks_that_share_an_expert_are_computed_once(make_backbone):
    encoder = MoEEncoder(*make_backbone(), {"a": "one", "b": "one"}, max_length=32).eval()
    ids = torch.randint(5, 60, (2, 9))
    vectors = encoder.forward_tasks(packed(ids, torch.ones_like(ids)), ["a", "b"])
    assert vectors["a"] is vectors["b"]


def test_similarity_of_the_training_is_stored_with_the_model(encoder, tmp_path):
    assert load_encoder(encoder.save_pretrained(tmp_path / "untrained")).similarity is None
    for similarity in ("cosine", "dot"):
        if not isinstance(encoder, AdapterEncoder):
            ContrastiveModule(encoder, similarity=similarity)
        encoder.similarity = similarity
        assert load_encoder(encoder.save_pretrained(tmp_path / similarity)).similarity == similarity
        path = tmp_path / f"{similarity}.ckpt"
        weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        checkpoint = {"encoder": describe(encoder), "state_dict": weights}
        torch.save(checkpoint, path)
        assert load_encoder(path).similarity == similarity
        assert replica(load_encoder(path)).similarity == similarity
        del checkpoint["encoder"]["similarity"]  # as earlier versions wrote it
        torch.save(checkpoint, path)
        assert load_encoder(path).similarity is None
        checkpoint["encoder"]["similarity"] = ["l1"]
        torch.save(checkpoint, path)
        with pytest.raises(UserError, match=r"ckpt: similarity: expected one of dot, cosine, got \['l1'\]"):
            load_encoder(path)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_similarity_survives_the_plain_export(make_encoder, tmp_path, similarity):
    encoder = ContrastiveModule(make_encoder("attention"), similarity=similarity).encoder
    assert load_encoder(save_dense(encoder, "search", tmp_path / "plain")).similarity == similarity
    assert average(encoder).similarity == similarity
