"""The Makefile: what make itself would do with words that are no target."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def dry(folder, *words: str) -> subprocess.CompletedProcess:
    """What would run, in a folder that has the Makefile alone."""
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
def test_a_word_that_is_no_target_is_refused_before_anything_runs(tmp_path, words, unknown):
    done = dry(tmp_path, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"unknown target: {unknown}. Settings are key=value" in done.stderr


@pytest.mark.slow
def test_targets_that_there_are_run_one_after_the_other_with_their_settings(tmp_path):
    done = dry(tmp_path, "dry-run", "train", "EXP=vanilla", "optim.lr=1e-3", "query=two words")
    assert done.returncode == 0, done.stderr
    last = [line for line in done.stdout.splitlines() if "experiments." in line]
    assert [line.split()[2] for line in last] == ["experiments.dry_run", "experiments.train"]
    assert all("vanilla scale=sample" in line and "'optim.lr=1e-3'" in line for line in last)
    assert all("'query=two words'" in line for line in last)
    assert dry(tmp_path).returncode == 0
