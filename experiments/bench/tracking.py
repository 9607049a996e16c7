"""Measure how much W&B slows down training: python -m experiments.bench.tracking --help"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datamodules.options import option
from experiments.bench.timing import DEVICES
from experiments.build.data import build_data
from experiments.build.module import build_module
from experiments.config.arguments import parse
from experiments.config.experiment import load_config
from experiments.run.wandb_logger import build_loggers
from experiments.shared.console import entry_point
from lightning_modules.loggers import RunLogger
from lightning_modules.retrieval.compute import resolve_device

log = logging.getLogger(__name__)

BASELINE = "metrics.jsonl"
SETUPS = {
    BASELINE: ["wandb.mode=disabled"],
    "offline": ["wandb.mode=offline"],
    "refusing server": ["wandb.mode=online"],
    "silent server": ["wandb.mode=online"],
}


@dataclass(kw_only=True)
class TrackingOptions:
    """Measure how much W&B slows down training, in wall-clock time and in CPU time of the training thread.

    One process trains throughout, and switches between the setups in turn, so that other load on the machine affects
    all alike: metrics.jsonl only, W&B offline, and W&B online with a server that refuses connections or never answers.
    """

    rounds: int = option(10, "number of rounds; ratios are medians over rounds", minimum=1)
    steps: int = option(100, "number of steps of each setup per round", minimum=1)
    every: int = option(20, "number of steps between two logged rows", minimum=1)
    device: str = option("auto", DEVICES)


def main(arguments: Sequence[str]) -> None:
    options = parse(TrackingOptions, arguments)
    listener = socket.create_server(("127.0.0.1", 0))  # accepts connections, but never answers
    urls = {"silent server": f"http://127.0.0.1:{listener.getsockname()[1]}"}
    os.environ["WANDB_API_KEY"] = "0" * 40
    training, loggers = Training(resolve_device(options.device)), {}
    with tempfile.TemporaryDirectory() as root:
        for setup, overrides in SETUPS.items():
            folder = Path(root, setup.replace(" ", "-"))
            folder.mkdir()
            os.environ["WANDB_BASE_URL"] = urls.get(setup, "http://127.0.0.1:9")
            loggers[setup] = build_loggers(load_config("moe", [*overrides, "wandb.finish_timeout=1"]), folder)
            measure(training, loggers[setup], 0, options)  # lets W&B start and the machine warm up
        times: dict[str, list[np.ndarray]] = {setup: [] for setup in SETUPS}
        for number in range(1, options.rounds + 1):
            first = number % len(SETUPS)
            for setup in [*SETUPS][first:] + [*SETUPS][:first]:
                times[setup].append(measure(training, loggers[setup], number * options.steps, options))
        report(times, options)
        for setup in SETUPS:
            for logger in loggers[setup]:
                logger.close()


class Training:
    """Training on the sample data, step by step."""

    def __init__(self, device: torch.device) -> None:
        config = load_config("moe", ["trainer.accelerator=cpu", "trainer.max_steps=1000000"])
        torch.manual_seed(0)
        data = build_data(config, training=True)
        self.module, self.device = build_module(config, data).to(device).train(), device
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.batches = iter(data.train_dataloader())

    def step(self) -> dict[str, float]:
        """Take an optimizer step, and return the values to log."""
        batch = next(self.batches).to(self.device)
        loss = self.module.training_step(batch, 0)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {f"train/{batch.task}/loss": loss.item(), "train/lr": 1e-4, "train/batch": batch.fingerprint}


def measure(training: Training, loggers: Sequence[RunLogger], first: int, options: TrackingOptions) -> np.ndarray:
    """Time `options.steps` steps, numbered from `first`, and the logging of their rows.

    Returns the seconds of wall-clock time, and of CPU time of the training thread, (2,).
    """
    started = _clock()
    for step in range(first, first + options.steps):
        values = training.step()
        if step % options.every == 0:
            for logger in loggers:
                logger.log_metrics(values, step=step)
    return _clock() - started


def _clock() -> np.ndarray:
    return np.array([time.perf_counter(), time.thread_time()])


def report(times: dict[str, list[np.ndarray]], options: TrackingOptions) -> None:
    base = np.array(times[BASELINE])  # (rounds, 2)
    median = np.median(base[:, 0])
    log.info("%d steps, a row every %d: %.2f s with metrics.jsonl", options.steps, options.every, median)
    for setup in [*SETUPS][1:]:
        wall, thread = 100 * np.median(times[setup] / base, axis=0) - 100
        log.info("W&B, %s: %+.1f %% time, %+.1f %% CPU time of the training thread", setup, wall, thread)


if __name__ == "__main__":
    entry_point(main)
