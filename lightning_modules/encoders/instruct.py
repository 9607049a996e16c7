"""Encoders that read their task from a sentence (paper, section 3.3, equations 4 and 5, table 1).

    Instruction   the instruction is encoded alone; in every layer the text attends to the instruction's state before
                  that layer, and to itself. One set of parameters for both.
    Prefix        the same with an instruction encoder of its own, which alone is trained; the text encoder is frozen
    Prompt        the instruction simply precedes the text

The paper leaves open where positions begin: those of a text begin at 0 whatever its instruction, as in the authors'
later code. The instruction's keys and values are the text encoder's own projections of its states, also in Prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from datamodules.records import UserError
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.families import Prefix, Surroundings, family_of

_optimizer_steps = [0]  # of any optimizer: fused ones change weights without counting up their versions


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


def checked_instructions(instructions: Mapping[str, str], tasks: Mapping[str, str]) -> dict[str, str]:
    """The tasks' instructions. Raises UserError naming a task that has none."""
    for task in tasks:
        if not instructions.get(task, "").strip():
            raise UserError(f"task {task} has no instruction, which this encoder reads (task.{task}.instruction)")
    return {task: instructions[task].strip() for task in tasks}


class Kept(NamedTuple):
    """Prefixes by instruction, for a state of the weights. parameters are held, so that no other takes their place."""

    state: tuple
    parameters: list[nn.Parameter]
    prefixes: dict[str, list[Prefix]]


class InstructEncoder(Encoder):
    """An encoder whose texts attend to their task's instruction.

    instructions: task -> sentence. separate: an instruction encoder of its own, a copy of the backbone at first, is
    trained, and the backbone frozen (the paper's Prefix). Further arguments as in Encoder.

    Without gradients, outside of training, an instruction's keys and values are computed once and kept.
    """

    layer_methods = ("layer", "instruction_layer")

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer,
        tasks: Mapping[str, str],
        instructions: Mapping[str, str],
        separate: bool = False,
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__(backbone, tokenizer, tasks, pooling, normalize, max_length)
        self.instructions = checked_instructions(instructions, tasks)
        self.separate = separate
        self.instruction_family = self.family
        if separate:
            self.instruction_backbone = copy.deepcopy(backbone)
            self.instruction_family = family_of(self.instruction_backbone)
            backbone.requires_grad_(False)
            # The last layer's states are never read, so it could not learn.
            self.instruction_backbone.requires_grad_(False)
            self.instruction_backbone.embeddings.requires_grad_(True)
            self.instruction_family.layers[:-1].requires_grad_(True)
        for task, instruction in self.instructions.items():
            length, longest = len(self._ids(instruction)), self.family.max_positions
            if length > longest:
                raise UserError(f"task.{task}.instruction: has {length} tokens, the backbone positions for {longest}")
        self._kept = Kept((), [], {})

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"instructions": self.instructions, "separate": self.separate}

    @property
    def num_shared_layers(self) -> int:
        return 0

    def served_by(self, task: str) -> str:
        self.expert_of(task)
        return self.instructions[task]

    def guide(self, task: str) -> list[Prefix]:
        """Each layer's keys and values of a task's instruction."""
        self.expert_of(task)
        instruction = self.instructions[task]
        if self.training or torch.is_grad_enabled():
            return self._prefixes(instruction)
        state = self._state()
        if self._kept.state != state:
            self._kept = Kept(state, list(self.parameters()), {})
        if instruction not in self._kept.prefixes:
            self._kept.prefixes[instruction] = self._prefixes(instruction)
        return self._kept.prefixes[instruction]

    def _state(self) -> tuple:
        """What an instruction's keys and values depend on beside itself.

        One value of each parameter is part of it, because edits through .data raise no version.
        """
        kind = self.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        parameters = list(self.parameters())
        versions = tuple((id(p), 0 if p.is_inference() else p._version) for p in parameters)
        values = tuple(torch.stack([p.detach().reshape(-1)[p.numel() // 2].float() for p in parameters]).tolist())
        return versions, values, kind, parameters[0].dtype, precision, *_optimizer_steps

    def _ids(self, instruction: str) -> list[int]:
        return self.tokenizer(instruction)["input_ids"]

    def _prefixes(self, instruction: str) -> list[Prefix]:
        ids = torch.tensor([self._ids(instruction)], device=self.device)
        states, around = self.instruction_family.begin(ids, torch.ones_like(ids))
        prefixes = []
        for index in range(self.num_layers):
            prefix, states = self.instruction_layer(index, states, around)
            prefixes.append(prefix)
        return prefixes

    def layer_modules(self, index: int) -> list[nn.Module]:
        own = [self.instruction_family.layers[index]] if self.separate else []
        return [*super().layer_modules(index), *own]

    def instruction_layer(self, index: int, states: Tensor, around: Surroundings) -> tuple[Prefix, Tensor]:
        """A layer's keys and values of an instruction's states (1, P, D), and the states after it."""
        family, prefix = self.instruction_family, self.family.prefix(self.family.layers[index], states)
        if index < self.num_layers - 1:  # of the last one nothing reads them
            own = family.layers[index]
            states = family.feed_forward(own, family.attention(own, states, states, around))
        return prefix, states

    def layer(self, index: int, hidden: Tensor, context: Tensor, around: Surroundings, guide: list[Prefix]) -> Tensor:
        layer = self.family.layers[index]
        hidden = self.family.attention(layer, hidden, context, around, prefix=guide[index])
        return self.family.feed_forward(layer, hidden)


class PromptEncoder(Encoder):
    """An encoder whose texts begin with their task's instruction: [CLS] instruction text [SEP].

    instructions: task -> sentence. pool_prompt: whether [CLS] and the instruction belong to the mean (with pooling
    "mean"). Both are what sentence-transformers calls a prompt, and include_prompt. Further arguments as in Encoder;
    max_length counts the instruction too.

    forward is given texts that begin with the prompt; encode, and training, put it there.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer,
        tasks: Mapping[str, str],
        instructions: Mapping[str, str],
        pool_prompt: bool = True,
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__(backbone, tokenizer, tasks, pooling, normalize, max_length)
        self.instructions = checked_instructions(instructions, tasks)
        self.pool_prompt = pool_prompt
        self._lengths = {task: self._num_tokens(prompt) for task, prompt in self.prompts.items()}
        for task, length in self._lengths.items():
            if length + 2 > max_length:
                raise UserError(
                    f"task.{task}.instruction: has {length} tokens with [CLS], which leaves no room for texts in "
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

    def _num_tokens(self, prompt: str) -> int:
        """Tokens of a prompt with the special ones before it, without those after it."""
        ids = self.tokenizer(prompt)["input_ids"]
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def pooled_positions(self, attention_mask: Tensor, task: str) -> Tensor:
        if self.pool_prompt:
            return attention_mask
        return attention_mask * (torch.arange(attention_mask.shape[1], device=self.device) >= self._lengths[task])
