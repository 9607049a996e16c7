"""Send runs that were logged offline to W&B: python -m experiments.sync [folder=RUN]"""

from __future__ import annotations

import logging
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.options import option
from datamodules.records import UserError, counted
from experiments.config.arguments import parse
from experiments.run.lock import is_in_use
from experiments.run.wandb_environment import check_environment
from experiments.run.wandb_sender import PATIENCE, environment, is_sent
from experiments.shared.console import entry_point

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SyncOptions:
    """Send runs that were logged offline to W&B.

    You can repeat the command, because nothing is sent twice. All attempts of a run go to the same W&B run, in order.
    Runs that are still training are skipped.
    """

    folder: Path = option(Path("runs"), "run, or folder with runs at any depth")
    dry_run: bool = option(False, "only list what would be sent")


def main(arguments: Sequence[str]) -> None:
    options = parse(SyncOptions, arguments)
    if not options.folder.is_dir():
        raise UserError(f"folder: {options.folder} is not a folder")
    unsent, failed, num_sent = list(unsent_runs(options.folder)), [], 0
    if unsent and not options.dry_run:
        check_server()
    for run, files in unsent:
        attempts = counted(len(files), "attempt")
        if is_in_use(run):
            log.info("%s: still training, skipped", run)
        elif options.dry_run:
            log.info("%s: %s to send", run, attempts)
        elif problem := _send(files):
            log.error("%s: not sent (%s)", run, problem)
            failed.append(run)
        else:
            num_sent += 1
            log.info("%s: sent, %s", run, attempts)
    if failed:
        raise UserError(f"{len(failed)} of {len(unsent)} runs could not be sent; the same command tries again")
    log.info("%s", f"sent {counted(num_sent, 'run')}" if unsent else f"{options.folder}: nothing left to send")


def unsent_runs(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each run with unsent attempts in a folder, and the files of these attempts in order."""
    for wandb_folder in sorted(folder.rglob("wandb")):
        files = [file for file in wandb_folder.glob("*run-*/run-*.wandb") if not is_sent(file)]
        if files:
            # Without their prefix, the names of the attempts' folders begin with the start time.
            yield wandb_folder.parent, sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))


def check_server() -> None:
    """Raise UserError if W&B's server does not answer, because `wandb sync` would wait for hours."""
    import wandb

    check_environment()
    url = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(f"{url}/healthz", timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # an error status is an answer, too
    except OSError as error:
        raise UserError(f"W&B's server at {url} does not answer ({error}); nothing was sent") from error


def _send(files: Sequence[Path]) -> str:
    """Send the attempts of one run. Returns the error message, or ""."""
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", "--yes", *map(str, files)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment())
    if result.returncode == 0 and all(map(is_sent, files)):
        return ""
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    return lines[-1].removeprefix("wandb:").strip() if lines else f"status {result.returncode}"


if __name__ == "__main__":
    entry_point(main)
