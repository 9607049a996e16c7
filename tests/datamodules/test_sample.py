"""The built-in sample: reproducible, consistent, and with tasks that conflict."""

import subprocess
import sys

import pytest

from datamodules.records import UserError
from datamodules.sample import SampleReader, science


def fingerprints(seed):
    return [SampleReader(view, num_papers=500, seed=seed).read().fingerprint() for view in SampleReader.VIEWS]


@pytest.mark.slow
def test_sample_depends_only_on_the_seed():
    command = (
        "from datamodules.sample import SampleReader as R;"
        "print(*[R(v, num_papers=500, seed=3).read().fingerprint() for v in R.VIEWS])"
    )
    elsewhere = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.split() == fingerprints(3)
    assert not set(fingerprints(3)) & set(fingerprints(4))


def test_default_sample_size():
    topics = SampleReader("topics").read()
    assert len(topics.queries) == 5000
    assert 200 <= len(topics.corpus) <= 500


@pytest.mark.parametrize("view", SampleReader.VIEWS)
def test_splits_are_disjoint_and_consistent(view):
    collection = SampleReader(view, num_papers=1000).read()
    splits = [set(collection.qrels[split]) for split in ("train", "dev", "test")]
    assert all(splits)
    assert sum(map(len, splits)) == len(set.union(*splits))
    for qrels in collection.qrels.values():
        for query, grades in qrels.items():
            assert query in collection.queries
            assert set(grades) <= set(collection.corpus)
            assert any(grade > 0 for grade in grades.values())


def test_only_the_train_split_has_hard_negatives():
    for view in SampleReader.VIEWS:
        qrels = SampleReader(view, num_papers=1000).read().qrels
        assert any(grade == 0 for grades in qrels["train"].values() for grade in grades.values())
        assert all(
            grade > 0 for split in ("dev", "test") for grades in qrels[split].values() for grade in grades.values()
        )


def test_papers_cite_earlier_papers_of_their_subfield():
    world = science(0, 1000)
    papers = {paper.document.id: paper for paper in world.papers}
    assert world.citations
    for citing, cited in world.citations.items():
        for paper in cited:
            assert papers[paper].year < papers[citing].year
            assert papers[paper].subfield == papers[citing].subfield


def test_all_queries_of_a_material_and_aspect_are_in_one_split():
    collection = SampleReader("searches", num_papers=1000).read()
    split_of = {}
    for split, qrels in collection.qrels.items():
        for query in qrels:
            assert split_of.setdefault(query.rsplit(".", 1)[0], split) == split


def test_papers_close_in_one_task_are_mostly_not_in_another():
    """Otherwise one shared embedding could serve all tasks."""
    world = science(0, 2000)
    pairs = [(a, b) for a in world.papers[:300] for b in world.papers[300:600]]
    same_topic = [(a.subfield, a.aspect) == (b.subfield, b.aspect) for a, b in pairs]
    same_line = [(a.subfield, a.method) == (b.subfield, b.method) for a, b in pairs]
    same_object = [(a.material, a.aspect) == (b.material, b.aspect) for a, b in pairs]
    for one, other in ((same_topic, same_line), (same_topic, same_object), (same_line, same_object)):
        both = sum(x and y for x, y in zip(one, other, strict=True))
        assert sum(one) > 20
        assert both < 0.5 * sum(one)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"view": "nonsense"}, "topics"), ({"view": "topics", "num_papers": 3}, "500")]
)
def test_wrong_sample_arguments_raise_user_error(arguments, message):
    with pytest.raises(UserError, match=message):
        SampleReader(**arguments)
