"""Command-line options as typed dataclasses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from datamodules.options import check_options, option
from datamodules.records import UserError
from experiments.config.arguments import as_argument, named_values, parse, parse_known


@dataclass(kw_only=True)
class Options:
    """Do something with a model."""

    experiment: str = option("moe", "name of the experiment", positional=True)
    model: str = option(help="folder of a run")
    count: int = option(3, "number of texts", minimum=1)
    share: float = option(0.1, "share of the steps", minimum=0, below=1)
    split: Literal["dev", "test"] = option("test", "split to measure")
    tasks: tuple[str, ...] = option((), "tasks, separated by commas")
    names: tuple[str, ...] = option((), "names", choices=("a", "b"))
    output: Path | None = option(None, "folder of the result")
    overwrite: bool = option(False, "replace earlier results")
    root: str = option("data", "folder of the data", key="data.root")


def test_values_have_the_type_of_their_field():
    arguments = [
        "model=m",
        "count=5",
        "share=0.5",
        "split=dev",
        "tasks=a,b",
        "output=there",
        "overwrite=yes",
        "data.root=d",
    ]
    options = parse(Options, arguments)
    expected = Options(
        model="m", count=5, share=0.5, split="dev", tasks=("a", "b"), output=Path("there"), overwrite=True, root="d"
    )
    assert options == expected
    assert type(options.count) is int


def test_defaults_and_the_positional_argument():
    assert parse(Options, ["vanilla", "model=m"]) == Options(experiment="vanilla", model="m")
    assert parse(Options, ["model=m", "output="]).output is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("count=0", "count: expected a number of at least 1, got 0"),
        ("count=1.5", "count: expected a whole number, got '1.5'"),
        ("share=1", "share: expected a number of at least 0 and below 1, got 1.0"),
        ("share=nan", "share: expected a number of at least 0 and below 1, got nan"),
        ("split=train", "split: expected one of dev, test, got 'train'"),
        ("names=a,c", "names: expected one of a, b, got 'c'"),
        ("overwrite=maybe", "overwrite: expected yes or no, got 'maybe'"),
        ("modle=x", "command line: unknown key 'modle'; did you mean model?"),
        ("word", "command line: expected key=value, got 'word'"),
        ("model=", "model: required, folder of a run"),
    ],
)
def test_wrong_argument_names_the_key_and_what_is_expected(argument, message):
    with pytest.raises(UserError) as error:
        parse(Options, ["moe", "model=m", argument])
    assert message in str(error.value)


def test_missing_required_option_raises_user_error():
    with pytest.raises(UserError, match="model: required"):
        parse(Options, [])


def test_misspelt_required_key_is_named_before_the_missing_one():
    with pytest.raises(UserError, match="unknown key 'modle'; did you mean model?"):
        parse(Options, ["modle=x"])


def test_other_keys_are_returned_in_their_order():
    options, rest = parse_known(Options, ["model=m", "optim.lr=1", "count=2", "b"])
    assert (options.count, rest) == (2, ["optim.lr=1", "b"])


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Options, ["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith("Do something with a model.")
    for key in ("EXPERIMENT", "model=TEXT", "split=dev|test", "tasks=TEXT,TEXT", "overwrite=yes|no", "data.root=TEXT"):
        assert key in text
    assert "number of texts; a number of at least 1; default: 3" in text


def test_an_option_survives_being_written_and_parsed():
    options = parse(Options, ["model=m", "tasks=a,b", "overwrite=yes"])
    arguments = [f"{key}={as_argument(getattr(options, key))}" for key in ("model", "tasks", "overwrite", "output")]
    assert parse(Options, arguments) == options


def test_named_values_are_complete_and_have_one_value_for_each_name():
    assert named_values("parts", ["a:1:2", "b:c"], "NAME:VALUE") == {"a": "1:2", "b": "c"}
    assert named_values("tasks", ["a", "b:c"], "NAME", optional=True) == {"a": "", "b": "c"}
    for text in ("a", "a:", ":1"):
        with pytest.raises(UserError, match=f"^parts: expected NAME:VALUE, got '{text}'$"):
            named_values("parts", [text], "NAME:VALUE")
    with pytest.raises(UserError, match="^parts: expected one value for a, got '1:0' and '0:1'$"):
        named_values("parts", ["a:1:0", "b:1:1", "a:0:1"], "NAME:VALUE")


def test_nested_dataclasses_are_checked_with_their_path():
    @dataclass
    class Task:
        batch_size: int | None = option(None, "queries", minimum=1)

    @dataclass
    class Data:
        task: dict[str, Task] = option({}, "tasks")

    check_options(Data({"search": Task()}))
    globals()["Task"] = Task
    with pytest.raises(UserError, match=r"data.task.search.batch_size: expected a number of at least 1, got 0"):
        check_options(Data({"search": Task(0)}), "data.")
