"""The package as a library: training without configuration files."""

import lightning as L
import pytest
import torch

from datamodules.batches import MultiTaskDataModule
from datamodules.records import UserError
from lightning_modules import ContrastiveModule, load_encoder
from lightning_modules.encoders.base import Encoder
from lightning_modules.objective_options import GuideOptions, TeacherOptions
from lightning_modules.optim import OptimOptions


def test_training_with_defaults(make_encoder, three_tasks, tmp_path):
    module, data = ContrastiveModule(make_encoder("attention")), MultiTaskDataModule(three_tasks.tasks)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = L.Trainer(max_steps=4, accelerator="cpu", default_root_dir=tmp_path, logger=False)
    trainer.fit(module, data)
    assert trainer.global_step == 4
    assert trainer.optimizers[0].param_groups[-1]["lr"] == 0  # the schedule ends with the trainer's last step
    assert any(not torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    encoder = load_encoder(checkpoint)
    assert isinstance(encoder, Encoder)
    vectors = encoder.encode(["bara beli"], "search")
    assert torch.equal(vectors, module.encoder.eval().encode(["bara beli"], "search"))


def test_schedule_of_unknown_length_raises_user_error(make_encoder):
    with pytest.raises(UserError, match="length of the schedule is unknown; set total_steps"):
        ContrastiveModule(make_encoder("shared")).configure_optimizers()
    assert ContrastiveModule(make_encoder("shared"), total_steps=10).configure_optimizers()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": OptimOptions(lr=0)}, "lr: expected a number above 0"),
        ({"optim": OptimOptions(warmup=1.0)}, "warmup: expected a number of at least 0 and below 1, got 1.0"),
        ({"temperature": 0}, "temperature: expected a number of at least 1e-06 and at most 1e6, got 0"),
        ({"guide": GuideOptions("x")}, "guide.model: 'x' is not loaded here; pass a FrozenEncoder as guide_model"),
        ({"teacher": TeacherOptions("x")}, "teacher.model: 'x' is not loaded here; pass a FrozenEncoder as teacher"),
    ],
)
def test_invalid_arguments_raise_user_error(make_encoder, arguments, message):
    with pytest.raises(UserError, match=message):
        ContrastiveModule(make_encoder("shared"), **arguments)
