"""The pages in docs/: their links, code and examples, and the site that is built from them."""

import ast
import asyncio
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import datamodules
import lightning_modules
import scimult
from datamodules.readers.beir import write_beir
from tests.conftest import toy_collection
from tests.experiments.browser import CHROMIUM, chromium

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LOADING = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}  # elements that load a file


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    links = [(page, link) for page in PAGES for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8")))]
    links = [(page, link) for page, link in links if not link.startswith("http")]
    assert len(links) > 100
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), (page.name, link)
        assert target.is_relative_to(ROOT), (page.name, link)
        assert not anchor or anchor in anchors(target), (page.name, link)


def test_lists_and_tables_follow_a_blank_line():
    """GitHub shows them without one, but mkdocs takes them for text of the paragraph."""
    block = re.compile(r"[*-] |\d+\. |\|")
    for page in PAGES:
        lines = FENCED.sub("", page.read_text(encoding="utf-8")).split("\n")
        for before, line in pairwise(lines):
            if block.match(line) and before.strip():
                assert block.match(before) or before.startswith("  "), (page.name, line)


def test_version_of_torch_in_the_installation_is_the_tested_one():
    (version,) = re.findall(r"torch==([\d.]+)", (ROOT / "docs/start.md").read_text())
    assert f"torch=={version}\n" in (ROOT / "constraints.txt").read_text()


def test_code_of_the_library_page_runs(tmp_path, monkeypatch, make_backbone):
    backbone, tokenizer = make_backbone()
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    write_beir(toy_collection(), tmp_path / "searches")
    write_beir(toy_collection(papers=True), tmp_path / "citations")
    monkeypatch.chdir(tmp_path)
    page = DOCS / "library.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert len(blocks) == 5
    assert names["scores"].shape == (1, 1)
    assert names["trainer"].global_step == 4
    assert set(names["result"].metrics) == {"ndcg@10", "recall@100"}
    assert len(names["mined"].negatives)


def check_example(folder: Path, output: str) -> None:
    """Check what the example has printed, and that its folder loads."""
    assert len(re.findall(r"^(?:classification|search) {'ndcg@10': (?:1\.0|0\.9)", output, re.MULTILINE)) == 2, output
    assert re.search(r" on galaxies \d$", output, re.MULTILINE), output
    encoder = scimult.load_encoder(folder / "encoder")
    assert encoder.encode(["a paper"], task="search").shape == (1, 64)


@pytest.mark.slow
def test_example_script_trains_and_searches(tmp_path):
    command, environment = [sys.executable, EXAMPLES / "own_papers.py"], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    check_example(tmp_path, done.stdout)


@pytest.mark.slow
def test_example_notebook_trains_and_searches(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "own_papers.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    check_example(tmp_path, "".join(output.get("text", "") for output in outputs))


def test_example_notebook_is_the_script_without_outputs():
    cells = [
        cell for cell in nbformat.read(EXAMPLES / "own_papers.ipynb", as_version=4).cells if cell.cell_type == "code"
    ]
    _docstring, *lines, main, _call = ast.parse((EXAMPLES / "own_papers.py").read_text(encoding="utf-8")).body
    code = ast.parse("\n".join(cell.source for cell in cells)).body
    assert list(map(ast.dump, code)) == list(map(ast.dump, [*lines, *main.body]))
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site; a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


class Page(HTMLParser):
    """The ids and the loaded files of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.loaded = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if attributes.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.add(attributes.get(LOADING.get(name)))


@pytest.mark.slow
def test_site_has_every_page_and_name_and_loads_nothing_from_outside(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists()
    pages = {path.relative_to(site): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for package in (datamodules, lightning_modules):
        assert {f"{package.__name__}.{name}" for name in package.__all__} <= pages[Path("api.html")].ids
    text = (site / "api.html").read_text(encoding="utf-8")
    assert "<li><code>batch_size</code>: number of queries per batch" in text  # a field made by option
    assert "<li><code>attention</code>: whether attention has experts" in text  # a parameter
    for path, page in pages.items():
        for file in page.loaded - {None}:
            assert (site / path.parent / file).exists(), (path, file)
    for path in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_pages_of_the_site_in_a_browser(site, tmp_path):
    async def visit() -> None:
        async with chromium(tmp_path / "profile") as page:
            for name in ("index", "api", "examples/own_papers"):
                for width, scheme in ((1400, "light"), (390, "dark")):
                    await page.open(f"file://{site}/{name}.html", width, scheme)
                    assert await page.run("document.documentElement.scrollWidth") <= width, (name, width)
            requests = [event["request"]["url"] for kind, event in page.events if kind == "Network.requestWillBeSent"]
            assert requests
            assert not [url for url in requests if not url.startswith(("file:", "data:"))]
            assert not [event for kind, event in page.events if kind in ("Log.entryAdded", "Runtime.exceptionThrown")]

    (tmp_path / "profile").mkdir()
    asyncio.run(visit())
