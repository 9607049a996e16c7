"""Hard negatives mined during training or before it, also after a kill."""

import json
import random
import shlex
import shutil
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.hard_negatives import HardNegativeStore
from datamodules.records import UserError
from datamodules.schedule import STRATEGIES
from experiments.build.data import build_data
from experiments.build.mining import build_mining, steps_between
from experiments.config.experiment import load_config
from experiments.mine import main as mine
from experiments.train import train
from lightning_modules.callbacks import hard_negatives
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.retrieval.vector_cache import VectorCache
from tests import forked
from tests.experiments.test_train import TINY, batches, command, rows

SMALL = [*TINY, "trainer.log_every_n_steps=1", "evaluation.every_n_steps=0", "evaluation.baselines=false"]
MINED = ["mining.every_n_steps=2", "mining.relative_margin=null", "mining.use=mined", "mining.k=40"]


def negatives_of_batches(config, tokenizer, store=None):
    """Return the hash of each batch, and whether all its negatives are from the store."""
    data = build_data(config, training=True)
    data.tokenizer = tokenizer
    batches = []
    for batch in data.train_dataloader():
        drawn = set(batch.document_ids.tolist()) - set(batch.document_ids[batch.positives].flatten().tolist())
        mined = set(store.tasks[batch.task].documents.tolist()) if store else set()
        batches.append((batch.fingerprint, drawn <= mined))
    return batches


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps, with mining before the first and after every second one."""
    folder = tmp_path_factory.mktemp("mined") / "run"
    train("moe_mined", [f"run.dir={folder}", *SMALL, *MINED, "mining.first_step=0", "trainer.max_steps=6"])
    return folder


@pytest.mark.slow
def test_each_mining_writes_a_store_and_a_report(run):
    folders = sorted(path.name for path in (run / "negatives").iterdir())
    assert folders == ["step-00000000", "step-00000002", "step-00000004", "vectors"]
    assert not list((run / "negatives" / "vectors").rglob("*.npy"))  # vectors of earlier weights are deleted
    models = set()
    for name in folders[:3]:
        store = HardNegativeStore(run / "negatives" / name)
        assert store.meta["step"] == int(name[-8:])
        assert set(store.tasks) == {"classification", "link_prediction", "search"}
        models.add(store.meta["model"])
        task_reports = json.loads((store.path / "report.json").read_text())
        assert sum(task_reports["search"]["histogram"]["counts"]) == len(store.tasks["search"].documents)
        ElementTree.parse(store.path / "report.svg")
    assert len(models) == 3


@pytest.mark.slow
def test_each_mining_is_logged_for_every_task(run):
    logged = [row for row in rows(run) if "mine/seconds" in row]
    assert [row["step"] for row in logged] == [0, 2, 4]
    for row in logged:
        for task in ("classification", "link_prediction", "search"):
            assert 0 <= row[f"mine/{task}/false_negative_rate"] <= 1
            assert (row.get(f"mine/{task}/age") == 2) == (row["step"] > 0)


@pytest.mark.slow
def test_mined_negatives_are_documents_and_never_known_positives(run):
    data = build_data(load_config("moe_mined", [*SMALL, *MINED]))
    store = HardNegativeStore(run / "negatives" / "step-00000004")
    store.check(data.fingerprints())
    for task in data.tasks:
        corpus = task.corpus_rows()
        for i in range(0, len(task.examples), 7):
            drawn = store.negatives_of(task.task.name, i)
            assert len(drawn) == 8
            assert corpus[drawn].all()
            assert not set(drawn) & set(task.examples[i].not_negatives)


@pytest.mark.slow
def test_batches_draw_from_the_store_in_use(run, tmp_path):
    """Logged batches equal those of the data with the store in use, and differ from those without it."""
    logged = {row["step"] - 1: row["train/batch"] for row in rows(run) if "train/batch" in row}
    tokenizer = load_encoder(run).tokenizer
    overrides = [*SMALL, "trainer.max_steps=6", "mining.use=mined"]
    plain = negatives_of_batches(load_config("moe", overrides), tokenizer)
    for step in (0, 2, 4):
        store = HardNegativeStore(run / "negatives" / f"step-{step:08d}")
        config = load_config("moe", [*overrides, f"mining.store={store.path}"])
        batches = negatives_of_batches(config, tokenizer, store)
        for batch in (step, step + 1):
            assert batches[batch] == (logged[batch], True)
            assert plain[batch][0] != logged[batch]


@pytest.mark.slow
def test_judge_relabels_while_mining_or_a_store_and_the_run_trains_on_it(tmp_path, caplog):
    caplog.set_level("INFO")
    miner = "mining.miner={_target_: lightning_modules.mining.miners.RandomMiner}"
    mining = ["moe", *SMALL, "mining.k=40", "mining.relative_margin=null", miner]
    mine([*mining, f"output={tmp_path / 'plain'}"])
    plain, data = HardNegativeStore(tmp_path / "plain"), build_data(load_config("moe", SMALL))
    (task,) = (task for task in data.tasks if task.task.name == "search")
    labels, lines = ("keep", "drop", "positive"), []
    for i, example in enumerate(task.examples):
        for n, row in enumerate(plain.negatives_of("search", i)):
            pair = {"query": task.documents[example.query].id, "paper": task.documents[row].id}
            lines.append(json.dumps(pair | {"label": labels[(i + n) % 3]}))
    file = tmp_path / "judged.jsonl"
    file.write_text("\n".join(lines))
    target = "_target_: lightning_modules.mining.relabel.FileJudge"
    judge = f"mining.judges={{search: {{{target}, path: {file}}}}}"
    mine([*mining, judge, f"output={tmp_path / 'at once'}"])
    mine(["moe", *SMALL, f"mining.store={tmp_path / 'plain'}", judge, f"output={tmp_path / 'later'}"])
    assert "search, decisions of FileJudge: keep" in caplog.text
    next_command = shlex.join(["make", "train", "EXP=moe", *SMALL, f"mining.store={tmp_path / 'later'}"])
    assert caplog.messages[-1] == f"Hard negatives: {tmp_path / 'later'}. Next: {next_command}"
    at_once, later = (HardNegativeStore(tmp_path / name) for name in ("at once", "later"))
    assert at_once.hash == later.hash != plain.hash
    assert later.meta["judges"]["search"]["path"] == str(file)
    assert (later.meta["relabelled"], at_once.meta["relabelled"]) == (plain.hash, None)
    assert at_once.tasks["classification"].labels is None
    for i in range(0, len(task.examples), 9):
        rows = plain.negatives_of("search", i)
        for label in range(3):
            expected = [row for n, row in enumerate(rows) if (i + n) % 3 == label]
            assert later.negatives_of("search", i, label) == expected
    report = json.loads((tmp_path / "later" / "report.json").read_text())
    assert sum(report["search"]["relabelled"]["counts"].values()) == len(lines)

    other = judge.replace("path:", "drop_above: 0.4, path:")
    for arguments in (mining, [*mining, other], ["moe", *SMALL, f"mining.store={tmp_path / 'plain'}", other]):
        for output in ("at once", "later"):
            with pytest.raises(UserError, match="mined with other settings .*(judges|relabelled)"):
                mine([*arguments, f"output={tmp_path / output}"])
    with pytest.raises(
        UserError, match="mining.store: make mine relabels the negatives of this store, so it needs mining.judge"
    ):
        mine(["moe", *SMALL, f"mining.store={tmp_path / 'plain'}", f"output={tmp_path / 'none'}"])
    with pytest.raises(UserError, match="mining.judge: this run mines nothing"):
        train("moe", [f"run.dir={tmp_path / 'unused'}", *SMALL, judge])
    train("moe", [f"run.dir={tmp_path / 'run'}", *SMALL, f"mining.store={tmp_path / 'later'}", "trainer.max_steps=2"])


@pytest.mark.slow
def test_judgements_of_unknown_ids_end_a_training_before_its_first_step(tmp_path):
    (tmp_path / "judged.jsonl").write_text('{"query": "nobody", "paper": "p1", "label": "drop"}')
    judge = f"{{_target_: lightning_modules.mining.relabel.FileJudge, path: {tmp_path / 'judged.jsonl'}}}"
    settings = [*SMALL, *MINED, f"mining.judge={judge}", "trainer.max_steps=3", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="judged.jsonl:1: unknown query 'nobody'"):
        train("moe", settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_guide_judges_what_is_mined_during_training(run, tmp_path):
    judge = f"mining.judge={{_target_: lightning_modules.mining.relabel.GuideJudge, model: {run}, drop_above: 0}}"
    miner = "mining.miner={_target_: lightning_modules.mining.miners.RandomMiner}"
    train(
        "moe_mined", [f"run.dir={tmp_path}", *SMALL, *MINED, judge, miner, "mining.first_step=0", "trainer.max_steps=3"]
    )
    store = HardNegativeStore(tmp_path / "negatives" / "step-00000002")
    shares = [row for row in rows(tmp_path) if "mine/search/dropped" in row][-1]
    for task, mined in store.tasks.items():
        assert 0 < shares[f"mine/{task}/dropped"] == pytest.approx((mined.labels == 1).mean())
        assert shares[f"mine/{task}/turned"] == 0


def test_guide_judge_need_not_serve_tasks_that_it_does_not_judge(tmp_path, make_encoder):
    guide = make_encoder("shared", tasks={"search": "search"}).save_pretrained(tmp_path / "guide")
    node = f"{{_target_: lightning_modules.mining.relabel.GuideJudge, model: {guide}}}"
    config = load_config("moe", [*SMALL, f"mining.judges={{search: {node}}}"])
    assert list(build_mining(config, tmp_path, "cpu").judges) == ["search"]
    config = load_config("moe", [*SMALL, f"mining.judges={{search: {node}, classification: {node}}}"])
    with pytest.raises(UserError, match="model: has no task classification .its tasks are search"):
        build_mining(config, tmp_path, "cpu")


def test_judge_that_cannot_be_built_names_the_key(tmp_path):
    target = "_target_: lightning_modules.mining.relabel.FileJudge"
    for key, node in (("judge", f"{{{target}, path: gone}}"), ("judges", f"{{search: {{{target}, path: gone}}}}")):
        config = load_config("moe_mined", [*SMALL, *MINED, f"mining.{key}={node}", f"run.dir={tmp_path}"])
        with pytest.raises(UserError, match=rf"mining.{key}(.search)?.path: gone cannot be read"):
            build_mining(config, tmp_path, "cpu")
    with pytest.raises(UserError, match="mining.judge._target_: expected a subclass of Judge"):
        load_config("moe", ["mining.judge={_target_: lightning_modules.mining.miners.DenseMiner}"])
    with pytest.raises(UserError, match="mining.judges.*serach"):
        load_config("moe", [f"mining.judges={{serach: {{{target}, path: gone}}}}"])


@pytest.mark.slow
def test_make_mine_finds_the_negatives_of_an_independent_ranking(run, tmp_path, caplog):
    """A run then trains with the store."""
    caplog.set_level("INFO")
    output = tmp_path / "store"
    arguments = [*SMALL, *MINED[1:], f"model={run}", f"output={output}"]
    mine(["moe", *arguments])
    assert "false_negative_rate" in caplog.text
    store = HardNegativeStore(output)
    encoder = load_encoder(run)
    data = build_data(load_config("moe", SMALL))
    (task,) = (task for task in data.tasks if task.task.name == "search")
    documents = encoder.encode(list(task.collections["searches"].corpus.values()), "search").double()
    documents = torch.nn.functional.normalize(documents, dim=-1)
    for i in range(0, len(task.examples), 50):
        example = task.examples[i]
        query = encoder.encode([task.documents[example.query]], "search").double()
        order = (torch.nn.functional.normalize(query, dim=-1) @ documents.T)[0].argsort(descending=True, stable=True)
        assert store.negatives_of("search", i) == [r for r in order[:40].tolist() if r not in example.not_negatives][:8]
    mine(["moe", *arguments])
    assert "were already mined" in caplog.text
    (output / "report.json").unlink()  # as after a kill: without it, the mining has not finished
    mine(["moe", *arguments])
    assert (output / "report.json").is_file()
    assert HardNegativeStore(output).hash == store.hash
    trained = tmp_path / "trained"
    train("moe", [f"run.dir={trained}", *SMALL, f"mining.store={output}", "trainer.max_steps=2"])
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]
    (rounds,) = [loader["rounds"] for loader in state["combined_loader"]]
    assert [(r["batch"], r["store"], r["hash"]) for r in rounds] == [(0, str(output), store.hash)]


@pytest.mark.slow
def test_asymmetric_student_mines_among_its_teachers_documents(run, tmp_path, make_encoder):
    """During the training as by make mine: the student is never trained to encode documents."""
    teacher, stores = tmp_path / "teacher", []
    tasks = dict.fromkeys(("classification", "link_prediction", "search"), "one")
    make_encoder("shared", tasks=tasks).save_pretrained(teacher)
    student = ["objective.similarity=cosine", f"objective.vector_teacher.model={teacher}"]
    student += ["objective.vector_teacher.asymmetric=true", f"init_from={run}", "trainer.max_steps=1"]
    train("moe_mined", [f"run.dir={tmp_path / 'run'}", *SMALL, *MINED, *student, "mining.first_step=0"])
    for name, options in (("with", [f"document_model={teacher}"]), ("without", [])):
        mine(["moe", *SMALL, *MINED[1:], f"model={run}", *options, f"output={tmp_path / name}"])
        stores.append(HardNegativeStore(tmp_path / name))
    mined = HardNegativeStore(tmp_path / "run" / "negatives" / "step-00000000")
    assert mined.hash == stores[0].hash != stores[1].hash
    assert mined.meta["document_model"] == stores[0].meta["document_model"] != mined.meta["model"]
    with pytest.raises(UserError, match="mined with other settings .document_model: None then"):
        mine(["moe", *SMALL, *MINED[1:], f"model={run}", f"document_model={teacher}", f"output={tmp_path / 'without'}"])
    with pytest.raises(UserError, match="document_model: needs model= too"):
        mine(["moe", *SMALL, *MINED[1:], f"document_model={teacher}", f"output={tmp_path / 'none'}"])


@pytest.mark.slow
def test_vectors_of_a_killed_mining_are_deleted_when_the_run_resumes(tmp_path, monkeypatch, caplog):
    """The run dies after the report of a mining is written, and before the vectors are deleted."""
    caplog.set_level("INFO")
    vectors = tmp_path / "negatives" / "vectors"
    arguments = ["moe_mined", [f"run.dir={tmp_path}", *SMALL, *MINED, "mining.first_step=0", "trainer.max_steps=1"]]

    def die(cache):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(VectorCache, "remove", die)
        with pytest.raises(RuntimeError, match="killed"):
            train(*arguments)
    assert list(vectors.rglob("*.npy"))
    train(*arguments)
    assert "step 0: these hard negatives have already been mined" in caplog.text
    assert not list(vectors.rglob("*.npy"))


@pytest.mark.slow
def test_killed_mining_continues_without_embedding_again(run, tmp_path):
    """SIGKILL while it embeds: complete shards are reused, and the store equals that of an uninterrupted mining."""
    output, vectors = tmp_path / "store", tmp_path / "store.vectors"
    arguments = [*SMALL, *MINED[1:], f"model={run}", f"output={output}"]
    process = forked.Forked([sys.executable, "-m", "experiments.mine", "moe", *arguments])
    while process.poll() is None and len(list(vectors.glob("*/*.npy"))) < 2:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not output.exists()

    def shards():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in vectors.glob("*/*.npy")}

    finished = shards()
    mine(["moe", *arguments])
    assert 2 <= len(finished) < len(shards())
    assert finished.items() <= shards().items()
    mine(["moe", *arguments[:-1], f"output={tmp_path / 'whole'}"])
    assert HardNegativeStore(output).hash == HardNegativeStore(tmp_path / "whole").hash


@pytest.mark.slow
def test_a_store_mined_with_other_settings_is_not_overwritten(run, tmp_path, make_encoder):
    output, other = tmp_path / "store", tmp_path / "other"
    tasks = dict.fromkeys(("classification", "link_prediction", "search"), "one")
    make_encoder("shared", tasks=tasks).save_pretrained(other)
    arguments = [*SMALL, *MINED[1:], f"output={output}"]
    mine(["moe", *arguments, f"model={run}"])
    with pytest.raises(UserError, match="other settings .model: [0-9a-f]{16} then, [0-9a-f]{16} now"):
        mine(["moe", *arguments, f"model={other}"])
    with pytest.raises(UserError, match=r"miner\.options\.k: 40 then, 30 now"):
        mine(["moe", *arguments, f"model={run}", "mining.k=30"])


@pytest.mark.slow
def test_a_store_of_other_data_raises_before_training(run, tmp_path):
    store = run / "negatives" / "step-00000002"
    changed = [*SMALL, "task.search.data.searches.num_papers=501", f"mining.store={store}"]
    with pytest.raises(UserError, match="hard negatives of search were mined from different data .fingerprints then: "):
        train("moe", [f"run.dir={tmp_path / 'run'}", *changed])
    assert not (tmp_path / "run").exists()


def test_a_warning_says_if_mining_takes_longer_than_training(tmp_path, monkeypatch, caplog):
    times = iter([0, 100, 110, 180, 260, 330])  # mining takes 100, 70 and 70 s; training 10 and 80 s between them
    monkeypatch.setattr(hard_negatives, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    train("moe_mined", [f"run.dir={tmp_path}", *SMALL, *MINED, "mining.first_step=0", "trainer.max_steps=6"])
    warnings = [record.getMessage() for record in caplog.records if "mining took" in record.getMessage()]
    assert warnings == [
        "step 2: mining took 70 s, but the steps since the last mining only 10 s; consider a higher "
        "mining.every_n_steps (now 2)"
    ]


@pytest.mark.slow
def test_training_stops_if_negatives_look_like_positives(tmp_path):
    short = ["mining.first_step=2", "trainer.max_steps=4"]
    for _ in range(2):  # the second time from the existing store
        with pytest.raises(UserError, match="of the mined hard negatives look like positives"):
            train("moe_mined", [f"run.dir={tmp_path}", *SMALL, *MINED, "mining.stop_at=0.2", *short])
    assert (tmp_path / "negatives" / "step-00000002" / "report.svg").is_file()


@pytest.mark.slow
def test_training_uses_the_negatives_of_the_data_if_mining_finds_none(run, tmp_path, caplog):
    """make mine, which would write an empty store, fails."""
    none = ["mining.absolute_margin=3", *MINED]
    train("moe_mined", [f"run.dir={tmp_path / 'run'}", *SMALL, *none, "mining.first_step=0", "trainer.max_steps=3"])
    for task in ("classification", "link_prediction", "search"):
        assert f"{task}: no hard negatives are left. Candidates removed by each filter: " in caplog.text
    assert caplog.text.count("Until the next mining, the task uses the hard negatives in its data") == 6
    store = HardNegativeStore(tmp_path / "run" / "negatives" / "step-00000002")
    assert {len(mined.documents) for mined in store.tasks.values()} == {0}
    train("moe", [f"run.dir={tmp_path / 'plain'}", *SMALL, "trainer.max_steps=3"])
    assert batches(tmp_path / "run") == batches(tmp_path / "plain")
    with pytest.raises(UserError, match="no hard negatives are left"):
        mine(["moe", *SMALL, *none[:1], f"model={run}", "mining.relative_margin=null", f"output={tmp_path / 'store'}"])
    assert not (tmp_path / "store").exists()


def test_tasks_can_have_their_own_miners_and_mine_without_a_model(tmp_path):
    node = "{{_target_: lightning_modules.mining.miners.{}}}"
    kinds = {"classification": "LabelsOfCitedMiner", "link_prediction": "CitedByCitedMiner"}
    miners = ", ".join(f"{task}: {node.format(kind)}" for task, kind in kinds.items())
    output = tmp_path / "store"
    mine(
        ["moe", *SMALL, "mining.relative_margin=null", f"mining.miners={{{miners}, search: null}}", f"output={output}"]
    )
    store = HardNegativeStore(output)
    assert set(store.tasks) == set(kinds)
    assert store.meta["model"] is None
    data = build_data(load_config("moe", SMALL))
    for task in data.tasks[:2]:  # the sample's own hard negatives follow the same rules
        agree = [
            set(store.negatives_of(task.task.name, i)) <= set(task.examples[i].hard_negatives)
            for i in range(len(task.examples))
        ]
        assert np.mean(agree) == 1.0


@pytest.mark.slow
def test_cached_data_and_data_in_memory_give_the_same_negatives(tmp_path, beir_root):
    stores = []
    for cache in ("null", tmp_path / "cache"):
        node = f"{{_target_: datamodules.readers.beir.BeirReader, folder: {beir_root / 'mlcite'}}}"
        arguments = ["tasks=[link_prediction]", f"task.link_prediction.data={{cite: {node}}}", f"data.cache={cache}"]
        miner = "mining.miner._target_=lightning_modules.mining.miners.CitedByCitedMiner"
        output = tmp_path / f"store{len(stores)}"
        mine(["moe", *SMALL[3:], *arguments, miner, "mining.relative_margin=null", f"output={output}"])
        stores.append(HardNegativeStore(output))
    one, other = stores
    assert len(one.tasks["link_prediction"].documents) > 20
    for name in ("starts", "documents", "ranks", "scores"):
        assert (getattr(one.tasks["link_prediction"], name) == getattr(other.tasks["link_prediction"], name)).all()


@pytest.mark.slow
def test_a_moved_store_can_be_used_again(run, tmp_path):
    store, moved, folder = tmp_path / "store", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(run / "negatives" / "step-00000002", store)
    arguments = [f"run.dir={folder}", *SMALL, "trainer.max_steps=2"]
    train("moe", [*arguments, f"mining.store={store}"])
    store.rename(moved)
    train("moe", [*arguments, f"mining.store={moved}", "trainer.max_steps=3"])
    assert [row["step"] for row in rows(folder) if "train/lr" in row] == [1, 2, 3]
    with pytest.raises(UserError, match="was trained with mined hard negatives"):
        train("moe", [*arguments, "trainer.max_steps=4"])


def test_every_n_epochs_counts_passes_over_all_examples():
    config = load_config("moe", [*SMALL, "mining.every_n_epochs=0.5"])
    data = build_data(config)
    batches = sum(-(-len(task.examples) // 8) for task in data.tasks)
    assert steps_between(config, data, 1) == round(batches / 2)
    assert steps_between(config, data, 3) == round(batches / 6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mining.every_n_steps=-1"], "mining.every_n_steps: expected a number of at least 0, got -1"),
        (["mining.every_n_steps=2", "mining.every_n_epochs=1"], "set only one of them"),
        (["mining.first_step=2"], "mining.first_step: only used with mining during training"),
        (
            ["mining.store=x", "mining.every_n_steps=2", "mining.first_step=0"],
            "set only one source for the first hard negatives",
        ),
        (["mining.first_rank=100"], "mining.first_rank: expected a rank below mining.k .100., got 100"),
        (
            ["mining.every_n_steps=2", "mining.use=data"],
            "mining.use: with data, mined hard negatives are never used",
        ),
        (["mining.every_n_steps=2", "data.num_hard_negatives=0"], "is 0, so mined hard negatives are never used"),
        (
            ["mining.relative_margin=1.5"],
            "mining.relative_margin: expected a number of at least 0 and below 1, got 1.5",
        ),
        (["mining.sampling=best"], "mining.sampling"),
        (["mining.store=/no/where"], "mining.store: /no/where: expected mined hard negatives, but no such folder"),
        (
            ["mining.miner._target_=lightning_modules.mining.miners.BM25"],
            "has no class 'BM25'; expected one of BM25Miner",
        ),
        (["mining.miners={sarch: null}"], "unknown task in mining.miners 'sarch'; did you mean search"),
        (
            ["mining.guide=/no/where", "mining.every_n_steps=2"],
            "mining.guide: '/no/where' is not an existing file or folder",
        ),
    ],
)
def test_invalid_settings_raise_user_errors(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train("moe", [f"run.dir={tmp_path / 'run'}", *SMALL, "trainer.max_steps=4", *overrides])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_killed_run_continues_with_its_hard_negatives(tmp_path):
    """Two ranks, two workers, mining at steps 4 and 8: batches, stores and weights equal those of a complete run."""
    rng = random.Random()  # training seeds the global generator
    strategy, stop_at = rng.choice((*STRATEGIES, "curriculum")), rng.randint(4, 11)
    schedule = {
        "weights": ["data.schedule=weights", "data.weights={classification: 2, link_prediction: 1, search: 2}"],
        "curriculum": ["data.curriculum=[{from_step: 5, weights: {classification: 1, link_prediction: 1, search: 5}}]"],
    }.get(strategy, [f"data.schedule={strategy}"])
    overrides = [*SMALL, *MINED, "trainer.devices=2", "data.num_workers=2", *schedule, "trainer.max_steps=12"]
    overrides += ["checkpoint.every_n_steps=3", "backbone.dropout=0.3", "mining.every_n_steps=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    forked.run_ranks(command(whole, *overrides), check=True)
    ranks = forked.start_ranks(command(killed, *overrides))
    while ranks[0].poll() is None:
        seen = rows(killed) if (killed / "metrics.jsonl").is_file() else []
        if any(row["step"] >= stop_at for row in seen):
            for rank in ranks:
                rank.kill()  # with its workers
            break
        time.sleep(0.01)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2, "the run ended before it was killed"
    forked.run_ranks(command(killed, *overrides), check=True)

    def batches(folder):
        return {row["step"]: row["train/batch"] for row in rows(folder) if "train/batch" in row}

    assert len(batches(whole)) == 12
    assert batches(killed) == batches(whole), (strategy, stop_at)
    for step in (4, 8):
        one, two = (HardNegativeStore(f / "negatives" / f"step-{step:08d}") for f in (whole, killed))
        assert (one.hash, one.meta["model"]) == (two.hash, two.meta["model"])
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, killed))
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), (strategy, stop_at, name)
