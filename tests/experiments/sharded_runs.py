"""Train several runs in sequence on one of two ranks. test_sharded_runs.py starts both, as torchrun would.

python -m tests.experiments.sharded_runs RANK PORT FOLDER [key=value ...]
"""

import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from experiments.train import train


def main(rank, port, folder, overrides):
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}

    def run(name, strategy, begun=None):
        if begun and rank == "0":
            shutil.copytree(folder / begun, folder / name)
        if begun:
            dist.barrier()
        train("moe", [f"run.dir={folder / name}", f"trainer.strategy={strategy}", *overrides])

    run("ddp", "ddp")
    run("fsdp", "fsdp")
    run("killed_then_fsdp", "fsdp", begun="killed")
    run("killed_then_ddp", "ddp", begun="killed")
    run("one_then_fsdp", "fsdp", begun="one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
