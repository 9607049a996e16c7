"""Within a training step, the host never waits for the GPU.

Steps run on torch's meta device in place of a GPU. Its tensors have shapes, but no values, so whatever would read a
value (item, nonzero, unique, a boolean index, a copy to the host) raises an error.
"""

import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datamodules.tasks import SearchDataModule
from lightning_modules.callbacks.training_log import TrainingLog
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.adapters import AdapterEncoder
from lightning_modules.encoders.control import ControlEncoder
from lightning_modules.encoders.cross_stitch import CrossStitchEncoder
from lightning_modules.encoders.dual_prompt import DualPromptEncoder
from lightning_modules.encoders.instruct import InstructEncoder, PromptEncoder
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.frozen import FrozenEncoder, FrozenVectors
from lightning_modules.loss_weights import DynamicWeights
from lightning_modules.task_balance import GradNorm, PCGrad
from tests.conftest import TASKS
from tests.lightning_modules.auxiliary import cases as losses
from tests.lightning_modules.quiet_trainer import quiet_trainer
from tests.lightning_modules.test_objective import CASES, world


def frozen_stitches(*arguments, **options):
    """Return a CrossStitchEncoder with constant matrices, of which the first step on a GPU reads each row once."""
    encoder = CrossStitchEncoder(*arguments, **options, ffn=True)
    encoder.stitches.requires_grad_(False)
    for task in TASKS:
        encoder.condition(task)
    return encoder


ROOT = Path(__file__).parents[2]
COPIES = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)
INSTRUCTIONS = {task: f"{task} text title" for task in TASKS}
ENCODERS = {
    "shared": SharedEncoder,
    "mean": partial(SharedEncoder, pooling="mean"),
    "moe": partial(MoEEncoder, ffn=True),
    "instruct": partial(InstructEncoder, instructions=INSTRUCTIONS),
    "prefix": partial(InstructEncoder, instructions=INSTRUCTIONS, separate=True),
    "dual_prompt": partial(DualPromptEncoder, instructions=INSTRUCTIONS),
    "prompt": partial(PromptEncoder, instructions=INSTRUCTIONS, pool_prompt=False, pooling="mean"),
    "stitched": partial(CrossStitchEncoder, ffn=True),
    "stitched, frozen": frozen_stitches,
    "control": partial(ControlEncoder, ffn=True),
    "routed": partial(RoutedEncoder, entropy_weight=0.1),
    "routed_tokens": partial(RoutedEncoder, entropy_weight=0.1, level="token", pooling="mean"),
    "adapters": AdapterEncoder,
}
OPTIONS = {
    "similarity": "cosine",
    "temperature": 0.05,
    "learn_temperature": "per_task",
    "symmetric": True,
    "matryoshka": [8],
    "balance": "uncertainty",
}


class Operations(TorchDispatchMode):
    """Records operations that wait: they read a value from the device, have an output whose shape depends on values, or
    copy between host and device, explicitly without non_blocking or implicitly because arguments are on both.
    """

    def __init__(self, device, record):
        super().__init__()
        self.device, self.record = device, record

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.device in devices((args, kwargs)) and self._reads(function, args, kwargs):
            self.record(function)
        outputs = function(*args, **kwargs)
        if self._copies(function, args, kwargs, outputs):
            self.record(function)
        return outputs

    @staticmethod
    def _reads(function, args, kwargs):
        if torch.Tag.data_dependent_output in function.tags:
            return True
        if torch.Tag.dynamic_output_shape not in function.tags:
            return False
        if function is torch.ops.aten.index.Tensor:
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return kwargs.get("output_size") is None

    @staticmethod
    def _copies(function, args, kwargs, outputs):
        if function.overloadpacket not in COPIES:
            return len(devices((args, kwargs, outputs), min_dim=1)) > 1  # numbers are arguments of a GPU's kernel
        names = [argument.name for argument in function._schema.arguments]
        non_blocking = (dict(zip(names, args, strict=False)) | kwargs).get("non_blocking")
        return len(devices((args, kwargs, outputs))) > 1 and not non_blocking


class Conversions(TorchFunctionMode):
    """Records conversions of Python lists and numbers to tensors on the device, which are blocking copies."""

    def __init__(self, device, record):
        super().__init__()
        self.device, self.record = device, record

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        made = function in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], torch.Tensor)
        indexed = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list)
        if (made and outputs.device == self.device) or (indexed and args[0].device == self.device):
            self.record(function)
        return outputs


def devices(arguments, min_dim=0):
    return {x.device for x in tree_leaves(arguments) if isinstance(x, torch.Tensor) and x.dim() >= min_dim}


@contextmanager
def recorded_waits(device):
    """Yield a list of the operations that wait for the device, with the lines of our code that call them."""
    waits = []

    def record(function):
        frames = traceback.extract_stack()
        ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and f.filename != __file__]
        waits.append(f"{function}" + (f" in {ours[-1].filename}:{ours[-1].lineno}" if ours else ""))

    with Operations(device, record), Conversions(device, record):
        yield waits


class Autocast:
    """Substitute for autocast, which the meta device does not have. enabled: whether it is active outside."""

    def __init__(self, enabled):
        self.enabled = enabled

    @contextmanager
    def __call__(self, device_type, dtype=torch.bfloat16, enabled=True):
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before


@pytest.fixture(params=["fp32"])
def gpu(request, monkeypatch):
    """Return the meta device, with substitutes for autocast and the fused optimizer.

    Modules keep their parameters when they move there, as they do when they move to a GPU.
    """
    autocast, adamw = Autocast(request.param == "bf16"), torch.optim.AdamW
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: autocast.enabled)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **options: adamw(groups, **options))
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield torch.device("meta")
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x[[0, 1]],
        lambda x: x + torch.tensor([1, 2, 3]).to(x.device),
        lambda x: x + torch.tensor([1, 2, 3], device=x.device),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64, device=x.device)),
        lambda x: torch.equal(x, x),
    ],
)
def test_waiting_is_noticed(wait, gpu):
    x, raised = torch.ones(3, dtype=torch.int64, device=gpu), False
    with recorded_waits(gpu) as waits:
        try:
            wait(x)
        except (RuntimeError, NotImplementedError):
            raised = True
    assert raised or waits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory", [2.2e-3, 512])  # in blocks, and at once
def test_objective_does_not_wait(case, memory, gpu):
    objective, vectors, batch = world(3, case, score_memory=memory, learn_temperature="one")
    objective, vectors, batch = objective.to(gpu), vectors.detach().to(gpu).requires_grad_(), batch.to(gpu)
    for model in filter(None, (objective.guide, objective.teacher, objective.vector_teacher)):
        frozen = FrozenVectors(*(torch.tensor(array, device=gpu) for array in model.arrays))
        model.embed = lambda _, frozen=frozen: frozen
    with recorded_waits(gpu) as waits:
        objective(vectors, batch)["loss"].backward()
        objective.temperature.clamp()
    assert not waits


@pytest.mark.parametrize("kind", [x if x == "moe" else pytest.param(x, marks=pytest.mark.slow) for x in ENCODERS])
@pytest.mark.parametrize(("gpu", "cache"), [("fp32", False), ("bf16", True)], indirect=["gpu"])
def test_training_step_does_not_wait(kind, cache, make_backbone, three_tasks, gpu):
    dropout = {"attention_probs_dropout_prob": 0.0} if cache else {}  # without dropout, varlen_attn computes bf16
    encoder = ENCODERS[kind](*make_backbone(num_layers=2, **dropout), TASKS, max_length=32)
    encoder.prepare(three_tasks)
    module = ContrastiveModule(encoder, grad_cache=cache, total_steps=10, **OPTIONS).to(gpu).train()
    configured, batches = module.configure_optimizers(), three_tasks.train_dataloader().batches
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    batch = max((batches[step] for step in range(3)), key=lambda batch: len(batch.chunks))
    assert len(batch.chunks) > 1
    for _ in range(2):
        with recorded_waits(gpu) as waits:
            module.training_step(batch.to(gpu), 0)["loss"].backward()
            module.configure_gradient_clipping(optimizer, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert not waits  # in the second step; the first may move instructions to the GPU


@pytest.mark.parametrize("case", losses.CASES)
def test_added_losses_do_not_wait(case, gpu):
    module, data = losses.module_of(case), losses.world().data(batch_size=4)
    module.prepare_losses(data)
    module, batches = module.to(gpu), data.train_dataloader().batches
    for step in range(len(losses.TASKS)):
        batch = batches[step].to(gpu)
        with recorded_waits(gpu) as waits:
            module.training_step(batch, 0)["loss"].backward()
        assert not waits


@pytest.mark.parametrize("kind", ["shared", "moe", "stitched", "control", "instruct", "prompt", "adapters"])
def test_frozen_models_do_not_wait(kind, make_backbone, make_task, gpu):
    frozen = FrozenEncoder(ENCODERS[kind](*make_backbone(), TASKS, max_length=32).to(gpu))
    batches = make_task(SearchDataModule, carry_texts=True).train_dataloader().batches
    for step in range(2):
        with recorded_waits(gpu) as waits:
            vectors = frozen.embed(batches[step].to(gpu))
        assert vectors.queries.device == vectors.documents.device == gpu
    assert not waits  # in the second step; the first may move instructions to the GPU


class RecordedSteps(L.Callback):
    """Records the waits of the trainer for five batches, after a log and before the next, as if the CPU were a GPU."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 6:
            self.recording = recorded_waits(torch.device("cpu"))
            self.waits = self.recording.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 10:
            self.recording.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["none", "uncertainty", "dwa", "pcgrad", "gradnorm"])
def test_trainer_does_not_wait_between_logs(balance, make_encoder, three_tasks, tmp_path):
    callbacks = {"dwa": DynamicWeights(list(TASKS), window=1), "pcgrad": PCGrad(list(TASKS))}
    callbacks["gradnorm"] = GradNorm(list(TASKS))
    balancing = [callbacks[balance]] if balance in callbacks else []
    recorded, accumulated = RecordedSteps(), 3 if balance in ("pcgrad", "gradnorm") else 1
    trainer = quiet_trainer(
        tmp_path,
        max_steps=12 // accumulated,
        accumulate_grad_batches=accumulated,
        gradient_clip_val=1.0,
        callbacks=[TrainingLog(6 // accumulated, plain=True, peak_tflops=1.0), *balancing, recorded],
    )
    module = ContrastiveModule(make_encoder("both"), **OPTIONS | {"balance": balance})
    batches = [three_tasks.train_dataloader().batches[step] for step in range(12)]
    trainer.fit(module, torch.utils.data.DataLoader(2 * batches, batch_size=None))
    assert not recorded.waits


@pytest.mark.parametrize("balance", [PCGrad, GradNorm])
def test_balancing_tasks_does_not_wait(balance, make_encoder, three_tasks, gpu):
    module = ContrastiveModule(make_encoder("both"), total_steps=10).to(gpu).train()
    callback = balance(list(TASKS))
    trainer = SimpleNamespace(global_step=0, strategy=SimpleNamespace(model=module), loggers=[], precision_plugin=None)
    callback.on_train_start(trainer, module)
    for _ in range(2):
        with recorded_waits(gpu) as waits:
            for step in range(3):
                batch = three_tasks.train_dataloader().batches[step].to(gpu)
                callback.on_train_batch_start(trainer, module, batch, step)
                loss = module.training_step(batch, step)["loss"]
                callback.on_before_backward(trainer, module, loss)
                loss.backward()
                callback.on_after_backward(trainer, module)
            callback.on_before_optimizer_step(trainer, module)
        assert not waits
