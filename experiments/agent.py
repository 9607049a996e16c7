"""Run trials of a sweep that W&B leads: python -m experiments.agent sweep_id=ENTITY/PROJECT/ID [count=N]

count       trials until it ends, by default all that the sweep has

Under srun, an agent is started on every rank: that of the first one alone speaks to W&B, and the others train with what
it was given. A trial that was preempted is given to the sweep's next agent, with its id and parameters, so the same
command goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import netrc
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from datamodules.files import read_json, write_json
from datamodules.records import UserError
from experiments.config.experiment import FOLDER
from experiments.shared.console import entry_point, key_values, whole_number
from lightning_modules.distributed import launch
from lightning_modules.distributed.signals import ASKING

log = logging.getLogger(__name__)

KEYS = {"sweep_id": "", "count": ""}
MEETING = "SCIMULT_TRIALS"  # environment variable: the folder in which the first rank tells of its trials
OVER = "over"


def agent(sweep_id: str, count: int | None) -> int:
    """Run an agent to its end. Returns its status."""
    several = launch.under_srun() and launch.num_tasks() > 1
    folder = FOLDER.parent / "runs" / ".agents" / f"{launch.slurm_job()}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    if launch.rank() > 0:
        return _follow(folder)
    counted = ["--count", str(count)] if count else []
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", *counted, sweep_id]
    environment = dict(os.environ)
    if several:
        folder.mkdir(parents=True, exist_ok=True)
        environment[MEETING] = str(folder)
    try:
        return _run(command, environment)
    finally:
        if several:
            (folder / OVER).touch()


def tell_other_ranks(experiment: str, overrides: Sequence[str], run: Path) -> None:
    """Give other ranks, if agents wait there, the trial that this process trains. run: its folder."""
    if MEETING in os.environ and launch.rank() == 0:
        folder = Path(os.environ[MEETING])
        number = sum(1 for _ in folder.glob("*.json"))
        write_json(folder / f"{number}.json", [experiment, *overrides, f"run.dir={run}"])


def _follow(folder: Path) -> int:
    """Train what the first rank trains, trial by trial, until it says that its agent is over."""
    environment = {key: value for key, value in os.environ.items() if key != MEETING}
    for number in itertools.count():
        trial = folder / f"{number}.json"
        while not trial.exists():
            if (folder / OVER).exists() and not trial.exists():  # in this order: a trial is told of before the end
                return 0
            time.sleep(0.5)
        _run([sys.executable, "-m", "experiments.train", *read_json(trial)], environment)


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a process that is also sent the signals that ask this one to end."""
    process = subprocess.Popen(command, cwd=FOLDER.parent, env=environment)
    for number in ASKING:
        signal.signal(number, lambda number, _: process.send_signal(number))
    return process.wait()


def _refuse_without_login() -> None:
    """Raise UserError where W&B's agent would have no key to speak to its server with."""
    import wandb

    settings = wandb.setup().settings
    known = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or settings.api_key
    host = urllib.parse.urlsplit(settings.base_url).hostname
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = known or netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    if not known:
        raise UserError(
            f"sweep_id: its trials come from {settings.base_url}, where you are not logged in: .venv/bin/wandb login, "
            "or WANDB_API_KEY in the environment. `make sweep` runs a sweep without W&B"
        )


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    if not values["sweep_id"]:
        raise UserError("sweep_id: which sweep? `make sweep ... wandb.mode=online` registers one and says its id")
    count = whole_number("count", values["count"]) if values["count"] else None
    if launch.rank() == 0:
        _refuse_without_login()
    status = agent(values["sweep_id"], count)
    sys.exit(status)


if __name__ == "__main__":
    entry_point(main)
