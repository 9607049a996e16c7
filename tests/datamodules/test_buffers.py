"""A batch moves between processes and devices as one buffer, and arrives as it was."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils.pin_memory import pin_memory

from datamodules.buffers import ALIGNMENT, moved, pack
from datamodules.tasks import SearchDataModule


@pytest.fixture
def batch(make_task):
    batch = (
        make_task(SearchDataModule, num_positives=2, token_budget=16, carry_texts=True).train_dataloader().batches[0]
    )
    assert len(batch.chunks) > 1
    return batch


def parts(batch):
    """Return the fields of a batch and of its chunks, tensors as lists with their type."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "chunks"}
    fields |= {f"{i}.{name}": value for i, chunk in enumerate(batch.chunks) for name, value in vars(chunk).items()}
    return {key: (x.dtype, x.tolist()) if isinstance(x, torch.Tensor) else x for key, x in fields.items()}


def tensors(batch):
    return [x for chunk in batch.chunks for x in (chunk.input_ids, chunk.offsets)] + [
        x for x in vars(batch).values() if isinstance(x, torch.Tensor)
    ]


@pytest.mark.parametrize(
    "move",
    [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, lambda x: moved(x, torch.clone), lambda x: x.to("cpu")],
)
def test_a_batch_arrives_as_it_was(batch, move):
    expected = parts(batch)
    assert {x.dtype for x in tensors(batch)} == {torch.int64, torch.int32}
    assert parts(move(batch)) == expected
    assert parts(move(move(batch))) == expected
    assert parts(batch) == expected


def test_moved_tensors_share_one_aligned_buffer_that_is_not_packed_again(batch):
    received = pickle.loads(pickle.dumps(batch))
    assert len({x.untyped_storage().data_ptr() for x in tensors(received)}) == 1
    assert all(x.storage_offset() * x.element_size() % ALIGNMENT == 0 for x in tensors(received))
    assert pack(received)[0].data_ptr() == received.chunks[0].input_ids.untyped_storage().data_ptr()
    changed = dataclasses.replace(received, positives=received.positives + 0)
    assert parts(moved(changed, torch.clone)) == parts(batch)


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        inputs = [x for x in args if isinstance(x, torch.Tensor)]
        if isinstance(outputs, torch.Tensor) and any(x.device != outputs.device for x in inputs):
            self.operations.append((function, kwargs["non_blocking"]))
        return outputs


def test_a_batch_reaches_a_device_in_one_copy_that_does_not_block(batch):
    with Copies() as copies:
        on_device = batch.to("meta")
    assert copies.operations == [(torch.ops.aten._to_copy.default, True)]
    assert all(x.device.type == "meta" for x in tensors(on_device))
    assert [x.shape for x in tensors(on_device)] == [x.shape for x in tensors(batch)]


def test_a_loader_pins_the_buffer_of_a_batch(batch, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    result = pin_memory(batch)
    assert len(pinned) == 1
    assert parts(result) == parts(batch)
    assert len({x.untyped_storage().data_ptr() for x in tensors(result)}) == 1
