"""The encoder that all variants share: a Hugging Face backbone, read layer by layer.

The backbone's modules and parameters stay as they are; only the loop over its layers is ours (families.py knows how one
is computed). That is what lets a variant choose experts by task without state on the side, the last layer compute the
pooled position alone, and several tasks share the layers that do not tell them apart.

Shapes: B texts, L tokens, D hidden size, n documents.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datamodules.records import Document, UserError
from datamodules.text import as_documents, input_text, length_sorted_chunks, pad, token_ids
from lightning_modules.encoders.families import Surroundings, family_of
from lightning_modules.retrieval.compute import default_token_budget

POOLINGS = ("cls", "mean")
BLOCK = 8192  # texts that are sorted by length together, so that token ids of a whole corpus never stand in memory


def check_tokenizer(tokenizer: Any, backbone: nn.Module) -> None:
    """Raise UserError for a tokenizer that lacks what texts need, or has more tokens than the backbone."""
    for name in ("sep_token", "pad_token_id"):
        if getattr(tokenizer, name, "") is None:
            raise UserError(f"the tokenizer has no {name} (is its tokenizer_config.json missing?)")
    size, known = getattr(tokenizer, "vocab_size", 0), getattr(backbone.config, "vocab_size", None)
    if known is not None and size > known:
        raise UserError(f"the tokenizer has {size} tokens, the backbone embeddings for {known}")


def check_one_each(tasks: Sequence[str], input_ids: Tensor) -> None:
    if len(tasks) != len(input_ids):
        raise ValueError(f"task: got {len(tasks)} tasks for {len(input_ids)} texts")


class Encoder(nn.Module):
    """A bi-encoder's one tower, for queries and documents of all its tasks (paper, equations 1 and 3).

    backbone: a model of one of the FAMILIES; changed in place by variants. tasks: task -> expert that serves it.
    pooling: "cls" (last layer's first token, the paper's) or "mean". normalize: vectors of length 1. max_length: tokens
    of a text, special tokens included.

    A variant overrides layer, and guide and served_by where tasks differ in it.
    """

    # Whether a step on one task leaves parameters without gradient: DDP must then look for them.
    has_idle_parameters: ClassVar[bool] = False
    # Methods that compute something of one layer, whose index is their first argument.
    layer_methods: ClassVar[tuple[str, ...]] = ("layer",)

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
        if not tasks:
            raise UserError("an encoder needs at least one task")
        if not isinstance(normalize, bool):
            raise UserError(f"normalize: got {normalize!r}, allowed are true and false")
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 3:
            raise UserError(
                f"max_length: got {max_length!r}, allowed are whole numbers from 3 ([CLS], a word and [SEP])"
            )
        self.family = family_of(backbone)
        check_tokenizer(tokenizer, backbone)
        if max_length > self.family.max_positions:
            longest = self.family.max_positions
            raise UserError(f"max_length: got {max_length} tokens, but the backbone has positions for {longest}")
        self.backbone, self.tokenizer = backbone, tokenizer
        self.tasks = dict(tasks)
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.gradient_checkpointing = False
        self.sharded = False  # over ranks, by sharding.py
        self.encoded = {"texts": 0, "tokens": 0}  # by encode, so far; tokens without padding

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
        return next(self.parameters()).device

    @property
    def num_layers(self) -> int:
        return len(self.family.layers)

    @property
    def num_shared_layers(self) -> int:
        """The first layers that compute the same for every task, so that encoding for several tasks shares them."""
        return self.num_layers

    @property
    def prompts(self) -> dict[str, str]:
        """Task -> what precedes its texts."""
        return {}

    def expert_of(self, task: str) -> str:
        if task not in self.tasks:
            raise UserError(f"unknown task {task!r}: this encoder was built for {', '.join(self.tasks)}")
        return self.tasks[task]

    def add_expert(self, name: str, like: str) -> None:
        """A new expert, a copy of another, whose parameters are trained. Raises UserError where none are."""
        raise UserError(f"{type(self).__name__} has no experts by task, so a new task would change the others")

    def document_task(self, task: str) -> str:
        """The task that a task's documents are encoded for, where its queries are encoded for the task itself."""
        return task

    def served_by(self, task: str) -> Hashable:
        """Tasks that this is equal for have equal vectors."""
        self.expert_of(task)
        return None

    def guide(self, task: str) -> Any:
        """What the layers are given of a task."""
        return None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, task: str | Sequence[str]) -> Tensor:
        """Vectors (B, D) of texts. input_ids, attention_mask: (B, L). task: of all texts, or one for each."""
        if not isinstance(task, str):
            return self._by_task(input_ids, attention_mask, task)
        return self.forward_tasks(input_ids, attention_mask, (task,))[task]

    def forward_tasks(self, input_ids: Tensor, attention_mask: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Vectors (B, D) of texts for each of several tasks; what tasks have in common is computed once."""
        served = {self.served_by(task): task for task in tasks}
        hidden, around = self.family.begin(input_ids, attention_mask)
        fork = self.num_shared_layers if len(served) > 1 else 0
        hidden = self._layers(range(fork), hidden, around, self.guide(tasks[0]) if fork else None)
        rest = range(fork, self.num_layers)
        vectors = {
            key: self.pool(self._layers(rest, hidden, around, self.guide(task)), attention_mask, task)
            for key, task in served.items()
        }
        return {task: vectors[self.served_by(task)] for task in tasks}

    def forward_with_penalty(self, input_ids: Tensor, attention_mask: Tensor, task: str) -> tuple[Tensor, Tensor]:
        """Vectors (B, D) of texts, and what the encoder adds to their loss, a scalar."""
        vectors = self(input_ids, attention_mask, task)
        return vectors, vectors.new_zeros(())

    def _by_task(self, input_ids: Tensor, attention_mask: Tensor, tasks: Sequence[str]) -> Tensor:
        """Vectors (B, D) of texts with a task each: texts of one task go together, so every expert runs once."""
        check_one_each(tasks, input_ids)
        groups = [
            (task, torch.tensor([i for i, other in enumerate(tasks) if other == task], device=input_ids.device))
            for task in dict.fromkeys(tasks)
        ]
        vectors = torch.cat([self(input_ids[rows], attention_mask[rows], task) for task, rows in groups])
        return vectors[torch.cat([rows for _, rows in groups]).argsort()]

    def _layers(self, indices: range, hidden: Tensor, around: Surroundings, guide: Any) -> Tensor:
        """The given layers one after the other; the backbone's last one at the pooled positions alone."""
        for index in indices:
            last = index == self.num_layers - 1
            # Contiguous, because torch otherwise chooses a kernel by whether weights are trained: other last bits.
            wanted = hidden[:, :1].contiguous() if last and self.pooling == "cls" else hidden
            hidden = self._run(index, wanted, hidden, around, guide)
            if last:
                hidden = self.family.end(hidden)
        return hidden

    def _run(self, *arguments) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(self.layer, *arguments, use_reentrant=False)
        return self.layer(*arguments)

    def layer_modules(self, index: int) -> list[nn.Module]:
        """What the layer_methods compute with."""
        return [self.family.layers[index]]

    def layer(self, index: int, hidden: Tensor, context: Tensor, around: Surroundings, guide: Any) -> Tensor:
        """One Transformer layer for the positions in hidden (B, L, D), which attend to context (B, S, D)."""
        layer = self.family.layers[index]
        return self.family.feed_forward(layer, self.family.attention(layer, hidden, context, around))

    def pool(self, hidden: Tensor, attention_mask: Tensor, task: str) -> Tensor:
        """(B, L, D) -> (B, D)."""
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = self.pooled_positions(attention_mask, task)[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return F.normalize(pooled.float(), dim=-1) if self.normalize else pooled

    def pooled_positions(self, attention_mask: Tensor, task: str) -> Tensor:
        """(B, L), 1 where a position belongs to the mean."""
        return attention_mask

    @torch.inference_mode()
    def encode(
        self,
        documents: Sequence[Document | Mapping[str, Any] | str],
        task: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        token_budget: int | None = None,
        advance=None,
    ) -> Tensor | dict[str, Tensor]:
        """Vectors (n, D) of documents in their order: float32, on the CPU. They are not normalised, unless the encoder
        is so (normalize), so cosine takes a further step.

        documents: papers as a Document or a dict with title and text (or abstract), or strings, texts without title.
        task: that they are for; or tasks: several, for which the result is task -> vectors, and the layers that serve
        all of them are computed once. token_budget: padded tokens of one forward, by default what is fast on the
        device. advance: called with the number of texts after each forward.
        """
        if self.sharded:
            raise RuntimeError("a sharded encoder cannot encode; use sharding.replica(encoder)")
        if (task is None) == (tasks is None):
            raise TypeError("encode needs either task or tasks")
        if task is None and (isinstance(tasks, str) or not tasks):
            raise TypeError(f"tasks: got {tasks!r}, expected a list of tasks")
        wanted = (task,) if tasks is None else tuple(dict.fromkeys(tasks))
        token_budget = token_budget or default_token_budget(self.device)
        for name in wanted:
            self.expert_of(name)
        documents = as_documents(documents)
        found = {}
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for prompt in dict.fromkeys(self.prompts.get(name, "") for name in wanted):
                alike = [name for name in wanted if self.prompts.get(name, "") == prompt]
                found |= self._encode(documents, prompt, alike, token_budget, advance)
        finally:
            for module, training in modes:
                module.training = training
        return found[task] if tasks is None else {name: found[name] for name in wanted}

    def _encode(self, documents: list[Document], prompt: str, tasks: list[str], token_budget: int, advance):
        """Task -> vectors (n, D), for tasks whose texts begin alike."""
        vectors = {task: torch.empty(len(documents), self.dimension) for task in tasks}
        for start in range(0, len(documents), BLOCK):
            texts = [prompt + input_text(d, self.tokenizer.sep_token) for d in documents[start : start + BLOCK]]
            ids = token_ids(texts, self.tokenizer, self.max_length)
            for rows in length_sorted_chunks([len(x) for x in ids], token_budget):
                tokens = pad((ids[row] for row in rows), self.tokenizer.pad_token_id).to(self.device)
                places = torch.tensor(rows) + start
                for task, pooled in self.forward_tasks(tokens.input_ids, tokens.attention_mask, tasks).items():
                    vectors[task][places] = pooled.float().cpu()
                self.encoded["texts"] += len(rows)
                self.encoded["tokens"] += sum(len(ids[row]) for row in rows)
                if advance is not None:
                    advance(len(rows))
        return vectors

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the encoder to a folder that from_pretrained, load_encoder and transformers.AutoModel read."""
        from lightning_modules.encoders.pretrained import save_encoder

        return save_encoder(self, folder)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """An encoder from such a folder, or from the hub. Raises UserError if it is of another class."""
        from lightning_modules.encoders.pretrained import load_pretrained

        encoder = load_pretrained(name)
        if not isinstance(encoder, cls):
            raise UserError(f"{name}: holds a {type(encoder).__name__}, not a {cls.__name__}")
        return encoder
