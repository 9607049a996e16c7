import pytest

from datamodules.records import Collection, Document, UserError
from datamodules.tasks import SearchDataModule
from tests.conftest import toy_collection


def fingerprints(batches):
    return [batch.fingerprint for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_goes_on_at_the_exact_batch(make_task, num_workers):
    def loader():
        return make_task(SearchDataModule, num_batches=10, num_workers=num_workers).train_dataloader()

    whole = fingerprints(loader())
    assert len(whole) == 10
    first = loader()
    seen = []
    for batch in first:
        seen.append(batch.fingerprint)
        if len(seen) == 4:
            state = first.state_dict()  # workers have prepared further batches by now
            break
    second = loader()
    second.load_state_dict(state)
    assert seen + fingerprints(second) == whole


def test_the_state_is_one_integer_and_what_the_plan_depends_on(make_task):
    state = make_task(SearchDataModule).train_dataloader().state_dict()
    assert state["position"] == 0
    assert set(state["signature"]) == {"seed", "batch_size", "world_size", "examples", "data"}


def test_a_state_of_another_plan_is_refused(make_task):
    state = make_task(SearchDataModule, batch_size=4).train_dataloader().state_dict()
    with pytest.raises(UserError, match="batch_size: 4 in the checkpoint, 2 now"):
        make_task(SearchDataModule, batch_size=2).train_dataloader().load_state_dict(state)


def test_changed_data_are_noticed(make_task):
    state = make_task(SearchDataModule).train_dataloader().state_dict()
    collection = toy_collection()
    corpus = dict(collection.corpus) | {"d0": Document("d0", "another", "text")}
    changed = make_task(SearchDataModule, collection=Collection(corpus, collection.queries, collection.qrels))
    with pytest.raises(UserError, match="the schedule has changed .data: "):
        changed.train_dataloader().load_state_dict(state)


def test_length_is_that_of_the_training(make_task):
    assert len(make_task(SearchDataModule, num_batches=8).train_dataloader()) == 8
