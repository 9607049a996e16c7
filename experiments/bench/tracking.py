"""What W&B costs a training, by its server: python -m experiments.bench.tracking [rounds=N] [steps=N] [every=N]

One process trains on and on; in turns its rows go to metrics.jsonl alone, to W&B offline, and to W&B online with a
server that refuses connections, or accepts them and never answers: so all share the machine's moods. Both the time that
passes and what the training's own thread computes are measured; a ratio is the median over rounds.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.build.data import build_data
from experiments.build.module import build_module
from experiments.config.experiment import load_config
from experiments.run.tracking import build_loggers
from experiments.shared.console import entry_point, key_values, whole_number
from lightning_modules.loggers import RunLogger

log = logging.getLogger(__name__)

KEYS = {"rounds": "10", "steps": "100", "every": "20"}
WAYS = {
    "metrics.jsonl": ["wandb.mode=disabled"],
    "offline": ["wandb.mode=offline"],
    "refuses": ["wandb.mode=online"],
    "is silent": ["wandb.mode=online"],
}


class Training:
    """The sample's training, step by step."""

    def __init__(self) -> None:
        config = load_config("moe", ["trainer.accelerator=cpu", "trainer.max_steps=1000000"])
        torch.manual_seed(0)
        data = build_data(config, training=True)
        self.module = build_module(config, data)
        self.module.train()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.batches = iter(data.train_dataloader())

    def step(self) -> dict[str, float]:
        batch = next(self.batches)
        loss = self.module.training_step(batch, 0)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {f"train/{batch.task}/loss": loss.item(), "train/lr": 1e-4, "train/batch": batch.fingerprint}


def measure(
    training: Training, loggers: Sequence[RunLogger], first: int, steps: int, every: int
) -> tuple[float, float]:
    """Seconds that pass, and that the thread computes, for some steps with their rows."""
    began, computed = time.perf_counter(), time.thread_time()
    for step in range(first, first + steps):
        values = training.step()
        if step % every == 0:
            for logger in loggers:
                logger.log_metrics(values, step=step)
    return time.perf_counter() - began, time.thread_time() - computed


def run(rounds: int, steps: int, every: int) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # accepts into its backlog, and nobody reads
    urls = {"refuses": "http://127.0.0.1:9", "is silent": f"http://127.0.0.1:{silent.getsockname()[1]}"}
    os.environ |= {"WANDB_API_KEY": "0" * 40}
    training, loggers = Training(), {}
    with tempfile.TemporaryDirectory() as place:
        for way, overrides in WAYS.items():
            folder = Path(place, way.replace(" ", "-"))
            folder.mkdir()
            os.environ["WANDB_BASE_URL"] = urls.get(way, urls["refuses"])
            loggers[way] = build_loggers(load_config("moe", [*overrides, "wandb.finish_timeout=1"]), folder)
            measure(training, loggers[way], 0, steps, every)  # it starts, and the machine warms up
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(1, rounds + 1):
            for way in list(WAYS)[number % 4 :] + list(WAYS)[: number % 4]:
                seconds[way].append(measure(training, loggers[way], number * steps, steps, every))
        base = seconds["metrics.jsonl"]
        log.info(
            "%s",
            f"{steps} steps, a row every {every}: {statistics.median(x for x, _ in base):.2f} s with metrics.jsonl",
        )
        for way in list(WAYS)[1:]:
            passed, computed = (
                statistics.median(mine[i] / plain[i] for mine, plain in zip(seconds[way], base, strict=True))
                for i in (0, 1)
            )
            log.info("%s", f"W&B {way}: {passed - 1:+.1%} of time, {computed - 1:+.1%} of the thread's computing")
        for way in WAYS:
            for logger in loggers[way]:
                logger.close()


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    run(*(whole_number(key, values[key]) for key in KEYS))


if __name__ == "__main__":
    entry_point(main)
