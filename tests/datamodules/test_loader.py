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
    assert set(state["signature"]) == {"seed", "batch_size", "schedule", "examples", "data"}


def test_a_state_of_another_plan_is_refused(make_task):
    state = make_task(SearchDataModule, batch_size=4).train_dataloader().state_dict()
    with pytest.raises(UserError, match="batch_size: {'search': 4} in the checkpoint, {'search': 2} now"):
        make_task(SearchDataModule, batch_size=2).train_dataloader().load_state_dict(state)


def test_changed_data_are_noticed(make_task):
    state = make_task(SearchDataModule).train_dataloader().state_dict()
    collection = toy_collection()
    corpus = dict(collection.corpus) | {"d0": Document("d0", "another", "text")}
    changed = make_task(SearchDataModule, collection=Collection(corpus, collection.queries, collection.qrels))
    with pytest.raises(UserError, match="the schedule differs from the checkpoint's .data: "):
        changed.train_dataloader().load_state_dict(state)


def test_length_is_that_of_the_training(make_task):
    assert len(make_task(SearchDataModule, num_batches=8).train_dataloader()) == 8


class Rank:
    """What a data module asks its trainer."""

    def __init__(self, rank, world_size):
        self.global_rank, self.world_size = rank, world_size


def test_another_number_of_ranks_goes_on_with_the_same_global_batches(make_task):
    def loaders(world_size):
        found = []
        for rank in range(world_size):
            task = make_task(SearchDataModule, batch_size=8 // world_size, num_batches=9)
            task.trainer = Rank(rank, world_size)
            found.append(task.train_dataloader())
        return found

    def queries(batches):
        """Of one step, all ranks: the texts of their queries, in order."""
        rows = []
        for batch in batches:
            texts = [pair for c in batch.chunks for pair in zip(c.input_ids, c.attention_mask, strict=True)]
            ids = [row[mask.bool()].tolist() for row, mask in texts]
            rows += [tuple(ids[i]) for i in batch.queries.tolist()]
        return rows

    whole = [queries(batches) for batches in zip(*loaders(2), strict=True)]
    first = loaders(2)
    for _, batches in zip(range(4), zip(*first, strict=True), strict=False):
        assert queries(batches)
    state = first[0].state_dict()
    for world_size in (1, 2, 4):
        rest = loaders(world_size)
        for loader in rest:
            loader.load_state_dict(state)
        assert [queries(batches) for batches in zip(*rest, strict=True)] == whole[state["position"] :]
