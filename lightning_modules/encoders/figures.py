"""Figures with image vectors: a text encoder that also reads a vector for each figure, precomputed by any model.

A linear layer maps the vector of an image, such as CLIP's, to the hidden size. The result is added to the embedding of
the first token of the figure's text (text_features.py). No image is decoded here.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.files import ARRAY_ERRORS, regular
from datamodules.options import check_number
from datamodules.records import UserError, explained
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.text_features import TextFeatures

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, KeyError, AttributeError, RuntimeError)  # AttributeError: a .npy file
NPZ_ERRORS = (OSError, ValueError, *ARRAY_ERRORS, *ZIP_ERRORS)


class FigureEncoder(MoEEncoder):
    """An MoEEncoder that adds image vectors to the texts of figures. All other texts are encoded as usual.

    The vectors are read once, before training, and saved with the encoder.

    attention, ffn, layers: as in MoEEncoder.
    image_size: size of the image vectors; 0: no image vectors, as in an MoEEncoder.
    vectors: .npz file with the arrays `ids`, names of figures (n,), and `vectors`, (n, image_size).
    figure_task: task whose corpus contains the figures. Each figure needs a vector.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        attention: bool = True,
        ffn: bool = False,
        layers: str | list[int] = "mod2",
        image_size: int = 0,
        vectors: str = "",
        figure_task: str = "figure",
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        check_number("image_size", image_size, minimum=0)
        if vectors and not image_size:
            raise UserError(f"image_size: expected the size of the image vectors in {vectors}, got 0")
        super().__init__(backbone, tokenizer, tasks, attention, ffn, layers, pooling, normalize, max_length)
        self.image_size, self.vectors, self.figure_task = image_size, vectors, figure_task
        if image_size:
            self.features["images"] = TextFeatures(image_size, self.dimension, bounded=False)

    def prepare(self, data: Any) -> None:
        """Read the vectors of all figures, unless the encoder was loaded with them."""
        if not self.image_size or len(features := cast(TextFeatures, self.features["images"])):
            return
        tasks = getattr(data, "by_name", {})
        if self.figure_task not in tasks:
            names = ", ".join(tasks) or "none"
            raise UserError(
                f"figure_task: expected the task that ranks figures, got {self.figure_task!r}; tasks: {names}"
            )
        if not self.vectors:
            raise UserError("vectors: image_size needs a .npz file with ids and vectors")
        rows_of, vectors = read_image_vectors(Path(self.vectors), self.image_size)
        task = tasks[self.figure_task]
        rows = [row for row in np.flatnonzero(task.corpus_rows()).tolist() if not task.documents[row].is_blank]
        ids = [task.documents[row].id for row in rows]
        if missing := [id for id in ids if id not in rows_of]:
            raise UserError(
                f"{self.vectors}: {len(missing)} of {len(ids)} figures of task {self.figure_task} have no vector, "
                f"first {missing[0]!r}; add their vectors"
            )
        features.fill_rows(self, data, task, rows, vectors[[rows_of[id] for id in ids]])


def read_image_vectors(path: Path, size: int) -> tuple[dict[str, int], np.ndarray]:
    """Return figure -> row, and the vectors (n, size), float32. Raises UserError if the file is not as expected."""
    problem = f"{path}: expected a .npz file with the arrays ids and vectors"
    with explained(problem, *NPZ_ERRORS), np.load(regular(path), allow_pickle=False) as file:
        ids, vectors = file["ids"], file["vectors"]
    if ids.ndim != 1 or ids.dtype.kind != "U" or vectors.dtype.kind != "f" or vectors.shape != (len(ids), size):
        raise UserError(
            f"{path}: expected ids of shape (n,) and vectors of shape (n, {size}), according to image_size; got ids "
            f"{ids.shape} of {ids.dtype} and vectors {vectors.shape} of {vectors.dtype}"
        )
    rows = {id: row for row, id in enumerate(ids.tolist())}
    if len(rows) < len(ids):
        raise UserError(f"{path}: expected one vector per figure, got {len(ids)} vectors for {len(rows)} figures")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        raise UserError(f"{path}: the vector of {str(ids[row])!r} contains a non-finite number")
    return rows, vectors.astype(np.float32)
