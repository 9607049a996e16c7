"""Check every file of experiments/sweeps: python -m experiments.sweeping.check"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.shared.console import entry_point
from experiments.sweeping.file import check_trials, read_sweep, sweeps

EXPERIMENT = "moe"  # of make, where none is named


def main(arguments: Sequence[str]) -> None:
    for name in sweeps():
        check_trials(read_sweep(name, EXPERIMENT))
    print(f"{len(sweeps())} sweeps are in order")


if __name__ == "__main__":
    entry_point(main)
