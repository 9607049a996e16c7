"""Two prompts: the instruction of the task, and the position of the paper in the citation graph.

ULTRA-DP (Chen et al., arXiv 2310.14845, section 3) attaches a node to a paper's graph. Its features are a vector of the
task plus tanh(W r / std(r) + b), where r is the reachability of the anchors: the probabilities that a random walk from
the paper is at each of the papers that walks visit most. Here, the text attends to the instruction (instruct.py), and
the second term is added to the embedding of the text's first token (text_features.py).

Queries, and papers outside the graph, have no position. They are encoded as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.citation_graph import graph_of, positions
from datamodules.options import check_number
from datamodules.records import UserError, prefixed
from lightning_modules.encoders.base import Condition
from lightning_modules.encoders.instruct import InstructEncoder
from lightning_modules.encoders.text_features import TextFeatures


class DualPromptEncoder(InstructEncoder):
    """An InstructEncoder with the positions of papers in the citation graph.

    The graph consists of the training links. Positions are computed once, before training, and saved with the encoder.

    instructions, separate: as in InstructEncoder.
    prompt: whether texts attend to the instruction. If not, and without anchors, this is a SharedEncoder.
    num_anchors: number of anchors; 0: no positions, as in an InstructEncoder.
    steps: maximum number of steps of a walk.
    graph: file with pairs of paper ids, one pair per line, whose links replace the training links.
    link_task: task whose papers are in the graph; by default, the only task of kind link_prediction.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        instructions: Mapping[str, str],
        separate: bool = False,
        prompt: bool = True,
        num_anchors: int = 32,
        steps: int = 9,
        graph: str = "",
        link_task: str = "",
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        if separate and not prompt:
            raise UserError("separate: cannot be combined with prompt=false, which leaves out the instruction encoder")
        check_number("num_anchors", num_anchors, minimum=0)
        check_number("steps", steps, minimum=1)
        super().__init__(backbone, tokenizer, tasks, instructions, separate, pooling, normalize, max_length)
        self.prompt, self.num_anchors, self.steps = prompt, num_anchors, steps
        self.graph, self.link_task = graph, link_task
        if not prompt:
            self.instruction_family = None  # type: ignore[assignment]
        if num_anchors:
            self.features["positions"] = TextFeatures(num_anchors, self.dimension)

    @property
    def num_shared_layers(self) -> int:
        return 0 if self.prompt else self.num_layers

    def served_by(self, task: str) -> str:
        return super().served_by(task) if self.prompt else ""

    def condition(self, task: str) -> Condition:
        self.expert_of(task)
        return super().condition(task) if self.prompt else Condition()

    def prepare(self, data: Any) -> None:
        """Compute the positions, unless the encoder was loaded with them. Papers added since then get no position."""
        if not self.num_anchors or len(features := cast(TextFeatures, self.features["positions"])):
            return
        task = self._link_task(data)
        with prefixed("graph: "):
            graph = graph_of(task, self.graph or None)
        rows, vectors = positions(graph, self.num_anchors, self.steps)
        features.fill_rows(self, data, task, rows.tolist(), vectors)

    def _link_task(self, data: Any) -> Any:
        """Return the data of the task whose papers are in the graph."""
        tasks = getattr(data, "by_name", {})
        names = [name for name, task in tasks.items() if task.queries_are_documents]
        chosen = [name for name in names if self.link_task in ("", name)]
        if len(chosen) != 1:
            actual = f"{self.link_task!r}" if self.link_task else f"{len(names)} such tasks"
            expected = f"one of {', '.join(names)}" if names else "a task of kind link_prediction in the training"
            raise UserError(f"link_task: the positions need a citation graph; expected {expected}, got {actual}")
        return tasks[chosen[0]]
