"""Long steps log their progress."""

from types import SimpleNamespace

import pytest

from datamodules import conversion, progress_lines, store
from datamodules.progress_lines import ProgressLines
from datamodules.readers.beir import BeirReader, write_beir
from datamodules.records import Benchmark
from datamodules.tasks import SearchDataModule
from datamodules.tokens import Encoding, token_tables
from lightning_modules.callbacks.evaluation import Evaluation
from lightning_modules.mining.cross_encoder import CrossEncoderJudge
from lightning_modules.mining.mine import Mining, MiningOptions
from lightning_modules.mining.miners import DenseMiner
from lightning_modules.retrieval.evaluation import evaluate
from tests.conftest import toy_collection


@pytest.fixture
def lines(monkeypatch, caplog):
    """Log each step, and return the lines."""
    monkeypatch.setattr(progress_lines, "EVERY", 0)
    caplog.set_level("INFO", logger="datamodules.progress_lines")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "datamodules.progress_lines"]


def test_a_line_every_30_seconds_has_count_rate_and_remaining_time(monkeypatch, caplog):
    caplog.set_level("INFO")
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(progress_lines, "time", clock)
    step = ProgressLines("encoding x", "texts", total=7200)
    for clock.now in (110.0, 129.0, 130.0, 150.0, 160.0):
        step.advance(20)
    assert [record.getMessage() for record in caplog.records] == [
        "encoding x: 60 of 7,200 texts, 2.0/s, 60 min left",
        "encoding x: 100 of 7,200 texts, 1.7/s, 71 min left",
    ]


def test_mining_logs_what_it_encodes_and_mines(make_task, make_encoder, tmp_path, lines):
    data, encoder = make_task(SearchDataModule, collection=toy_collection()), make_encoder("shared")
    options = MiningOptions(k=5, relative_margin=None, num_negatives=5)
    mining = Mining(options, {"search": DenseMiner()}, tmp_path, guide=make_encoder("shared", seed=1))
    mining.run(mining.cache(encoder), data.pools())
    for line in ("encoding documents of toy: 10 of 10 texts", "encoding queries of toy: 12 of 12 texts"):
        assert len([each for each in lines() if each.startswith(line)]) == 2, line  # of the encoder and of the guide
    assert any(line.startswith("mining toy: 12 of 12 queries") for line in lines())


def test_a_judge_logs_its_training_and_what_it_judges(make_task, make_encoder, make_backbone, tmp_path, lines):
    for part in make_backbone(1, num_layers=1):
        part.save_pretrained(tmp_path / "bert")
    data = make_task(SearchDataModule, collection=toy_collection())
    options = MiningOptions(k=5, relative_margin=None, num_negatives=5)
    judge = CrossEncoderJudge(str(tmp_path / "bert"), drop_above=1.0, steps=3, max_length=16)
    mining = Mining(options, {"search": DenseMiner()}, tmp_path, judges={"search": judge})
    mining.run(mining.cache(make_encoder("shared")), data.pools())
    trained = [line for line in lines() if line.startswith("training the judge of fold ")]
    assert [line.split(" steps")[0].removeprefix("training the judge of fold ") for line in trained] == [
        f"{fold}/2: {step} of 3" for fold in (1, 2) for step in (1, 2, 3)
    ]
    assert any(line.startswith("judging: ") for line in lines())


@pytest.mark.parametrize("way", ["evaluate", "callback"])
def test_an_evaluation_logs_each_stage(make_encoder, lines, way):
    collection = toy_collection()
    benchmark = Benchmark("toy", "search", "test", collection.corpus, collection.queries, collection.qrels["test"])
    advance = Evaluation._advance("toy", may_leave=True) if way == "callback" else None
    evaluate(make_encoder("shared"), benchmark, ["ndcg@10"], advance=advance)
    assert any(line.startswith("evaluation encodes toy: 22 of 22 texts") for line in lines())
    assert any(line.startswith("evaluation ranks toy: 120 of 120 pairs") for line in lines())


def test_conversion_and_tokenisation_log_their_progress(make_encoder, tmp_path, lines, monkeypatch):
    for module in (conversion, store):
        monkeypatch.setattr(module, "BATCH_ROWS", 5)
    write_beir(toy_collection(), tmp_path / "data")
    collection = conversion.stored(BeirReader(str(tmp_path / "data")), tmp_path / "cache")
    token_tables(collection, Encoding(make_encoder("shared").tokenizer))
    for line in ("converting: 10 documents", "tokenising corpus: 10 of 10 texts", "tokenising queries: 12 of 12 texts"):
        assert any(each.startswith(line) for each in lines()), line
