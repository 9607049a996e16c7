"""The page as a whole."""

from __future__ import annotations

from pathlib import Path

from experiments.reporting.experts import experts
from experiments.reporting.html import Html, tag
from experiments.reporting.identity import head, identity, title
from experiments.reporting.papers import failures, papers_map, queries
from experiments.reporting.results import results
from experiments.reporting.run_files import RunFiles
from experiments.reporting.training import curves, mining

SECTIONS = {
    "results": ("Results", results),
    "curves": ("Training", curves),
    "experts": ("Experts", experts),
    "mining": ("Hard negatives", mining),
    "map": ("Map", papers_map),
    "queries": ("What it finds", queries),
    "failures": ("Where it fails", failures),
    "run": ("The run", identity),
}

# What browsers show when the mouse rests on a mark, told below the figure as well: fingers do not rest.
SCRIPT = """
for (const figure of document.querySelectorAll('figure')) {
  if (!figure.querySelector('circle title')) continue;
  const told = document.createElement('output');
  let chosen = null;
  figure.append(told);
  for (const event of ['pointerover', 'click']) figure.addEventListener(event, ({target}) => {
    const title = target.closest('circle')?.querySelector('title');
    if (!title) return;
    chosen?.classList.remove('chosen');
    chosen = target;
    chosen.classList.add('chosen');
    told.textContent = title.textContent;
  });
}
"""


def page(run: RunFiles) -> str:
    """One HTML file that needs nothing else."""
    links = (tag("li", tag("a", label, href=f"#{id}")) for id, (label, _) in SECTIONS.items())
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    body = tag(
        "body",
        head(run),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", *(of(run) for _, of in SECTIONS.values())),
        tag("script", Html(SCRIPT)),
    )
    top = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title(run)),
        Html('<link rel="icon" href="data:,">'),  # else browsers ask for one
        tag("style", Html(style)),
    )
    return f"<!doctype html>\n{tag('html', top, body, lang='en')}\n"
