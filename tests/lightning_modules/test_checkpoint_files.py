"""The last few checkpoints are kept, any damage is detected, and a full disk does not destroy them."""

import random
import resource

import pytest
import torch

from datamodules.records import UserError
from lightning_modules.callbacks.checkpoint import SafeCheckpointIO
from lightning_modules.checkpoint_files import candidates, damage, newest_intact, read_checkpoint, write_checkpoint
from lightning_modules.encoders.loading import describe, load_encoder


def checkpoint(step):
    weights = {"weight": torch.full((100, 100), float(step))}
    return {"global_step": step, "state_dict": weights, "optimizer_states": [], "loops": {}}


def steps(path):
    return [torch.load(file, weights_only=True)["global_step"] for file in candidates(path)]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_last_few_checkpoints_are_kept(tmp_path, keep):
    path = tmp_path / "last.ckpt"
    for step in range(1, 7):
        write_checkpoint(checkpoint(step), path, keep)
        assert steps(path) == list(range(step, max(step - keep, 0), -1))
    write_checkpoint(checkpoint(7), path, 2)  # fewer than before
    assert steps(path) == [7, 6]
    assert len(list(tmp_path.iterdir())) == 2


def test_every_flipped_bit_and_every_cut_is_detected(tmp_path):
    path, draw = tmp_path / "last.ckpt", random.Random(0)
    write_checkpoint(checkpoint(1), path)
    good = path.read_bytes()
    assert damage(path) is None
    for _ in range(100):
        position = draw.randrange(len(good))
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << draw.randrange(8)]) + good[position + 1 :])
        if damage(path) is None:  # the bit is between two records, where nothing is read
            assert torch.equal(torch.load(path)["state_dict"]["weight"], checkpoint(1)["state_dict"]["weight"])
        path.write_bytes(good[:position])
        assert damage(path)


def test_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, caplog):
    path = tmp_path / "last.ckpt"
    for step in (1, 2, 3):
        write_checkpoint(checkpoint(step), path, 3)
    for damaged in (path, tmp_path / "last.1.ckpt"):
        damaged.write_bytes(damaged.read_bytes()[:-100])
    assert newest_intact(path) == tmp_path / "last.2.ckpt"
    assert (
        "last.ckpt is damaged (File is not a zip file); resuming from the checkpoint before it, last.2" in caplog.text
    )
    write_checkpoint(checkpoint(2), path, 3)  # damaged checkpoints do not count, so the good one stays
    assert steps(path) == [2, 1]
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_all_damaged_checkpoints_are_named(tmp_path):
    path = tmp_path / "last.ckpt"
    assert newest_intact(path) is None
    for step in (1, 2):
        write_checkpoint(checkpoint(step), path, 2)
    path.write_bytes(b"")
    write_checkpoint({"global_step": 1}, tmp_path / "last.1.ckpt")
    with pytest.raises(
        UserError, match=r"last\.ckpt \(File is not.*last\.1\.ckpt \(it has no loops.*Restore an intact one as"
    ):
        newest_intact(path)
    assert path.exists()


def test_full_disk_keeps_earlier_checkpoints_and_raises_nothing(tmp_path, caplog):
    path, io = tmp_path / "last.ckpt", SafeCheckpointIO(tmp_path / "last.ckpt", 2)
    io.save_checkpoint(checkpoint(1), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow beyond 20 kB
    try:
        io.save_checkpoint(checkpoint(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert io.failure.reason == "File too large"
    assert not io.failure.diverged
    assert "last.ckpt: the checkpoint of step 2 could not be written: File too large" in caplog.text
    assert steps(path) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    io.save_checkpoint(checkpoint(3), path)
    assert io.failure is None
    assert steps(path) == [3, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["state_dict", "optimizer_states"])
def test_checkpoint_that_is_not_finite_never_replaces_a_good_one(tmp_path, caplog, value, part):
    """After a divergence, all kept checkpoints contained NaN, and the same command failed forever."""
    path, io = tmp_path / "last.ckpt", SafeCheckpointIO(tmp_path / "last.ckpt", 2)
    io.save_checkpoint(checkpoint(1), path)
    diverged = checkpoint(2)
    if part == "state_dict":
        diverged["state_dict"]["weight"][3, 7] = value
    else:
        diverged["optimizer_states"] = [{"state": {0: {"exp_avg": torch.tensor([0.0, value])}}}]
    for file in (path, tmp_path / "best.ckpt"):
        io.save_checkpoint(diverged, file)
        assert io.failure.diverged
    assert f"of step 2 could not be written: {part}" in caplog.text
    assert steps(path) == [1]
    assert not (tmp_path / "best.ckpt").exists()
    write_checkpoint(diverged, path, 2)  # as an earlier version did
    assert "contains non-finite numbers" in damage(path)
    assert newest_intact(path) == tmp_path / "last.1.ckpt"


@pytest.mark.parametrize(
    "content", [[], {"global_step": "1"}, {"state_dict": []}, {"optimizer_states": None}, {"loops": [1]}]
)
def test_checkpoint_of_another_type_is_damaged(tmp_path, content):
    path = tmp_path / "last.ckpt"
    write_checkpoint(checkpoint(1), path, 2)
    write_checkpoint(checkpoint(2) | content if isinstance(content, dict) else content, path, 2)
    assert "must be a" in damage(path) or "expected a dict" in damage(path)
    assert newest_intact(path).name == "last.1.ckpt"


def test_folder_in_the_place_of_a_checkpoint_raises_user_error(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(UserError, match="last.ckpt: expected a checkpoint, got a folder"):
        newest_intact(tmp_path / "last.ckpt")


@pytest.mark.parametrize("name", ["best.ckpt", "other.ckpt"])
def test_damaged_checkpoint_is_never_loaded(make_encoder, tmp_path, name):
    """torch reads a file with a flipped bit in a weight without complaint; only the checksum reveals it."""
    encoder = make_encoder("shared")
    weights = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir()
    torch.save({"encoder": describe(encoder), "state_dict": weights, "global_step": 3}, path)
    model = tmp_path if name == "best.ckpt" else path
    load_encoder(model)
    content, weight = bytearray(path.read_bytes()), next(iter(weights.values())).numpy().tobytes()
    content[bytes(content).index(weight[:64])] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True, mmap=True)
    for load in (lambda: load_encoder(model), lambda: read_checkpoint(path)):
        with pytest.raises(UserError, match=rf"{name}: not a checkpoint, or a damaged one \(the checksum of .*data"):
            load()
