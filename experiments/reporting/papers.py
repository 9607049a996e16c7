"""Papers and queries themselves: the map, queries as most are, and those that went worst."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.reporting.charts import legend, scatter
from experiments.reporting.html import Html, join, missing, section, tag
from experiments.reporting.run_files import FIGURES, RunFiles
from experiments.reporting.source import Source

FILES = (FIGURES, "runs/*.trained.trec", "runs/*.qrels")


def papers_map(run: RunFiles) -> Html:
    """The same papers as the expert of each task places them."""
    title = "Map of papers"
    if not run.figures.get("map"):
        told = "No map: it needs a checkpoint, the run's data, and papers of classification or link prediction."
        return section("map", title, missing(told))
    found = run.at(FIGURES)["map"]
    names, titles = found.value["labels"], [words.told(words.value, "title") for words in found["titles"]]
    pictures = []
    for task, of in found["tasks"]:
        told = [of["variance"].figure(".0%"), " of the variance"]
        if names:
            told += ["; nearest paper has the same label: ", of["same_label"].figure(".0%")]
        places = np.array(of.value["places"])
        pictures.append(scatter(task, places, found.value["groups"], titles, tag("p", *told, class_="note")))
    told = [
        "The same ",
        found["papers"].figure(","),
        f" papers of {found.value['benchmark']} by the expert of each task: ",
    ]
    told += ["their vectors' first two principal components, from ", tag("code", found.value["checkpoint"]), ". "]
    if names:
        told += ["Two papers drawn by chance share a label in ", found["chance"].figure(".0%"), " of cases."]
    key = legend([(name, tone, "") for tone, name in enumerate(names)])
    return section(
        "map", title, tag("p", *told, class_="note"), key, tag("div", *pictures, class_="charts"), files=[FIGURES]
    )


def queries(run: RunFiles) -> Html:
    """For each benchmark, queries that are typical."""
    note = "For each benchmark a query that went better than nine in ten, and the one in the middle."
    return _cards(run, "queries", "What it finds", "typical", note)


def failures(run: RunFiles) -> Html:
    """For each benchmark, the queries of the lowest value, and where their relevant documents are."""
    note = "The lowest values; among equals, those whose first relevant document stands lowest."
    return _cards(run, "failures", "Where it fails", "hardest", note)


def _cards(run: RunFiles, id: str, title: str, kind: str, note: str) -> Html:
    if not run.figures.get("queries"):
        return section(id, title, missing("No queries to show before there are results."))
    parts = []
    for name, of in run.at(FIGURES)["queries"]:
        parts += [tag("h3", name), tag("div", *(_card(of, query, kind) for query in of[kind]), class_="queries")]
    return section(id, title, tag("p", note, class_="note"), *parts, files=FILES)


def _card(of: Source, query: Source, kind: str) -> Html:
    metric = of.value["metric"]
    if query.value["first_relevant"]:
        rank = join(["first relevant at rank ", query["first_relevant"].figure(",")])
    else:
        rank = join(["nothing relevant among the first ", of["depth"].figure(",")])
    told = (f"{metric} ", query[metric].figure(), ", ", query["relevant"].figure(","), " relevant, ", rank)
    lists = [_list("Ranked first", query["top"])]
    if kind == "hardest":
        lists.append(_list("Relevant, and where it ranks them", query["wanted"]))
    return tag("article", tag("h4", query["text"].told(query.value["text"])), tag("p", *told), *lists)


def _list(title: str, documents: Source) -> Html:
    if not documents.value:
        return tag("p", f"{title}: nothing")
    return join([tag("p", title), tag("ol", *(tag("li", *_document(document)) for document in documents))])


def _document(document: Source) -> tuple[Any, Any, Any]:
    """Its rank, its words, and whether it is relevant."""
    rank, grade, words = document["rank"], document["grade"], document["text"]
    place = rank.figure(",") if rank.value else tag("span", "–", title="not retrieved")
    relevant = tag("span", "✓ grade ", grade.figure("d"), class_="relevant") if grade.value else ""
    return place, words.told(words.value), relevant
