"""Send runs to W&B that were logged offline: python -m experiments.sync [folder=RUN]"""

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
from datamodules.records import UserError
from experiments.config.arguments import parse
from experiments.run.lock import is_in_use
from experiments.run.wandb_sender import PATIENCE, environment, is_sent
from experiments.shared.console import counted, entry_point

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SyncOptions:
    """Send runs to W&B that were logged offline.

    The command may be repeated: nothing is sent twice. All attempts of a run go to the same run of W&B, in their order.
    Runs that are still being trained are skipped.
    """

    folder: Path = option(Path("runs"), "a run, or a folder with runs at any depth")
    dry_run: bool = option(False, "only list what would be sent")


def main(arguments: Sequence[str]) -> None:
    options = parse(SyncOptions, arguments)
    sync(options.folder, options.dry_run)


def sync(folder: Path, dry_run: bool) -> None:
    """Send all runs in a folder. Raises UserError if one could not be sent."""
    if not folder.is_dir():
        raise UserError(f"folder: {folder} is not a folder")
    unsent, failed, num_sent = list(unsent_runs(folder)), [], 0
    if unsent and not dry_run:
        check_server()
    for run, files in unsent:
        attempts = counted(len(files), "attempt")
        if is_in_use(run):
            log.info("%s: still being trained, skipped", run)
        elif dry_run:
            log.info("%s: %s to send", run, attempts)
        elif problem := _send(files):
            log.error("%s: not sent (%s)", run, problem)
            failed.append(run)
        else:
            num_sent += 1
            log.info("%s: sent, %s", run, attempts)
    if failed:
        raise UserError(f"{len(failed)} of {len(unsent)} runs could not be sent; the same command tries again")
    log.info("%s", f"sent {counted(num_sent, 'run')}" if unsent else f"{folder}: everything has been sent already")


def unsent_runs(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the runs in a folder that have unsent files of attempts, with these files in their order."""
    for wandb_folder in sorted(folder.rglob("wandb")):
        files = wandb_folder.glob("*run-*/run-*.wandb")
        if unsent := [file for file in sorted(files, key=_started) if not is_sent(file)]:
            yield wandb_folder.parent, unsent


def _started(file: Path) -> str:
    """Return the part of an attempt's folder name that begins with its start time."""
    return file.parent.name.removeprefix("offline-")


def check_server() -> None:
    """Raise UserError if W&B's server does not answer: `wandb sync` would wait for it for hours."""
    import wandb

    url = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(f"{url}/healthz", timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # this is an answer, too
    except OSError as error:
        raise UserError(f"W&B's server at {url} does not answer ({error}): nothing was sent") from error


def _send(files: Sequence[Path]) -> str:
    """Send the attempts of one run. Returns what went wrong, or ""."""
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", "--yes", *map(str, files)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment())
    if result.returncode == 0 and all(map(is_sent, files)):
        return ""
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
    return lines[-1].removeprefix("wandb:").strip() if lines else f"status {result.returncode}"


if __name__ == "__main__":
    entry_point(main)
