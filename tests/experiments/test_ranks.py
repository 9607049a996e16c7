"""Evaluation on several ranks: the files of one process, and an end for all when one of them fails."""

import json
import os
import subprocess
import sys

import pytest

from datamodules.readers.beir import write_beir
from datamodules.records import Collection, Document, UserError
from experiments.evaluate import main
from experiments.run.ranks import ranks
from experiments.run.workers import share_of
from lightning_modules.distributed import launch
from tests.conftest import text_of
from tests.experiments.test_train import ROOT


def files_of(folder):
    """What was measured, without its cost and the command line."""
    found = json.loads((folder / "results.json").read_text())["benchmarks"]
    for key in ("seconds", "cost"):
        del found["toy"]["measured"]["encoder"][key]
    return found, {path.name: path.read_bytes() for path in folder.glob("runs/*")}


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_process(make_encoder, tmp_path):
    """Of documents many are alike, and they are more than one unit, so that both ranks encode some.

    The two are started in a SLURM step of one task, whose ranks they are not.
    """
    make_encoder("attention").save_pretrained(tmp_path / "model")
    corpus = {f"d{i}": Document(f"d{i}", "", text_of(i % 700, i % 37)) for i in range(1500)}
    queries = {f"q{i}": Document(f"q{i}", "", text_of(i, i + 7)) for i in range(25)}
    qrels = {"test": {query: {f"d{i * 3}": 1, f"d{i * 3 + 1}": 2} for i, query in enumerate(queries)}}
    write_beir(Collection(corpus, queries, qrels), tmp_path / "toy")
    given = [f"model={tmp_path / 'model'}", f"beir={tmp_path / 'toy'}", "task=search", "metrics=ndcg@10,recall@100"]
    command = [sys.executable, "-m", "experiments.evaluate", *given, f"output={tmp_path / 'two'}", "devices=2"]
    step = {f"SLURM_{key}": value for key, value in {"STEP_ID": "0", "PROCID": "0", "STEP_NUM_TASKS": "1"}.items()}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | step, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Results and run files are in") == 1  # the first rank alone tells
    main([*given, f"output={tmp_path / 'one'}"])
    wanted = files_of(tmp_path / "one")
    assert len(wanted[1]) == 3
    assert files_of(tmp_path / "two") == wanted


PROBE = """
import os
import torch.distributed as dist
from datamodules.records import UserError
from experiments.shared.console import entry_point
from experiments.run.ranks import ranks
from experiments.run.workers import share_of

def main(arguments):
    with ranks("probe", arguments, "2"):
        rank = dist.get_rank()
        open(f"{arguments[0]}-{rank}", "w").write(str(os.getpid()))
        dist.barrier()
        if arguments[0] == "all" or (arguments[0] == "one" and rank == 1):
            raise UserError(f"{arguments[0]} of us cannot go on")
        dist.barrier()

entry_point(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("one", ["error: one of us cannot go on", "error: rank 1 ended with status 2"]),
        ("all", ["error: all of us cannot go on"]),
    ],
)
def test_an_error_of_one_rank_ends_all_and_is_told_once(tmp_path, way, told):
    (tmp_path / "probe.py").write_text(PROBE)
    command, environment = [sys.executable, "-m", "probe", way], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == told
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{way}-{rank}").read_text()), 0)


def test_ranks_of_a_launcher_are_counted_and_more_are_refused(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launch.num_ranks() == 1
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert launch.num_ranks() == 4
    monkeypatch.setenv("WORLD_SIZE", "2")  # started by the first of ours, inside a job
    assert launch.num_ranks() == 2
    with pytest.raises(UserError, match="devices: got 3, but the launcher started 2 processes"), ranks("x", [], "3"):
        pass
    with pytest.raises(UserError, match="devices: got '0', allowed are whole numbers from 1"), ranks("x", [], "0"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UserError, match="WORLD_SIZE is 'abc', expected a whole number"), ranks("x", [], "2"):
        pass
    with pytest.raises(UserError, match="RANK is 'x'"):
        share_of("", {"RANK": "x", "WORLD_SIZE": "2"})
