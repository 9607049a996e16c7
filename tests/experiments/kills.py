"""Kills a training again and again, at random moments: python -m tests.experiments.kills NUMBER [FOLDER]

Every attempt is a process, forked from this one, which has imported everything. It is killed

    anywhere    by SIGKILL, at a random moment
    writing     by SIGKILL, at a random point of writing a checkpoint
    full        by SIGKILL, when the disk has been full (or files limited in size) for some steps; or it ends, since
                there is no room for what it mines, or for the last checkpoint
    asked       by SIGUSR1, SIGTERM or SIGINT

and at the end one attempt is left alone. No attempt may lose steps that were saved, or repeat a step with another
batch, and the weights are in the end, bit for bit, those of a run that nobody killed.
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
from pathlib import Path

import torch

from datamodules.records import UserError
from experiments.train import train
from lightning_modules import checkpoint_files
from lightning_modules.distributed import signals
from tests.experiments.test_train import TINY

EVERY = 6  # steps between two checkpoints
STEPS = 8  # that an attempt makes at most before it is killed
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
KINDS = ("anywhere", "writing", "full", "asked")
LOGS = Path(tempfile.mkdtemp(prefix="kills-log-"))  # outside the file system that is filled
STATUS = {signal.SIGUSR1: 75, signal.SIGTERM: 75, signal.SIGINT: 130}


def attempt(folder: Path, steps: int, prepare=lambda: None) -> int:
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
    except UserError:  # as in entry_point: there was no room for the last checkpoint
        status = 2
        logging.exception("the attempt ended")
    except OSError as error:  # mining needs room
        status = 2 if error.errno in (errno.ENOSPC, errno.EFBIG) else 1
        logging.exception("the attempt failed")
    except BaseException:
        logging.exception("the attempt failed")
    finally:
        sys.stdout.flush()
        os._exit(status)


def rows(folder: Path) -> list[dict]:
    """Return the rows of metrics.jsonl with a batch, without a line that is being written."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [row for row in map(json.loads, lines) if "train/batch" in row]


def saved(folder: Path) -> int:
    """Return the step at which the run would be resumed."""
    for path in checkpoint_files.candidates(folder / "checkpoints" / "last.ckpt"):
        if checkpoint_files.damage(path) is None:
            return torch.load(path, weights_only=True)["global_step"]
    return 0


def die_while_writing(countdown: int) -> None:
    """Let this process kill itself at a random point of the n-th checkpoint that it writes, n = countdown."""
    point = random.choice(["half", "fsync", "link", "replace", "after"])
    left = [countdown]

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(checkpoint, file, original=torch.save):
        left[0] -= 1
        if left[0] == 0 and point == "half":
            original(checkpoint, file)
            file.flush()
            file.truncate(file.tell() // 2)
            kill()
        original(checkpoint, file)

    class Os:
        """The module os, but a call of the chosen function kills the process."""

        def __getattr__(self, name):
            function = getattr(os, name)

            def called(*arguments):
                if left[0] == 0 and name == point:
                    kill()
                result = function(*arguments)
                if left[0] == 0 and name == "replace" and point == "after":
                    kill()
                return result

            return called if callable(function) else function

    class Torch:
        def __getattr__(self, name):
            return save if name == "save" else getattr(torch, name)

    checkpoint_files.os, checkpoint_files.torch = Os(), Torch()


def num_full_disk_warnings() -> int:
    """Return how often the killed run has logged that a checkpoint could not be written."""
    return (LOGS / "killed.log").read_text().count("could not be written")


def fill_disk(folder: Path) -> bool:
    """Fill the folder's file system, if the folder is a mount point. Returns whether it is."""
    if not os.path.ismount(folder):
        return False
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
    return True


def kill_once(kind: str, folder: Path, steps: int) -> str:
    """Start one attempt and kill it. Returns a short description of what happened."""
    before, seen = saved(folder), len(rows(folder))
    wanted, written = random.randint(0, STEPS), random.randint(1, 2)
    pid = attempt(folder, steps, (lambda: die_while_writing(written)) if kind == "writing" else lambda: None)
    limit = time.monotonic() + 300
    full, told = False, 0
    asked = random.choice(list(STATUS))
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        made = len(rows(folder)) - seen
        if kind == "full":
            if made and not full:
                full, told = True, num_full_disk_warnings()
                if not fill_disk(folder.parent):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
            ready = full and num_full_disk_warnings() > told
        else:
            ready = kind != "writing" and made >= wanted
        if ready:
            time.sleep(random.uniform(0, 0.1) if made else random.uniform(0, 3))
            os.kill(pid, asked if kind == "asked" and made else signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        assert time.monotonic() < limit, f"{kind}: the attempt neither trains nor ends"
        time.sleep(0.002)
    (folder.parent / "filler").unlink(missing_ok=True)
    now, logged = saved(folder), rows(folder)[-1]["step"] if rows(folder) else 0
    assert now >= before, f"{kind}: step {before} was saved, and now {now} is"
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{kind}: {status}"
        if not full:
            due = max(before, (logged - 1) // EVERY * EVERY)
            assert now >= due or (kind == "writing" and now >= due - EVERY), f"{kind}: at {logged}, {now} is saved"
    else:
        expected = {"asked": STATUS[asked], "full": 2}.get(kind, 0)
        assert os.WEXITSTATUS(status) in (expected, 0), f"{kind}, {asked!r}: status {os.WEXITSTATUS(status)}"
        assert now == logged or full, f"{kind}: at step {logged}, {now} is saved"
    return f"{kind}: from step {before} to {logged}, saved {now}"


def campaign(folder: Path, number: int) -> Counter:
    """Kill a run many times, and compare it with an undisturbed one. Returns the number of kills of each kind."""
    steps = max(30, number * EVERY)
    whole, killed = folder / "whole", folder / "killed"
    assert os.waitpid(attempt(whole, steps), 0)[1] == 0, (LOGS / "whole.log").read_text()[-3000:]
    kinds, lost = Counter(), 0
    for i in range(number):
        kind = KINDS[i % len(KINDS)]
        told = kill_once(kind, killed, steps)
        kinds[kind] += 1
        last = rows(killed)[-1]["step"] if rows(killed) else 0
        lost = max(lost, last - saved(killed))
        print(f"{i + 1}/{number} {told}", flush=True)
    assert os.waitpid(attempt(killed, steps), 0)[1] == 0, (LOGS / "killed.log").read_text()[-3000:]
    check_equal(whole, killed, steps)
    print(f"{number} kills, {dict(kinds)}: at most {lost} steps lost at once, all equal after {steps}")
    return kinds


def check_equal(whole: Path, killed: Path, steps: int) -> None:
    """Assert that both runs had the same batch in each step, and have the same weights, optimizer and results."""
    batches = {row["step"]: row["train/batch"] for row in rows(whole)}
    assert len(batches) == steps
    for row in rows(killed):
        assert row["train/batch"] == batches[row["step"]], f"step {row['step']}"
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, killed))
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    for key, state in one["optimizer_states"][0]["state"].items():
        assert all(torch.equal(state[n], two["optimizer_states"][0]["state"][key][n]) for n in state), key
    assert figures(whole) == figures(killed)


def figures(folder: Path) -> dict:
    """Return the content of results.json without times."""
    results = json.loads((folder / "results.json").read_text())
    results["benchmarks"] = {name: result["systems"] for name, result in results["benchmarks"].items()}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"WANDB_MODE": "disabled"}
    place = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp(prefix="kills-"))
    campaign(place, int(sys.argv[1]))
    for name in ("whole", "killed"):
        shutil.rmtree(place / name, ignore_errors=True)
    shutil.rmtree(LOGS)
