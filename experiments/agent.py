"""Run trials of a sweep registered with W&B: python -m experiments.agent sweep_id=ENTITY/PROJECT/ID [count=N]"""

from __future__ import annotations

import contextlib
import netrc
import os
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.options import option
from datamodules.records import UserError
from experiments.config.arguments import parse
from experiments.config.experiment import ROOT
from experiments.run.agent_trials import END, VARIABLE, published_trials
from experiments.run.wandb_environment import check_environment
from experiments.shared.console import entry_point
from lightning_modules.distributed import launch
from lightning_modules.distributed.signals import ASKING


@dataclass(kw_only=True)
class AgentOptions:
    """Run trials of a sweep registered with W&B.

    Under srun, start an agent on every rank: the first one gets trials from W&B, and all ranks train them. W&B gives a
    preempted trial to the next agent of the sweep.
    """

    sweep_id: str = option(help="ENTITY/PROJECT/ID, as printed by `make sweep ... wandb.mode=online`")
    count: int | None = option(None, "number of trials to run; by default all trials of the sweep", minimum=1)


def main(arguments: Sequence[str]) -> None:
    options = parse(AgentOptions, arguments)
    if launch.rank() == 0:
        check_login()
    sys.exit(run_agent(options.sweep_id, options.count))


def run_agent(sweep_id: str, count: int | None) -> int:
    """Run W&B's agent on the first rank, and the trials it gets on the other ranks. Returns the exit status."""
    is_shared = launch.under_srun() and launch.num_tasks() > 1
    # A job may start several agents, one after the other.
    numbers = [os.environ.get(f"SLURM_{key}", "0") for key in ("RESTART_COUNT", "STEP_ID")]
    attempt = "-".join([str(launch.slurm_job()), *numbers])
    folder = ROOT / "runs" / ".agents" / attempt
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    if launch.rank() > 0:
        for trial in published_trials(folder):
            _run([sys.executable, "-m", "experiments.train", *trial], environment)
        return 0
    limit = ["--count", str(count)] if count else []
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", *limit, sweep_id]
    if not is_shared:
        return _run(command, environment)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _run(command, environment | {VARIABLE: str(folder)})
    finally:
        (folder / END).touch()


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a process, and forward signals that ask the current process to end."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    for number in ASKING:
        signal.signal(number, lambda number, _: process.send_signal(number))
    return process.wait()


def check_login() -> None:
    """Raise UserError if W&B's agent would not find an API key for its server."""
    import wandb

    check_environment()
    settings = wandb.setup().settings
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")) or settings.api_key
    host = urllib.parse.urlsplit(settings.base_url).hostname
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        has_key = has_key or netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    if not has_key:
        raise UserError(
            f"sweep_id: the trials come from {settings.base_url}, where you are not logged in; run .venv/bin/wandb "
            "login, or set WANDB_API_KEY. `make sweep` without wandb.mode=online needs no W&B"
        )


if __name__ == "__main__":
    entry_point(main)
