"""Kill a training again and again, at random moments: python -m tests.experiments.kills NUMBER [FOLDER]

Each attempt is forked from this process, which has imported everything. There are four kinds of kills:

    anywhere    SIGKILL at a random moment
    writing     SIGKILL at a random point while a checkpoint is written
    full        SIGKILL after the disk has been full (or the size of files limited) for some steps, unless the attempt
                has ended with an error because there is no room for mined negatives or for the last checkpoint
    signal      SIGUSR1, SIGTERM or SIGINT

The last attempt is not killed. No attempt may lose saved steps, or repeat a step with another batch. The final weights
must equal those of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from datamodules.records import UserError
from experiments.train import train
from lightning_modules import checkpoint_files
from lightning_modules.distributed import signals
from tests.experiments.test_train import TINY, check_same_state
from tests.lightning_modules.callbacks.test_training_log import curve

EVERY = 6  # steps between two checkpoints
STEPS = 8  # maximum number of steps of an attempt before it is killed
SETTINGS = [
    *TINY,
    f"checkpoint.every_n_steps={EVERY}",
    "trainer.log_every_n_steps=1",
    "evaluation.every_n_steps=15",
    "evaluation.baselines=false",
    "backbone.dropout=0.3",
    "mining.every_n_steps=20",
    "mining.relative_margin=null",
    "mining.k=20",
]
KINDS = ("anywhere", "writing", "full", "signal")
LOGS = Path(tempfile.mkdtemp(prefix="kills-log-"))  # not on the file system that is filled
STATUS = {signal.SIGUSR1: 75, signal.SIGTERM: 75, signal.SIGINT: 130}


def start_attempt(folder: Path, steps: int, prepare=lambda: None) -> int:
    """Fork a training, and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(LOGS / f"{folder.name}.log", "ab") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
        signals.catch()
        prepare()
        train("moe", [f"run.dir={folder}", *SETTINGS, f"trainer.max_steps={steps}"])
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except UserError:  # as in entry_point: no room for the last checkpoint
        status = 2
        logging.exception("the attempt failed")
    except OSError as error:  # no room for mined negatives
        status = 2 if error.errno in (errno.ENOSPC, errno.EFBIG) else 1
        logging.exception("the attempt failed")
    except BaseException:
        logging.exception("the attempt failed")
    finally:
        sys.stdout.flush()
        os._exit(status)


def rows(folder: Path) -> list[dict]:
    """Return the rows of metrics.jsonl with a batch, except for a line that is being written."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [row for row in map(json.loads, lines) if "train/batch" in row]


def saved_step(folder: Path) -> int:
    """Return the step from which the run would resume."""
    for path in checkpoint_files.candidates(folder / "checkpoints" / "last.ckpt"):
        if checkpoint_files.damage(path) is None:
            return torch.load(path, weights_only=True)["global_step"]
    return 0


def die_while_writing(countdown: int) -> None:
    """Make this process kill itself at a random point of writing its n-th checkpoint, n = countdown."""
    point = random.choice(["half", "fsync", "link", "replace", "after"])

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(checkpoint, file, original=torch.save):
        nonlocal countdown
        countdown -= 1
        original(checkpoint, file)
        if countdown == 0 and point == "half":
            file.flush()
            file.truncate(file.tell() // 2)
            kill()

    class Os:
        """The module os, except that a call of the chosen function kills the process."""

        def __getattr__(self, name):
            function = getattr(os, name)

            def called(*arguments):
                if countdown == 0 and name == point:
                    kill()
                result = function(*arguments)
                if countdown == 0 and name == "replace" and point == "after":
                    kill()
                return result

            return called if callable(function) else function

    class Torch:
        def __getattr__(self, name):
            return save if name == "save" else getattr(torch, name)

    checkpoint_files.os, checkpoint_files.torch = Os(), Torch()


def num_full_disk_warnings() -> int:
    """Return how often the killed run logged that it could not write a checkpoint."""
    return (LOGS / "killed.log").read_text().count("could not be written")


def fill_disk(folder: Path) -> bool:
    """Fill the folder's file system if the folder is a mount point. Returns whether it is one."""
    if not os.path.ismount(folder):
        return False
    with open(folder / "filler", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    return True


def kill_once(kind: str, folder: Path, steps: int) -> str:
    """Start one attempt and kill it. Returns a short description of what happened."""
    before, rows_before = saved_step(folder), rows(folder)
    num_rows = len(rows_before)
    last_step, countdown = random.randint(0, STEPS), random.randint(1, 2)
    pid = start_attempt(folder, steps, (lambda: die_while_writing(countdown)) if kind == "writing" else lambda: None)
    deadline = time.monotonic() + 300
    is_full, num_warnings = False, 0
    number = random.choice(list(STATUS))
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        num_steps = len(rows(folder)) - num_rows
        if kind == "full":
            if num_steps and not is_full:
                is_full, num_warnings = True, num_full_disk_warnings()
                if not fill_disk(folder.parent):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
            is_due = is_full and num_full_disk_warnings() > num_warnings
        else:
            is_due = kind != "writing" and num_steps >= last_step
        if is_due:
            time.sleep(random.uniform(0, 0.1) if num_steps else random.uniform(0, 3))
            os.kill(pid, number if kind == "signal" and num_steps else signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        assert time.monotonic() < deadline, f"{kind}: the attempt neither trains nor ends"
        time.sleep(0.002)
    (folder.parent / "filler").unlink(missing_ok=True)
    saved, logged = saved_step(folder), rows(folder)[-1]["step"] if rows(folder) else 0
    assert saved >= before, f"{kind}: the last checkpoint went back from step {before} to {saved}"
    problem = f"{kind}: the last logged step is {logged}, but the last checkpoint is of step {saved}"
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{kind}: {status}"
        if not is_full and rows(folder) != rows_before:  # else the rows may be of a full disk
            expected = max(before, (logged - 1) // EVERY * EVERY)
            assert saved >= expected - (EVERY if kind == "writing" else 0), problem
    else:
        expected = {"signal": STATUS[number], "full": 2}.get(kind, 0)
        assert os.WEXITSTATUS(status) in (expected, 0), f"{kind}, {number!r}: status {os.WEXITSTATUS(status)}"
        assert saved == logged or is_full, problem
    return f"{kind}: from step {before} to {logged}, saved {saved}"


def kill_repeatedly(folder: Path, number: int) -> Counter:
    """Kill a run many times, and compare it with an undisturbed one. Returns the number of kills of each kind."""
    steps = max(30, number * EVERY)
    whole, killed = folder / "whole", folder / "killed"
    assert os.waitpid(start_attempt(whole, steps), 0)[1] == 0, (LOGS / "whole.log").read_text()[-3000:]
    kinds, lost = Counter(), 0
    for i in range(number):
        kind = KINDS[i % len(KINDS)]
        description = kill_once(kind, killed, steps)
        kinds[kind] += 1
        last = rows(killed)[-1]["step"] if rows(killed) else 0
        lost = max(lost, last - saved_step(killed))
        print(f"{i + 1}/{number} {description}", flush=True)
    assert os.waitpid(start_attempt(killed, steps), 0)[1] == 0, (LOGS / "killed.log").read_text()[-3000:]
    batches = {row["step"]: row["train/batch"] for row in rows(whole)}
    assert len(batches) == steps
    for row in rows(killed):
        assert row["train/batch"] == batches[row["step"]], f"step {row['step']}"
    check_same_state(whole, killed)
    assert curve(whole / "metrics.jsonl") == curve(killed / "metrics.jsonl")
    assert figures(whole) == figures(killed)
    print(f"{number} kills, {dict(kinds)}: no more than {lost} steps lost at once, equal after {steps} steps")
    return kinds


def figures(folder: Path) -> dict:
    """Return the content of results.json without times."""
    results = json.loads((folder / "results.json").read_text())
    results["benchmarks"] = {name: result["systems"] for name, result in results["benchmarks"].items()}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"WANDB_MODE": "disabled"}
    root = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="kills-"))
    kill_repeatedly(root, int(sys.argv[1]))
    for name in ("whole", "killed"):
        shutil.rmtree(root / name, ignore_errors=True)
    shutil.rmtree(LOGS)
