"""A run's results and checkpoints are not used for data that have changed since."""

import json
import re

import pytest

from datamodules.readers.beir import write_beir
from datamodules.records import UserError
from experiments.sweep import main as sweep
from experiments.train import train
from tests.conftest import toy_collection

ARGUMENTS = [
    *(
        "tasks=[search]",
        "data.batch_size=3",
        "trainer.accelerator=cpu",
        "data.num_workers=0",
        "evaluation.baselines=false",
    ),
    *("backbone.config.hidden_size=32", "backbone.config.intermediate_size=32", "evaluation.metrics=[ndcg@10]"),
]


def change_corpus(folder):
    path = folder / "corpus.jsonl"
    path.write_text(path.read_text().replace("ara", "uru"))


def remove_judgement(folder):
    path = folder / "qrels" / "test.tsv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def add_query(folder):
    with open(folder / "queries.jsonl", "a") as file:
        file.write(json.dumps({"_id": "new", "text": "bara"}) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("change", [change_corpus, remove_judgement, add_query])
@pytest.mark.parametrize("is_cached", [True, False])
def test_changed_data_raise_user_error_for_complete_and_resumed_runs(change, is_cached, tmp_path, capsys):
    """The old table was shown as that of the new data; a resumed run with another vocabulary ended in a traceback."""
    write_beir(toy_collection(), folder := tmp_path / "set")
    cache = f"data.cache={tmp_path / 'cache'}" if is_cached else "data.cache=null"
    run = tmp_path / "run"
    arguments = [*ARGUMENTS, f"task.search.data={folder}", f"run.dir={run}", cache]
    train("vanilla", [*arguments, "trainer.max_steps=2"])
    results = (run / "results.json").read_text()
    capsys.readouterr()
    train("vanilla", [*arguments, "trainer.max_steps=2"])  # unchanged: shows the table
    assert "trained" in capsys.readouterr().out
    change(folder)
    for steps in (2, 4):
        message = f"run.dir: the data are not those of the run in {re.escape(str(run))} .set: .* run.resume=never"
        with pytest.raises(UserError, match=message):
            train("vanilla", [*arguments, f"trainer.max_steps={steps}"])
    assert (run / "results.json").read_text() == results
    train("vanilla", [*arguments, "trainer.max_steps=2", "run.resume=never"])
    assert (tmp_path / "run.1" / "results.json").read_text() == results
    assert (run / "results.json").read_text() != results or change is not change_corpus


@pytest.mark.slow
def test_another_cache_setting_or_removed_data_still_show_the_results(tmp_path, caplog, capsys):
    write_beir(toy_collection(), folder := tmp_path / "set")
    arguments = [*ARGUMENTS, f"task.search.data={folder}", f"run.dir={tmp_path / 'run'}", "trainer.max_steps=2"]
    train("vanilla", [*arguments, "data.cache=null"])
    capsys.readouterr()
    train("vanilla", [*arguments, f"data.cache={tmp_path / 'cache'}"])
    assert "trained" in capsys.readouterr().out
    with pytest.raises(UserError, match="data.cache: the run began with null, .*cache.*; set data.cache=null"):
        train("vanilla", [*arguments, f"data.cache={tmp_path / 'cache'}", "trainer.max_steps=3"])
    (folder / "corpus.jsonl").unlink()
    train("vanilla", [*arguments, "data.cache=null"])
    assert "trained" in capsys.readouterr().out
    assert "The data cannot be compared with the run's data" in caplog.text


@pytest.mark.slow
def test_trials_on_data_that_have_changed_are_not_shown_as_results_of_a_sweep(tmp_path, capsys):
    """The table of a sweep mixed them with new trials, or showed them alone."""
    write_beir(toy_collection(), folder := tmp_path / "set")
    file, output = tmp_path / "one.yaml", tmp_path / "out"
    parameters = "method: grid\nparameters: {optim.lr: {values: [0.1, 0.2]}}\n"
    metric = "metric: {name: val/mean/ndcg@10, goal: maximize}\n"
    file.write_text(f'{parameters}{metric}command: [make, train, "${{args_no_hyphens}}"]')
    arguments = [*ARGUMENTS, f"task.search.data={folder}", "data.cache=null", "trainer.max_steps=2"]
    arguments.append("evaluation.every_n_steps=1")
    train("vanilla", [*arguments, "optim.lr=0.1", f"run.dir={output / 't000'}", "wandb.group=out"])
    train("vanilla", [*arguments, "optim.lr=0.2", f"run.dir={output / 't001'}", "wandb.group=out"])
    command = ["vanilla", f"sweep={file}", f"output={output}", *arguments]
    sweep(command)
    before = (output / "results.json").read_text()
    capsys.readouterr()
    change_corpus(folder)
    message = "output: trial 0 in .* was trained on other data .set: fingerprint .* then, .* now.*choose another output"
    with pytest.raises(UserError, match=message):
        sweep(command)
    assert not capsys.readouterr().out
    assert (output / "results.json").read_text() == before
