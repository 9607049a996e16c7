"""Mined hard negatives: the store, and the batches that draw from it."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from datamodules.hard_negatives import HardNegativeStore, Rounds, write_store
from datamodules.ragged import Ragged
from datamodules.records import DROP, POSITIVE, Collection, Document, MinedNegatives, UserError
from datamodules.tasks import SearchDataModule
from tests.conftest import toy_collection, trainer_on

META = {"miner": "any", "model": "aaaa", "step": 0, "k": 10}


def mined_of(lists) -> MinedNegatives:
    starts, rows = Ragged.of(lists)
    return MinedNegatives(starts, rows, np.arange(len(rows), dtype=np.int32), np.linspace(1, 0, len(rows)), {"any": 3})


def written(path, data, lists, **meta):
    return write_store(path, {"search": mined_of(lists)}, META | {"data": data.fingerprints()} | meta)


def with_rounds(make_task, folder, source="mined", **options):
    """Make a task of twelve queries and ten documents, with rounds that may start at batches 3, 6, ..."""
    data = make_task(SearchDataModule, **{"num_batches": 12, "batch_size": 4} | options)
    data.rounds = Rounds(folder, source, data.fingerprints())
    data.rounds.plan(3, 3)
    return data


def negatives(batch):
    """Return the rows of documents that are not a positive of any query."""
    return set(batch.document_ids.tolist()) - set(batch.document_ids[batch.positives].flatten().tolist())


def test_store_round_trip(make_task, tmp_path):
    data = make_task(SearchDataModule)
    lists = [[1, 2], [], [7, 3, 5], *[[i] for i in range(9)]]
    store = written(tmp_path / "store", data, lists)
    for again in (store, HardNegativeStore(tmp_path / "store"), pickle.loads(pickle.dumps(store))):
        assert [again.negatives_of("search", i) for i in range(12)] == lists
        assert again.negatives_of("classification", 0) == []
        assert again.hash == store.hash
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    assert meta["tasks"]["search"] == {"examples": 12, "negatives": 14, "taken": {"any": 3}}
    assert (meta["model"], meta["k"], meta["version"]) == ("aaaa", 10, 1)
    store.check(data.fingerprints())


@pytest.mark.parametrize("source", ["mined", "both", "data"])
def test_decisions_of_a_judge_change_the_examples(make_task, tmp_path, source):
    """Of mined rows, the judge keeps 7, drops 8 and makes 9 a positive. It also drops the data's negative."""
    data = with_rounds(make_task, tmp_path, source, num_hard_negatives=3, num_positives=3, batch_size=12)
    of_data = [example.hard_negatives[0] for example in data.examples]
    lists = [[*{7, 8, 9} - set(example.not_negatives), of_data[i]] for i, example in enumerate(data.examples)]
    lists = [list(dict.fromkeys(rows)) for rows in lists]
    decisions = {7: 0, 8: 1, 9: 2}
    labels = [1 if row == of_data[i] else decisions[row] for i, rows in enumerate(lists) for row in rows]
    mined = dataclasses.replace(mined_of(lists), labels=np.array(labels, dtype=np.int8))
    store = write_store(tmp_path / "store", {"search": mined}, META | {"data": data.fingerprints()})
    assert store.hash != written(tmp_path / "other", data, lists).hash
    data.rounds.begin(0, "store")
    batch = next(iter(data.train_dataloader()))
    drawn_positives = drawn_negatives = 0
    for b, query in enumerate(batch.queries.tolist()):
        (i,) = [i for i, e in enumerate(data.examples) if batch_row(batch, data, query) == e.query]
        ids = batch.document_ids.tolist()
        positives, negatives = (
            {ids[c] for c in columns[b].tolist() if c >= 0} for columns in (batch.positives, batch.hard_negatives)
        )
        known, example = set(batch.known_positives[b].tolist()) - {-1}, data.examples[i]
        if source == "data":
            assert (positives, negatives, known) == (set(example.positives), {of_data[i]}, set(example.not_negatives))
            continue
        turned = set(store.negatives_of("search", i, POSITIVE))
        dropped = set(store.negatives_of("search", i, DROP))
        assert turned == {9} & set(lists[i]) - {of_data[i]}
        assert positives == set(example.positives) | turned
        assert negatives == {7} & set(lists[i]) - {of_data[i]}
        assert known == set(example.not_negatives) | turned | dropped
        drawn_positives, drawn_negatives = drawn_positives + len(turned), drawn_negatives + len(negatives)
    assert source == "data" or (drawn_positives > 3 and drawn_negatives > 3)


def batch_row(batch, data, query):
    """Return the row of a batch's text in the document table, by its token ids."""
    ids = [text for chunk in batch.chunks for text in chunk.input_ids.split(list(chunk.lengths))]
    encoding = data._encoding(data)
    (row,) = [e.query for e in data.examples if data.tokens(encoding)[e.query].tolist() == ids[query].tolist()]
    return row


def test_lost_labels_are_detected(make_task, tmp_path):
    data = make_task(SearchDataModule)
    mined = dataclasses.replace(mined_of([[1]] * 12), labels=np.ones(12, dtype=np.int8))
    write_store(tmp_path / "store", {"search": mined}, META | {"data": data.fingerprints()})
    (tmp_path / "store" / "search.labels.npy").unlink()
    with pytest.raises(UserError, match="do not match the hash"):
        HardNegativeStore(tmp_path / "store")


def test_failed_write_keeps_the_old_store(make_task, tmp_path):
    data = make_task(SearchDataModule)
    written(tmp_path / "store", data, [[1]] * 12)
    with pytest.raises(TypeError):
        written(tmp_path / "store", data, [[2]] * 12, model=object())
    assert HardNegativeStore(tmp_path / "store").negatives_of("search", 0) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("damage", ["meta.json", "search.documents.npy"])
def test_damaged_or_missing_store_raises_user_error(make_task, tmp_path, damage):
    written(tmp_path / "store", make_task(SearchDataModule), [[1]] * 12)
    (tmp_path / "store" / damage).write_bytes(b"{")
    with pytest.raises(UserError, match="the mined hard negatives are damaged"):
        HardNegativeStore(tmp_path / "store")
    (tmp_path / "store" / damage).unlink()
    with pytest.raises(UserError, match=f"expected mined hard negatives, but {damage} is missing"):
        HardNegativeStore(tmp_path / "store")


@pytest.mark.parametrize("name", ["starts", "documents", "ranks", "scores"])
def test_store_whose_arrays_do_not_match_the_stored_hash_raises_user_error(make_task, tmp_path, name):
    """The array keeps its shape, so no other check notices."""
    data = with_rounds(make_task, tmp_path)
    written(tmp_path / "store", data, [[1, 2]] * 12)
    data.rounds.begin(3, "store")
    loader = data.train_dataloader()
    loader.position = 4
    state = loader.state_dict()
    path = tmp_path / "store" / f"search.{name}.npy"
    array = np.load(path)
    array[1] += 1
    np.save(path, array)
    message = r"store: the arrays do not match the hash in meta.json \(.* stored, .* found\).*mine again"
    for read in (
        lambda: HardNegativeStore(tmp_path / "store"),
        lambda: Rounds(tmp_path, "mined", data.fingerprints()).begin(0, str(tmp_path / "store")),
        lambda: with_rounds(make_task, tmp_path).train_dataloader().load_state_dict(state),
    ):
        with pytest.raises(UserError, match=message):
            read()


def test_store_of_other_data_raises_user_error_with_both_fingerprints(make_task, tmp_path):
    data = make_task(SearchDataModule)
    store = written(tmp_path / "store", data, [[1]] * 12)
    collection = toy_collection()
    corpus = dict(collection.corpus) | {"d0": Document("d0", "another", "text")}
    other = make_task(SearchDataModule, collection=Collection(corpus, collection.queries, collection.qrels))
    then, now = (d.fingerprints()["search"]["toy"] for d in (data, other))
    with pytest.raises(UserError, match=f"mined from different data .fingerprints .*: toy {then}, .*; now: toy {now}"):
        Rounds(tmp_path, "mined", other.fingerprints()).begin(0, "store")
    with pytest.raises(UserError, match="expected hard negatives of a task, but these are of search"):
        store.check({})


def test_round_is_used_from_its_first_batch(make_task, tmp_path):
    data = with_rounds(make_task, tmp_path)
    for name in ("one", "two"):
        written(tmp_path / name, data, [[1]] * 12, step=name)
    rounds = data.rounds
    rounds.begin(3, "one")
    rounds.begin(9, "two")
    names = [store.path.name if (store := rounds.at(step)) else None for step in range(12)]
    assert names == [None] * 3 + ["one"] * 6 + ["two"] * 3
    assert [rounds.boundary_after(step) for step in range(7)] == [3, 3, 3, 6, 6, 6, 9]
    assert [step for step in range(12) if rounds.is_planned(step)] == [3, 6, 9]
    assert Rounds(tmp_path).boundary_after(5) is None
    assert not Rounds(tmp_path).is_planned(0)


def test_source_selects_mined_negatives_or_those_of_the_data(make_task, tmp_path):
    lists = [[9, 8, 7], [], *[[6]] * 10]
    for source in ("mined", "data", "both"):
        data = with_rounds(make_task, tmp_path, source)
        written(tmp_path / "store", data, lists)
        data.rounds.begin(3, "store")
        draw = data.rounds.examples_for("search")
        for i in range(3):
            example = data.examples[i]
            own = list(example.hard_negatives)
            assert len(own) == 1
            assert list(draw(i, example, 2).hard_negatives) == own
            wanted = {"mined": lists[i] or own, "data": own, "both": list(dict.fromkeys(lists[i] + own))}[source]
            assert list(draw(i, example, 3).hard_negatives) == wanted
    with pytest.raises(UserError, match="source: expected one of mined, data, both, got 'mind'"):
        Rounds(tmp_path, "mind")


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_switch_to_a_new_round_at_its_first_batch(make_task, tmp_path, num_workers):
    """In each round, all examples have the same single hard negative."""
    data = with_rounds(make_task, tmp_path, num_workers=num_workers, batch_size=1)
    seen = {}
    for batch in data.train_dataloader():
        seen[batch.step] = negatives(batch)
        after = batch.step + 1
        if data.rounds.is_planned(after):  # as the mining callback does at the end of a step
            written(tmp_path / f"{after}", data, [[9 - after // 3]] * 12)
            data.rounds.begin(after, f"{after}")
    assert sorted(seen) == list(range(12))
    for step, rows in seen.items():
        example = data.examples[data.schedule().draws(step)[0][0]]
        if step < 3:
            assert rows == set(example.hard_negatives)
        elif 9 - step // 3 not in example.positives:
            assert rows == {9 - step // 3}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3, 7])
def test_resuming_with_rounds_gives_the_same_batches_on_any_number_of_ranks(make_task, tmp_path, stop):
    """Rounds start at 3, 6 and 9, each with different negatives. A resumed run reuses earlier rounds."""

    def run(world_size, num_workers, state=None, until=12):
        rows_by_step, loaders = {}, []
        for rank in range(world_size):
            data = with_rounds(make_task, tmp_path, batch_size=8 // world_size, num_workers=num_workers)
            data.trainer = trainer_on(global_rank=rank, world_size=world_size)
            loaders.append((data.train_dataloader(), data))
            if state:
                loaders[-1][0].load_state_dict(state)
        for batches in zip(*(loader for loader, _ in loaders), strict=True):
            step = batches[0].step
            drawn = [row for batch in batches for row in batch.document_ids.tolist()]
            rows_by_step[step] = sorted(set(drawn))
            for _, data in loaders:
                if data.rounds.is_planned(step + 1) and not data.rounds.has(step + 1):
                    rng = np.random.default_rng(step)
                    written(tmp_path / f"{step + 1}", data, [rng.permutation(10)[:3].tolist() for _ in range(12)])
                    data.rounds.begin(step + 1, f"{step + 1}")
            if step + 1 == until:
                break
        return rows_by_step, loaders[0][0].state_dict()

    whole, _ = run(2, 0)
    assert sorted(whole) == list(range(12))
    _, state = run(2, 2, until=stop)
    assert [r["batch"] for r in state["rounds"]] == list(range(3, stop + 1, 3))
    for world_size in (1, 2, 4):
        rest, _ = run(world_size, 2 if world_size == 2 else 0, json.loads(json.dumps(state)))
        assert rest == {step: rows for step, rows in whole.items() if step >= stop}


def test_resuming_without_the_same_store_raises_user_error(make_task, tmp_path):
    data = with_rounds(make_task, tmp_path)
    store = written(tmp_path / "one", data, [[1]] * 12)
    data.rounds.begin(3, "one")
    loader = data.train_dataloader()
    loader.position = 4
    state = loader.state_dict()

    def resumed():
        return with_rounds(make_task, tmp_path).train_dataloader()

    resumed().load_state_dict(state)
    other = written(tmp_path / "one", data, [[2]] * 12, model="bbbb")
    both = f"expected hash {store.hash}, mined by model aaaa; found hash {other.hash}, model bbbb"
    with pytest.raises(UserError, match=both):
        resumed().load_state_dict(state)
    (tmp_path / "one").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"one: the hard negatives used since batch 3 are missing.*{store.hash}"):
        resumed().load_state_dict(state)
    state["position"] = 2  # before the round, which is then mined again
    resumed().load_state_dict(state)


def test_initial_store_may_move_but_not_change(make_task, tmp_path):
    data = with_rounds(make_task, tmp_path)
    written(tmp_path / "given", data, [[1]] * 12)
    data.rounds.begin(0, str(tmp_path / "given"))
    state = data.train_dataloader().state_dict()
    (tmp_path / "given").rename(tmp_path / "moved")
    again = with_rounds(make_task, tmp_path)
    again.rounds.begin(0, str(tmp_path / "moved"))
    again.train_dataloader().load_state_dict(state)
    assert again.rounds.at(0).path == tmp_path / "moved"
    written(tmp_path / "moved", data, [[2]] * 12, model="bbbb")
    other = with_rounds(make_task, tmp_path)
    other.rounds.begin(0, str(tmp_path / "moved"))
    with pytest.raises(UserError, match="moved: the checkpoint was trained with different hard negatives .*aaaa.*bbbb"):
        other.train_dataloader().load_state_dict(state)
    without = make_task(SearchDataModule, num_batches=12)
    with pytest.raises(UserError, match="was trained with mined hard negatives .*given., but this training has none"):
        without.train_dataloader().load_state_dict(state)


def test_has_store_requires_the_same_settings(make_task, tmp_path):
    data = with_rounds(make_task, tmp_path)
    meta = META | {"data": data.fingerprints()}
    assert not data.rounds.has_store("one", meta)
    data.rounds.write("one", {"search": mined_of([[1]] * 12)}, meta)
    assert not data.rounds.has_store("one", meta | {"model": "bbbb"})
    assert data.rounds.has_store("one", meta)
    assert not data.rounds.has(3)


def test_stripped_documents_are_neither_examples_nor_candidates(make_task, tmp_path):
    data = make_task(SearchDataModule)
    store = written(tmp_path / "store", data, [[1]] * 12)
    queries = [data.examples[i].query for i in (0, 5)]
    data.strip(np.array(queries), np.array([4, 7]))
    (pool,) = data.pools()
    assert len(pool.queries) == len(data.examples) < 12
    assert [q.id for q in pool.queries] == [data.documents[example.query].id for example in data.examples]
    assert pool.excluded.tolist() == [4, 7]
    with pytest.raises(UserError, match="hard negatives of search were mined from different data"):
        store.check(data.fingerprints())


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_writing_a_store_replaces_only_older_stores(make_task, tmp_path, kind):
    data, path = make_task(SearchDataModule), tmp_path / "store"
    written(tmp_path / "other", data, [[1]] * 12)
    if kind == "folder":
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is not a store of hard negatives, so it will not be replaced"):
        written(path, data, [[2]] * 12)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "other" / "meta.json").write_bytes(b"{")  # damaged
    assert written(tmp_path / "other", data, [[2]] * 12).negatives_of("search", 0) == [2]
    assert sorted(tmp_path.rglob("*")) == before
