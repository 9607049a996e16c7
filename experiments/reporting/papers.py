"""Papers and queries themselves: the map, queries as most are, and those that went worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.reporting.charts import legend, scatter
from experiments.reporting.html import Html, figure, join, missing, pointer, quoted, section, tag
from experiments.reporting.run_files import FIGURES, RunFiles


def papers_map(run: RunFiles) -> Html:
    """The same papers as the expert of each task places them."""
    title, found = "Map of papers", run.figures.get("map")
    if not found:
        told = "No map: it needs a checkpoint, the run's data, and papers of classification or link prediction."
        return section("map", title, missing(told))
    titles = [
        tag("title", words, data_source=pointer(FIGURES, "map", "titles", i)) for i, words in enumerate(found["titles"])
    ]
    names, labelled = found["labels"], bool(found["labels"])
    key = legend([(name, i, "") for i, name in enumerate(names)]) if labelled else ""
    pictures = []
    for task, of in found["tasks"].items():
        tones = found["groups"]
        told = [figure(of["variance"], pointer(FIGURES, "map", "tasks", task, "variance"), ".0%"), " of the variance"]
        if labelled:
            same = figure(of["same_label"], pointer(FIGURES, "map", "tasks", task, "same_label"), ".0%")
            told += ["; nearest paper has the same label: ", same]
        below = tag("p", *told, class_="note")
        pictures.append(scatter(task.replace("_", " "), np.array(of["places"]), tones, titles, below))
    count = figure(found["papers"], pointer(FIGURES, "map", "papers"), ",")
    chance = figure(found["chance"], pointer(FIGURES, "map", "chance"), ".0%") if labelled else ""
    note = tag(
        "p",
        *(
            "The same ",
            count,
            " papers of ",
            found["benchmark"],
            " by the expert of each task: their vectors' first two ",
        ),
        *("principal components, from ", tag("code", found["checkpoint"]), ". "),
        *(("Two papers drawn by chance share a label in ", chance, " of cases.") if labelled else ()),
        class_="note",
    )
    return section("map", title, note, key, tag("div", *pictures, class_="charts maps"), files=[FIGURES])


def queries(run: RunFiles) -> Html:
    """For each benchmark, queries that are typical."""
    found = run.figures.get("queries", {})
    if not found:
        return section("queries", "What it finds", missing("No queries to show before there are results."))
    parts = []
    for name, of in found.items():
        cards = [_card(name, of, "typical", i) for i in range(len(of["typical"]))]
        parts += [tag("h3", name), tag("div", *cards, class_="queries")]
    note = tag("p", "For each benchmark a query that went better than nine in ten, and the one in the middle.",
               class_="note")  # fmt: skip
    return section("queries", "What it finds", note, *parts, files=[FIGURES, "runs/*.trained.trec", "runs/*.qrels"])


def failures(run: RunFiles) -> Html:
    """For each benchmark, the queries of the lowest value, and where their relevant documents are."""
    found = run.figures.get("queries", {})
    if not found:
        return section("failures", "Where it fails", missing("No queries to show before there are results."))
    parts = []
    for name, of in found.items():
        cards = [_card(name, of, "hardest", i) for i in range(len(of["hardest"]))]
        parts += [tag("h3", name), tag("div", *cards, class_="queries")]
    note = tag(
        "p", "The lowest values; among equals, those whose first relevant document stands lowest.", class_="note"
    )
    return section("failures", "Where it fails", note, *parts, files=[FIGURES, "runs/*.trained.trec", "runs/*.qrels"])


def _card(name: str, of: Mapping[str, Any], kind: str, number: int) -> Html:
    query = of[kind][number]
    where = ("queries", name, kind, number)
    metric, first = of["metric"], query["first_relevant"]
    value = figure(query[metric], pointer(FIGURES, *where, metric), ".3f")
    relevant = figure(query["relevant"], pointer(FIGURES, *where, "relevant"), ",")
    if first:
        rank: Any = join(["first relevant at rank ", figure(first, pointer(FIGURES, *where, "first_relevant"), ",")])
    else:
        depth = figure(of["depth"], pointer(FIGURES, "queries", name, "depth"), ",")
        rank = join(["nothing relevant among the first ", depth])
    lists = [_list("Ranked first", query["top"], (*where, "top"))]
    if kind == "hardest":
        lists.append(_list("Relevant, and where it ranks them", query["wanted"], (*where, "wanted")))
    return tag(
        "article",
        tag("h4", quoted(query["text"], pointer(FIGURES, *where, "text"))),
        tag("p", f"{metric} ", value, ", ", relevant, " relevant, ", rank),
        *lists,
    )


def _list(title: str, documents: list[Mapping[str, Any]], where: tuple[Any, ...]) -> Html:
    if not documents:
        return tag("p", f"{title}: nothing")
    items = []
    for i, document in enumerate(documents):
        rank = document["rank"]
        place = tag("span", "–", title="not retrieved")
        if rank:
            place = figure(rank, pointer(FIGURES, *where, i, "rank"), ",")
        grade = ""
        if document["grade"]:
            level = figure(document["grade"], pointer(FIGURES, *where, i, "grade"), "d")
            grade = tag("span", "✓ grade ", level, class_="relevant")
        items.append(tag("li", place, quoted(document["text"], pointer(FIGURES, *where, i, "text")), grade))
    return join([tag("p", title), tag("ol", *items)])
