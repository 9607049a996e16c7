"""The Makefile: unknown targets, and settings that are passed on."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def dry(folder, *words: str) -> subprocess.CompletedProcess:
    """Print the commands that would run, in a folder that has only the Makefile."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("setup.cfg", "constraints.txt", "pyproject.toml"):
        (folder / name).touch()
    return subprocess.run(["make", "-n", *words], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (["train", "EXP=moe", "optim.lr"], "optim.lr"),
        (["train", "moe"], "moe"),
        (["find", "embeddings=V", "query=reward", "policy"], "policy"),
        (["evall", "model=M"], "evall"),
    ],
)
def test_unknown_target_fails_before_anything_runs(tmp_path, words, unknown):
    done = dry(tmp_path, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"unknown target: {unknown}. Settings are key=value" in done.stderr


@pytest.mark.slow
def test_several_targets_run_in_order_with_their_settings(tmp_path):
    done = dry(tmp_path, "dry-run", "train", "EXP=vanilla", "optim.lr=1e-3", "query=two words")
    assert done.returncode == 0, done.stderr
    last = [line for line in done.stdout.splitlines() if "experiments." in line]
    assert [line.split()[2] for line in last] == ["experiments.dry_run", "experiments.train"]
    assert all("vanilla scale=sample" in line and "'optim.lr=1e-3'" in line for line in last)
    assert all("'query=two words'" in line for line in last)
    assert dry(tmp_path).returncode == 0
