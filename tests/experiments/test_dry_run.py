"""The predictions of the dry run equal numbers that can be counted, and it leaves no files."""

import time

import pytest
import torch

from experiments import dry_run as dry_run_module
from experiments.build.data import build_data
from experiments.build.module import build_module
from experiments.config.experiment import load_config
from experiments.dry_run import dry_run
from experiments.mine import main as mine
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.encoders.pretrained import save_encoder
from tests.experiments.test_train import TINY

pytestmark = pytest.mark.slow

TASKS = ("classification", "link_prediction", "search")


@pytest.fixture
def predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        return dry_run("moe", [*TINY, "trainer.max_steps=9", "evaluation.every_n_steps=0", *overrides])

    yield run
    assert list(tmp_path.iterdir()) == []


def total(prediction):
    return sum(prediction.memory.values())


def test_memory_and_time_are_measured(predicted, monkeypatch):
    original = ContrastiveModule.training_step

    def slow_and_large(module, batch, index):
        ballast = torch.ones(100 << 18)  # 100 MiB
        time.sleep(0.1)
        del ballast
        return original(module, batch, index)

    def build_slowly(*arguments):
        time.sleep(0.5)
        return build_module(*arguments)

    monkeypatch.setattr(ContrastiveModule, "training_step", slow_and_large)
    monkeypatch.setattr(dry_run_module, "build_module", build_slowly)
    prediction = predicted()
    assert {name: cost.batches for name, cost in prediction.tasks.items()} == dict.fromkeys(prediction.tasks, 3)
    assert set(prediction.tasks) == {"classification", "link_prediction", "search"}
    moments = 2 * prediction.memory["weights"]  # two per parameter
    assert prediction.memory["optimizer"] == pytest.approx(moments, rel=0.01)
    # One of three experts has gradients.
    assert 0.4 * prediction.memory["weights"] < prediction.memory["gradients"] < 0.99 * prediction.memory["weights"]
    assert prediction.memory["activations"] > 95 << 20
    assert all(cost.seconds > 0.1 for cost in prediction.tasks.values())
    assert prediction.update < 0.1
    assert prediction.start > 0.5
    assert prediction.training(9) == 9 * prediction.update + sum(3 * cost.seconds for cost in prediction.tasks.values())


def test_speed_is_that_of_the_whole_training(predicted, caplog):
    """Tasks count by their number of batches."""
    overrides = [
        "tasks=[classification,search]",
        "data.schedule=weights",
        "data.weights={classification: 1, search: 3}",
        "trainer.max_steps=8",
    ]
    with caplog.at_level("INFO"):
        prediction = predicted(*overrides, "trainer.peak_tflops=0.5", "data.num_positives=2")
    first, second = (prediction.tasks[name] for name in ("classification", "search"))
    a, b = first.batches, second.batches
    assert 0 < a < b
    seconds = 8 * prediction.update + a * first.seconds + b * second.seconds
    for cost in (first, second):
        assert 0 < cost.waiting < cost.seconds
        assert 8 < cost.pairs <= 16  # of 8 queries
    one, four = prediction.speed(8, ranks=1), prediction.speed(8, ranks=4)
    assert one.tokens_per_second == pytest.approx((a * first.tokens + b * second.tokens) / seconds)
    assert one.pairs_per_second == pytest.approx((a * first.pairs + b * second.pairs) / seconds)
    assert one.mfu == pytest.approx((a * first.flops + b * second.flops) / seconds / 0.5e12)
    assert one.data_share == pytest.approx((a * first.waiting + b * second.waiting) / seconds)
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    assert four.mfu == one.mfu
    assert one.padding_share == 0
    assert one.text() in caplog.text


def test_workers_hide_the_preparation_of_batches(predicted, monkeypatch):
    original = dry_run_module.first_batches

    def slow_batches(*arguments):
        time.sleep(0.8)  # 0.1 s for each of eight batches
        return original(*arguments)

    monkeypatch.setattr(dry_run_module, "first_batches", slow_batches)
    alone, helped = predicted("tasks=[search]"), predicted("tasks=[search]", "data.num_workers=2")
    assert alone.tasks["search"].waiting > 0.1
    assert helped.tasks["search"].waiting < alone.tasks["search"].waiting / 2


def test_balance_stores_a_gradient_per_task_and_takes_time_in_each_step(predicted, monkeypatch):
    original = dry_run_module.TaskGradients.apply

    def slow(*arguments):
        time.sleep(0.3)
        return original(*arguments)

    monkeypatch.setattr(dry_run_module.TaskGradients, "apply", slow)
    without, weighted = predicted(), predicted("objective.balance=dwa")
    combined = predicted("objective.balance=mgda", "data.schedule=together")
    assert without.memory["balance"] == weighted.memory["balance"] == 0
    assert combined.memory["balance"] == 3 * combined.memory["weights"]
    assert total(combined) - combined.memory["balance"] < 2 * total(without)
    assert combined.update > 0.3 > without.update


def test_encoding_for_mining_and_for_the_teacher_is_counted(predicted, make_encoder, tmp_path_factory, monkeypatch):
    """One unit of time per text, which a rank has to encode at step 0, 4 and 8, and once for the teacher."""
    model, encoded = save_encoder(make_encoder(), tmp_path_factory.mktemp("model") / "encoder"), []

    def count(config, encoder, task, *parts):
        encoded.append(task)
        return sum(map(len, parts))

    monkeypatch.setattr(dry_run_module, "_encoding_seconds", count)
    mining = ["mining.first_step=0", "mining.every_n_steps=4", "mining.k=5", "task.search.num_hard_negatives=0"]
    teacher = [
        f"init_from={model}",
        "objective.vector_teacher.model=start",
        "objective.vector_teacher.weight={classification: 0, link_prediction: 0, search: 1}",
    ]
    assert (without := predicted()).mining == without.teacher == 0
    data = build_data(load_config("moe", TINY))
    pools = {pool.task: len(pool.corpus) + len(pool.queries) for pool in data.pools()}
    encoded.clear()
    assert predicted(*mining).mining == 3 * (pools["classification"] + pools["link_prediction"])
    assert set(encoded[:2]) == {"classification", "link_prediction"}
    never = predicted("mining.first_step=9", "mining.every_n_steps=1", "mining.k=5")
    assert never.mining == 0
    bm25 = ["mining.miner={_target_: lightning_modules.mining.miners.BM25Miner}", "mining.relative_margin=null"]
    assert predicted(*mining, *bm25).mining == 0
    assert predicted(*teacher).teacher == sum(len(texts) for texts, _ in data.texts_of_rows()["search"])


def test_batches_have_the_hard_negatives_of_mining(predicted, tmp_path_factory):
    """Each of the eight queries of a batch brings further documents, unless two draw the same. Labels are few.

    The sample's searches have hard negatives already.
    """
    without = predicted()
    mining = ["mining.every_n_steps=4", "task.search.num_hard_negatives=0", "task.link_prediction.num_hard_negatives=3"]
    planned = predicted(*mining)
    store = tmp_path_factory.mktemp("store") / "mined"
    mine(
        [
            "moe",
            *TINY,
            "mining.miner={_target_: lightning_modules.mining.miners.RandomMiner}",
            "mining.relative_margin=null",
            f"output={store}",
        ]
    )
    mined = predicted(f"mining.store={store}")
    added = {
        name: [p.tasks[name].documents - without.tasks[name].documents for p in (planned, mined)] for name in TASKS
    }
    assert 2 < added["classification"][0] <= 8
    assert 20 < added["link_prediction"][0] <= 24
    assert -8 <= added["search"][0] < -7
    assert 2 < added["classification"][1] <= 8
    assert 6 < added["link_prediction"][1] <= 8
    assert -1 < added["search"][1] <= 0


def test_sharded_ranks_hold_their_share_of_the_weights(predicted):
    copied, shared = predicted("trainer.devices=2"), predicted("trainer.devices=2", "trainer.strategy=fsdp")
    for name in ("weights", "gradients", "optimizer"):
        assert shared.memory[name] == copied.memory[name] // 2
    assert copied.memory["gathered"] == 0
    # Two layers and everything outside of layers, with gradients.
    assert shared.memory["gathered"] == 2 * copied.memory["weights"]
    three = predicted("trainer.devices=2", "trainer.strategy=fsdp", "backbone.config.num_hidden_layers=3")
    projections = 4 * (32 * 32 + 32)  # of each expert's attention: query, key, value and output
    rest = 2 * (32 * 32 + 32) + 4 * 32  # feed-forward sub-layer and both LayerNorms
    assert three.memory["gathered"] == shared.memory["gathered"]
    assert 2 * three.memory["weights"] == copied.memory["weights"] + 4 * (projections + rest)  # float32


def test_more_ranks_add_documents_and_scores(predicted):
    one, four = predicted(), predicted("trainer.devices=2", "trainer.num_nodes=2")
    assert one.memory["further"] == 0
    assert [cost.documents for cost in four.tasks.values()] == [4 * cost.documents for cost in one.tasks.values()]
    # Scores of 8 queries and vectors of 32 dimensions from three more ranks, in float32, and the gradients of both.
    most = max(cost.documents for cost in one.tasks.values())
    assert four.memory["further"] == int(2 * 3 * most * 4 * (8 + 32))
