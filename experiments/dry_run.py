"""What a training will need, before it is queued: python -m experiments.dry_run EXPERIMENT [scale=S] [key=value ...]

Reads the data and builds the encoder as training does, and takes a few steps of every task on one rank: memory and
time are measured where this runs. What follows for the configured ranks and steps is computed. Nothing is written but
the cache of the data.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence

import lightning as L
import torch
from rich.table import Table

from datamodules.records import UserError
from experiments.build.data import build_data, describe_schedule
from experiments.build.module import build_module
from experiments.build.trainer import precision_of
from experiments.config.experiment import experiments, load_config
from experiments.config.schema import Config
from experiments.run.predict import Prediction, predict, ranks_of
from experiments.shared.console import counted, entry_point, table_console

log = logging.getLogger(__name__)


def dry_run(experiment: str, overrides: Sequence[str] = ()) -> Prediction:
    """Predict, and print the tables."""
    config = load_config(experiment, overrides)
    with tempfile.TemporaryDirectory() as folder:
        config.run.dir = folder  # of quarantined lines
        started = time.perf_counter()
        L.seed_everything(config.run.seed, verbose=False)
        data = build_data(config, training=True)
        module = build_module(config, data)
        describe_schedule(config, data)
        prediction = predict(config, data, module, time.perf_counter() - started)
    _show_tasks(config, prediction)
    _show_memory(prediction)
    _tell(config, prediction)
    return prediction


def _show_tasks(config: Config, prediction: Prediction) -> None:
    columns = ("batches", "ms a batch", "tokens", "tokens/s", "queries", "documents of all ranks", "TFLOP")
    table = Table("task", *columns, title=f"{config.experiment}, {config.scale}: a batch on one rank")
    for name, cost in prediction.tasks.items():
        table.add_row(
            name,
            f"{cost.batches:,}",
            f"{1e3 * cost.seconds:,.1f}",
            f"{cost.tokens:,.0f}",
            f"{cost.tokens / cost.seconds:,.0f}",
            f"{cost.queries:,.0f}",
            f"{cost.documents:,.0f}",
            f"{cost.flops / 1e12:.3g}",
        )
    table_console().print(table)


def _show_memory(prediction: Prediction) -> None:
    table = Table("memory of a rank", "MB", "")
    share = ", the share of a rank" if prediction.gathered else ""
    for name, how in (
        ("weights", f"computed{share}"),
        ("gradients", f"computed, of the task that has most{share}"),
        ("optimizer", f"computed{share}"),
        ("process", "measured: Python, libraries, data" if not torch.cuda.is_available() else "measured: other memory"),
        ("activations", "measured: the rest of the peak; data.token_budget and trainer.grad_cache bound them"),
        ("further", "computed: vectors of the other ranks' documents, and similarities with them"),
        ("gathered", "computed: weights and gradients that stand whole while a layer is computed"),
        ("memory", "in all"),
    ):
        table.add_row(name, f"{getattr(prediction, name) / 2**20:,.0f}", how)
    table_console().print(table)


def _tell(config: Config, prediction: Prediction) -> None:
    ranks, steps = ranks_of(config), config.trainer.max_steps
    training = prediction.training(steps)
    log.info(
        "measured on %s in %s, %s; configured: %s of %s",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU",
        precision_of(config),
        counted(torch.get_num_threads(), "thread"),
        counted(ranks, "rank"),
        counted(config.trainer.num_nodes, "node"),
    )
    log.info(
        "a step takes %.1f ms (of which %.1f ms are the update); start %s, %d steps %s, evaluation %s, in all %s",
        1e3 * training / steps,
        1e3 * prediction.update,
        _duration(prediction.start),
        steps,
        _duration(training),
        _duration(prediction.evaluation),
        _duration(prediction.start + training + prediction.evaluation),
    )
    log.info(
        "not counted: imports (some seconds), BM25, ranking, checkpoints, logging, and other programs on the machine, "
        "W&B's own among them"
    )
    if prediction.gathered:
        log.info(
            "not measured: gathering %.0f MB of weights forward and backward for each chunk, exchanging gradients, and "
            "ranks that share cores; an evaluation or a mining holds all weights once more",
            prediction.weights * ranks / 2**20,
        )
    elif ranks > 1:
        log.info(
            "not measured: exchanging %.0f MB of gradients a step between ranks, and ranks that share cores",
            prediction.gradients / 2**20,
        )
    unmeasured = {
        "objective.balance": config.objective.balance in ("gradnorm", "pcgrad"),
        "mining": config.mining.every_n_steps or config.mining.every_n_epochs,
        "diagnostics": config.diagnostics.every_n_steps,
    }
    if any(unmeasured.values()):
        log.info("not measured: %s", ", ".join(name for name, there in unmeasured.items() if there))
    if not torch.cuda.is_available():
        work = sum(cost.flops * cost.batches for cost in prediction.tasks.values())
        log.info(
            "on a GPU: not measured here. The work is %.3g PFLOP on each rank (computed: 6 for each parameter and "
            "token), %s at 50 TFLOP/s; memory without the process is about that above, in bf16 less",
            work / 1e15,
            _duration(work / 50e12),
        )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def main(arguments: Sequence[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise UserError(f"which experiment? There are {', '.join(experiments())}: python -m experiments.dry_run moe")
    dry_run(arguments[0], arguments[1:])


if __name__ == "__main__":
    entry_point(main)
