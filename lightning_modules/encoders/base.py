"""The encoder that all variants share: a Hugging Face backbone whose layers are computed one by one.

The modules and parameters of the backbone are unchanged; only the loop over its layers is ours (families.py computes a
single layer). So variants can choose experts by task, the last layer can compute only the pooled position, and several
tasks can share the layers that do not depend on the task.

Shapes: T tokens of B texts, packed end to end; L positions computed (T, or B if only the first one of each text is
needed); D hidden size; n documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypedDict, Unpack, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.packed import Tokens
from datamodules.records import Document, UserError, check_choice, check_name
from datamodules.store import Rows
from datamodules.text import as_documents
from lightning_modules.encoders.attention import NUM_SPLITS, AttentionContext, Prefix
from lightning_modules.encoders.families import Choice, Family, family_of
from lightning_modules.encoders.pipeline import encode_units, vectors_of_task
from lightning_modules.encoders.pooling import POOLINGS, pooled
from lightning_modules.encoders.text_features import TextFeatures
from lightning_modules.retrieval.compute import default_token_budget, evaluating

Advance = Callable[[int], None]
Texts = Sequence[Document | Mapping[str, Any] | str]
TaskVectors = dict[str, Tensor]  # task -> vectors (n, D)


class EncodeKeywords(TypedDict, total=False):
    """Types of the options of Encoder.encode, which documents them."""

    token_budget: int | None
    advance: Advance | None
    batch_invariant: bool


class Condition(NamedTuple):
    """Inputs of the layers that depend on the task.

    experts: expert for all texts, or experts for groups of texts.
    prefixes: keys and values of the task's instruction, one Prefix per layer.
    routing: one-hot choice of an expert for each computed position, (L, E).
    mixtures: layer -> expert -> weight of its outputs, a scalar.
    """

    experts: Choice = None
    prefixes: tuple[Prefix, ...] = ()
    routing: Tensor | None = None
    mixtures: Mapping[int, Mapping[str, Tensor]] = {}


class Encoder(nn.Module):
    """An encoder of queries and documents for one or several tasks (paper, equations 1 and 3).

    backbone: model of one of the FAMILIES. Variants change it in place.
    tasks: task -> name of the expert that serves it.
    pooling: one of POOLINGS: "cls" (the last layer's first token, as in the paper), "mean", ...
    normalize: whether to scale vectors to length 1.
    max_length: maximum number of tokens per text, including special tokens.

    Variants override layer, and also condition if their layers depend on the task. They store each argument of their
    constructor in an attribute of the same name.
    """

    # Whether a step on one task leaves some parameters without gradients. If so, DDP must find unused parameters.
    has_idle_parameters: ClassVar[bool] = False
    # Whether texts of one task have different experts. If so, the number of rows per expert depends on the batch.
    groups_texts: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = False  # whether the encoder needs the hashes of texts, Tokens.keys
    # Names of the methods that compute one layer. Their first argument is the layer's index.
    layer_methods: ClassVar[tuple[str, ...]] = ("layer",)
    lora_scale: float | None = None  # alpha / rank, of an encoder with LoRA (lora.py)
    # Similarity that the encoder was trained with, "dot" or "cosine"; None if unknown.
    similarity: str | None = None
    origin: str = ""  # checkpoint that the weights were loaded from: file in its run, optimizer step, and kind

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__()
        check_choice("pooling", pooling, POOLINGS)
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
        self.features = nn.ModuleDict()  # name -> TextFeatures, added by some variants
        self.tasks = dict(tasks)
        self.pooling, self.normalize, self.max_length = pooling, normalize, max_length
        self.gradient_checkpointing = False
        self.sharded = False  # whether distributed/sharding.py has split the parameters over ranks
        self._weights: Mapping[Tensor, Tensor] = {}  # parameter -> replacement during casting
        self.encoded = {"texts": 0, "tokens": 0, "flops": 0.0}  # totals over all calls of encode (see throughput.py)

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
    def pools_one_position(self) -> bool:
        """Whether the last layer only needs to compute the first position of each text."""
        return self.pooling == "cls"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def num_layers(self) -> int:
        return len(self.family.layers)

    @property
    def num_shared_layers(self) -> int:
        """Number of layers before the first one that depends on the task. They are computed once for several tasks."""
        return 0 if self._has_conditions else self.num_layers

    @property
    def _has_conditions(self) -> bool:
        return type(self).condition is not Encoder.condition

    @property
    def prompts(self) -> dict[str, str]:
        """Task -> prompt at the start of each text. Empty if the encoder does not use prompts."""
        return {}

    def expert_of(self, task: str) -> str:
        """Return the name of the expert that serves a task. Raises UserError for an unknown task."""
        if task not in self.tasks:
            raise UserError(f"unknown task {task!r}: this encoder was built for {', '.join(self.tasks)}")
        return self.tasks[task]

    def add_expert(self, name: str, like: str) -> None:
        """Add a trainable copy of the expert `like`. Raises UserError if the encoder has no experts."""
        raise UserError(f"{type(self).__name__} has no experts, so a new task would change the vectors of the others")

    def neutral_weights(self) -> dict[str, Tensor]:
        """Return parameters (by name) that have no effect, for copying weights from an encoder without them."""
        return {}

    def prepare(self, data: Any) -> None:
        """Prepare the encoder with data, once, before training. Most encoders do nothing. Raises UserError on failure.

        data: ContrastiveDataModule that is set up and has the tokenizer.
        """

    def document_task(self, task: str) -> str:
        """Return the task for which a task's documents are encoded. Queries are always encoded for the task itself."""
        return task

    def served_by(self, task: str) -> Hashable:
        """Return a key for everything that a task's vectors depend on. Tasks with equal keys share their vectors."""
        self.expert_of(task)
        return task if self._has_conditions else None

    def condition(self, task: str) -> Condition:
        """Return the inputs of the layers for a task. Raises UserError for an unknown task."""
        self.expert_of(task)
        return Condition()

    def forward(self, tokens: Tokens, task: str | Sequence[str]) -> Tensor:
        """Return the vectors (B, D) of texts. task: the task of all texts, or a sequence with one per text."""
        if not isinstance(task, str):
            if len(task) != len(tokens):
                raise ValueError(f"task: got {len(task)} tasks for {len(tokens)} texts")
            with self.casting():
                return self._forward_mixed(tokens, task)
        return self.forward_tasks(tokens, (task,))[task]

    def forward_tasks(
        self, tokens: Tokens, tasks: Sequence[str], conditions: Mapping[str, Condition] | None = None
    ) -> dict[str, Tensor]:
        """Return task -> vectors (B, D) of the same texts. Shared layers are computed once.

        conditions: the condition of each task, if it was computed before.
        """
        with self.casting():
            distinct = {self.served_by(task): task for task in tasks}
            conditions = conditions or {task: self.condition(task) for task in distinct.values()}
            hidden, context = self.begin(tokens)
            fork = self.num_shared_layers if len(distinct) > 1 else 0
            if fork:
                hidden = self._layers(range(fork), hidden, context, next(iter(conditions.values())))
            vectors = {}
            for key, task in distinct.items():
                states = self._layers(range(fork, self.num_layers), hidden, context, conditions[task])
                vectors[key] = self.pool(states, context, task)
            return {task: vectors[self.served_by(task)] for task in tasks}

    def begin(self, tokens: Tokens) -> tuple[Tensor, AttentionContext]:
        """Return the input of the first layer, (T, D), and the AttentionContext of a batch."""
        hidden, context = self.family.begin(tokens)
        for features in self.features.values():
            hidden = cast(TextFeatures, features).add_to(hidden, tokens)
        return hidden, context

    def forward_with_penalty(self, tokens: Tokens, task: str) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, D) of texts, and a scalar to add to the loss."""
        vectors = self(tokens, task)
        return vectors, vectors.new_zeros(())

    def _forward_mixed(self, tokens: Tokens, tasks: Sequence[str]) -> Tensor:
        """Return the vectors (B, D) of texts, task by task. tasks: task of each text."""
        groups = {task: [i for i, other in enumerate(tasks) if other == task] for task in dict.fromkeys(tasks)}
        vectors = torch.cat([self(tokens.select(texts), task) for task, texts in groups.items()])
        order = [text for texts in groups.values() for text in texts]
        return vectors[torch.tensor(order, device=vectors.device).argsort()]

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Under autocast, cast the weights of linear layers once, instead of in each layer of each chunk.

        In inference mode, also cast the LayerNorms of BERT's layers. Embeddings stay in float32. Does nothing for
        sharded encoders, which do not have whole weights.
        """
        device = self.device.type
        if self.sharded or self._weights or not torch.is_autocast_enabled(device):
            yield
            return
        dtype = torch.get_autocast_dtype(device)
        modules: list[nn.Module] = [module for module in self.modules() if isinstance(module, nn.Linear)]
        if torch.is_inference_mode_enabled():  # not in the first pass of GradCache, which must equal the second
            modules += [norm for family in self._families() for norm in family.half_norms()]
        weights: dict[Tensor, Tensor] = {w: w.to(dtype) for module in modules for w in module.parameters()}
        with self._with_weights(weights):
            yield

    @contextmanager
    def _with_weights(self, weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Replace parameters temporarily. weights: parameter -> its replacement."""
        replaced = [
            (module, name, parameter)
            for module in self.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter in weights
        ]
        previous, self._weights = self._weights, weights
        try:
            for module, name, parameter in replaced:
                module._parameters[name] = weights[parameter]  # type: ignore[assignment]
            yield
        finally:
            self._weights = previous
            for module, name, parameter in replaced:
                module._parameters[name] = parameter

    def compile(self, *_: Any, **__: Any) -> None:
        """Compile the parts of the layers. This slows the first batches by about a minute, but speeds up the others."""
        for family in self._families():
            family.compiled = True

    def _families(self) -> list[Family]:
        return [value for value in vars(self).values() if isinstance(value, Family)]

    def _layers(self, indices: range, states: Tensor, context: AttentionContext, condition: Condition) -> Tensor:
        """Compute layers one after the other, from states (T, D)."""
        for index in indices:
            hidden = self._computed_positions(index, states, context)
            states = self._compute_layer(index, hidden, states, context, condition)
        return states

    def _computed_positions(self, index: int, states: Tensor, context: AttentionContext) -> Tensor:
        """Return the positions that a layer computes, (L, D). With pooling "cls", the last layer needs only [CLS]."""
        if index < self.num_layers - 1 or not self.pools_one_position:
            return states
        return states[context.tokens.offsets[:-1]]

    def _compute_layer(
        self, index: int, hidden: Tensor, states: Tensor, context: AttentionContext, condition: Condition
    ) -> Tensor:
        """Compute a layer, with gradient checkpointing if enabled. The last layer includes the end of the backbone."""
        arguments = (index, hidden, states, context, condition)
        if self.gradient_checkpointing and self.training:
            weights = self._weights

            def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
                return nullcontext(), self._with_weights(weights)

            hidden = checkpoint(self.layer, *arguments, use_reentrant=False, context_fn=contexts)
        else:
            hidden = self.layer(*arguments)
        return self.family.end(hidden) if index == self.num_layers - 1 else hidden

    def layer_modules(self, index: int) -> list[nn.Module]:
        """Return the modules of a layer that the layer_methods use."""
        return [self.family.layers[index]]

    def layer(
        self, index: int, hidden: Tensor, states: Tensor, context: AttentionContext, condition: Condition
    ) -> Tensor:
        """Compute one Transformer layer for the positions hidden (L, D), which attend to states (T, D)."""
        layer, family = self.family.layers[index], self.family
        prefix = condition.prefixes[index] if condition.prefixes else None
        hidden = family.attention(layer, hidden, states, context, condition.experts, prefix)
        return family.feed_forward(layer, hidden, context, condition.experts)

    def pool(self, hidden: Tensor, context: AttentionContext, task: str) -> Tensor:
        """Pool the states of the last layer, (L, D), to vectors (B, D)."""
        if not self.pools_one_position:
            hidden = pooled(
                self.pooling, hidden, context.tokens.offsets, context.positions, self.skipped_positions(task)
            )
        return F.normalize(hidden.float(), dim=-1) if self.normalize else hidden

    def skipped_positions(self, task: str) -> int:
        """Return the number of positions at the start of a text that pooling leaves out."""
        return 0

    @overload
    def encode(self, documents: Texts, task: str, **options: Unpack[EncodeKeywords]) -> Tensor: ...
    @overload
    def encode(self, documents: Texts, *, tasks: Sequence[str], **options: Unpack[EncodeKeywords]) -> TaskVectors: ...
    def encode(
        self,
        documents: Texts,
        task: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        token_budget: int | None = None,
        advance: Advance | None = None,
        batch_invariant: bool = False,
    ) -> Tensor | TaskVectors:
        """Return the vectors (n, D) of documents, in float32 on the CPU.

        They have length 1 only if the encoder was built with normalize=True. Otherwise, normalize them before comparing
        them by cosine.

        documents: Document objects, dicts with "title" and "text" (or "abstract"), or strings (texts without title).
        task: task to encode for.
        tasks: several tasks, instead of task. The result is then task -> vectors, and shared layers are computed once.
        token_budget: maximum number of tokens per forward pass; the default is fast on the device.
        advance: function called after each forward pass with its number of texts.
        batch_invariant: whether the exact bits of a text's vector must not depend on other texts, for a given device
            and token_budget. This takes longer. On GPUs, it needs torch 2.13, and an encoder whose experts do not
            depend on the text.
        """
        options: Any = {"token_budget": token_budget, "advance": advance, "batch_invariant": batch_invariant}
        (vectors,) = self.encode_each([documents], **(options | {"task": task, "tasks": tasks}))
        return vectors

    @overload
    def encode_each(
        self, groups: Iterable[Texts], task: str, **options: Unpack[EncodeKeywords]
    ) -> Generator[Tensor]: ...
    @overload
    def encode_each(
        self, groups: Iterable[Texts], *, tasks: Sequence[str], **options: Unpack[EncodeKeywords]
    ) -> Generator[TaskVectors]: ...
    def encode_each(
        self,
        groups: Iterable[Texts],
        task: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        token_budget: int | None = None,
        advance: Advance | None = None,
        batch_invariant: bool = False,
    ) -> Generator[Tensor] | Generator[TaskVectors]:
        """Yield the result of encode for each group of documents, with exactly the same bits.

        The next groups are read and tokenised while the device computes, so this is faster than calling encode for each
        group. If you do not exhaust the generator, close it (contextlib.closing).
        """
        if self.sharded:
            raise RuntimeError("a sharded encoder cannot encode; use sharding.replica(encoder)")
        if (task is None) == (tasks is None):
            raise TypeError("encode needs either task or tasks")
        if task is None and (isinstance(tasks, str) or not tasks):
            raise TypeError(f"tasks: expected a list of tasks, got {tasks!r}")
        names = tuple(dict.fromkeys(tasks or [str(task)]))
        for name in names:
            self.expert_of(name)
        units = (group if isinstance(group, Rows) else as_documents(group) for group in groups)
        if batch_invariant and self.device.type == "cuda" and not NUM_SPLITS:
            raise UserError("batch_invariant: on GPUs it needs torch 2.13 or later")
        if batch_invariant and self.device.type != "cpu" and self.groups_texts:
            raise UserError(
                f"batch_invariant: {type(self).__name__} only supports it on CPUs, because the number of texts that "
                f"an expert computes together depends on the other texts, and with it the last bits of vectors"
            )
        token_budget = token_budget or default_token_budget(self.device)
        results = encode_units(self, units, names, token_budget, advance, batch_invariant)
        return results if task is None else vectors_of_task(results, task)

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """Compute without dropout or gradients, in the precision of autocast."""
        with evaluating(self), torch.inference_mode(), self.casting():
            yield

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the encoder to a folder for from_pretrained, load_encoder and transformers.AutoModel."""
        from lightning_modules.encoders.pretrained import save_encoder

        return save_encoder(self, folder)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load an encoder from a folder written by save_pretrained, or from the hub.

        Raises UserError if it contains a different class.
        """
        from lightning_modules.encoders.pretrained import load_pretrained

        encoder = load_pretrained(name, packages=[cls.__module__])  # the caller has imported it already
        if not isinstance(encoder, cls):
            raise UserError(f"{name}: contains a {type(encoder).__name__}, not a {cls.__name__}")
        return encoder


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedModel) -> None:
    """Raise UserError unless a tokenizer has words, separator and padding, and the backbone embeddings for all ids."""
    for name in ("sep_token", "pad_token_id"):
        if getattr(tokenizer, name, "") is None:
            raise UserError(f"the tokenizer has no {name}; is its tokenizer_config.json missing?")
    # vocab_size does not count tokens that were added to the tokenizer.
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    # If the file is missing, transformers creates a tokenizer without words.
    if vocabulary and vocabulary.keys() <= set(tokenizer.all_special_tokens):
        raise UserError("the tokenizer has no words, only special tokens; is its tokenizer.json or vocab.txt missing?")
    size = max(vocabulary.values(), default=0) + 1
    limit: Any = backbone.get_input_embeddings().num_embeddings
    if size > limit:
        raise UserError(f"the tokenizer has {size} tokens, but the backbone has embeddings for only {limit}")
