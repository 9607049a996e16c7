"""Small files that describe huge encoders are refused before anything is allocated for them."""

import json

import pytest
import torch

from datamodules.records import UserError
from lightning_modules.encoders.backbone import MAX_SIZES, check_size, load_backbone, random_backbone
from lightning_modules.encoders.loading import describe, load_encoder
from lightning_modules.encoders.routed import RoutedEncoder

HUGE = [(name, value) for name in MAX_SIZES for value in (10**9, 10**30, -1, 1.5, "9" * 1000)]
# Each size alone is possible, but not their product.
TOGETHER = {"num_hidden_layers": 1000, "hidden_size": 100_000, "intermediate_size": 1_000_000}


# Without the checks, these files hang the process or fill the memory.
pytestmark = pytest.mark.usefixtures("time_limit")


def test_random_backbones_are_bounded(vocabulary):
    for name, value in HUGE:
        with pytest.raises(UserError, match=f"backbone config: .*{name}"):
            random_backbone({name: value}, vocabulary)
    with pytest.raises(UserError, match=r"expected at most 20,000,000,000 parameters, got about 240,"):
        random_backbone(TOGETHER, vocabulary)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "mpnet", "dpr", "scimult"])
def test_folders_of_models_are_bounded(tmp_path, make_encoder, family):
    encoder = make_encoder("shared")
    folder = encoder.save_pretrained(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    plain = config["backbone"] | {"model_type": family}
    for change in (*({name: value} for name, value in HUGE), TOGETHER):
        changed = config | {"backbone": config["backbone"] | change} if family == "scimult" else plain | change
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="expected a whole number up to|expected at most 20,000,000,000 parameters"):
            load_encoder(folder)
        if family not in ("scimult", "dpr"):
            with pytest.raises(UserError, match="expected"):
                load_backbone(str(folder), with_weights=False)


def test_checkpoints_are_bounded(tmp_path, make_encoder):
    description = describe(make_encoder("shared"))
    path = tmp_path / "model.ckpt"
    for change in (*({name: value} for name, value in HUGE), TOGETHER):
        changed = description | {"backbone": description["backbone"] | change}
        torch.save({"encoder": changed, "state_dict": {}, "global_step": 1}, path)
        with pytest.raises(UserError, match="expected a whole number up to|expected at most 20,000,000,000 parameters"):
            load_encoder(path)


def test_experts_of_a_checkpoint_are_bounded(tmp_path, make_backbone):
    description = describe(RoutedEncoder(*make_backbone(), {"search": "search"}, num_experts=2, max_length=32))
    for count in (10**9, 10**30, 1, -5):
        changed = description | {"arguments": description["arguments"] | {"num_experts": count}}
        torch.save({"encoder": changed, "state_dict": {}, "global_step": 1}, tmp_path / "model.ckpt")
        with pytest.raises(UserError, match="num_experts: expected 2 to 1,024"):
            load_encoder(tmp_path / "model.ckpt")


def test_published_encoders_are_within_the_bounds():
    """BERT-large, XLM-RoBERTa-XXL and a model of the size of E5-Mistral."""
    check_size({"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 30522})
    check_size({"num_hidden_layers": 48, "hidden_size": 4096, "intermediate_size": 16384, "vocab_size": 250880})
    check_size({"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000})
    check_size({})
