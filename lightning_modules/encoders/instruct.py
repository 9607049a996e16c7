"""Encoders that read their task from a sentence (paper, section 3.3, equations 4 and 5, table 1).

    Instruction   The instruction is encoded separately, by the same parameters. In each layer, the text attends to
                  itself and to the states of the instruction before that layer.
    Prefix        The same, with a separate instruction encoder. Only that one is trained; the text encoder is frozen.
    Prompt        The text starts with the instruction.

The paper does not say where positions start. As in the authors' later code, those of a text start at 0, and the text
encoder projects the instruction's states to keys and values, in Prefix too.
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

_num_optimizer_steps = 0  # of all optimizers; fused optimizers change weights without changing their version


def _count_step(*_: Any) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def required_instructions(instructions: Mapping[str, str], tasks: Mapping[str, str]) -> dict[str, str]:
    """Return the instruction of each task. Raises UserError if a task has none."""
    for task in tasks:
        if not instructions.get(task, "").strip():
            raise UserError(f"task {task} has no instruction, which this encoder needs; set its instruction")
    return {task: instructions[task].strip() for task in tasks}


class CachedPrefixes(NamedTuple):
    """Instruction -> one Prefix per layer, for one version of the weights.

    parameters: the weights. While they are referenced, no other tensor can have their id.
    """

    version: tuple
    parameters: list[nn.Parameter]
    prefixes: dict[str, tuple[Prefix, ...]]


class InstructEncoder(Encoder):
    """An encoder whose texts attend to the instruction of their task. At inference, its keys and values are cached.

    instructions: task -> sentence.
    separate: whether to freeze the backbone, and train a copy of it that encodes instructions (the paper's Prefix).
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
            # The last layer stays frozen. It would get no gradient, because the states after it are not used.
            self.instruction_backbone.requires_grad_(False)
            self.instruction_backbone.embeddings.requires_grad_(True)
            self.instruction_family.layers[:-1].requires_grad_(True)
        limit = self.family.max_positions
        for task, instruction in self.instructions.items():
            if (length := len(self._token_ids(instruction))) > limit:
                problem = f"the instruction of task {task} has {length} tokens"
                raise UserError(f"{problem}, but the backbone has positions for {limit}")
        self._cache = CachedPrefixes((), [], {})
        self._instruction_ids: dict[tuple[str, torch.device], Tensor] = {}

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
        """Return a key of everything that prefixes depend on, except the instruction.

        It includes one value of each parameter, because a change through .data does not change its version.
        """
        device = self.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        parameters = list(self.parameters())
        versions = tuple((id(p), 0 if p.is_inference() else p._version) for p in parameters)
        values = tuple(torch.stack([p.detach().reshape(-1)[p.numel() // 2].float() for p in parameters]).tolist())
        return versions, values, device, parameters[0].dtype, precision, _num_optimizer_steps

    def _token_ids(self, instruction: str) -> list[int]:
        return self.tokenizer(instruction)["input_ids"]

    def _input_ids(self, instruction: str) -> Tensor:
        """Return the token ids (1, P) of an instruction. They stay on the device, so that no step waits for a copy."""
        key = instruction, self.device
        if key not in self._instruction_ids:
            with torch.inference_mode(False):  # training may use them, too
                self._instruction_ids[key] = torch.tensor([self._token_ids(instruction)], device=self.device)
        return self._instruction_ids[key]

    def _prefixes(self, instruction: str) -> tuple[Prefix, ...]:
        ids = self._input_ids(instruction)
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
        """Return a layer's prefix for the states (1, P, D) of an instruction, and the states after that layer."""
        family, prefix = self.instruction_family, self.family.prefix(self.family.layers[index], states)
        if index < self.num_layers - 1:  # the states after the last layer are not used
            layer = family.layers[index]
            states = family.feed_forward(layer, family.attention(layer, states, states, context))
        return prefix, states

    def layer(self, index, hidden, states, context, condition):
        layer = self.family.layers[index]
        hidden = self.family.attention(layer, hidden, states, context, prefix=condition.prefixes[index])
        return self.family.feed_forward(layer, hidden)


class PromptEncoder(Encoder):
    """An encoder whose texts start with the instruction of their task: [CLS] instruction text [SEP].

    instructions: task -> sentence, a "prompt" of sentence-transformers.
    pool_prompt: whether mean pooling includes [CLS] and the instruction ("include_prompt" of sentence-transformers).
    max_length: maximum number of tokens, including the instruction.

    forward expects texts that already start with the prompt. encode and the data modules add it.
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
        self._prompt_lengths = {}
        for task, prompt in self.prompts.items():
            ids = tokenizer(prompt)["input_ids"]
            length = len(ids) - (ids[-1] in tokenizer.all_special_ids)  # without [SEP]
            self._prompt_lengths[task] = length
            if length + 2 > max_length:
                problem = f"the instruction of task {task} has {length} tokens with [CLS]"
                raise UserError(f"{problem}, which leaves no room for texts in max_length {max_length}")

    @property
    def prompts(self) -> dict[str, str]:
        return {task: f"{instruction} " for task, instruction in self.instructions.items()}

    def served_by(self, task: str) -> str:
        self.expert_of(task)
        return self.instructions[task]

    def pooled_positions(self, attention_mask: Tensor, task: str) -> Tensor:
        if self.pool_prompt:
            return attention_mask
        positions = torch.arange(attention_mask.shape[1], device=self.device)
        return attention_mask * (positions >= self._prompt_lengths[task])
