"""Measure what W&B costs a training: python -m experiments.bench.tracking [rounds=N] [steps=N] [every=N]

One process trains throughout. Its rows go in turns to metrics.jsonl only, to W&B offline, and to W&B online with a
server that refuses connections or never answers; so all ways are affected alike by other load on the machine.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from datamodules.options import option
from experiments.build.data import build_data
from experiments.build.module import build_module
from experiments.config.arguments import parse
from experiments.config.experiment import load_config
from experiments.run.wandb_logger import build_loggers
from experiments.shared.console import entry_point
from lightning_modules.loggers import RunLogger

log = logging.getLogger(__name__)

BASELINE = "metrics.jsonl"
WAYS = {
    BASELINE: ["wandb.mode=disabled"],
    "offline": ["wandb.mode=offline"],
    "refusing server": ["wandb.mode=online"],
    "silent server": ["wandb.mode=online"],
}


@dataclass(kw_only=True)
class TrackingOptions:
    """Measure what W&B costs a training, in wall-clock time and in the training's own thread."""

    rounds: int = option(10, "number of rounds; a ratio is their median", minimum=1)
    steps: int = option(100, "steps of each way in a round", minimum=1)
    every: int = option(20, "steps between two logged rows", minimum=1)


def main(arguments: Sequence[str]) -> None:
    options = parse(TrackingOptions, arguments)
    listener = socket.create_server(("127.0.0.1", 0))  # accepts connections, but nothing ever reads them
    urls = {"silent server": f"http://127.0.0.1:{listener.getsockname()[1]}"}
    os.environ["WANDB_API_KEY"] = "0" * 40
    training, loggers = Training(), {}
    with tempfile.TemporaryDirectory() as root:
        for way, overrides in WAYS.items():
            folder = Path(root, way.replace(" ", "-"))
            folder.mkdir()
            os.environ["WANDB_BASE_URL"] = urls.get(way, "http://127.0.0.1:9")
            loggers[way] = build_loggers(load_config("moe", [*overrides, "wandb.finish_timeout=1"]), folder)
            measure(training, loggers[way], 0, options)  # W&B starts, and the machine warms up
        times: dict[str, list[Times]] = {way: [] for way in WAYS}
        for number in range(1, options.rounds + 1):
            first = number % len(WAYS)
            for way in [*WAYS][first:] + [*WAYS][:first]:
                times[way].append(measure(training, loggers[way], number * options.steps, options))
        report(times, options)
        for way in WAYS:
            for logger in loggers[way]:
                logger.close()


class Training:
    """The training of the sample, step by step."""

    def __init__(self) -> None:
        config = load_config("moe", ["trainer.accelerator=cpu", "trainer.max_steps=1000000"])
        torch.manual_seed(0)
        data = build_data(config, training=True)
        self.module = build_module(config, data)
        self.module.train()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.batches = iter(data.train_dataloader())

    def step(self) -> dict[str, float]:
        """Take an optimizer step, and return the values to log."""
        batch = next(self.batches)
        loss = self.module.training_step(batch, 0)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {f"train/{batch.task}/loss": loss.item(), "train/lr": 1e-4, "train/batch": batch.fingerprint}


@dataclass(frozen=True)
class Times:
    """Seconds of wall-clock time, and of computing in the training's thread."""

    wall: float
    thread: float


def measure(training: Training, loggers: Sequence[RunLogger], first: int, options: TrackingOptions) -> Times:
    """Time some steps from step `first` on, with their logged rows."""
    wall, thread = time.perf_counter(), time.thread_time()
    for step in range(first, first + options.steps):
        values = training.step()
        if step % options.every == 0:
            for logger in loggers:
                logger.log_metrics(values, step=step)
    return Times(time.perf_counter() - wall, time.thread_time() - thread)


def report(times: dict[str, list[Times]], options: TrackingOptions) -> None:
    base = times[BASELINE]
    median = statistics.median(each.wall for each in base)
    log.info("%d steps, a row every %d: %.2f s with metrics.jsonl", options.steps, options.every, median)
    for way in [*WAYS][1:]:
        pairs = list(zip(times[way], base, strict=True))
        wall = statistics.median(each.wall / plain.wall for each, plain in pairs)
        thread = statistics.median(each.thread / plain.thread for each, plain in pairs)
        log.info(
            "W&B, %s: %+.1f %% of time, %+.1f %% of the thread's computing", way, 100 * wall - 100, 100 * thread - 100
        )


if __name__ == "__main__":
    entry_point(main)
