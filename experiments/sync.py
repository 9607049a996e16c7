"""Send runs to W&B that were logged offline: python -m experiments.sync [folder=RUN]

folder      a run, or a folder with runs at any depth; by default runs
dry_run     yes only tells what would be sent

What was sent already is not sent again, so the command may be repeated. Attempts of one run are sent in their order, to
one run of W&B. A run that is still trained is left out.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.records import UserError
from experiments.run.lock import is_in_use
from experiments.run.sender import PATIENCE, environment, is_sent
from experiments.shared.console import choice, entry_point, key_values

log = logging.getLogger(__name__)

KEYS = {"folder": "runs", "dry_run": "no"}


def unsent(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Runs in a folder, and those of their attempts' files that were not sent, in their order."""
    for within in sorted(folder.rglob("wandb")):
        files = sorted(within.glob("*run-*/run-*.wandb"), key=lambda file: file.parent.name.removeprefix("offline-"))
        if files := [file for file in files if not is_sent(file)]:
            yield within.parent, files


def sync(folder: Path, dry_run: bool) -> None:
    """Send all runs in a folder. Raises UserError if one could not be sent."""
    if not folder.is_dir():
        raise UserError(f"folder: {folder} is no folder")
    waiting, failed, count = list(unsent(folder)), [], 0
    if waiting and not dry_run:
        _ask_server()
    for run, files in waiting:
        attempts = f"{len(files)} attempt{'s' if len(files) > 1 else ''}"
        if is_in_use(run):
            log.info("%s: is still trained, and left out", run)
        elif dry_run:
            log.info("%s: %s to be sent", run, attempts)
        elif problem := _send(files):
            log.error("%s: not sent (%s)", run, problem)
            failed.append(run)
        else:
            count += 1
            log.info("%s: sent, %s", run, attempts)
    if failed:
        raise UserError(f"{len(failed)} of {len(waiting)} runs could not be sent; the same command tries again")
    log.info("%s", f"{count} runs were sent" if waiting else f"{folder}: nothing is left to be sent")


def _ask_server() -> None:
    """Raise UserError if W&B's server does not answer: `wandb sync` would wait for it for hours."""
    import wandb

    url = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(f"{url}/healthz", timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        raise UserError(f"W&B's server at {url} does not answer ({error}): nothing was sent") from error


def _send(files: Sequence[Path]) -> str:
    """Send the attempts of one run. Returns what went wrong, or nothing."""
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", "--yes", *map(str, files)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment())
    if done.returncode == 0 and all(map(is_sent, files)):
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1].removeprefix("wandb:").strip() if lines else f"status {done.returncode}"


def main(arguments: Sequence[str]) -> None:
    values = key_values(arguments, KEYS)
    sync(Path(values["folder"]), choice("dry_run", values["dry_run"], ("yes", "no")) == "yes")


if __name__ == "__main__":
    entry_point(main)
