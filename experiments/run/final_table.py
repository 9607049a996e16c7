"""The final table of a run: measured, written and shown."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from datamodules.files import read_json, write_json
from datamodules.records import Benchmark, UserError
from experiments.config.schema import Config
from experiments.results.results import Results, combine, evaluate_bm25, evaluate_encoder
from experiments.results.table import show
from experiments.run.folder import RunFolder
from lightning_modules.distributed.collectives import rank
from lightning_modules.encoders.base import Encoder

log = logging.getLogger(__name__)


class FinalTable:
    """What a run comes to: BM25, the untrained and the trained encoder on the final split, all ranks sharing the work.

    The encoders compute in fp32, as in `make eval`, whatever the training's precision.

    content: what stands in results.json.
    """

    def __init__(self, config: Config, benchmarks: Sequence[Benchmark], folder: RunFolder):
        self.config, self.benchmarks, self.folder = config, list(benchmarks), folder
        if not self.benchmarks:
            split = config.evaluation.split
            raise UserError(
                f"evaluation.split: no collection has a split {split!r} for the final table; add it ({split}.jsonl or "
                f"qrels/{split}.tsv), or measure on another (evaluation.split=dev, or train to see that it learns)"
            )
        without = set(config.task) - {benchmark.task for benchmark in self.benchmarks}
        if without:
            missing = ", ".join(sorted(without))
            log.warning("no %s split for %s: the table is without it", config.evaluation.split, missing)
        self.kept = folder.path / "baselines.json"  # a resumed run does not measure them again
        self.content: dict[str, Any] = {}

    def measure(self, system: str, encoder: Encoder) -> Results:
        return evaluate_encoder(
            system,
            encoder,
            self.benchmarks,
            self.config.evaluation.metrics,
            self.folder.path / "runs",
            similarity=self.config.objective.similarity,
            token_budget=self.config.data.token_budget,
        )

    def baselines(self, encoder: Encoder) -> None:
        """Measure BM25 and the encoder as it starts: untrained, or what init_from or extend.model gave."""
        bm25 = evaluate_bm25(self.benchmarks, self.config.evaluation.metrics, self.folder.path / "runs")
        start = "start" if self.config.init_from or self.config.extend.model else "untrained"
        found = combine(bm25, self.measure(start, encoder))
        if rank() == 0:
            write_json(self.kept, self._protocol() | {"benchmarks": found})

    def _protocol(self) -> dict[str, Any]:
        return {"split": self.config.evaluation.split, "metrics": self.config.evaluation.metrics}

    def _measured_before(self) -> Results:
        """The baselines, if they were measured on the same split and data with the same metrics and protocols."""
        if not self.kept.is_file():
            return {}
        before = read_json(self.kept)
        now = {benchmark.name: (benchmark.protocol, benchmark.fingerprint()) for benchmark in self.benchmarks}
        then = {name: (of.get("protocol"), of.get("data")) for name, of in before["benchmarks"].items()}
        if self._protocol() | {"benchmarks": before["benchmarks"]} != before or then != now:
            log.warning("the baselines were measured on other data or by other rules: the table is without them")
            return {}
        return before["benchmarks"]

    def finish(self, encoder: Encoder, checkpoint: str, checkpoint_step: int) -> None:
        """Measure the trained encoder and write results.json. checkpoint: the file it is from, of which step."""
        self.content = {
            "experiment": self.config.experiment,
            "scale": self.config.scale,
            "seed": self.config.run.seed,
            "steps": self.config.trainer.max_steps,
            "checkpoint": checkpoint,
            "checkpoint_step": checkpoint_step,
            **self._protocol(),
            "benchmarks": combine(self._measured_before(), self.measure("trained", encoder)),
        }
        if rank() == 0:
            write_json(self.folder.results, self.content)

    def flat(self) -> dict[str, float]:
        """The trained encoder's figures for loggers: <split>/<benchmark>/<metric>, and the mean of the first metric."""
        split, first = self.content["split"], self.content["metrics"][0]
        trained = {name: result["systems"]["trained"] for name, result in self.content["benchmarks"].items()}
        values = {f"{split}/{name}/{metric}": x for name, means in trained.items() for metric, x in means.items()}
        return values | {f"{split}/mean/{first}": sum(means[first] for means in trained.values()) / len(trained)}

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table, for loggers."""
        metrics = self.content["metrics"]
        rows = [
            [result["task"], name, system, *(means.get(metric) for metric in metrics)]
            for name, result in self.content["benchmarks"].items()
            for system, means in result["systems"].items()
        ]
        return ["task", "benchmark", "system", *metrics], rows

    @staticmethod
    def show(content: dict[str, Any]) -> None:
        """Print what stands in a results.json."""
        what = f"{content['experiment']}, scale {content['scale']}, seed {content['seed']}"
        step = f"{content['checkpoint']} of step {content['checkpoint_step']} of {content['steps']}"
        title = f"{what}, {step}, {content['split']} split"
        show(content["benchmarks"], content["metrics"], title)
