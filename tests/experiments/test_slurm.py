"""SLURM jobs: the script, refused options, and a real SLURM on loopback that preempts a run with two ranks.

For more kinds of preemption, set LONG_TESTS to a number of steps, such as 1000. That many steps, with an evaluation
after each, must take longer than two attempts of three minutes.
"""

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamodules.records import UserError
from experiments.slurm import seconds, slurm
from tests import slurm_loopback
from tests.experiments.test_train import LONG, ROOT, TINY, batches, check_same_state, command, rows
from tests.forked import run_ranks


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_script_has_the_options_and_runs_the_training(tmp_path, caplog):
    caplog.set_level("INFO")
    script = slurm(["moe", "NODES=2", "GPUS=8", "TIME=04:00:00", "PARTITION=gpu", "optim.lr=3e-5", "wandb.name=it's 1"])
    text = script.read_text()
    for line in (
        *("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=04:00:00", "--partition=gpu"),
        *("--requeue", "--open-mode=append", "--signal=USR1@120", "--cpus-per-task=8"),
    ):
        assert f"#SBATCH {line}\n" in text
    assert not any(f"--{absent}" in text for absent in ("account", "array", "mem", "qos"))
    assert "{{" not in text
    assert f"in runs/{script.stem}" in caplog.text
    assert run_script(tmp_path, script) == [
        *("-m", "experiments.train", "moe", "optim.lr=3e-5", "wandb.name=it's 1", "trainer.num_nodes=2"),
        *("trainer.devices=8", "trainer.accelerator=gpu"),
    ]


def run_script(tmp_path, script, status=0, **environment):
    """Run the script with a stub of srun, and return the arguments that python gets."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\nexit {status}\n')
    scontrol = srun.with_name("scontrol")
    scontrol.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/requeued\n')
    for program in (srun, scontrol):
        program.chmod(0o755)
    environment |= {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash", str(script)], env=os.environ | environment, check=False)
    arguments = (tmp_path / "arguments").read_text().split("\n")[:-1]
    assert done.returncode == (0 if status == 75 else status)
    assert arguments[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    return arguments[arguments.index(sys.executable) + 1 :]


@pytest.mark.slow
def test_an_array_has_a_job_for_every_experiment_and_seed(tmp_path):
    script = slurm(["moe", "TIME=60", "GPUS=0", "TASKS=2", "EXPS=vanilla,moe", "SEEDS=0,7", "AT_ONCE=2"])
    text = script.read_text()
    assert "#SBATCH --array=0-3%2\n" in text
    assert "%A_%a.out" in text
    assert "gpus" not in text
    commands = [run_script(tmp_path, script, SLURM_ARRAY_TASK_ID=str(i)) for i in range(4)]
    assert [(words[2], words[3]) for words in commands] == [
        *(("vanilla", "run.seed=0"), ("vanilla", "run.seed=7"), ("moe", "run.seed=0"), ("moe", "run.seed=7"))
    ]


@pytest.mark.slow
def test_the_script_requeues_a_run_that_cannot_do_so_itself(tmp_path):
    script = slurm(["moe", "TIME=60", "LAUNCH=apptainer exec --nv image.sif", "SETUP=export COLOUR=red"])
    assert "  apptainer exec --nv image.sif " in script.read_text()
    assert "\nexport COLOUR=red\n" in script.read_text()
    run_script(tmp_path, script, status=2)
    assert not (tmp_path / "requeued").exists()
    run_script(tmp_path, script, status=75)
    assert (tmp_path / "requeued").read_text() == "requeue 12\n"


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("90:30", 5430), ("04:00:00", 14400), ("2-12", 216000), ("1-00:30", 88200), ("1-2:03:04", 93784)],
)
def test_times_are_read_as_slurm_reads_them(time, expected):
    assert seconds(time) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TIME: required, time limit of one attempt"),
        (["TIME=4h"], "TIME: expected minutes, .*, got '4h'"),
        (["TIME=01:99:00"], "TIME: expected minutes, .*, got '01:99:00'"),
        (["TIME=2"], "TIME: 2 leaves no time to train, because the run saves 120 seconds"),
        (["TIME=60", "GPUS=two"], "GPUS: expected a whole number, got 'two'"),
        (["TIME=60", "AT_ONCE=0", "SEEDS=0,1"], "AT_ONCE: expected a number of at least 1, got 0"),
        (["TIME=60", "optim.lrr=1"], "did you mean optim.lr"),
        (["TIME=60", "nodes=2"], r"unknown key nodes; did you mean NODES\?"),
        (["TIME=60", "NODE=2"], r"unknown key NODE; did you mean NODES\?"),
        (["TIME=60", "EXPS=moe,mo"], "unknown experiment 'mo'"),
        (["TIME=60", "SEEDS=0,1", "run.dir=x"], "run.dir: each job of an array needs its own folder"),
        (["TIME=60", "SEEDS=0,1,0"], "SEEDS: each may be named only once, got 0,1,0"),
        (["TIME=60", "EXPS=moe,moe"], "EXPS: each may be named only once"),
        (["TIME=60", "trainer.devices=4"], "trainer.devices=4: NODES, GPUS and TASKS set it to 1"),
    ],
)
def test_wrong_options_are_refused_before_a_job_is_written(arguments, message):
    with pytest.raises(UserError, match=message):
        slurm(["moe", *arguments])
    assert not Path("slurm").exists()


def test_without_slurm_the_error_names_the_script(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for value in ("1", "yes", "true", "on"):
        with pytest.raises(UserError, match=r"SUBMIT: sbatch cannot be run here .* the job is in .*moe.*\.sbatch"):
            slurm(["moe", "TIME=60", f"SUBMIT={value}"])


@pytest.mark.parametrize("value", ["", "0", "no", "false", "off", "OFF"])
def test_a_job_is_not_submitted_if_submit_says_no(monkeypatch, value):
    monkeypatch.setattr("experiments.slurm.submit", lambda _: pytest.fail("submitted"))
    assert slurm(["moe", "TIME=60", f"SUBMIT={value}"]).is_file()
    with pytest.raises(UserError, match="^SUBMIT: expected yes or no, got 'n'"):
        slurm(["moe", "TIME=60", "SUBMIT=n"])


@pytest.fixture
def write_cluster(tmp_path, monkeypatch):
    """Return a function that writes cluster.yaml."""

    def write(text):
        (tmp_path / "cluster.yaml").write_text(text)
        monkeypatch.setattr("experiments.slurm.CLUSTER", tmp_path / "cluster.yaml")

    return write


LINES = ("export PATH=${HOME}/bin:$PATH", "echo ${HOME} ${A:+:$A}")


@pytest.mark.parametrize("escape", ["", "\\"])  # they had to be escaped
@pytest.mark.parametrize("setup", [LINES, "\n".join(LINES)], ids=["list", "text"])
def test_variables_of_the_shell_in_cluster_yaml_stay(write_cluster, setup, escape, monkeypatch):
    monkeypatch.setenv("PROJECT", "physics")
    content = {"setup": setup, "launch": "apptainer exec ${IMAGES}/x.sif"}
    text = json.dumps(content | {"account": "${oc.env:PROJECT}"})
    write_cluster(text.replace("${", json.dumps(escape)[1:-1] + "${").replace(r"\\${oc", "${oc"))
    text = slurm(["moe", "TIME=60"]).read_text()
    assert "#SBATCH --account=physics" in text
    assert "\n".join(("", *LINES, "")) in text
    assert " apptainer exec ${IMAGES}/x.sif " in text


@pytest.mark.parametrize("setup", ["3", "[1]", "{a: b}"])
def test_setup_that_is_not_text_raises_user_error(write_cluster, setup):
    write_cluster(f"setup: {setup}")
    with pytest.raises(UserError, match=r"cluster.yaml: setup: expected a shell command or a list of them, got "):
        slurm(["moe", "TIME=60"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := slurm_loopback.why_not():
        pytest.skip(reason)
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0)), two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    with slurm_loopback.slurm(tmp_path_factory.mktemp("slurm"), ports) as environment:
        yield environment


HOSTILE = ("gpu --wrap=evil", "gpu # x", "a'b", 'a"b', "$(touch x)", "`touch x`", "gpu; touch x", "a|b&c", "a=", "=")


@pytest.mark.parametrize("key", ["PARTITION", "ACCOUNT", "QOS", "CONSTRAINT", "MEM"])
def test_values_cannot_add_options_to_the_script(key):
    """shlex reads an option as sbatch does: with quotes, and # starts a comment."""
    plain = slurm(["vanilla", "TIME=60", "GPUS=0", f"{key}=value"]).read_text()
    for value in HOSTILE:
        text = slurm(["vanilla", "TIME=60", "GPUS=0", f"{key}={value}"]).read_text()
        options = [shlex.split(line[8:], comments=True) for line in text.splitlines() if line.startswith("#SBATCH")]
        assert all(len(words) == 1 for words in options)
        assert [f"--{key.lower()}={value}"] in options
        changed = set(text.splitlines()) ^ set(plain.splitlines())
        assert len(changed) == 2
    for value in ("gpu\n#SBATCH --wrap=evil", "gpu\ntouch x", "gpu\rx", "gpu\x00"):
        with pytest.raises(UserError, match=rf"^{key}: expected one line without control characters, got 'gpu\\"):
            slurm(["vanilla", "TIME=60", "GPUS=0", f"{key}={value}"])


@pytest.mark.parametrize("key", ["LAUNCH", "JOB_PYTHON", "EXPS", "SEEDS", "SUBMIT", "SWEEP", "TIME"])
def test_line_breaks_are_refused_in_every_option(key):
    with pytest.raises(UserError, match=f"^{key}: "):
        slurm(["vanilla", "TIME=60", "GPUS=0", f"{key}=a\ntouch x"])


@pytest.mark.slow
def test_launch_and_python_are_words_not_shell(tmp_path):
    launch = "apptainer exec '$IMAGES/a b.sif'; touch x $(touch x) $IMAGE"
    script = slurm(["vanilla", "TIME=60", "GPUS=0", f"LAUNCH={launch}"])
    line = next(line for line in script.read_text().splitlines() if "experiments.train" in line)
    done = subprocess.run(
        ["bash", "-c", "srun() { :; }; IMAGE=mine; printf '%s|' " + line.strip().removesuffix('"$@"')],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    words = ["apptainer", "exec", "$IMAGES/a b.sif;", "touch", "x", "$(touch", "x)", "mine", sys.executable]
    assert done.stdout.split("|")[: len(words)] == words
    assert not (tmp_path / "x").exists()


def test_paths_that_sbatch_would_change_are_refused(tmp_path, monkeypatch):
    for name in ("100%j", "a\nb", "a\\b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(UserError, match="expected a path without"):
            slurm(["vanilla", "TIME=60", "GPUS=0"])
    monkeypatch.chdir(tmp_path)
    for name in ("..", "."):
        assert slurm(["vanilla", "TIME=60", "GPUS=0", f"run.dir={tmp_path / name}"]).parent == tmp_path / "slurm"


@pytest.mark.slow
def test_sbatch_reads_the_paths_of_a_folder_with_blanks_and_quotes(tmp_path, monkeypatch, cluster):
    folder = tmp_path / """a b # 'q' "d" $HOME `x` --wrap=y"""
    folder.mkdir()
    monkeypatch.chdir(folder)
    script = slurm(["vanilla", "TIME=60", "GPUS=0", "CPUS=1", "ACCOUNT=one two # --hold", "run.dir=runs/my run"])
    submitted = ["sbatch", "--parsable", "--hold", str(script)]
    number = subprocess.run(submitted, env=cluster, capture_output=True, text=True, check=True).stdout.strip()
    shown = ["scontrol", "show", "job", number]
    job = subprocess.run(shown, env=cluster, capture_output=True, text=True, check=True).stdout
    subprocess.run(["scancel", number], env=cluster, check=True)
    assert f"StdOut={folder}/slurm/my run-{number}.out\n" in job
    assert "Account=one two # --hold " in job
    assert "JobName=my run\n" in job


STEPS = 40
WAYS = {"steps": ["step"], "imports": ["imports", "step", "step"], "time": []}


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way == "steps" or "LONG_TESTS" in os.environ])
def test_a_preempted_job_equals_an_undisturbed_one(tmp_path, monkeypatch, caplog, cluster, way):
    """SIGUSR1 comes during imports, at random steps, at the time limit, and after the end. No attempt fails."""
    settings = [*LONG, "data.num_workers=1", f"trainer.max_steps={STEPS}"]
    if way == "time":
        settings += [f"trainer.max_steps={os.environ['LONG_TESTS']}", "evaluation.every_n_steps=1"]
    whole, folder = tmp_path / "whole", tmp_path / "preempted"
    run_ranks(command(whole, *settings, "trainer.devices=2"), check=True)

    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, cluster[key])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    caplog.set_level("INFO")
    limits = ["TIME=3", "GRACE=60"] if way == "time" else ["TIME=20"]
    script = slurm(["moe", "GPUS=0", "TASKS=2", "CPUS=1", *limits, "SUBMIT=1", f"run.dir={folder}", *TINY, *settings])
    number = next(r.args[0] for r in caplog.records if r.msg.startswith("job %s:"))
    output = script.with_name(f"{script.stem}-{number}.out")
    for kind in WAYS[way]:
        preempt(cluster, number, kind, folder)
    state = wait(cluster, number, (folder / "results.json").is_file, until=("COMPLETED",))
    scancel(cluster, number)  # the run is just ending, so this has no effect
    state = wait(cluster, number, until=("COMPLETED",))
    text = output.read_text()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), text[-3000:]
    assert int(state["Restarts"]) >= max(len(WAYS[way]), 2 if way == "time" else 1), text[-3000:]
    assert text.count("preempted by SIGUSR1: the same command") == int(state["Restarts"])
    assert not list(folder.rglob("hpc_ckpt*"))
    assert batches(folder) == sorted(batches(whole))  # and no step twice
    check_same_state(whole, folder)


def preempt(cluster, number, kind, folder):
    """Send SIGUSR1 to all tasks of a job, during imports or after a random number of further steps."""
    restarts = int(wait(cluster, number, until=("RUNNING",))["Restarts"])

    def num_rows():
        return len(rows(folder)) if (folder / "metrics.jsonl").is_file() else 0

    if kind == "imports":
        time.sleep(random.uniform(1, 4))
    else:
        target = num_rows() + random.randint(1, 8)
        wait(cluster, number, lambda: num_rows() >= target)
    scancel(cluster, number)
    wait(cluster, number, lambda: int(slurm_loopback.job(cluster, number)["Restarts"]) > restarts)


def scancel(cluster, number):
    subprocess.run(["scancel", f"--signal={signal.SIGUSR1.name[3:]}", number], env=cluster, capture_output=True)


def wait(cluster, number, condition=lambda: False, until=()):
    """Wait until the job is in one of the states `until` or the condition holds. Returns the job's state."""
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline:
        state = slurm_loopback.job(cluster, number)
        assert state["JobState"] not in ("FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED"), state
        if state["JobState"] in until or condition():
            return state
        time.sleep(0.05)
    raise AssertionError(state)
