"""A real SLURM on this machine: one controller, one node, on loopback, made of Debian's slurm-wlm and munge."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("sbatch", "scontrol", "slurmctld", "slurmd", "munged", "runuser")
# cred_expire: how long a job that is put into the queue again waits, by default two minutes. KillWait: between TERM
# and KILL.
CONFIGURATION = """\
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=2
MinJobAge=3600
OverTimeLimit=0
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no SLURM here."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if missing:
        return f"SLURM is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root here"
    return None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def slurm(folder: Path, ports: tuple[int, int]) -> Iterator[dict[str, str]]:
    """Starts the daemons. Gives the environment in which sbatch and the others find them, and ends them afterwards."""
    for name in ("state", "spool", "log", "munge"):
        (folder / name).mkdir(parents=True)
    for above in (folder, *folder.parents):  # munge's user has to reach its socket
        if above.stat().st_uid == os.geteuid():
            above.chmod(above.stat().st_mode | 0o111)
    shutil.chown(folder / "munge", "munge", "munge")
    (folder / "munge").chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    shutil.chown(key, "munge", "munge")
    key.chmod(0o400)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 8 // 10 >> 20
    conf = folder / "slurm.conf"
    conf.write_text(
        CONFIGURATION.format(folder=folder, host=platform.node(), ports=ports, cpus=os.cpu_count(), memory=memory)
    )
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": _path()}
    options = [f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file")]
    options += [f"--seed-file={folder}/munge/seed", f"--log-file={folder}/munge/log"]
    try:
        for command in (
            ["runuser", "-u", "munge", "--", "munged", *options],
            ["slurmctld", "-f", str(conf)],
            ["slurmd", "-f", str(conf), "-N", platform.node()],
        ):
            subprocess.run(command, check=True, env=environment, capture_output=True, timeout=60)
        _wait_for_node(environment)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=60, check=False)
        for pid in (folder / "slurmd.pid", folder / "slurmctld.pid", folder / "munge" / "pid"):
            if pid.is_file():
                subprocess.run(["kill", pid.read_text().strip()], check=False)


def _wait_for_node(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        seen = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True, check=False)
        if seen.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    raise RuntimeError(f"SLURM's node did not come up: {seen.stdout} {seen.stderr}")


def job(environment: dict[str, str], number: str) -> dict[str, str]:
    """What scontrol says of a job: JobState, Restarts, ExitCode, ..."""
    command = ["scontrol", "-o", "show", "job", number]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return dict(field.split("=", 1) for field in told.split() if "=" in field)
