"""Encoders that read their task from a sentence (paper, section 3.3, equations 4 and 5, table 1).

    Instruction   the instruction is encoded on its own. In each layer the text attends to itself and to the state of
                  the instruction before that layer. Both use the same parameters.
    Prefix        the same with a separate instruction encoder. Only that one is trained; the text encoder is frozen.
    Prompt        the instruction is the beginning of the text

The paper leaves open where positions start. Here those of a text start at 0 whatever its instruction, as in the
authors' later code. The keys and values of the instruction are projections by the text encoder, also in Prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedTokenizerBase

from datamodules.records import UserError
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.families import AttentionContext, Prefix, family_of

_num_optimizer_steps = 0  # of all optimizers, because fused ones do not update the versions of weights


def _count_step(*_: Any) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def required_instructions(instructions: Mapping[str, str], tasks: Mapping[str, str]) -> dict[str, str]:
    """Return the instruction of each task. Raises UserError if a task has none."""
    for task in tasks:
        if not instructions.get(task, "").strip():
            raise UserError(f"task {task} has no instruction, which this encoder reads; set its instruction")
    return {task: instructions[task].strip() for task in tasks}


class CachedPrefixes(NamedTuple):
    """The prefixes of instructions for one version of the weights.

    parameters: the weights. As long as they are referenced, no other tensor can have their id.
    prefixes: instruction -> one Prefix per layer.
    """

    version: tuple
    parameters: list[nn.Parameter]
    prefixes: dict[str, tuple[Prefix, ...]]


class InstructEncoder(Encoder):
    """An encoder whose texts attend to the instruction of their task.

    instructions: task -> sentence.
    separate: whether a separate instruction encoder, a copy of the backbone, is trained and the backbone is frozen (the
        paper's Prefix).

    The other arguments are those of Encoder. Outside of training, the keys and values of an instruction are computed
    once and cached.
    """

    layer_methods = ("layer", "instruction_layer")

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        instructions: Mapping[str, str],
        separate: bool = False,
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__(backbone, tokenizer, tasks, pooling, normalize, max_length)
        self.instructions = required_instructions(instructions, tasks)
        self.separate = separate
        self.instruction_family = self.family
        if separate:
            self.instruction_backbone = copy.deepcopy(backbone)
            self.instruction_family = family_of(self.instruction_backbone)
            backbone.requires_grad_(False)
            # The states after the last layer are never used, so that layer would get no gradient.
            self.instruction_backbone.requires_grad_(False)
            self.instruction_backbone.embeddings.requires_grad_(True)
            self.instruction_family.layers[:-1].requires_grad_(True)
        longest = self.family.max_positions
        for task, instruction in self.instructions.items():
            if (length := len(self._token_ids(instruction))) > longest:
                raise UserError(
                    f"the instruction of task {task} has {length} tokens, but the backbone has positions for {longest}"
                )
        self._cache = CachedPrefixes((), [], {})

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"instructions": self.instructions, "separate": self.separate}

    @property
    def num_shared_layers(self) -> int:
        return 0

    def served_by(self, task: str) -> str:
        self.expert_of(task)
        return self.instructions[task]

    def condition(self, task: str) -> Condition:
        self.expert_of(task)
        instruction = self.instructions[task]
        if self.training or torch.is_grad_enabled():
            return Condition(prefixes=self._prefixes(instruction))
        version = self._weights_version()
        if self._cache.version != version:
            self._cache = CachedPrefixes(version, list(self.parameters()), {})
        if instruction not in self._cache.prefixes:
            self._cache.prefixes[instruction] = self._prefixes(instruction)
        return Condition(prefixes=self._cache.prefixes[instruction])

    def _weights_version(self) -> tuple:  # not _version, which state_dict stores with the weights
        """Return everything that prefixes depend on, except the instruction.

        One value of each parameter is included, because a change through .data does not change its version.
        """
        device = self.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        parameters = list(self.parameters())
        versions = tuple((id(p), 0 if p.is_inference() else p._version) for p in parameters)
        values = tuple(torch.stack([p.detach().reshape(-1)[p.numel() // 2].float() for p in parameters]).tolist())
        return versions, values, device, parameters[0].dtype, precision, _num_optimizer_steps

    def _token_ids(self, instruction: str) -> list[int]:
        return self.tokenizer(instruction)["input_ids"]

    def _prefixes(self, instruction: str) -> tuple[Prefix, ...]:
        ids = torch.tensor([self._token_ids(instruction)], device=self.device)
        states, context = self.instruction_family.begin(ids, torch.ones_like(ids))
        prefixes = []
        for index in range(self.num_layers):
            prefix, states = self.instruction_layer(index, states, context)
            prefixes.append(prefix)
        return tuple(prefixes)

    def layer_modules(self, index: int) -> list[nn.Module]:
        instruction_layers = [self.instruction_family.layers[index]] if self.separate else []
        return [*super().layer_modules(index), *instruction_layers]

    def instruction_layer(self, index: int, states: Tensor, context: AttentionContext) -> tuple[Prefix, Tensor]:
        """Return a layer's prefix for the states (1, P, D) of an instruction, and the states after the layer."""
        family, prefix = self.instruction_family, self.family.prefix(self.family.layers[index], states)
        if index < self.num_layers - 1:  # the states after the last layer are not used
            layer = family.layers[index]
            states = family.feed_forward(layer, family.attention(layer, states, states, context))
        return prefix, states

    def layer(
        self, index: int, hidden: Tensor, states: Tensor, context: AttentionContext, condition: Condition
    ) -> Tensor:
        layer = self.family.layers[index]
        hidden = self.family.attention(layer, hidden, states, context, prefix=condition.prefixes[index])
        return self.family.feed_forward(layer, hidden)


class PromptEncoder(Encoder):
    """An encoder whose texts start with the instruction of their task: [CLS] instruction text [SEP].

    instructions: task -> sentence.
    pool_prompt: whether mean pooling includes [CLS] and the instruction.

    Sentence-transformers calls these two a prompt and include_prompt. The other arguments are those of Encoder;
    max_length includes the instruction.

    forward expects texts that already start with the prompt. encode and the training data add it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        instructions: Mapping[str, str],
        pool_prompt: bool = True,
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__(backbone, tokenizer, tasks, pooling, normalize, max_length)
        self.instructions = required_instructions(instructions, tasks)
        self.pool_prompt = pool_prompt
        self._prompt_lengths = {task: self._num_prompt_tokens(prompt) for task, prompt in self.prompts.items()}
        for task, length in self._prompt_lengths.items():
            if length + 2 > max_length:
                raise UserError(
                    f"the instruction of task {task} has {length} tokens with [CLS], which leaves no room for texts in "
                    f"max_length {max_length}"
                )

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"instructions": self.instructions, "pool_prompt": self.pool_prompt}

    @property
    def prompts(self) -> dict[str, str]:
        return {task: f"{instruction} " for task, instruction in self.instructions.items()}

    def served_by(self, task: str) -> str:
        self.expert_of(task)
        return self.instructions[task]

    def _num_prompt_tokens(self, prompt: str) -> int:
        """Return the number of tokens up to the end of a prompt, including the special ones before it."""
        ids = self.tokenizer(prompt)["input_ids"]
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def pooled_positions(self, attention_mask: Tensor, task: str) -> Tensor:
        if self.pool_prompt:
            return attention_mask
        positions = torch.arange(attention_mask.shape[1], device=self.device)
        return attention_mask * (positions >= self._prompt_lengths[task])
