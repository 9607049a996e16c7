"""metrics.jsonl: each row is on a line of its own, even after a kill or a full disk. And Lightning's own loggers."""

import csv
import json
import resource
from pathlib import Path

import pytest

from experiments.config.schema import LOGGERS
from lightning_modules.loggers import LIGHTNING_LOGGERS, JsonlLogger, LightningLogger


def readable_rows(path):
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_row_written_after_a_kill_starts_on_its_own_line(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    JsonlLogger(path).log_metrics({"loss": 1.0}, step=1)
    JsonlLogger(path).log_metrics({"loss": 2.0}, step=2)
    path.write_bytes(path.read_bytes()[:-cut])
    logger = JsonlLogger(path)
    logger.log_metrics({"loss": 3.0}, step=3)
    logger.log_metrics({"loss": 4.0}, step=4)
    steps = [row["step"] for row in readable_rows(path)]
    assert steps == ([1, 2, 3, 4] if cut == 1 else [1, 3, 4])  # a cut of 1 removes only the newline


def test_rows_wait_until_the_disk_has_room(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log_metrics({"loss": 1.0}, step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))  # no file may grow beyond it
    try:
        logger.log_metrics({"loss": 2.0}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in caplog.text
    logger.log_metrics({"loss": 3.0}, step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_rows_after_the_step_where_training_resumes_are_removed(tmp_path):
    """A killed run logs until its end, and again from its last checkpoint on. Each row must be there once."""
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in range(1, 9):
        logger.log_metrics({"loss": 1.0}, step=step)
    logger.log_metrics({"val": 0.5}, step=6)
    path.write_bytes(path.read_bytes() + b'[1]\n{"loss": 1}\nnot JSON\n{"step": 9, "lo')
    logger = JsonlLogger(path)
    logger.rewind(6)
    assert sorted(row["step"] for row in readable_rows(path)) == [1, 2, 3, 4, 5, 6, 6]
    logger.log_metrics({"val": 0.5}, step=6)  # measured again, because the checkpoint is older than the evaluation
    logger.log_metrics({"other": 0.5}, step=6)
    for step in (7, 8):
        logger.log_metrics({"loss": 2.0}, step=step)
    rows = readable_rows(path)
    assert sorted((row["step"], *sorted(row.keys() - {"step", "time"})) for row in rows) == [
        *((step, "loss") for step in range(1, 7)),
        *((6, "other"), (6, "val"), (7, "loss"), (8, "loss")),
    ]
    assert [row["loss"] for row in rows if row["step"] > 6] == [2.0, 2.0]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_in_a_folder_with_rows_starts_with_none(tmp_path):
    """The first attempt was killed before its first checkpoint."""
    path = tmp_path / "metrics.jsonl"
    for step in (0, 1, 2):
        JsonlLogger(path).log_metrics({"loss": 1.0}, step=step)
    JsonlLogger(path).rewind(0)
    assert [row["step"] for row in readable_rows(path)] == [0]
    JsonlLogger(tmp_path / "new.jsonl").rewind(0)
    assert not (tmp_path / "new.jsonl").exists()


def log_twice(name, folder):
    """Log steps 1 to 4, and after a kill 3 to 5 from the checkpoint of step 2."""
    for start, steps in ((0, range(1, 5)), (2, range(3, 6))):
        logger = LightningLogger(name, folder)
        logger.rewind(start)
        for step in steps:
            logger.log_metrics({"train/loss": start + step / 10, "train/batch": "a1"}, step=step)
    logger.log_metrics({"test/mean/ndcg@10": 0.5}, step=5)
    logger.close()


def test_tensorboard_shows_each_step_of_a_killed_run_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_twice("tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "test/mean/ndcg@10"}
    shown = [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")]
    assert shown == [(1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4), (5, 2.5)]


def test_each_start_of_a_run_writes_a_csv_file(tmp_path):
    log_twice("csv", tmp_path)
    tables = [list(csv.DictReader(path.open())) for path in sorted(tmp_path.glob("csv/version_*/metrics.csv"))]
    assert [[(row["step"], row["train/loss"]) for row in table if row["train/loss"]] for table in tables] == [
        [("1", "0.1"), ("2", "0.2"), ("3", "0.3"), ("4", "0.4")],
        [("3", "2.3"), ("4", "2.4"), ("5", "2.5")],
    ]
    assert tables[1][-1]["test/mean/ndcg@10"] == "0.5"


def test_the_configuration_knows_the_loggers():
    """It names them itself, so that most commands need not import Lightning."""
    assert tuple(LIGHTNING_LOGGERS) == LOGGERS


@pytest.mark.parametrize("folder", ["$HOME", "${HOME}/run", "~", "~root"])
@pytest.mark.parametrize("name", LIGHTNING_LOGGERS)
def test_names_of_folders_are_never_expanded(tmp_path, monkeypatch, name, folder):
    """TensorBoard's files of a run in "runs/$HOME" were written to the home folder."""
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    log_twice(name, Path(folder))
    assert list((tmp_path / folder / name).iterdir())
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("name", LIGHTNING_LOGGERS)
def test_a_logger_that_cannot_write_does_not_end_the_run(tmp_path, caplog, name):
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    (tmp_path / name).write_text("a file where the folder should be")
    logger = LightningLogger(name, tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": 1.0}, step=step)
    logger.close()
    assert caplog.text.count(f"{name}: cannot be written") == 1
