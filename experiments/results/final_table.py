"""The final table of a run: BM25, the encoder before training, and the trained encoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from datamodules.files import write_json
from datamodules.records import Benchmark, UserError
from experiments.build.models import System
from experiments.build.module import start_of
from experiments.config.experiment import LAST
from experiments.config.schema import Config
from experiments.results.measuring import evaluate_system
from experiments.results.result_tables import result_tables
from experiments.results.results import Benchmarks, Results, RunInfo, combine, read_tables, tables_to_json
from experiments.run.folder import RunFolder
from experiments.shared.table_formats import print_tables
from lightning_modules.distributed.collectives import rank
from lightning_modules.encoders.base import Encoder
from lightning_modules.retrieval.compute import describe_device
from lightning_modules.retrieval.vector_cache import VectorCache

log = logging.getLogger(__name__)


class FinalTable:
    """Evaluates a run's systems on the final split, and writes results.json. All ranks share the work.

    Encoders compute in fp32 here, whatever the precision of the training.
    """

    def __init__(self, config: Config, benchmarks: Sequence[Benchmark], folder: RunFolder):
        self.config, self.benchmarks, self.folder = config, list(benchmarks), folder
        split = config.evaluation.split
        if not self.benchmarks and split != "none":
            raise UserError(
                f"evaluation.split: no collection has a split {split!r} for the final table; add {split}.jsonl or "
                f"qrels/{split}.tsv to one, or set evaluation.split=dev (or train, to see whether the model learns)"
            )
        if self.benchmarks and (missing := set(config.task) - {benchmark.task for benchmark in self.benchmarks}):
            log.warning("the final table has no results for %s: no %s split", ", ".join(sorted(missing)), split)
        self.baselines_file = folder.path / "baselines.json"  # so that a resumed run need not evaluate them again
        self.results: Results | None = None

    def baselines(self, encoder: Encoder) -> None:
        """Evaluate BM25, and the encoder before training: "untrained" if its weights are random, else "start"."""
        log.info("baselines on %s", describe_device(encoder.device))
        model = start_of(self.config)
        start = self._evaluate_encoder("start" if model else "untrained", encoder, model)
        tables = combine(self._evaluate(System("bm25", "bm25", None, "bm25")), start)
        if rank() == 0:
            write_json(self.baselines_file, self._protocol() | {"benchmarks": tables_to_json(tables)})

    def finish(
        self,
        encoder: Encoder,
        checkpoint: str,
        checkpoint_step: int,
        last_step: int,
        document_vectors: VectorCache | None = None,
    ) -> None:
        """Evaluate the trained encoder and write results.json.

        checkpoint: name of the file that the encoder was loaded from. checkpoint_step: optimizer step of that file.
        last_step: optimizer step at which training ended.
        document_vectors: vectors of the documents, if the encoder was only trained for queries.
        """
        if self.benchmarks:
            log.info("final table on %s", describe_device(encoder.device))
        info = RunInfo(
            experiment=self.config.experiment,
            scale=self.config.scale,
            seed=self.config.run.seed,
            steps=self.config.trainer.max_steps,
            checkpoint=checkpoint,
            checkpoint_step=checkpoint_step,
            stopped_at=last_step if last_step < self.config.trainer.max_steps else None,
            **self._protocol(),
        )
        tables = combine(
            self._read_baselines(), self._evaluate_encoder("trained", encoder, document_vectors=document_vectors)
        )
        self.results = Results(info=info, benchmarks=tables)
        if rank() == 0:
            self.results.write(self.folder.results)

    def logged_metrics(self) -> dict[str, float]:
        """Return the trained encoder's metrics for loggers: SPLIT/BENCHMARK/METRIC, and the first metric's mean."""
        split, first = self.results.info.split, self.results.info.metrics[0]
        trained = {name: table.systems["trained"].metrics for name, table in self.results.benchmarks.items()}
        values = {f"{split}/{name}/{metric}": x for name, metrics in trained.items() for metric, x in metrics.items()}
        return values | {f"{split}/mean/{first}": self.results.means()["trained"]}

    def logged_rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return the columns and rows of the table, for loggers."""
        metrics = self.results.info.metrics
        rows = [
            [table.task, name, system, *(result.metrics.get(metric) for metric in metrics)]
            for name, table in self.results.benchmarks.items()
            for system, result in table.systems.items()
        ]
        return ["task", "benchmark", "system", *metrics], rows

    def _evaluate_encoder(
        self, name: str, encoder: Encoder, model: str | None = None, document_vectors: VectorCache | None = None
    ) -> Benchmarks:
        vectors = VectorCache(encoder, token_budget=self.config.data.token_budget)
        similarity = self.config.objective.similarity
        return self._evaluate(System(name, model or name, encoder, similarity, vectors, document_vectors))

    def _evaluate(self, system: System) -> Benchmarks:
        metrics, folder = self.config.evaluation.metrics, self.folder.path / "runs"
        return combine(*(evaluate_system(system, benchmark, metrics, folder) for benchmark in self.benchmarks))

    def _protocol(self) -> dict[str, Any]:
        return {"split": self.config.evaluation.split, "metrics": self.config.evaluation.metrics}

    def _read_baselines(self) -> Benchmarks:
        """Return the baselines, if they were evaluated on the same data with the same metrics and protocols."""
        if not self.baselines_file.is_file():
            if self.config.evaluation.baselines and self.benchmarks:
                log.warning("the final table has no baselines, because they are only evaluated when a run starts")
            return {}
        try:
            content, tables = read_tables(self.baselines_file)
        except UserError as error:
            log.warning("the final table has no baselines: %s", error)
            return {}
        now = {benchmark.name: (benchmark.protocol, benchmark.fingerprint()) for benchmark in self.benchmarks}
        then = {name: (table.protocol, table.data) for name, table in tables.items()}
        if {key: content.get(key) for key in self._protocol()} != self._protocol() or then != now:
            log.warning(
                "the baselines were evaluated with other data, metrics or protocols, so the final table leaves them out"
            )
            return {}
        return tables


def show_results(results: Results) -> None:
    """Print the results of a run."""
    info = results.info
    if not results.benchmarks:
        log.info("no final table (evaluation.split=none); the run ended at step %d", info.checkpoint_step)
        return
    chosen = "" if info.checkpoint != LAST.name else " (the dev splits were not used)"
    stopped = f", stopped early at step {info.stopped_at}" if info.stopped_at else ""
    starts = {table.systems["start"].model for table in results.benchmarks.values() if "start" in table.systems}
    start = f", start: {starts.pop()}" if len(starts) == 1 and starts != {"start"} else ""  # "start" in old files
    title = (
        f"{info.experiment}, scale {info.scale}, seed {info.seed}, {info.checkpoint}{chosen} of step "
        f"{info.checkpoint_step} of {info.steps}{stopped}, {info.split} split{start}"
    )
    print_tables("table", result_tables(results.benchmarks, info.metrics, title), [])
