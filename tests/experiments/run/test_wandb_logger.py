"""W&B: the content of its file, and failing servers, which must not slow a run down or lose a row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import wandb
from lightning.pytorch.utilities import rank_zero_only

from datamodules.records import UserError
from experiments import sync as sync_module
from experiments.config.experiment import as_dict, load_config
from experiments.run.lock import lock_run
from experiments.run.wandb_logger import WandbLogger, build_loggers
from experiments.sync import main as sync
from tests.experiments.run.wandb_file import history, records
from tests.experiments.test_train import ROOT
from tests.experiments.wandb_server import wandb_server

STEP = "trainer/global_step"


@pytest.fixture
def server(monkeypatch):
    """Start a stub of W&B's server, and point W&B to it."""
    with wandb_server() as stub:
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()  # it reads the environment once
        yield stub
        wandb.teardown()


def make_logger(folder, *overrides) -> WandbLogger:
    folder.mkdir(exist_ok=True)
    _, logger = build_loggers(load_config("moe", ["wandb.finish_timeout=15", *overrides]), folder)
    return logger


def file_of(folder):
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def kinds(path, kind):
    return [getattr(record, kind) for record in records(path) if record.WhichOneof("record_type") == kind]


def test_an_id_that_a_full_disk_cut_is_replaced(server, tmp_path):
    (tmp_path / "wandb_id").touch()
    logger = make_logger(tmp_path)
    assert len(logger._run_id()) == 8
    assert logger._run_id() == (tmp_path / "wandb_id").read_text()


@pytest.mark.slow
def test_the_file_of_a_run_has_configuration_curves_table_picture_and_model(server, tmp_path):
    logger = make_logger(tmp_path, "run.seed=3", "scale=sample")
    logger.log_metrics({"train/search/loss": 0.5, "train/batch": "a1"}, step=20)
    logger.log_metrics({"val/mean/ndcg@10": 0.25}, step=40)
    (tmp_path / "report.svg").write_text("<svg>margins</svg>")
    logger.log_picture("mine/report", tmp_path / "report.svg", step=40)
    logger.log_table("results", ["system", "ndcg@10"], [["bm25", 0.1], ["trained", None]], step=40)
    logger.log_histograms({"mine/search/margins": (np.array([1, 3]), np.array([0.0, 0.5, 1.0]))}, step=40)
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    logger.log_model([tmp_path / "best.ckpt"])
    logger.close()
    path = file_of(tmp_path)
    (run, *_) = kinds(path, "run")
    assert run.run_group == "moe-sample"
    assert list(run.tags) == ["moe", "sample", "seed3"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config == json.loads(json.dumps(as_dict(load_config("moe", ["wandb.finish_timeout=15", "run.seed=3"]))))
    rows = history(path)
    assert [row[STEP] for row in rows] == [20, 40, 40, 40, 40]
    histogram = [rows[-1][f"mine/search/margins.{part}"] for part in ("_type", "values", "bins")]
    assert histogram == ["histogram", [1, 3], [0.0, 0.5, 1.0]]
    assert rows[0]["train/search/loss"] == 0.5
    metrics = {metric.name or metric.glob_name: metric.step_metric for metric in kinds(path, "metric")}
    assert metrics["*"] == STEP
    (media,) = path.parent.glob("files/media/html/**/*.html")
    assert "<svg>margins</svg>" in media.read_text()
    (table,) = path.parent.glob("files/media/table/results*.json")
    assert json.loads(table.read_text())["data"] == [["bm25", 0.1], ["trained", None]]
    artifacts = {artifact.name: artifact.type for artifact in kinds(path, "artifact")}
    assert artifacts[f"model-{run.run_id}"] == "model"
    assert server.runs == {}  # offline


@pytest.mark.slow
def test_the_attempts_of_a_run_are_sent_once_and_to_one_run(server, tmp_path, caplog):
    caplog.set_level("INFO")
    for first in (1, 3):
        logger = make_logger(tmp_path / "run")
        for step in range(first, first + 4):
            logger.log_metrics({"train/search/loss": step / 10}, step=step)
        logger.close()
        time.sleep(1.1)  # W&B's folders are named by the second
    identity = (tmp_path / "run" / "wandb_id").read_text()
    with lock_run(tmp_path / "run"):
        sync([f"folder={tmp_path}"])
    assert "still training" in caplog.text
    assert server.rows(identity) == []
    sync([f"folder={tmp_path}"])
    assert "run: sent, 2 attempts" in caplog.text
    assert [row[STEP] for row in server.rows(identity)] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert list(server.runs) == [identity]
    sync([f"folder={tmp_path}"])
    assert "nothing left to send" in caplog.text
    assert len(server.rows(identity)) == 8


@pytest.mark.slow
def test_an_online_run_is_sent_while_it_trains(server, tmp_path):
    logger = make_logger(tmp_path, "wandb.mode=online")
    logger.log_metrics({"train/search/loss": 0.5}, step=1)
    identity = (tmp_path / "wandb_id").read_text()
    deadline = time.monotonic() + 40
    while not server.rows(identity) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.rows(identity)[0]["train/search/loss"] == 0.5
    logger.log_metrics({"train/search/loss": 0.25}, step=2)
    logger.preempted()
    assert [row[STEP] for row in server.rows(identity)] == [1, 2]
    assert server.exits == {identity: 75}
    assert kinds(file_of(tmp_path), "preempting")


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["refuses", "falls silent later"])
def test_a_failing_server_loses_nothing_and_delays_nothing(server, tmp_path, caplog, failure):
    fail = server.silent.set if "silent" in failure else server.close
    logger = make_logger(tmp_path, "wandb.mode=online", "wandb.finish_timeout=3")
    if "later" not in failure:
        fail()
    logger.log_metrics({"train/search/loss": 0.0}, step=0)
    if "later" in failure:
        deadline = time.monotonic() + 40
        while not server.rows((tmp_path / "wandb_id").read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        fail()
    longest = 0.0
    for step in range(1, 101):
        start = time.perf_counter()
        logger.log_metrics({"train/search/loss": step / 10}, step=step)
        longest = max(longest, time.perf_counter() - start)
        time.sleep(0.005)
    logger.log_table("results", ["system"], [["trained"]], step=100)
    sender = logger._sender
    start = time.perf_counter()
    logger.close()
    assert time.perf_counter() - start < 8
    assert longest < 2  # the server never answers
    assert sender.poll() is not None
    assert [row[STEP] for row in history(file_of(tmp_path))] == [*range(101), 100]
    assert "W&B did not receive the whole run; make sync" in caplog.text
    with wandb_server() as back:
        os.environ["WANDB_BASE_URL"] = back.url  # monkeypatch puts it back
        wandb.teardown()
        sync([f"folder={tmp_path}"])
        rows = {row[STEP] for row in back.rows((tmp_path / "wandb_id").read_text())}
        rows |= {row[STEP] for row in server.rows((tmp_path / "wandb_id").read_text())}
    assert rows == set(range(101))


@pytest.mark.slow
def test_sync_reports_an_absent_server(server, tmp_path, monkeypatch):
    logger = make_logger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.close()
    server.close()
    with pytest.raises(UserError, match="does not answer"):
        sync([f"folder={tmp_path}"])
    monkeypatch.setattr(sync_module, "check_server", lambda: None)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="1 of 1 runs could not be sent"):
        sync([f"folder={tmp_path}"])


@pytest.mark.slow
def test_an_error_in_wandb_ends_its_log_but_not_the_run(server, tmp_path, caplog):
    logger = make_logger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    run, logger._run = logger._run, None
    logger.arguments = {"no such argument": 1}
    logger.log_metrics({"a": 2.0}, step=2)
    logger.log_metrics({"a": 3.0}, step=3)
    logger.close()
    assert caplog.text.count("W&B failed") == 1
    run.finish()


@pytest.mark.slow
def test_only_the_first_rank_has_a_wandb_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = make_logger(tmp_path, "wandb.mode=online")
    logger.log_metrics({"a": 1.0}, step=1)
    logger.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trial_has_the_id_that_its_agent_chose(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen01")
    logger = make_logger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.close()
    (run, *_) = kinds(file_of(tmp_path), "run")
    assert (run.run_id, run.sweep_id) == ("chosen01", "s1")


@pytest.mark.slow
def test_the_sender_ends_with_a_killed_training(server, tmp_path):
    (tmp_path / "run-a.wandb").write_bytes(b":W&B\x00\x00\x00")  # a run that never ends
    sender = [sys.executable, "-m", "experiments.run.wandb_sender", str(tmp_path / "run-a.wandb")]
    code = f"import subprocess, time; print(subprocess.Popen({sender!r}).pid, flush=True); time.sleep(60)"
    training = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    sender = int(training.stdout.readline())
    time.sleep(3)
    os.kill(sender, 0)
    training.send_signal(signal.SIGKILL)
    training.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{sender}").exists():
        time.sleep(0.1)
    assert not Path(f"/proc/{sender}").exists()
