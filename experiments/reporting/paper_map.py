"""A map of papers: the same papers in two dimensions, as the expert of each task sees them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.records import Benchmark, UserError
from experiments.config.experiment import from_dict
from experiments.reporting.charts import NUM_TONES
from experiments.reporting.run_files import RunFiles
from experiments.results.differences import words
from experiments.results.texts import benchmarks_of_run
from lightning_modules.encoders.loading import checkpoint_of, load_encoder

log = logging.getLogger(__name__)


def paper_map(run: RunFiles, num_papers: int) -> dict[str, Any] | None:
    """Test papers with their labels and places, for each task's expert; None where it cannot be drawn."""
    try:
        config = from_dict(run.config, str(run.path / "config.yaml"))
        benchmarks = benchmarks_of_run(run.path.resolve(), config.evaluation.split).values()
        checkpoint = checkpoint_of(run.path)
        encoder = load_encoder(checkpoint)
    except (UserError, OSError) as error:
        log.warning("no map of papers: %s", error)
        return None
    kinds = {name: task.kind for name, task in config.task.items()}
    labelled = [benchmark for benchmark in benchmarks if kinds[benchmark.task] == "classification"]
    papers = labelled or [benchmark for benchmark in benchmarks if kinds[benchmark.task] == "link_prediction"]
    if not papers:
        return None
    source = papers[0]
    ids = evenly(list(source.queries), num_papers)
    names, groups = groups_of(source, ids) if labelled else ([], [0] * len(ids))
    log.info("%d papers are encoded for the map", len(ids))
    documents = [source.queries[id] for id in ids]
    maps = {}
    for task in encoder.tasks:
        vectors = encoder.encode(documents, task, token_budget=config.data.token_budget).double().numpy()
        places, shares = two_components(vectors)
        maps[task] = {"places": places.round(4).tolist(), "variance": float(shares[:2].sum())}
        if names:
            maps[task]["same_label"] = same_label(vectors, groups)
    chance = [share * share for share in np.bincount(groups) / len(groups)]
    return {
        "benchmark": source.name,
        "checkpoint": str(checkpoint.relative_to(run.path)),
        "papers": len(ids),
        "ids": ids,
        "titles": [words(document, document.id) for document in documents],
        "labels": names,
        "groups": list(groups),
        "chance": float(sum(chance)) if names else None,
        "tasks": maps,
    }


def evenly(ids: Sequence[str], count: int) -> list[str]:
    """At most count of them, from the whole range."""
    if len(ids) <= count:
        return list(ids)
    return [ids[i] for i in np.linspace(0, len(ids) - 1, count).round().astype(int)]


def groups_of(benchmark: Benchmark, ids: Sequence[str]) -> tuple[list[str], list[int]]:
    """The most frequent labels of the papers, and the number of each paper's; the last group is "other".

    A paper with several labels has the one that most papers have: in a hierarchy, the highest.
    """
    labels = [[label for label, grade in benchmark.qrels[id].items() if grade > 0] for id in ids]
    counts = Counter(label for own in labels for label in own)
    most = [max(own, key=lambda label: (counts[label], label), default=None) for own in labels]
    kept = [label for label, _ in Counter(label for label in most if label).most_common(NUM_TONES - 1)]
    place = {label: i for i, label in enumerate(kept)}
    names = [words(benchmark.corpus.get(label), label, 40) for label in kept]
    return [*names, "other"], [place.get(label, len(kept)) for label in most]


def two_components(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, 2) of vectors (n, D) on their first two principal components, at most 1 from the middle, and each
    component's share of the variance."""
    centred = vectors - vectors.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    places = left[:, :2] * singular[:2]
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    signs = np.sign(places[np.abs(places).argmax(0), range(2)])  # a component's sign is arbitrary
    variance = singular**2
    return places * signs / max(np.abs(places).max(), 1e-12), variance / max(variance.sum(), 1e-12)


def same_label(vectors: np.ndarray, groups: Sequence[int]) -> float:
    """Share of the papers whose nearest other paper, by cosine in all dimensions, is in the same group."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    near = unit @ unit.T
    np.fill_diagonal(near, -np.inf)
    groups = np.asarray(groups)
    return float((groups[near.argmax(1)] == groups).mean())
