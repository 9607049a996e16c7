"""The encoder that all variants share: a Hugging Face backbone, read layer by layer.

The backbone's modules and parameters stay as they are; only the loop over its layers is ours. That is what lets a
variant choose experts by task without state on the side, and the last layer compute the pooled position alone.

Shapes: B texts, L tokens (of the queries of attention), S tokens attended to, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datamodules.records import Document, UserError
from datamodules.text import input_text, length_sorted_chunks, pad, token_ids

POOLINGS = ("cls", "mean")


def attend(attention: nn.Module, hidden: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Multi-head attention of hidden (B, L, D) to context (B, S, D) with a backbone's query, key and value projections.

    mask: (B, 1, 1, S) bool, true where context may be attended to. Returns the joined heads (B, L, D).
    """

    def heads(x: Tensor) -> Tensor:  # (B, n, D) -> (B, heads, n, D / heads)
        return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    query, key, value = (
        heads(attention.query(hidden)),
        heads(attention.key(context)),
        heads(attention.value(context)),
    )
    dropout = attention.dropout.p if attention.training else 0.0
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        # torch's attention on a CPU takes 2.6 times longer, forward with backward, in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=mask, dropout_p=dropout
            ).to(query.dtype)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    """A bi-encoder's one tower, for queries and documents of all its tasks (paper, equations 1 and 3).

    backbone: a model of the BERT family (BertModel, RobertaModel); changed in place by variants. tasks: task -> expert
    that serves it. pooling: "cls" (last layer's first token, the paper's) or "mean". normalize: vectors of length 1.
    max_length: tokens of a text, special tokens included.
    """

    # Whether a step on one task leaves parameters without gradient: DDP must then look for them.
    has_idle_parameters: ClassVar[bool] = False

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer,
        tasks: Mapping[str, str],
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"pooling: got {pooling!r}, allowed are {', '.join(POOLINGS)}")
        try:
            layers = backbone.encoder.layer
            layers[0].attention.self.query, layers[0].intermediate, layers[0].output
        except (AttributeError, IndexError) as error:
            raise UserError(
                f"backbone {type(backbone).__name__} is not of the BERT family "
                "(expected encoder.layer[i] with attention.self, intermediate and output)"
            ) from error
        longest = max_positions(backbone.config)
        if max_length > longest:
            raise UserError(f"max_length: got {max_length} tokens, but the backbone has positions for {longest}")
        self.backbone, self.tokenizer = backbone, tokenizer
        self.tasks = dict(tasks)
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.gradient_checkpointing = False

    @property
    def config(self) -> dict[str, Any]:
        """What, beside backbone and tokenizer, the constructor was given. Plain containers only."""
        return {
            "tasks": self.tasks,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_length": self.max_length,
        }

    @property
    def dimension(self) -> int:
        """Size of a vector."""
        return self.backbone.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.word_embeddings.weight.device

    def expert_of(self, task: str) -> str:
        if task not in self.tasks:
            raise UserError(f"unknown task {task!r}: this encoder was built for {', '.join(self.tasks)}")
        return self.tasks[task]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task: str | Sequence[str]) -> Tensor:
        """Vectors (B, D) of texts. input_ids, attention_mask: (B, L). task: of all texts, or one for each."""
        if not isinstance(task, str):
            return self._by_task(input_ids, attention_mask, task)
        expert = self.expert_of(task)
        mask = attention_mask[:, None, None, :].bool()
        hidden = self.backbone.embeddings(input_ids=input_ids)
        *lower, last = self.backbone.encoder.layer
        for layer in lower:
            hidden = self._run(layer, hidden, hidden, mask, expert)
        # The last layer's output is needed at the pooled positions alone.
        wanted = hidden[:, :1] if self.pooling == "cls" else hidden
        return self.pool(self._run(last, wanted, hidden, mask, expert), attention_mask)

    def _by_task(self, input_ids: Tensor, attention_mask: Tensor, tasks: Sequence[str]) -> Tensor:
        """Vectors (B, D) of texts with a task each: texts of one task go together, so every expert runs once."""
        if len(tasks) != len(input_ids):
            raise ValueError(f"task: got {len(tasks)} tasks for {len(input_ids)} texts")
        groups = [
            (task, torch.tensor([i for i, other in enumerate(tasks) if other == task], device=input_ids.device))
            for task in dict.fromkeys(tasks)
        ]
        vectors = torch.cat([self(input_ids[rows], attention_mask[rows], task) for task, rows in groups])
        return vectors[torch.cat([rows for _, rows in groups]).argsort()]

    def _run(self, *arguments) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(self.layer, *arguments, use_reentrant=False)
        return self.layer(*arguments)

    def layer(self, layer: nn.Module, hidden: Tensor, context: Tensor, mask: Tensor, expert: str) -> Tensor:
        """One Transformer layer for the positions in hidden (B, L, D), which attend to context (B, S, D)."""
        attention = layer.attention
        hidden = attention.output(attend(attention.self, hidden, context, mask), hidden)
        return layer.output(layer.intermediate(hidden), hidden)

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, D) -> (B, D)."""
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return F.normalize(pooled.float(), dim=-1) if self.normalize else pooled

    @torch.inference_mode()
    def encode(
        self, documents: Sequence[Document | str], task: str, *, token_budget: int = 16384, advance=None
    ) -> Tensor:
        """Vectors (n, D) of documents, or texts without title, in their order: float32, on the CPU.

        token_budget: padded tokens of one forward. advance: called with the number of texts after each forward.
        """
        documents = [Document("", "", d) if isinstance(d, str) else d for d in documents]
        texts = [input_text(document, self.tokenizer.sep_token) for document in documents]
        vectors = torch.empty(len(texts), self.dimension)
        training = self.training
        self.eval()
        try:
            for start in range(
                0, len(texts), 8192
            ):  # sorted within blocks, so that ids of all texts never stand in memory
                ids = token_ids(texts[start : start + 8192], self.tokenizer, self.max_length)
                for rows in length_sorted_chunks([len(x) for x in ids], token_budget):
                    tokens = pad((ids[row] for row in rows), self.tokenizer.pad_token_id).to(self.device)
                    pooled = self(tokens.input_ids, tokens.attention_mask, task)
                    vectors[torch.tensor(rows) + start] = pooled.float().cpu()
                    if advance is not None:
                        advance(len(rows))
        finally:
            self.train(training)
        return vectors


def max_positions(config) -> int:
    """Longest text, in tokens, that a backbone has positions for (RoBERTa spends the first ones on padding)."""
    positions = config.max_position_embeddings
    return positions - config.pad_token_id - 1 if config.model_type.endswith("roberta") else positions
