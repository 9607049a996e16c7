"""The encoder that all variants share: a Hugging Face backbone whose layers are computed one by one.

The modules and parameters of the backbone are unchanged; only the loop over its layers is ours (families.py computes a
single layer). That is why a variant can choose experts by the task it is called with, the last layer can compute only
the pooled position, and several tasks can share the layers that do not depend on the task.

Shapes: B texts, S tokens, L positions computed (S, or 1 if only the first one is needed), D hidden size, n documents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from datamodules.records import Document, UserError
from datamodules.text import as_documents, input_text, length_sorted_chunks, pad, token_ids
from lightning_modules.encoders.families import AttentionContext, Prefix, family_of
from lightning_modules.retrieval.compute import default_token_budget

POOLINGS = ("cls", "mean")
BLOCK = 8192  # texts tokenized and sorted by length at a time, because the token ids of a corpus may not fit in memory


class Condition(NamedTuple):
    """What the layers receive about a batch besides its texts.

    expert: name of the expert that serves all texts.
    groups: expert -> rows pairs, for texts of several tasks that are sorted by expert.
    prefixes: keys and values of the task's instruction, one Prefix per layer.
    routing: (B, E) or (B, L, E), the expert chosen for each text or each token, one-hot.
    """

    expert: str | None = None
    groups: tuple[tuple[str, slice], ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    routing: Tensor | None = None


class Encoder(nn.Module):
    """An encoder of queries and documents for one or several tasks (paper, equations 1 and 3).

    backbone: a model of one of the FAMILIES. Variants change it in place.
    tokenizer: the tokenizer of the backbone.
    tasks: task -> name of the expert that serves it.
    pooling: "cls" (the last layer's first token, as in the paper) or "mean".
    normalize: whether vectors are scaled to length 1.
    max_length: maximum number of tokens of a text, including special tokens.

    A variant overrides layer, and, if it depends on the task, condition and served_by.
    """

    # Whether a step on one task leaves some parameters without gradient. DDP must then look for them.
    has_idle_parameters: ClassVar[bool] = False
    # Names of the methods that compute one layer. Their first argument is its index.
    layer_methods: ClassVar[tuple[str, ...]] = ("layer",)

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        if not tasks:
            raise UserError("tasks: expected at least one, got none")
        if not isinstance(normalize, bool):
            raise UserError(f"normalize: expected true or false, got {normalize!r}")
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 3:
            raise UserError(
                f"max_length: expected a whole number of at least 3 ([CLS], a word and [SEP]), got {max_length!r}"
            )
        self.family = family_of(backbone)
        check_tokenizer(tokenizer, backbone)
        longest = self.family.max_positions
        if max_length > longest:
            raise UserError(f"max_length: got {max_length} tokens, but the backbone has positions for {longest}")
        self.backbone, self.tokenizer = backbone, tokenizer
        self.tasks = dict(tasks)
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.gradient_checkpointing = False
        self.sharded = False  # whether distributed/sharding.py has split the parameters over ranks
        self.encoded = {"texts": 0, "tokens": 0}  # totals over all calls of encode, without padding

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, except backbone and tokenizer, as plain containers."""
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
        return next(self.parameters()).device

    @property
    def num_layers(self) -> int:
        return len(self.family.layers)

    @property
    def num_shared_layers(self) -> int:
        """Number of first layers that do not depend on the task. They are computed once for several tasks."""
        return self.num_layers

    @property
    def prompts(self) -> dict[str, str]:
        """Task -> the prompt that precedes each of its texts. Empty if the encoder uses no prompts."""
        return {}

    def expert_of(self, task: str) -> str:
        """Return the name of the expert that serves a task. Raises UserError for an unknown task."""
        if task not in self.tasks:
            raise UserError(f"unknown task {task!r}: this encoder was built for {', '.join(self.tasks)}")
        return self.tasks[task]

    def add_expert(self, name: str, like: str) -> None:
        """Add a trainable expert, a copy of the expert `like`. Raises UserError if the encoder has no experts."""
        raise UserError(f"{type(self).__name__} has no experts, so a new task would change the vectors of the others")

    def document_task(self, task: str) -> str:
        """Return the task for which the documents of a task are encoded. Queries are encoded for the task itself."""
        return task

    def served_by(self, task: str) -> Hashable:
        """Return what a task's vectors depend on. Tasks with equal values have equal vectors."""
        self.expert_of(task)
        return None

    def condition(self, task: str) -> Condition:
        """Return what the layers receive about a task."""
        return Condition()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task: str | Sequence[str]) -> Tensor:
        """Return the vectors (B, D) of texts.

        input_ids, attention_mask: (B, S).
        task: the task of all texts, or a sequence with one task per text.
        """
        if not isinstance(task, str):
            return self._forward_mixed(input_ids, attention_mask, task)
        return self.forward_tasks(input_ids, attention_mask, (task,))[task]

    def forward_tasks(self, input_ids: Tensor, attention_mask: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return task -> vectors (B, D) of the same texts. Layers that do not depend on the task are computed once."""
        distinct = {self.served_by(task): task for task in tasks}
        hidden, context = self.family.begin(input_ids, attention_mask)
        fork = self.num_shared_layers if len(distinct) > 1 else 0
        if fork:
            hidden = self._layers(range(fork), hidden, context, self.condition(tasks[0]))
        vectors = {}
        for key, task in distinct.items():
            states = self._layers(range(fork, self.num_layers), hidden, context, self.condition(task))
            vectors[key] = self.pool(states, attention_mask, task)
        return {task: vectors[self.served_by(task)] for task in tasks}

    def forward_with_penalty(self, input_ids: Tensor, attention_mask: Tensor, task: str) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, D) of texts, and a scalar that the encoder adds to the loss."""
        vectors = self(input_ids, attention_mask, task)
        return vectors, vectors.new_zeros(())

    def _forward_mixed(self, input_ids: Tensor, attention_mask: Tensor, tasks: Sequence[str]) -> Tensor:
        """Return the vectors (B, D) of texts with one task each. Texts of the same task are computed together."""
        check_one_task_per_text(tasks, input_ids)
        groups = [
            (task, torch.tensor([i for i, other in enumerate(tasks) if other == task], device=input_ids.device))
            for task in dict.fromkeys(tasks)
        ]
        vectors = torch.cat([self(input_ids[rows], attention_mask[rows], task) for task, rows in groups])
        return vectors[torch.cat([rows for _, rows in groups]).argsort()]

    def _layers(self, indices: range, states: Tensor, context: AttentionContext, condition: Condition) -> Tensor:
        """Compute the given layers, one after the other, from states (B, S, D)."""
        for index in indices:
            hidden = self._computed_positions(index, states)
            states = self._compute_layer(index, hidden, states, context, condition)
        return states

    def _computed_positions(self, index: int, states: Tensor) -> Tensor:
        """Return the positions that a layer computes, (B, L, D): in the last layer only [CLS], if it is pooled."""
        if index < self.num_layers - 1 or self.pooling != "cls":
            return states
        # Contiguous, because otherwise torch uses another kernel for frozen weights, which changes the last bits.
        return states[:, :1].contiguous()

    def _compute_layer(
        self, index: int, hidden: Tensor, states: Tensor, context: AttentionContext, condition: Condition
    ) -> Tensor:
        """Compute one layer, with gradient checkpointing if enabled, and after the last one the end of the backbone."""
        arguments = (index, hidden, states, context, condition)
        if self.gradient_checkpointing and self.training:
            hidden = checkpoint(self.layer, *arguments, use_reentrant=False)
        else:
            hidden = self.layer(*arguments)
        return self.family.end(hidden) if index == self.num_layers - 1 else hidden

    def layer_modules(self, index: int) -> list[nn.Module]:
        """Return the modules that the layer_methods use for a layer."""
        return [self.family.layers[index]]

    def layer(
        self, index: int, hidden: Tensor, states: Tensor, context: AttentionContext, condition: Condition
    ) -> Tensor:
        """Compute one Transformer layer, (B, L, D).

        hidden: (B, L, D) the positions to compute. states: (B, S, D) the positions they attend to.
        """
        layer = self.family.layers[index]
        return self.family.feed_forward(layer, self.family.attention(layer, hidden, states, context))

    def pool(self, hidden: Tensor, attention_mask: Tensor, task: str) -> Tensor:
        """(B, L, D) -> (B, D)."""
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = self.pooled_positions(attention_mask, task)[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return F.normalize(pooled.float(), dim=-1) if self.normalize else pooled

    def pooled_positions(self, attention_mask: Tensor, task: str) -> Tensor:
        """Return (B, S), 1 for each position that mean pooling includes."""
        return attention_mask

    @torch.inference_mode()
    def encode(
        self,
        documents: Sequence[Document | Mapping[str, Any] | str],
        task: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        token_budget: int | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the vectors (n, D) of documents, in float32 on the CPU.

        Unless the encoder was built with normalize, they do not have length 1: normalize them before you compare them
        by cosine.

        documents: Document objects, dicts with "title" and "text" (or "abstract"), or strings, which are texts without
            a title.
        task: the task that the vectors are for.
        tasks: several tasks instead. The result is then task -> vectors, and common layers are computed once.
        token_budget: maximum number of padded tokens per forward pass; by default one that is fast on the device.
        advance: called after each forward pass with its number of texts.
        """
        if self.sharded:
            raise RuntimeError("a sharded encoder cannot encode; use sharding.replica(encoder)")
        if (task is None) == (tasks is None):
            raise TypeError("encode needs either task or tasks")
        if task is None and (isinstance(tasks, str) or not tasks):
            raise TypeError(f"tasks: expected a list of tasks, got {tasks!r}")
        names = (task,) if tasks is None else tuple(dict.fromkeys(tasks))
        token_budget = token_budget or default_token_budget(self.device)
        for name in names:
            self.expert_of(name)
        documents = as_documents(documents)
        vectors = {}
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for prompt in dict.fromkeys(self.prompts.get(name, "") for name in names):
                same_prompt = [name for name in names if self.prompts.get(name, "") == prompt]
                vectors |= self._encode(documents, prompt, same_prompt, token_budget, advance)
        finally:
            for module, training in modes:
                module.training = training
        return vectors[task] if tasks is None else {name: vectors[name] for name in names}

    def _encode(
        self,
        documents: list[Document],
        prompt: str,
        tasks: list[str],
        token_budget: int,
        advance: Callable[[int], None] | None,
    ) -> dict[str, Tensor]:
        """Return task -> vectors (n, D), for tasks whose texts start with the same prompt."""
        vectors = {task: torch.empty(len(documents), self.dimension) for task in tasks}
        for start in range(0, len(documents), BLOCK):
            texts = [prompt + input_text(d, self.tokenizer.sep_token) for d in documents[start : start + BLOCK]]
            ids = token_ids(texts, self.tokenizer, self.max_length)
            for rows in length_sorted_chunks([len(x) for x in ids], token_budget):
                tokens = pad((ids[row] for row in rows), self.tokenizer.pad_token_id).to(self.device)
                positions = torch.tensor(rows) + start
                for task, pooled in self.forward_tasks(tokens.input_ids, tokens.attention_mask, tasks).items():
                    vectors[task][positions] = pooled.float().cpu()
                self.encoded["texts"] += len(rows)
                self.encoded["tokens"] += sum(len(ids[row]) for row in rows)
                if advance is not None:
                    advance(len(rows))
        return vectors

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the encoder to a folder that from_pretrained, load_encoder and transformers.AutoModel can read."""
        from lightning_modules.encoders.pretrained import save_encoder

        return save_encoder(self, folder)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load an encoder from a folder of save_pretrained, or from the hub. Raises UserError for another class."""
        from lightning_modules.encoders.pretrained import load_pretrained

        encoder = load_pretrained(name)
        if not isinstance(encoder, cls):
            raise UserError(f"{name}: contains a {type(encoder).__name__}, not a {cls.__name__}")
        return encoder


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, backbone: nn.Module) -> None:
    """Raise UserError if a tokenizer has no separator or padding, or more tokens than the backbone has embeddings."""
    for name in ("sep_token", "pad_token_id"):
        if getattr(tokenizer, name, "") is None:
            raise UserError(f"the tokenizer has no {name}; is its tokenizer_config.json missing?")
    size, known = getattr(tokenizer, "vocab_size", 0), getattr(backbone.config, "vocab_size", None)
    if known is not None and size > known:
        raise UserError(f"the tokenizer has {size} tokens, but the backbone has embeddings for only {known}")


def check_one_task_per_text(tasks: Sequence[str], input_ids: Tensor) -> None:
    if len(tasks) != len(input_ids):
        raise ValueError(f"task: got {len(tasks)} tasks for {len(input_ids)} texts")
