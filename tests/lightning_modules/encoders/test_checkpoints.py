"""Initializing one encoder from another, loading plain folders, and errors for damaged files."""

import pickle

import pytest
import torch

from datamodules.records import UserError
from lightning_modules.encoders.loading import build, continue_from, describe, load_encoder
from lightning_modules.encoders.pretrained import save_encoder
from tests.conftest import TASKS

KINDS = ("shared", "attention", "ffn", "both")


def scrambled(encoder, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def vectors(encoder):
    return torch.stack([encoder.encode(["bara beli", "bomu"], task) for task in TASKS])


@pytest.mark.parametrize("kind", KINDS)
def test_experts_start_from_a_trained_shared_encoder(make_encoder, kind):
    source, target = scrambled(make_encoder("shared")), make_encoder(kind, seed=1)
    continue_from(source, target, "source")
    for task in TASKS:
        assert torch.equal(target.encode(["bara beli"], task), source.encode(["bara beli"], task))


def test_experts_continue_from_the_same_architecture(make_encoder):
    source, target = scrambled(make_encoder("attention")), make_encoder("attention", seed=1)
    continue_from(source, target, "source")
    assert torch.equal(vectors(target), vectors(source))


@pytest.mark.parametrize("kind", ["attention", "both"])
def test_experts_that_no_task_uses_are_left_out(make_encoder, kind, caplog):
    source, target = scrambled(make_encoder(kind)), make_encoder(kind, tasks={"search": "search"}, seed=1)
    with caplog.at_level("INFO"):
        continue_from(source, target, "source")
    assert torch.equal(target.encode(["bara beli"], "search"), source.encode(["bara beli"], "search"))
    assert "left out experts that no task of this run uses: classification, link" in caplog.text


def test_continuing_with_other_experts_names_those_that_are_missing(make_encoder):
    target = make_encoder("attention", tasks={"other": "other"})
    with pytest.raises(UserError, match="source: the weights do not fit this MoEEncoder: .*missing .*experts.other"):
        continue_from(make_encoder("attention"), target, "source")


def test_continuing_from_another_architecture_raises_user_error(make_encoder):
    with pytest.raises(UserError, match="source: the weights do not fit this MoEEncoder: .* missing"):
        continue_from(make_encoder("attention"), make_encoder("ffn"), "source")
    with pytest.raises(UserError, match="do not fit this SharedEncoder: .* unexpected"):
        continue_from(make_encoder("attention"), make_encoder("shared"), "source")
    with pytest.raises(UserError, match="with the wrong shape"):
        continue_from(make_encoder("shared", config={"intermediate_size": 32}), make_encoder("shared"), "source")


def test_plain_bert_folder_gets_the_given_tasks(make_backbone, tmp_path):
    backbone, tokenizer = make_backbone()
    backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path, {"mine": "mine"})
    assert encoder.tasks == {"mine": "mine"}
    tokens = tokenizer(["bara beli"], return_tensors="pt")
    expected = backbone.eval()(tokens["input_ids"]).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.encode(["bara beli"], "mine"), expected, atol=2e-6, rtol=1e-5)


def test_arguments_that_do_not_apply_to_a_model_are_named(make_encoder, make_backbone, tmp_path, caplog):
    """They were ignored: another pooling than the one asked for gave other vectors without a word."""
    folder, bert = save_encoder(make_encoder(), tmp_path / "encoder"), tmp_path / "bert"
    for part in make_backbone():
        part.save_pretrained(bert)
    with pytest.raises(UserError, match=f"pooling: only plain models take it; {folder} has its own, cls"):
        load_encoder(folder, pooling="mean")
    assert load_encoder(folder, pooling="cls").pooling == "cls"
    for model in (folder, bert):
        load_encoder(model, backbone=bert, tower="query")
        for argument in (f"backbone={bert}", "tower=query"):
            assert f"{argument} is not used: {model} has its own" in caplog.text


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_a_folder_without_the_file_of_its_tokenizer_is_refused(make_encoder, make_backbone, tmp_path, kind):
    """transformers then makes a tokenizer for which every word is [UNK]; all texts got the same vector."""
    if kind == "ours":
        save_encoder(make_encoder(), tmp_path)
    else:
        for part in make_backbone():
            part.save_pretrained(tmp_path)
    load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="the tokenizer has no words, only special tokens; is its tokenizer.json"):
        load_encoder(tmp_path)


def test_unknown_model_name_raises_user_error():
    with pytest.raises(UserError, match="model: 'no/such-model' cannot be loaded from a folder or the hub"):
        load_encoder("no/such-model")
    with pytest.raises(UserError, match="init_from: '/no/such/run' is not an existing file or folder"):
        load_encoder("/no/such/run", key="init_from")
    with pytest.raises(UserError, match="model: 'tests/nope' is not an existing file or folder"):
        load_encoder("tests/nope")


def test_damaged_files_and_files_of_other_programs_raise_user_error(make_encoder, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint, or a damaged one"):
        load_encoder(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint of this project"):
        load_encoder(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        load_encoder(path)
    folder = save_encoder(make_encoder("shared"), tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "scimult"}')
    with pytest.raises(UserError, match=r"config\.json: does not describe an encoder"):
        load_encoder(folder)
    save_encoder(make_encoder("shared"), folder)
    (folder / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="was changed or damaged after the export"):
        load_encoder(folder)
    (folder / "checksum.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(folder)


class Payload:
    def __reduce__(self):
        return print, ("code was run",)


def test_pickle_with_code_raises_user_error_without_running_it(tmp_path, capsys):
    torch.save({"encoder": Payload(), "state_dict": {}}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_encoder(tmp_path / "evil.ckpt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="not a checkpoint"):
        load_encoder(tmp_path / "evil.pkl")
    assert "code was run" not in capsys.readouterr().out


def test_description_of_another_class_raises_user_error(make_encoder):
    description = describe(make_encoder("shared"))
    with pytest.raises(UserError, match="only classes of lightning_modules.encoders"):
        build(description | {"kind": "os.system"})
    with pytest.raises(UserError, match="has no such class"):
        build(description | {"kind": "lightning_modules.encoders.moe.Nothing"})
