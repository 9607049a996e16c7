"""Encoders that read their task from a sentence (paper, section 3.3, equations 4 and 5, table 1).

    Instruction   The instruction is encoded separately, by the same parameters. In each layer, the text attends to
                  itself and to the states of the instruction before that layer.
    Prefix        The same, but with a separate instruction encoder, which is trained, and a frozen text encoder.
    Prompt        The text starts with the instruction.

The paper does not define where positions start. As in the authors' later code, a text's positions start at 0, and the
text encoder projects the instruction's states to keys and values, even in Prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.packed import Tokens
from datamodules.records import UserError
from lightning_modules.encoders.attention import AttentionContext, Prefix
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.families import family_of


def required_instructions(instructions: Mapping[str, str], tasks: Mapping[str, str]) -> dict[str, str]:
    """Return the instruction of each task. Raises UserError if a task has none."""
    for task in tasks:
        if not instructions.get(task, "").strip():
            raise UserError(f"task {task} has no instruction, which this encoder needs; set its instruction")
    return {task: instructions[task].strip() for task in tasks}


class InstructEncoder(Encoder):
    """An encoder whose texts attend to the instruction of their task.

    encode computes the keys and values of an instruction once per block of texts (pipeline.py).

    instructions: task -> sentence.
    separate: whether to freeze the backbone, and train a copy of it that encodes instructions (the paper's Prefix).
    """

    layer_methods = ("layer", "instruction_layer")

    def __init__(
        self,
        backbone: PreTrainedModel,
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
            # The last layer stays frozen: its output is not used, so it would not get a gradient.
            self.instruction_backbone.requires_grad_(False)
            for module in (*self.instruction_family.inputs, *self.instruction_family.layers[:-1]):
                module.requires_grad_(True)
        self._instruction_tokens: dict[tuple[str, torch.device], Tokens] = {}
        limit = self.family.max_positions
        for task, instruction in self.instructions.items():
            if (length := len(self._token_ids(instruction))) > limit:
                problem = f"the instruction of task {task} has {length} tokens"
                raise UserError(f"{problem}, but the backbone has positions for {limit}")

    def served_by(self, task: str) -> str:
        self.expert_of(task)
        return self.instructions[task]

    def condition(self, task: str) -> Condition:
        self.expert_of(task)
        return Condition(prefixes=self._prefixes(self.instructions[task]))

    def _token_ids(self, instruction: str) -> list[int]:
        return self.tokenizer(instruction)["input_ids"]

    def _tokens(self, instruction: str) -> Tokens:
        """Return the token ids of an instruction. They stay on the device, so that no step waits for a copy."""
        key = instruction, self.device
        if key not in self._instruction_tokens:
            with torch.inference_mode(False):  # outside of inference mode, because training may use them, too
                self._instruction_tokens[key] = Tokens.pack([self._token_ids(instruction)]).to(self.device)
        return self._instruction_tokens[key]

    def _prefixes(self, instruction: str) -> tuple[Prefix, ...]:
        states, context = self.instruction_family.begin(self._tokens(instruction))
        prefixes = []
        for index in range(self.num_layers):
            prefix, states = self.instruction_layer(index, states, context)
            prefixes.append(prefix)
        return tuple(prefixes)

    def layer_modules(self, index: int) -> list[nn.Module]:
        instruction_layers = [self.instruction_family.layers[index]] if self.separate else []
        return [*super().layer_modules(index), *instruction_layers]

    def instruction_layer(self, index: int, states: Tensor, context: AttentionContext) -> tuple[Prefix, Tensor]:
        """Return a layer's prefix for the states (P, D) of an instruction, and the states after that layer."""
        family, prefix = self.instruction_family, self.family.prefix(self.family.layers[index], states, context)
        if index < self.num_layers - 1:  # the states after the last layer are not used
            layer = family.layers[index]
            states = family.feed_forward(layer, family.attention(layer, states, states, context), context)
        return prefix, states


class PromptEncoder(Encoder):
    """An encoder whose texts start with the instruction of their task: [CLS] instruction text [SEP].

    instructions: task -> sentence, a "prompt" of sentence-transformers.
    pool_prompt: whether mean pooling includes [CLS] and the instruction ("include_prompt" of sentence-transformers).
    max_length: maximum number of tokens, including the instruction.

    forward expects texts that already start with the prompt. encode and the data modules add it.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
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

    def skipped_positions(self, task: str) -> int:
        return 0 if self.pool_prompt else self._prompt_lengths[task]
