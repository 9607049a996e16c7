"""The number of negatives equals a count in plain loops, and a task without any is warned of."""

import types

import pytest
import torch

from datamodules.records import Collection, Document
from datamodules.tasks import SearchDataModule
from lightning_modules.callbacks.negatives import NegativesReport, count_negatives
from lightning_modules.objective import Objective
from lightning_modules.objective_options import ObjectiveOptions
from tests.conftest import text_of


def first_batch(make_task, **options):
    return next(iter(make_task(SearchDataModule, **options).train_dataloader()))


def by_loops(batch, options):
    counts = []
    ids, keys = batch.document_ids.tolist(), batch.text_keys.tolist()
    for query, positives in enumerate(batch.positives.tolist()):
        own = [column for column in positives if column >= 0]
        texts = {keys[batch.documents[column]] for column in own} | {keys[batch.queries[query]]}
        count = 0
        for column, id in enumerate(ids):
            is_known = options.mask_known_positives and id in batch.known_positives[query].tolist()
            is_copy = options.mask_same_text and keys[batch.documents[column]] in texts
            count += column not in own and not is_known and not is_copy
        counts.append(count)
    return counts


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_count_equals_plain_loops(make_task, known, copies, size):
    options = ObjectiveOptions(mask_known_positives=known, mask_same_text=copies)
    batch = first_batch(make_task, batch_size=size)
    assert count_negatives(batch, options).tolist() == by_loops(batch, options)
    both = count_negatives(batch, ObjectiveOptions(mask_known_positives=known, mask_same_text=copies, symmetric=True))
    assert both[: len(batch.queries)].tolist() == by_loops(batch, options)


def report(batch, options):
    module = types.SimpleNamespace(objective=types.SimpleNamespace(options=options))
    callback = NegativesReport()
    for _ in range(2):
        callback.on_train_batch_start(None, module, batch, 0)


def test_task_without_negatives_is_warned_of_once(make_task, caplog):
    """Such a run trained at loss 0, and ended with a table."""
    documents = {f"d{i}": Document(f"d{i}", "", text_of(i)) for i in range(2)}
    queries = {f"q{i}": Document(f"q{i}", "", text_of(i + 5)) for i in range(2)}
    everything = {query: dict.fromkeys(documents, 1) for query in queries}  # every document is a known positive
    masked = first_batch(make_task, collection=Collection(documents, queries, {"train": everything}), batch_size=2)
    single = first_batch(make_task, batch_size=1, num_hard_negatives=0)
    options = ObjectiveOptions()
    for batch in (masked, single):
        caplog.clear()
        report(batch, options)
        assert caplog.text.count("search: the loss is 0") == 1
        vectors = torch.randn(sum(map(len, batch.chunks)), 8)
        assert Objective(options, ["search"], 8)(vectors, batch)["loss"] == 0
    caplog.clear()
    report(first_batch(make_task, batch_size=1, num_hard_negatives=1), options)
    assert "loss of search" not in caplog.text
