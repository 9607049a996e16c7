"""The list of runs: what differs, under short names, in a table that fits."""

import itertools
import subprocess
import sys

import pytest
import yaml

from experiments.config.experiment import as_dict, experiments, load_config
from experiments.run.folder import flat
from experiments.runs import OPTIONAL_COLUMNS, SPEED_COLUMNS, ListedRun, differences, records_of, short_keys, table_of
from experiments.shared.table_formats import PIPE_WIDTH, print_tables


def listed(name: str, overrides: list[str], **record) -> ListedRun:
    config = as_dict(load_config("moe", overrides))
    cells = dict.fromkeys((*OPTIONAL_COLUMNS, *SPEED_COLUMNS)) | {"run": name, "steps": 3, "max_steps": 9}
    return ListedRun(config, differences(config), cells | {"complete": False} | record, "same data")


def printed(capsys, runs, width=PIPE_WIDTH) -> str:
    table = table_of(runs, "runs")
    table.pipe_width = width
    print_tables("table", [table], [])
    return capsys.readouterr().out


def test_differences_are_the_settings_that_are_not_the_experiments():
    config = as_dict(load_config("moe", ["optim.lr=0.5", "tasks=[search]", "trainer.grad_cache=true"]))
    assert differences(config) == {"tasks": ["search"], "optim.lr": 0.5, "trainer.grad_cache": True}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", experiments())
def test_run_with_the_settings_of_its_experiment_has_no_differences(experiment):
    """The list converts no arguments of classes, because that would import torch."""
    assert differences(as_dict(load_config(experiment))) == {}


@pytest.mark.slow
def test_list_is_shown_without_torch(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(as_dict(load_config("moe", ["optim.lr=0.5"]))))
    code = "import sys\nfrom experiments.runs import main\nmain(sys.argv[1:])\nassert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, f"root={tmp_path}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "lr=0.5" in output


def test_short_keys_are_the_shortest_endings_of_one_key_only():
    keys = [key for key, _ in flat(as_dict(load_config("moe_mined")))]
    short = short_keys(keys)
    nodes = {key: key.removesuffix("._target_") for key in keys}
    assert len(set(short.values())) == len(keys) > 80
    for key, name in short.items():
        assert f".{nodes[key]}".endswith(f".{name}")
        if name != nodes[key]:  # no other key ends in it, and without its first part some other key would
            assert [k for k in keys if f".{nodes[k]}".endswith(f".{name}")] == [key]
        if "." in name:
            shorter = name.partition(".")[2]
            assert len([k for k in keys if f".{nodes[k]}".endswith(f".{shorter}")]) > 1
    assert short["optim.lr"] == "lr"
    assert short["encoder._target_"] == "encoder"
    assert short["task.search.instruction"] == "search.instruction"


def test_shared_settings_are_above_the_table_once(capsys):
    runs = [
        listed("runs/a", ["optim.lr=0.5", "tasks=[search]", "trainer.max_steps=9"]),
        listed("runs/b", ["optim.lr=0.25", "tasks=[search]", "trainer.max_steps=9"]),
        listed("runs/c", ["tasks=[search]", "trainer.max_steps=9"]),
    ]
    title, *rows = printed(capsys, runs).splitlines()
    assert title == "runs, all with tasks=[search] max_steps=9"
    assert [next((row for row in rows if f" runs/{name} " in row), "").split()[3] for name in "ab"] == [
        "lr=0.5",
        "lr=0.25",
    ]
    assert not [row for row in rows if "max_steps" in row or "tasks=" in row]
    alone = printed(capsys, runs[:1])
    assert " tasks=[search] lr=0.5 max_steps=9 " in alone


def test_machine_formats_have_the_value_of_every_run_under_its_full_key():
    runs = [listed("runs/a", ["optim.lr=0.5"]), listed("runs/b", [])]
    default = load_config("moe").optim.lr
    assert [record["optim.lr"] for record in records_of(runs)] == [0.5, default]


@pytest.mark.parametrize("width", [80, PIPE_WIDTH, 300])
def test_names_are_never_cut_and_lines_fit(capsys, width):
    full = dict.fromkeys((*SPEED_COLUMNS, "last logged", "metric"), "12345") | {"mean": 0.5, "BM25": 0.25}
    long = [f"task.search.instruction={'word ' * 20}", *(f"optim.{key}=0.123" for key in ("lr", "warmup"))]
    runs = [listed(f"runs/moe-sample-seed0-{i:06d}", long[: i + 1], **full) for i in range(3)]
    lines = printed(capsys, runs, width).splitlines()
    assert max(map(len, lines[1:])) <= width
    text = "\n".join(lines)
    assert all(f" {run.record['run']} " in text for run in runs)
    shown = [heading for heading in OPTIONAL_COLUMNS if heading in text]
    assert len(shown) >= {80: 1, PIPE_WIDTH: 5, 300: 9}[width]
    dropped = [heading for heading in OPTIONAL_COLUMNS if heading not in text and heading != "metric"]
    later = list(itertools.dropwhile(lambda heading: heading in dropped, OPTIONAL_COLUMNS))
    assert not set(later) & set(dropped) - {"device hours"}, "columns are left out in the order of OPTIONAL_COLUMNS"


def test_best_mean_is_marked_only_among_runs_on_the_same_data():
    runs = [listed(f"runs/{name}", [], mean=mean) for name, mean in (("a", 0.5), ("b", 0.25), ("c", 0.9))]
    runs[2] = ListedRun(runs[2].config, runs[2].settings, runs[2].record, "other data")
    table = table_of(runs, "runs")
    mean = [column.heading for column in table.columns].index("mean")
    assert [texts[mean] for _, texts in table.texts()] == [("0.5000", True), ("0.2500", False), ("0.9000", False)]


def test_own_data_sets_are_shown_by_their_names(capsys, tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": "d", "text": "x"}\n')
    (tmp_path / "train.jsonl").write_text('{"query": "x", "positives": ["d"]}\n')
    nodes = f"{{mine: {{folder: {tmp_path}}}, also_mine: {{folder: {tmp_path}}}}}"
    run = listed("runs/a", [f"task.search.data={nodes}", "task.classification.data.topics.num_papers=7"])
    output = printed(capsys, [run])
    words = set(output.split())
    assert {"search.data=[mine,also_mine]", "num_papers=7"} <= words
    assert "Reader" not in output
    assert str(tmp_path) not in output
    (record,) = records_of([run])
    assert record["task.search.data.mine.folder"] == str(tmp_path)
