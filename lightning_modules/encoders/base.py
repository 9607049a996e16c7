"""The encoder that all variants share: a Hugging Face backbone whose layers are computed one by one.

The modules and parameters of the backbone are unchanged; only the loop over its layers is ours (families.py computes a
single layer). That is why a variant can choose experts by the task it is called with, the last layer can compute only
the pooled position, and several tasks can share the layers that do not depend on the task.

Shapes: B texts, S tokens, L positions computed (S, or 1 if only the first one is needed), D hidden size, n documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from datamodules.records import Document, UserError, check_name
from datamodules.text import as_documents, input_text, length_sorted_chunks, pad, token_ids
from lightning_modules.encoders.families import AttentionContext, Prefix, family_of
from lightning_modules.retrieval.compute import default_token_budget

POOLINGS = ("cls", "mean")
Advance = Callable[[int], None]
BLOCK = 8192  # number of texts tokenized and sorted by length at a time; a whole corpus may not fit in memory


class Condition(NamedTuple):
    """Inputs of the layers that depend on the task.

    expert: name of the expert that serves all texts.
    groups: pairs of an expert and its rows, for a batch of several tasks that is sorted by expert.
    prefixes: keys and values of the task's instruction, one Prefix per layer.
    routing: one-hot choice of an expert for each text, (B, E), or for each token, (B, L, E).
    """

    expert: str | None = None
    groups: tuple[tuple[str, slice], ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    routing: Tensor | None = None


class Encoder(nn.Module):
    """An encoder of queries and documents for one or several tasks (paper, equations 1 and 3).

    backbone: model of one of the FAMILIES. Variants change it in place.
    tasks: task -> name of the expert that serves it.
    pooling: "cls" (the last layer's first token, as in the paper) or "mean".
    normalize: whether vectors are scaled to length 1.
    max_length: maximum number of tokens of a text, including special tokens.

    A variant overrides layer, and condition if its layers depend on the task. It stores each argument of its
    constructor in an attribute of the same name.
    """

    # Whether a step on one task leaves some parameters without gradient, so that DDP must look for unused parameters.
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
        for task in tasks:
            check_name("task", task)
        if not isinstance(normalize, bool):
            raise UserError(f"normalize: expected true or false, got {normalize!r}")
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 3:
            raise UserError(
                f"max_length: expected a whole number of at least 3 ([CLS], word, [SEP]), got {max_length!r}"
            )
        self.family = family_of(backbone)
        check_tokenizer(tokenizer, backbone)
        if max_length > (limit := self.family.max_positions):
            raise UserError(f"max_length: got {max_length} tokens, but the backbone has positions for {limit}")
        self.backbone, self.tokenizer = backbone, tokenizer
        self.tasks = dict(tasks)
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.gradient_checkpointing = False
        self.sharded = False  # whether distributed/sharding.py has split the parameters over ranks
        self.encoded = {"texts": 0, "tokens": 0}  # totals over all calls of encode, without padding

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor, except backbone and tokenizer, as plain containers."""
        names = [*inspect.signature(Encoder).parameters, *inspect.signature(type(self)).parameters]
        return {name: getattr(self, name) for name in dict.fromkeys(names) if name not in ("backbone", "tokenizer")}

    @property
    def dimension(self) -> int:
        """Number of dimensions of a vector."""
        return self.backbone.config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def num_layers(self) -> int:
        return len(self.family.layers)

    @property
    def num_shared_layers(self) -> int:
        """Number of layers before the first one that depends on the task. Several tasks share their computation."""
        return self.num_layers

    @property
    def prompts(self) -> dict[str, str]:
        """Task -> prompt at the start of each text. Empty if the encoder uses no prompts."""
        return {}

    def expert_of(self, task: str) -> str:
        """Return the name of the expert that serves a task. Raises UserError for an unknown task."""
        if task not in self.tasks:
            raise UserError(f"unknown task {task!r}: this encoder was built for {', '.join(self.tasks)}")
        return self.tasks[task]

    def add_expert(self, name: str, like: str) -> None:
        """Add a trainable copy of the expert `like`. Raises UserError if the encoder has no experts."""
        raise UserError(f"{type(self).__name__} has no experts, so a new task would change the vectors of the others")

    def document_task(self, task: str) -> str:
        """Return the task for which a task's documents are encoded. Queries are encoded for the task itself."""
        return task

    def served_by(self, task: str) -> Hashable:
        """Return the expert or instruction that a task uses, if any. Tasks that share it have equal vectors."""
        return self.condition(task).expert

    def condition(self, task: str) -> Condition:
        """Return the inputs of the layers for a task. Raises UserError for an unknown task."""
        self.expert_of(task)
        return Condition()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task: str | Sequence[str]) -> Tensor:
        """Return the vectors (B, D) of texts (B, S). task: the task of all texts, or a sequence with one per text."""
        if not isinstance(task, str):
            return self._forward_mixed(input_ids, attention_mask, task)
        return self.forward_tasks(input_ids, attention_mask, (task,))[task]

    def forward_tasks(self, input_ids: Tensor, attention_mask: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Return task -> vectors (B, D) of the same texts. Shared layers are computed once."""
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
        """Return the vectors (B, D) of texts, and a scalar to add to the loss."""
        vectors = self(input_ids, attention_mask, task)
        return vectors, vectors.new_zeros(())

    def _forward_mixed(self, input_ids: Tensor, attention_mask: Tensor, tasks: Sequence[str]) -> Tensor:
        """Return the vectors (B, D) of texts with one task each, computed task by task."""
        check_one_task_per_text(tasks, input_ids)
        groups = [
            (task, torch.tensor([i for i, other in enumerate(tasks) if other == task], device=input_ids.device))
            for task in dict.fromkeys(tasks)
        ]
        vectors = torch.cat([self(input_ids[rows], attention_mask[rows], task) for task, rows in groups])
        return vectors[torch.cat([rows for _, rows in groups]).argsort()]

    def _layers(self, indices: range, states: Tensor, context: AttentionContext, condition: Condition) -> Tensor:
        """Compute layers one after the other, from states (B, S, D)."""
        for index in indices:
            hidden = self._computed_positions(index, states)
            states = self._compute_layer(index, hidden, states, context, condition)
        return states

    def _computed_positions(self, index: int, states: Tensor) -> Tensor:
        """Return the positions that a layer computes, (B, L, D). With pooling "cls", the last one needs only [CLS]."""
        if index < self.num_layers - 1 or self.pooling != "cls":
            return states
        # If not contiguous, torch uses another kernel for frozen weights, and vectors differ in their last bits.
        return states[:, :1].contiguous()

    def _compute_layer(
        self, index: int, hidden: Tensor, states: Tensor, context: AttentionContext, condition: Condition
    ) -> Tensor:
        """Compute one layer, with gradient checkpointing if enabled. The last one includes the end of the backbone."""
        arguments = (index, hidden, states, context, condition)
        if self.gradient_checkpointing and self.training:
            hidden = checkpoint(self.layer, *arguments, use_reentrant=False)
        else:
            hidden = self.layer(*arguments)
        return self.family.end(hidden) if index == self.num_layers - 1 else hidden

    def layer_modules(self, index: int) -> list[nn.Module]:
        """Return the modules of a layer that the layer_methods use."""
        return [self.family.layers[index]]

    def layer(
        self, index: int, hidden: Tensor, states: Tensor, context: AttentionContext, condition: Condition
    ) -> Tensor:
        """Compute one Transformer layer for the positions hidden (B, L, D), which attend to states (B, S, D)."""
        layer = self.family.layers[index]
        return self.family.feed_forward(layer, self.family.attention(layer, hidden, states, context))

    def pool(self, hidden: Tensor, attention_mask: Tensor, task: str) -> Tensor:
        """Pool the states of the last layer, (B, L, D), to vectors (B, D)."""
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = self.pooled_positions(attention_mask, task)[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return F.normalize(pooled.float(), dim=-1) if self.normalize else pooled

    def pooled_positions(self, attention_mask: Tensor, task: str) -> Tensor:
        """Return 1 for each position that mean pooling includes and 0 for others, (B, S)."""
        return attention_mask

    @torch.inference_mode()
    def encode(
        self,
        documents: Sequence[Document | Mapping[str, Any] | str],
        task: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        token_budget: int | None = None,
        advance: Advance | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Return the vectors (n, D) of documents, in float32 on the CPU.

        They have length 1 only if the encoder was built with normalize=True. If not, normalize them before you compare
        them by cosine.

        documents: Document objects, dicts with "title" and "text" (or "abstract"), or strings (texts without title).
        task: task to encode for.
        tasks: several tasks, instead of task. The result is then task -> vectors, and shared layers are computed once.
        token_budget: maximum number of padded tokens per forward pass; by default one that is fast on the device.
        advance: function called after each forward pass with its number of texts.
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
        self, documents: list[Document], prompt: str, tasks: list[str], token_budget: int, advance: Advance | None
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
        """Write the encoder to a folder for from_pretrained, load_encoder and transformers.AutoModel."""
        from lightning_modules.encoders.pretrained import save_encoder

        return save_encoder(self, folder)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load an encoder from a folder written by save_pretrained, or the hub. Raises UserError for other classes."""
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
    size, limit = getattr(tokenizer, "vocab_size", 0), getattr(backbone.config, "vocab_size", None)
    if limit is not None and size > limit:
        raise UserError(f"the tokenizer has {size} tokens, but the backbone has embeddings for only {limit}")


def check_one_task_per_text(tasks: Sequence[str], input_ids: Tensor) -> None:
    if len(tasks) != len(input_ids):
        raise ValueError(f"task: got {len(tasks)} tasks for {len(input_ids)} texts")
