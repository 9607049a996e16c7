"""What the machine lacks ends a command with a sentence: a home folder, room on the disk, whole numbers of any size."""

import pwd
import shutil
import sys

import pytest

from datamodules.files import expanded
from datamodules.readers.beir import write_beir
from datamodules.records import UserError
from experiments import train
from experiments.build.data import build_data
from experiments.config.experiment import load_config
from experiments.config.structured import read_yaml
from experiments.doctor import disk, models
from experiments.shared.console import entry_point, full_disk
from lightning_modules.encoders.backbone import package_folder
from tests.conftest import toy_collection
from tests.experiments.test_changed_data import ARGUMENTS
from tests.forked import run
from tests.lightning_modules.quiet_trainer import after_batch


@pytest.fixture
def homeless(monkeypatch):
    """A container with any user id: no HOME, and no entry in /etc/passwd."""

    def unknown(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_missing_home_folder_is_named_with_the_key(homeless):
    """It was a traceback: RuntimeError: Could not determine home directory."""
    message = (
        "data.cache: ~/.cache/scimult needs a home folder, but this user has none; name a folder, or data.cache=null"
    )
    with pytest.raises(UserError, match=message):
        build_data(load_config("vanilla", ["scale=sample", "data.cache=~/.cache/scimult"]))
    assert build_data(load_config("vanilla", ["data.cache=null", "tasks=[search]"])).tasks
    assert expanded("/tmp/x", "key").as_posix() == "/tmp/x"
    lines = {line.subject: line for line in (*disk(), *models())}
    assert "needs a home folder" in str(lines["cache"])


@pytest.mark.parametrize("seed", [2**32, 20260712120000, 10**30, -1])
def test_seed_beyond_32_bits_raises_user_error(seed):
    """It was numpy's ValueError, or Python's OverflowError."""
    with pytest.raises(UserError, match=r"run.seed: expected a number (of at least 0 and|of at most)"):
        load_config("vanilla", [f"run.seed={seed}"])
    assert load_config("vanilla", [f"run.seed={2**32 - 1}"]).run.seed == 2**32 - 1


@pytest.mark.parametrize(
    "key", ["trainer.max_steps", "data.batch_size", "data.token_budget", "trainer.log_every_n_steps"]
)
def test_numbers_beyond_64_bits_raise_user_error(key):
    for number in (2**63, -(2**70), 10**400):
        with pytest.raises(UserError, match=f"{key}: expected a number of at most 64 bits, got "):
            load_config("vanilla", [f"{key}={number}"])


def wrapped(inner):
    try:
        try:
            raise inner
        except Exception as error:
            raise RuntimeError("PytorchStreamWriter failed writing file data/1") from error
    except RuntimeError as error:
        return error


def test_errors_of_a_full_disk_are_recognised():
    full = (
        OSError(28, "No space left on device"),
        wrapped(OSError(28, "No space left on device")),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("1024 requested and 512 written"),
    )
    assert all(map(full_disk, full))
    assert not any(map(full_disk, (OSError(2, "No such file"), ValueError("x"), wrapped(ValueError("x")))))


def test_errors_of_the_system_are_a_sentence_and_a_traceback_on_request(tmp_path, monkeypatch, capsys):
    """A folder where a file is due, or a file that may not be read: there was a traceback for each."""
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        entry_point(lambda _: tmp_path.read_text())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory (-v shows where)\n"
    monkeypatch.setattr(sys, "argv", ["command", "-v"])
    with pytest.raises(IsADirectoryError):
        entry_point(lambda _: tmp_path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["export format=plain", "export format=pretrained", "export format=reference", "mine"]
)
def test_full_disk_ends_a_command_with_a_sentence(make_encoder, tmp_path, command):
    """The limit on the size of a file gives the errors of a full disk."""
    make_encoder("attention").save_pretrained(tmp_path / "model")
    name, *options = command.split()
    arguments = [f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", *options]
    if name == "mine":
        arguments = ["vanilla", "tasks=[search]", *arguments, f"data.cache={tmp_path / 'cache'}"]
    elif options == ["format=plain"]:
        arguments.append("task=search")
    done = run([sys.executable, "-m", f"experiments.{name}", *arguments], max_file=8_000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wandb.tags", "[" + "x" * 65 + "]"),
        ("wandb.tags", '["a\\tb"]'),
        ("wandb.name", '"a\\nb"'),
        ("wandb.name", '"\\e[31mred"'),
        ("wandb.name", "x" * 129),
        ("wandb.group", '""'),
        ("wandb.project", "x" * 200),
    ],
)
def test_names_that_wandb_refuses_are_named_before_the_start(key, value):
    with pytest.raises(UserError, match=f"{key}: expected"):
        load_config("vanilla", [f"{key}={value}"])


def test_argument_that_is_not_utf8_raises_user_error():
    with pytest.raises(UserError, match="command line: .* is not UTF-8"):
        load_config("vanilla", ["wandb.name=a\udcff"])


@pytest.mark.parametrize("name", ["os", "", "../x", "numpy", "os.path", "a b"])
def test_package_that_is_not_a_model_raises_user_error(name):
    with pytest.raises(UserError, match=f"package:{name}: "):
        package_folder(f"package:{name}")


def test_package_that_is_not_installed_has_no_folder():
    assert package_folder("package:no_such_package") is None


@pytest.mark.parametrize(
    "content",
    [
        "# caf\u00e9\nencoder: {}\n".encode("latin-1"),
        "encoder: {}\n".encode("utf-16"),
        b"a: " + b"[" * 5000 + b"]" * 5000,
        b"{a: " * 3000 + b"1" + b"}" * 3000,
        b"a: \0\n",
        b"- 1\n",
        b"a: &x [1]\nb: *y\n",
        b'!!python/object/apply:os.system ["true"]\n',
    ],
)
def test_experiment_files_that_cannot_be_read_raise_user_error(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="mine.yaml"):
        read_yaml(path)


@pytest.mark.slow
def test_run_folder_that_is_deleted_during_training_is_named(tmp_path, monkeypatch):
    write_beir(toy_collection(), tmp_path / "set")
    run = tmp_path / "run"
    deleting = after_batch(lambda *_: shutil.rmtree(run, ignore_errors=True))
    arguments = [*ARGUMENTS, f"task.search.data={tmp_path / 'set'}", "data.cache=null", "trainer.max_steps=2"]
    build = train.build_callbacks
    monkeypatch.setattr(train, "build_callbacks", lambda *args: [*build(*args), deleting])
    with pytest.raises(UserError, match="run.dir: .* was deleted or moved"):
        train.train("vanilla", [*arguments, f"run.dir={run}"])
