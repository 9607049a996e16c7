"""Image vectors of figures: checked before training, saved with the encoder, and without effect on other texts."""

import os
import zipfile

import numpy as np
import pytest
import torch

from datamodules.packed import Tokens
from datamodules.records import UserError
from datamodules.tasks import SearchDataModule
from lightning_modules import ContrastiveModule, load_encoder
from lightning_modules.encoders.figures import FigureEncoder, read_image_vectors
from lightning_modules.encoders.moe import MoEEncoder
from tests.conftest import toy_collection
from tests.lightning_modules.quiet_trainer import quiet_trainer, save_once

TASKS = {"figure": "figure", "search": "search"}
FIGURES = toy_collection().corpus


@pytest.fixture
def figures(make_task):
    return make_task(SearchDataModule, "figure")


def write(path, ids=tuple(FIGURES), size=3, **arrays):
    vectors = np.random.default_rng(0).normal(size=(len(ids), size)).astype(np.float32)
    np.savez(path, **{"ids": np.array(ids), "vectors": vectors} | arrays)
    return vectors


@pytest.fixture
def make(make_backbone, tmp_path):
    def make(image_size=3, **arguments):
        arguments = {"vectors": str(tmp_path / "images.npz"), "max_length": 32} | arguments
        return FigureEncoder(*make_backbone(), TASKS, image_size=image_size, **arguments).eval()

    return make


def test_encoder_without_vectors_equals_the_mixture_of_experts(make, make_backbone):
    documents = list(FIGURES.values())
    ours = make(0, vectors="").encode(documents, "figure")
    assert torch.equal(ours, MoEEncoder(*make_backbone(), TASKS, max_length=32).eval().encode(documents, "figure"))


def test_linear_map_of_a_figures_vector_is_added_to_its_first_token(make, figures, tmp_path):
    vectors = write(tmp_path / "images.npz")
    encoder = make()
    encoder.prepare(figures)
    layer = torch.nn.init.normal_(encoder.features["images"].projection.weight)
    texts = [f"{d.title} [SEP] {d.text}" for d in FIGURES.values()]
    tokens = Tokens.pack([np.array(encoder.tokenizer(text)["input_ids"]) for text in texts])
    difference = (encoder.begin(tokens)[0] - encoder.family.begin(tokens)[0]).detach()
    first = tokens.offsets[:-1]
    torch.testing.assert_close(difference[first], torch.from_numpy(vectors) @ layer.T.detach())
    assert int((difference != 0).any(1).sum()) == len(FIGURES)
    others = Tokens.pack([np.array(encoder.tokenizer(f"{text} {text}")["input_ids"]) for text in texts])
    assert torch.equal(encoder.begin(others)[0], encoder.family.begin(others)[0])


def test_vectors_are_saved_with_the_encoder(make, figures, tmp_path):
    write(tmp_path / "images.npz")
    module = ContrastiveModule(make(), total_steps=4)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, figures)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "images.npz").unlink()
    loaded = load_encoder(tmp_path / "last.ckpt")
    assert loaded.features["images"].projection.weight.any()
    documents = list(FIGURES.values())
    assert torch.equal(loaded.encode(documents, "figure"), module.encoder.eval().encode(documents, "figure"))
    loaded.prepare(figures)  # has vectors already


def test_resumed_training_equals_an_undisturbed_one(make, figures, tmp_path):
    write(tmp_path / "images.npz")
    states = []
    for resumes in (False, True):
        trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[save_once(tmp_path / "two.ckpt")])
        torch.manual_seed(resumes)
        module = ContrastiveModule(make().train(), total_steps=4)
        trainer.fit(module, figures, ckpt_path=tmp_path / "two.ckpt" if resumes else None, weights_only=True)
        states.append(module.state_dict())
    assert states[0]["encoder.features.images.projection.weight"].any()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


NAMES = list(FIGURES)
VECTORS = np.zeros((len(NAMES), 3), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"size": 4},
            r"vectors of shape \(n, 3\), according to image_size; got ids \(10,\) of <U2 and vectors \(10, 4\)",
        ),
        ({"vectors": VECTORS[:-1]}, r"got ids \(10,\) of <U2 and vectors \(9, 3\)"),
        ({"vectors": VECTORS.astype(int)}, "vectors .* of int64"),
        ({"ids": NAMES[:-2]}, "2 of 10 figures of task figure have no vector, first 'd8'; add their vectors"),
        ({"ids": [*NAMES[:-1], "d0"]}, "expected one vector per figure, got 10 vectors for 9 figures"),
        ({"vectors": VECTORS + np.inf}, "the vector of 'd0' contains a non-finite number"),
        ({"ids": np.array(NAMES, dtype=object)}, "expected a .npz file with the arrays ids and vectors"),
    ],
)
def test_wrong_vectors_raise_user_error_before_training(make, figures, tmp_path, arrays, message):
    write(tmp_path / "images.npz", **arrays)
    with pytest.raises(UserError, match=f"images.npz: .*{message}|images.npz: {message}"):
        quiet_trainer(tmp_path, max_steps=1).fit(ContrastiveModule(make(), total_steps=4), figures)


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"PK\x03\x04"])
def test_file_of_another_kind_raises_user_error(make, figures, tmp_path, content):
    if content is not None:
        (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(UserError, match="images.npz: expected a .npz file with the arrays ids and vectors"):
        make().prepare(figures)


def test_damaged_file_raises_user_error(tmp_path):
    """A damaged header of an array made tokenize.TokenError, OverflowError or MemoryError end in a traceback."""
    path = tmp_path / "images.npz"
    write(path)
    good, damaged = path.read_bytes(), 0
    for position in range(len(good)):
        for bit in (0, 3, 6):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            try:
                read_image_vectors(path, 3)
            except UserError:
                damaged += 1
    assert damaged > len(good)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1_000_000_000_000_000, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1_000_000_000_000_000_000_000_000_000_000, 3)}",
        "{'descr': [], 'fortran_order': False, 'shape': (" + "(" * 5000 + "3,)}",
    ],
)
def test_damaged_header_raises_user_error(tmp_path, header):
    path, content = tmp_path / "images.npz", header.encode() + b"\n"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("ids.npy", "vectors.npy"):
            file.writestr(name, b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content)
    with pytest.raises(UserError, match="images.npz: expected a .npz file with the arrays ids and vectors"):
        read_image_vectors(path, 3)


def test_pipe_raises_user_error(tmp_path):
    os.mkfifo(tmp_path / "images.npz")
    with pytest.raises(UserError, match="expected a regular file"):
        read_image_vectors(tmp_path / "images.npz", 3)


def test_wrong_arguments_raise_user_error(make, figures):
    with pytest.raises(UserError, match="image_size: expected a number of at least 0, got -1"):
        make(-1)
    with pytest.raises(UserError, match="image_size: expected the size of the image vectors in .*images.npz, got 0"):
        make(0)
    with pytest.raises(UserError, match="vectors: image_size needs a .npz file"):
        make(vectors="").prepare(figures)
    with pytest.raises(UserError, match="figure_task: expected the task that ranks figures, got 'x'; tasks: figure"):
        make(figure_task="x").prepare(figures)
