"""The packages as a library: training from a script, without any configuration file."""

import lightning as L
import pytest
import torch

from datamodules import (
    BatchOptions,
    BeirReader,
    ClassificationDataModule,
    Collection,
    Document,
    LinkPredictionDataModule,
    MultiTaskDataModule,
    SearchDataModule,
    Task,
    UserError,
)
from datamodules.readers.beir import write_beir
from lightning_modules.contrastive import ContrastiveModule
from tests.conftest import toy_collection

PAPERS = [
    {"id": "p1", "title": "bara celi", "text": "domu fito gara"},
    {"id": "p2", "title": "domu bara", "text": "celi bara lito"},
    {"id": "p3", "title": "gara lito", "text": "fito domu bara"},
    {"id": "p4", "title": "fito celi", "text": "gara lito celi"},
]


@pytest.fixture
def papers() -> Collection:
    corpus = {paper["id"]: Document(**paper) for paper in PAPERS}
    queries = {"q1": Document("q1", text="celi gara"), "q2": Document("q2", text="lito")}
    return Collection(corpus, queries, {"train": {"q1": {"p1": 1, "p2": 0}, "q2": {"p3": 2, "p4": 1}}})


@pytest.fixture
def trainer(tmp_path) -> L.Trainer:
    return L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def parameters(module: L.LightningModule) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_records_and_beir_folder_train_without_configuration(papers, trainer, make_encoder, tmp_path):
    write_beir(toy_collection(papers=True), tmp_path / "citations")
    data = MultiTaskDataModule(
        [
            SearchDataModule("search", papers),
            LinkPredictionDataModule("link_prediction", BeirReader(str(tmp_path / "citations")), batch_size=4),
        ],
        batch_size=2,
        max_length=16,
    )
    module = ContrastiveModule(make_encoder("attention"))
    before = parameters(module)
    trainer.fit(module, data)
    assert trainer.global_step == len(data.train_dataloader()) == 4
    assert any(not torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
    batches = list(data.train_dataloader())
    assert [batch.task for batch in batches] == ["search", "link_prediction"] * 2
    assert [len(batch.queries) for batch in batches] == [2, 4, 2, 4]


def test_one_task_trains_alone(papers, trainer, make_encoder):
    data = SearchDataModule("search", {"mine": papers}, batch_size=2)
    trainer.fit(ContrastiveModule(make_encoder("shared")), data)
    assert trainer.global_step == 4
    assert list(data.collections) == ["mine"]


def test_task_options_replace_those_of_all_tasks(papers):
    all_own = SearchDataModule("all_own", papers, BatchOptions(batch_size=3))
    one_own = SearchDataModule("one_own", papers, batch_size=5)
    none_own = SearchDataModule("none_own", papers)
    options = [task.options for task in MultiTaskDataModule([all_own, one_own, none_own], batch_tokens=64).tasks]
    assert [o.batch_size for o in options] == [3, 5, 32]
    assert [o.batch_tokens for o in options] == [0, 0, 64]


def test_task_is_its_own_expert_by_default(papers):
    assert ClassificationDataModule("topics", papers).task == Task("topics", "topics")


def test_number_of_batches_follows_the_trainer(papers, trainer, make_encoder):
    tokenizer = make_encoder("shared").tokenizer
    assert len(_ready(SearchDataModule("search", papers, tokenizer=tokenizer)).train_dataloader()) == 1000
    assert len(_ready(SearchDataModule("search", papers, tokenizer=tokenizer, num_batches=7)).train_dataloader()) == 7


def _ready(data):
    data.setup()
    return data


def test_missing_tokenizer_is_rejected(papers):
    with pytest.raises(UserError, match="tokenizer: needed to make batches; pass one, or train a module that has"):
        _ready(SearchDataModule("search", papers)).train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a number of at least 1, got 0"),
        ({"num_hard_negatives": -1}, "num_hard_negatives: expected a number of at least 0, got -1"),
    ],
)
def test_option_out_of_bounds_is_rejected(papers, options, message):
    for kind in (BatchOptions, lambda **o: MultiTaskDataModule([SearchDataModule("search", papers)], **o)):
        with pytest.raises(UserError, match=message):
            kind(**options)


@pytest.mark.parametrize(
    ("query", "document", "message"),
    [
        ("q9", "p1", "collection mine: split train: the judgements contain query 'q9'"),
        ("q1", "p9", "no query of a train split has a positive"),
    ],
)
def test_judgement_of_unknown_id_is_rejected(papers, query, document, message):
    broken = Collection(papers.corpus, papers.queries, {"train": {query: {document: 1}}})
    with pytest.raises(UserError, match=f"task search.* {message}"):
        SearchDataModule("search", {"mine": broken}).setup()
