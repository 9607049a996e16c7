"""metrics.jsonl: each row is on a line of its own, even after a kill or a full disk."""

import json
import resource

import pytest

from lightning_modules.loggers import JsonlLogger


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
