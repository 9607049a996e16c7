"""Exports: plain folders, ONNX, the average of the experts, checkpoints in the authors' layout."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datamodules.records import Document, UserError
from lightning_modules.encoders.export import average, dense, save_dense, save_onnx, save_reference
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.shared import SharedEncoder
from tests.conftest import TASKS, text_of
from tests.lightning_modules.encoders.test_families import make_mpnet  # noqa: F401
from tests.lightning_modules.encoders.test_pretrained import INSTRUCTIONS, KINDS

TEXTS = [Document(str(i), text_of(i), text_of(*range(i, 3 * i))) for i in range(8)]
STRINGS = [f"{d.title} [SEP] {d.text}" if d.text else d.title for d in TEXTS]

# Runs in a process that cannot import our packages. Its arguments are pairs of a folder and the file for its vectors.
LOADER = """
import json, sys
for name in ("lightning_modules", "datamodules", "experiments"):
    sys.modules[name] = None
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
texts = json.load(sys.stdin)
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    model = SentenceTransformer(folder, device="cpu")
    result = {"sentence_transformers": model.encode(texts, batch_size=3), "length": model.max_seq_length,
              "similarity": model.similarity_fn_name}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        result["states"] = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state.numpy()
    result["mask"] = tokens["attention_mask"].numpy()
    np.savez(out, **result)
"""


def changed(encoder):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.eval()


@pytest.fixture
def make(make_backbone):
    def build(name, pooling="cls", normalize=False, seed=0, **options):
        kind, arguments = KINDS[name]
        arguments = {"max_length": 16} | arguments | options
        return changed(kind(*make_backbone(seed), TASKS, pooling=pooling, normalize=normalize, **arguments))

    return build


def load_elsewhere(folders):
    """Load the folders in a process without our packages. Return the vectors and settings of each."""
    arguments = [str(path) for folder in folders for path in (folder, folder.with_suffix(".npz"))]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *arguments], input=json.dumps(STRINGS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.load(folder.with_suffix(".npz")) for folder in folders]


@pytest.mark.slow
def test_other_tools_load_each_task_without_our_code(make, make_mpnet, tmp_path):  # noqa: F811
    cases = [("shared", "cls", False), ("attention", "cls", False), ("ffn", "mean", True), ("both", "mean", False)]
    exports = []
    for name, pooling, normalize in cases:
        encoder = make(name, pooling, normalize)
        for task in TASKS if name == "attention" else ["search"]:
            exports.append((encoder, task, save_dense(encoder, task, tmp_path / f"{name}-{task}", "cosine")))
    encoder = changed(MoEEncoder(*make_mpnet(), TASKS, ffn=True, max_length=16))
    exports.append((encoder, "search", save_dense(encoder, "search", tmp_path / "mpnet", "cosine")))
    results = load_elsewhere([folder for _, _, folder in exports])
    for (encoder, task, folder), loaded in zip(exports, results, strict=True):
        ours = encoder.encode(TEXTS, task).numpy()  # some texts are longer than max_length
        assert np.abs(loaded["sentence_transformers"] - ours).max() < 1e-5, folder
        states, mask = loaded["states"], loaded["mask"][..., None]
        pooled = states[:, 0] if encoder.pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
        pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True) if encoder.normalize else pooled
        assert np.abs(pooled - ours).max() < 1e-5, folder
        assert (loaded["length"], str(loaded["similarity"])) == (16, "cosine")


@pytest.mark.slow
def test_prompt_is_exported(make, tmp_path):
    exports = []
    for pooling, pool_prompt in [("mean", True), ("mean", False), ("cls", False)]:
        encoder = make("prompt", pooling, pool_prompt=pool_prompt, max_length=32)
        folder = save_dense(encoder, "search", tmp_path / f"{pooling}-{pool_prompt}")
        settings = json.loads((folder / "config_sentence_transformers.json").read_text())
        assert settings["prompts"] == {"search": INSTRUCTIONS["search"] + " "}
        exports.append((encoder, folder))
    for (encoder, folder), loaded in zip(exports, load_elsewhere([folder for _, folder in exports]), strict=True):
        ours = encoder.encode(TEXTS, "search").numpy()
        assert np.abs(loaded["sentence_transformers"] - ours).max() < 1e-5, folder


def test_average_is_the_mean_of_the_experts(make):
    encoder = make("both")
    general = average(encoder)
    assert general.tasks == encoder.tasks
    assert isinstance(general, SharedEncoder)
    state, mean = encoder.state_dict(), general.state_dict()
    key = "backbone.encoder.layer.1.attention.self"
    weights = [state[f"{key}.experts.{expert}.query.weight"].double().numpy() for expert in TASKS]
    np.testing.assert_allclose(mean[f"{key}.query.weight"].numpy(), sum(weights) / 3, atol=1e-7)
    shared = "backbone.embeddings.word_embeddings.weight"
    assert torch.equal(mean[shared], state[shared])
    untrained = MoEEncoder(general.backbone, general.tokenizer, TASKS, max_length=16)
    again = average(untrained).state_dict()
    for name, tensor in mean.items():  # the average of equal experts is one of them
        torch.testing.assert_close(again[name], tensor, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pooling"), [("attention", "cls"), ("ffn", "mean")])
def test_onnx_gives_the_same_vectors_for_any_batch_and_length(make, tmp_path, name, pooling):
    import onnxruntime

    encoder = make(name, pooling, normalize=pooling == "mean", max_length=40)
    session = onnxruntime.InferenceSession(save_onnx(save_dense(encoder, "search", tmp_path / "search")))
    for texts in (TEXTS[:1], TEXTS):
        strings = [f"{d.title} [SEP] {d.text}" if d.text else d.title for d in texts]
        tokens = encoder.tokenizer(strings, padding=True, return_tensors="np")
        feed = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        states, vectors = session.run(["last_hidden_state", "sentence_embedding"], feed)
        assert states.shape == (*tokens["input_ids"].shape, 32)
        assert np.abs(vectors - encoder.encode(texts, "search").numpy()).max() < 1e-5


@pytest.mark.parametrize("name", ["routed", "instruction", "prefix", "adapters"])
def test_plain_export_of_encoders_without_plain_form_raises_user_error(make, tmp_path, name):
    with pytest.raises(UserError, match="has no plain form, .*save the whole encoder"):
        save_dense(make(name), "search", tmp_path / "search")
    assert not (tmp_path / "search").exists()


def test_impossible_exports_raise_user_error(make, tmp_path):
    with pytest.raises(UserError, match="unknown task 'serach'"):
        dense(make("attention"), "serach")
    with pytest.raises(UserError, match="has no experts to average"):
        dense(make("shared"), "average")
    with pytest.raises(UserError, match="pool_prompt=false"):
        save_onnx(save_dense(make("prompt", "mean", max_length=32), "search", tmp_path / "p"))
    with pytest.raises(UserError, match="only SharedEncoder and MoEEncoder over bert, not RoutedEncoder over bert"):
        save_reference(make("routed"), tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="not pooling mean with normalize false"):
        save_reference(make("attention", "mean", layers="mod2"), tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"layers \[0, 2\]: the authors' format supports only mod2, mod3"):
        save_reference(make("attention"), tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.parametrize(
    ("name", "rule"),
    [("shared", ""), *itertools.product(("attention", "ffn", "both"), ("mod2", "mod3", "le7mod3", "ge6mod3"))],
)
def test_round_trip_through_the_authors_layout_is_bit_equal(make, make_backbone, tmp_path, name, rule):
    kind, arguments = KINDS[name]
    layers = {"layers": rule} if rule else {}
    torch.manual_seed(1)
    encoder = changed(kind(*make_backbone(num_layers=6), TASKS, **arguments | layers, max_length=64))
    encoder.save_pretrained(tmp_path / "bert")
    plain = dense(encoder, "search")
    plain.backbone.save_pretrained(tmp_path / "bert")
    plain.tokenizer.save_pretrained(tmp_path / "bert")
    again = load_encoder(save_reference(encoder, tmp_path / "first.ckpt"), backbone=tmp_path / "bert")
    back = load_encoder(save_reference(again, tmp_path / "second.ckpt"), backbone=tmp_path / "bert")
    for other in (again, back):
        assert other.state_dict().keys() == encoder.state_dict().keys()
        for key, tensor in encoder.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), key
        for task in TASKS:
            assert torch.equal(other.encode(TEXTS, task), encoder.encode(TEXTS, task))
    first, second = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("first", "second"))
    assert first["encoder_params"]["moe_type"] == second["encoder_params"]["moe_type"]
    assert first["model_dict"].keys() == second["model_dict"].keys()


def test_files_get_default_permissions_and_failures_leave_no_files(make, tmp_path):
    encoder, mask = make("ffn", layers="mod2"), os.umask(0)
    os.umask(mask)
    save_dense(encoder, "search", tmp_path / "plain")
    encoder.save_pretrained(tmp_path / "whole")
    save_reference(encoder, tmp_path / "first.ckpt")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "folder", tmp_path / "file" / "x.ckpt"):
        with pytest.raises(UserError, match="cannot be written"):
            save_reference(encoder, target)
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "whole", "first.ckpt", "folder", "file"}


def test_exported_plain_folder_loads_with_its_pooling(make, tmp_path, caplog):
    encoder = make("attention", "mean", normalize=True)
    plain = load_encoder(save_dense(encoder, "search", tmp_path / "search"))
    assert (plain.pooling, plain.normalize, plain.max_length) == ("mean", True, 16)
    torch.testing.assert_close(plain.encode(TEXTS, "search"), encoder.encode(TEXTS, "search"), atol=1e-5, rtol=1e-5)
    assert load_encoder(tmp_path / "search", pooling="cls").pooling == "cls"
    for pooling, pool_prompt in (("mean", False), ("mean", True), ("cls", False)):
        encoder = make("prompt", pooling, pool_prompt=pool_prompt, max_length=32)
        again = load_encoder(save_dense(encoder, "search", tmp_path / f"prompt-{pooling}-{pool_prompt}"))
        ours = encoder.encode(TEXTS, "search")
        torch.testing.assert_close(again.encode(TEXTS, "search"), ours, atol=1e-5, rtol=1e-5)
    settings = tmp_path / "search" / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": {"query": "query: ", "document": ""}}))
    load_encoder(tmp_path / "search")
    assert "prompts are ignored, because none of them is the default (query)" in caplog.text


def test_plain_folder_contains_only_the_weights_of_its_task(make, tmp_path):
    folder = save_dense(make("attention"), "search", tmp_path / "search")
    shared = save_dense(make("shared"), "search", tmp_path / "shared")
    assert load_file(folder / "model.safetensors").keys() == load_file(shared / "model.safetensors").keys()
