"""Feature vectors of texts as an additional input of an encoder, such as a paper's position in the citation graph.

    h <- h + tanh(W f + b)        h: embedding of the first token of a text, f: its features

Texts without features are encoded exactly as before. W and b start at 0, so adding features does not change any vector
at first.

Texts are recognised by their tokens, so the encoder finds their features everywhere: in training, evaluation, mining
and export. If texts are truncated to fewer tokens later, longer texts lose their features. Vectors can be cached as
usual, since they depend only on text and encoder. The table is part of the encoder's state_dict, and therefore of
checkpoints and fingerprints.

Shapes: n texts with features, F features, B texts of T tokens, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.packed import Tokens
from datamodules.records import UserError
from datamodules.tokens import Encoding

if TYPE_CHECKING:
    from lightning_modules.encoders.base import Encoder

log = logging.getLogger(__name__)

POSITIONS = 1 << 16  # above the maximum number of tokens of a text
KEYS_AT_ONCE = 1 << 16  # number of texts that are hashed together
MULTIPLIERS = (-7046029254386353131, -4658895280553007687)  # of SplitMix64 (Steele et al., 2014), as signed numbers


class TextFeatures(nn.Module):
    """A table of features by text, and their projection to the hidden size.

    size: number of features, F.
    hidden_size: D.
    bounded: whether tanh follows the projection.
    """

    keys: Tensor  # (n,) int64, ascending
    num_tokens: Tensor  # (1,) int64, number of leading tokens of a text that determine its key
    vectors: Tensor  # (n, F)

    def __init__(self, size: int, hidden_size: int, bounded: bool = True):
        super().__init__()
        self.projection, self.bounded = nn.Linear(size, hidden_size), bounded
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self.resize(0)

    def __len__(self) -> int:
        return len(self.keys)

    def resize(self, count: int) -> None:
        """Make room for `count` texts, with features 0."""
        weight = self.projection.weight
        device = "cpu" if weight.is_meta else weight.device
        self.register_buffer("keys", torch.arange(count, device=device))
        self.register_buffer("num_tokens", torch.tensor([POSITIONS], device=device))
        vectors = torch.zeros(count, self.projection.in_features, dtype=weight.dtype, device=device)
        self.register_buffer("vectors", vectors)

    def fill_rows(self, encoder: Encoder, data: Any, task: Any, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Set the features of some rows of a task's document table (see fill). data: data of all tasks."""
        max_length = min(encoder.max_length, *(each.options.max_length for each in data.tasks))
        tokens = task.tokens(Encoding(encoder.tokenizer, "", max_length))
        self.fill([tokens[row] for row in rows], vectors, max_length)

    def fill(self, texts: Sequence[np.ndarray], vectors: np.ndarray, max_length: int) -> None:
        """Set the features of texts. If several texts have the same tokens, they share the features of the first.

        texts: token ids of each text, n arrays.
        vectors: features, (n, F).
        max_length: maximum number of tokens, to which texts were truncated.
        Raises UserError for vectors that are not finite or have the wrong size.
        """
        if vectors.shape != (len(texts), self.projection.in_features):
            expected = f"{len(texts)} vectors of {self.projection.in_features} numbers"
            raise UserError(f"features: expected {expected}, got an array of shape {vectors.shape}")
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
            raise UserError(f"features: the vector of text {row} contains a non-finite number")
        starts = range(0, len(texts), KEYS_AT_ONCE)
        num_tokens = max_length - 1  # the last token of a truncated text is not one of its words
        parts = [token_keys(Tokens.pack(texts[i : i + KEYS_AT_ONCE]), num_tokens).numpy() for i in starts]
        all_keys = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        keys, first, inverse = np.unique(all_keys, return_index=True, return_inverse=True)
        if lost := int((vectors[first][inverse] != vectors).any(1).sum()):
            log.warning("features: %d of %d texts get the features of a text with the same tokens", lost, len(texts))
        self.resize(len(keys))
        self.keys.copy_(torch.from_numpy(keys))
        self.num_tokens.fill_(num_tokens)
        self.vectors.copy_(torch.from_numpy(np.ascontiguousarray(vectors[first])))

    def rows(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return each text's row in the table, (B,), and whether the text is in the table, (B,). The table must not be
        empty.

        If a text is not in the table, its row is arbitrary.
        """
        keys = token_keys(tokens, self.num_tokens)
        rows = torch.searchsorted(self.keys, keys).clamp(max=len(self) - 1)
        return rows, self.keys[rows] == keys

    def add_to(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Return the embeddings (T, D) of texts, with the features added to the first token of each."""
        if not len(self):
            return hidden
        rows, is_known = self.rows(tokens)
        projected = self.projection(self.vectors[rows])  # (B, D)
        added = torch.where(is_known[:, None], projected.tanh() if self.bounded else projected, 0)
        return hidden.index_add(0, tokens.offsets[:-1], added.to(hidden.dtype))


def token_keys(tokens: Tokens, num_tokens: int | Tensor) -> Tensor:
    """Return a hash of the first `num_tokens` tokens of each text, (B,) int64. It is the same on every device.

    The host does not wait for the device.
    """
    positions = tokens.positions()
    mixed = tokens.input_ids * POSITIONS + positions + 1
    for multiplier, shift in zip(MULTIPLIERS, (32, 29), strict=True):
        mixed = mixed * multiplier
        mixed = mixed ^ (mixed >> shift)
    totals = F.pad(torch.where(positions < num_tokens, mixed, 0).cumsum(0), (1, 0))  # overflows wrap around
    return totals[tokens.offsets[1:]] - totals[tokens.offsets[:-1]]
