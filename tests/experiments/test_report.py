"""The report of a run: each figure comes from a file of the run, and a browser renders the page correctly."""

import asyncio
import json
import math
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import yaml
from sklearn.decomposition import PCA

from datamodules.records import UserError
from datamodules.sample import science
from experiments.compare import main as compare
from experiments.evaluate import main as evaluate
from experiments.report import main
from experiments.reporting.charts import Series, line_chart
from experiments.reporting.computed import principal_components, same_label_share
from experiments.reporting.page import _transplants, figure, quote
from experiments.reporting.run_files import RunFiles, Source
from experiments.runs import SPEED_COLUMNS
from experiments.runs import main as list_runs
from experiments.train import train
from tests.experiments.browser import CHROMIUM, chromium
from tests.experiments.test_train import TINY

VOID = ("meta", "link", "line", "circle", "rect", "path", "polyline", "br")
UNSOURCED = ("style", "script", "pre", "code", "cite", "title-of-page")  # elements and classes without a data-source
NUMBER = re.compile(r"(?<![\w.])[−+]?\d[\d,]*(?:\.\d+)?(?:e[−+]?\d+)?%?")
METRIC = re.compile(r"\b[a-z_]+@\d+")

SETTINGS = [
    *("mining.every_n_steps=3", "mining.first_step=3", "mining.relative_margin=null", "mining.k=40"),
    *("trainer.max_steps=9", "trainer.log_every_n_steps=3", "diagnostics.every_n_steps=3"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a run that fills every section: mining, diagnostics, results."""
    folder = tmp_path_factory.mktemp("report") / "run"
    train("moe_mined", [f"run.dir={folder}", *TINY, *SETTINGS])
    main([f"RUN={folder}", "map=30"])
    return folder


class Texts(HTMLParser):
    """Collect the texts of a page, each with its data-source and the names and classes of its enclosing elements."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, name, attributes):
        if name not in VOID or name == "circle":
            attributes = dict(attributes)
            if name == "title" and not any(element[0] == "svg" for element in self.open):
                name = "title-of-page"
            self.open.append((name, attributes.get("data-source"), attributes.get("class") or ""))

    def handle_startendtag(self, name, attributes):
        pass

    def handle_endtag(self, name):
        self.open.pop()

    def handle_data(self, text):
        source = next((source for _, source, _ in reversed(self.open) if source), None)
        self.texts.append((text, source, {name for name, _, _ in self.open} | {c for _, _, c in self.open}))


def resolve(run: Path, source: str):
    """Return the value at a data-source, and the step of its row."""
    name, _, where = source.partition("#")
    step, _, keys = where.partition("/")
    keys = [key.replace("~1", "/").replace("~0", "~") for key in keys.split("/")] if keys else []
    if not where:
        return None, int(re.search(r"\d+", name)[0])
    text = (run / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        step, value = int(step.removeprefix("step=")), {}
        for row in map(json.loads, text.splitlines()):
            if row["step"] == step:
                value |= row
    else:
        step, value = None, yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value, step


def is_rounded(shown: str, value) -> bool:
    """Return whether a number on the page is the value, rounded to its last digit."""
    digits = shown.replace("−", "-").replace(",", "").rstrip("%")
    decimals = len(digits.partition("e")[0].partition(".")[2])
    power = int(digits.partition("e")[2] or 0)
    exact = value * (100 if shown.endswith("%") else 1)
    return abs(float(digits) - exact) <= 0.5001 * 10.0 ** (power - decimals)


def check_figures(run: Path) -> int:
    """Check every figure of the report against the run's files, and return their number."""
    checked = 0
    for text, source, enclosing in Texts((run / "report.html").read_text(encoding="utf-8")).texts:
        numbers = NUMBER.findall(METRIC.sub("", text))
        if not numbers or enclosing & {*UNSOURCED, "tick"}:
            continue
        assert source, text
        value, step = resolve(run, source)
        if isinstance(value, str):
            assert text == value or value.startswith(text), (text, source, value)
            continue
        for number in numbers:
            known = [x for x in (value, step) if x is not None and not isinstance(x, dict)]
            assert any(is_rounded(number, x) for x in known), (text, source, known)
        checked += 1
    return checked


@pytest.mark.slow
def test_every_figure_equals_the_value_at_its_data_source(run):
    assert check_figures(run) > 200


@pytest.mark.slow
def test_bold_figures_are_the_best_of_their_column(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r'<td( class="best")?><data value="[^"]*" data-source="(results.json#/benchmarks/[^"]+)"', page)
    assert cells
    for bold, source in cells:
        name, system, metric = re.fullmatch(r"results.json#/benchmarks/(.+)/systems/(.+)/(.+)", source).groups()
        systems = json.loads((run / "results.json").read_text())["benchmarks"][name]["systems"]
        assert bool(bold) == (systems[system][metric] == max(values[metric] for values in systems.values())), source


@pytest.mark.slow
def test_rounding_check_rejects_a_changed_figure(run):
    value, _ = resolve(run, "results.json#/benchmarks/topics/systems/trained/ndcg@10")
    assert is_rounded(f"{value:.4f}", value)
    assert not is_rounded(f"{value + 0.0001:.4f}", value)
    assert is_rounded("12.3%", 0.1234)
    assert not is_rounded("12.4%", 0.1234)


@pytest.mark.slow
def test_single_queries_and_differences_equal_pytrec_eval(run):
    figures = json.loads((run / "report.json").read_text())
    for name, content in figures["queries"].items():
        qrels, ranking = {}, {}
        for line in (run / "runs" / f"{name}.qrels").read_text().splitlines():
            query, _, document, grade = line.split()
            qrels.setdefault(query, {})[document] = max(0, int(grade))
        for line in (run / "runs" / f"{name}.trained.trec").read_text().splitlines():
            query, _, document, _, score, _ = line.split()
            ranking.setdefault(query, {})[document] = float(score)
        values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(ranking)
        lowest = sorted(value["ndcg_cut_10"] for value in values.values())
        assert [query["ndcg@10"] for query in content["hardest"]] == pytest.approx(lowest[: len(content["hardest"])])
        for query in (*content["typical"], *content["hardest"]):
            id = query["query"]
            assert query["ndcg@10"] == pytest.approx(values[id]["ndcg_cut_10"])
            hits = [i for i, document in enumerate(ranking[id], 1) if qrels[id].get(document, 0) > 0]
            assert query["first_relevant"] == (hits[0] if hits else None)
            assert [document["id"] for document in query["top"]] == list(ranking[id])[:5]
        means = {system: figures["differences"][name][system]["mean_b"] for system in ("bm25", "untrained")}
        results = json.loads((run / "results.json").read_text())["benchmarks"][name]["systems"]
        assert means == pytest.approx({system: results[system]["ndcg@10"] for system in means})


def test_map_equals_pca_of_scikit_learn_and_a_naive_neighbour_count():
    rng = np.random.default_rng(0)
    vectors, groups = rng.normal(size=(40, 12)) * np.arange(1, 13), rng.integers(3, size=40)
    points, shares = principal_components(vectors)
    theirs = PCA(2).fit(vectors)
    assert shares[:2] == pytest.approx(theirs.explained_variance_ratio_)
    their_points = theirs.transform(vectors)
    their_points *= np.sign((their_points * points).sum(0)) / np.abs(their_points).max()
    assert points == pytest.approx(their_points)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = [max((j for j in range(40) if j != i), key=lambda j, i=i: unit[i] @ unit[j]) for i in range(40)]
    assert same_label_share(vectors, groups) == np.mean([groups[i] == groups[j] for i, j in enumerate(nearest)])


@pytest.mark.slow
def test_figures_of_the_paper_are_shown_only_for_the_same_protocol_and_data(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation" / "search").mkdir(parents=True)
    about = {"task": "search", "split": "test", "metrics": ["ndcg@10"], "systems": {"encoder": {"ndcg@10": 0.5}}}
    same = about | {"protocol": "scimult/scifact/all-splits", "queries": 1109, "documents": 5183}
    fewer = same | {"queries": 300}
    content = {"metrics": ["ndcg@10"], "benchmarks": {"scifact": same, "scifact_part": fewer}}
    (tmp_path / "run" / "evaluation" / "search" / "results.json").write_text(json.dumps(content))
    main([f"RUN={tmp_path / 'run'}", "map=0"])
    rows = re.findall(r"<tr.*?</tr>", (tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    lines = [unescape(re.sub(r"<[^>]+>", "", row.replace("</th>", " "))) for row in rows if "paper" in row]
    assert "SciMult-MHAExpert (paper) 0.7067" in lines  # table 8
    assert "The paper measured on other data: 1,109 queries, 5,183 documents " in lines
    assert len(lines) == 8  # five variants of SciMult, BM25, SPECTER 2.0, and the line on other data
    check_figures(tmp_path / "run")


def test_text_of_a_run_is_escaped():
    source = Source("<script>&", 'report.json#/"')
    assert quote(source) == '<span data-source="report.json#/&#34;">&lt;script&gt;&amp;</span>'
    assert "<script>" not in figure(source)


def test_shades_of_transplants_are_numbers_even_if_a_loss_is_not(tmp_path):
    """A loss of NaN made --share:nan, or another shade for each order of the tasks."""
    losses = {"a": {"a": 1.0, "b": math.nan, "c": 2.0, "d": 3.0}, "b": {"a": math.inf, "b": 1.0}, "c": {"c": 1.0}}
    row = {f"diag/{task}/transplant/{other}": loss for task, each in losses.items() for other, loss in each.items()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4} | row))
    for order in ("abcd", "dcba"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"tasks": list(order)}))
        transplants = _transplants(RunFiles(tmp_path))
        cells = {
            (task, other): (loss and loss.value, excess)
            for task, each in transplants.rows.items()
            for other, (loss, excess) in zip(order, each, strict=True)
        }
        assert [cells["a", other] for other in "acd"] == [(1.0, 0.0), (2.0, 0.5), (3.0, 1.0)]
        assert [cells[pair][1] for pair in (("a", "b"), ("b", "a"))] == [0.0, 0.0]
        assert str(cells["a", "b"][0]) == "nan"
        assert cells["b", "c"] == (None, 0.0)
        assert transplants.rows.keys() == {"a", "b"}


def incomplete(run: Path, folder: Path, *removed: str) -> str:
    """Return the text of the report of a run with some files removed."""
    shutil.copytree(run, folder)
    for name in removed:
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    main([f"RUN={folder}", "map=0"])
    return re.sub(r"<[^>]+>", "", (folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_report_of_an_incomplete_run_names_what_is_missing(run, tmp_path):
    begun = incomplete(run, tmp_path / "begun", "*.json", "*.jsonl", "checkpoints/*", "negatives", "runs")
    assert "No results yet: training has reached step 0 of 9" in begun
    assert "Nothing was logged yet" in begun
    assert "diagnostics.every_n_steps=100 turns them on" in begun
    assert "mining.every_n_steps=500 mines them during training" in begun
    assert "No queries to show before there are results" in begun

    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    rows = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(rows[:3]) + rows[3][:20])  # as after a kill while writing
    text = incomplete(cut, tmp_path / "killed", "results.json")
    assert "incomplete, at step 3 of 9" in text
    assert "untrained" in text  # from the baselines

    (cut / "baselines.json").write_text('{"benchmarks": {"topics": 3}}')
    text = incomplete(cut, tmp_path / "damaged", "results.json")
    assert "untrained" not in text
    assert "incomplete, at step 3 of 9" in text


@pytest.mark.slow
def test_compare_shows_the_text_of_queries_of_runs_and_evaluations(run, beir_root, tmp_path):
    for name, model in (("a", run), ("b", "bm25")):
        evaluate(
            [f"model={model}", f"beir={beir_root / 'mlcite'}", "task=link_prediction", f"output={tmp_path / name}"]
        )
    pairs = {"of_runs": (run, f"{run}:bm25", "citations"), "of_evaluations": (tmp_path / "a", tmp_path / "b", "mlcite")}
    papers = {paper.document.title for paper in science(0, 500).papers}
    for output, (a, b, benchmark) in pairs.items():
        compare(
            [f"A={a}", f"B={b}", f"output={tmp_path / output}", "examples=2", f"benchmark={benchmark}", "draws=100"]
        )
        comparison = json.loads((tmp_path / output / "compare.json").read_text())["benchmarks"][benchmark]
        assert len(comparison["examples"]["B"]) == 2
        for example in comparison["examples"]["B"]:
            assert {example["text"], example["first_B"]["text"]} <= papers


@pytest.mark.slow
def test_runs_are_listed_with_progress_and_results(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # folders are printed whole, however long they are
    shutil.copytree(run, tmp_path / "done")
    shutil.copytree(run, tmp_path / "begun")
    (tmp_path / "begun" / "results.json").unlink()
    (tmp_path / "damaged" / "checkpoints").mkdir(parents=True)
    (tmp_path / "damaged" / "config.yaml").write_text("experiment: x\n")
    manifest = json.loads((tmp_path / "done" / "manifest.json").read_text())
    manifest["attempts"] = [{"seconds": 3600.0, "devices": 2}, {"seconds": None, "devices": 2}, {"seconds": 900.0}]
    (tmp_path / "done" / "manifest.json").write_text(json.dumps(manifest))
    list_runs(["root=."])
    printed = capsys.readouterr().out
    assert " 2.25 " in printed, "device hours; an attempt without a device count used one"
    mean = json.loads((run / "report.json").read_text())["mean"]["trained"]
    assert "2 runs in" in printed
    assert " 9 of 9 " in printed
    assert all(f" {name} " in printed for name in ("done", "begun"))
    shared = printed.splitlines()[0]
    assert {"experiment=moe_mined", "scale=sample", "seed=0", "max_steps=9"} <= set(shared.split())
    assert printed.count("max_steps") == 1
    assert f"{mean:.4f}" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 160
    list_runs([f"root={tmp_path}", "format=json"])
    listed = {Path(record["run"]).name: record for record in json.loads(capsys.readouterr().out)}
    assert listed["done"]["mean"] == mean
    assert listed["done"]["device hours"] == 2.25
    assert (listed["begun"]["complete"], listed["done"]["complete"]) == (False, True)
    assert listed["begun"]["trainer.max_steps"] == 9
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for heading, (key, _) in SPEED_COLUMNS.items():
        assert listed["begun"][heading] == np.median([row[key] for row in logged if key in row]), key
    with pytest.raises(UserError, match="found no runs"):
        list_runs([f"root={tmp_path / 'done' / 'runs'}"])


@pytest.mark.slow
def test_baselines_of_another_protocol_are_left_out_of_the_final_table(run, tmp_path, caplog):
    """Such a run used to train to the end and then fail to write its results."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    baselines = json.loads((tmp_path / "run" / "baselines.json").read_text())
    for table in baselines["benchmarks"].values():  # as earlier versions wrote them
        del table["protocol"], table["data"]
    (tmp_path / "run" / "baselines.json").write_text(json.dumps(baselines))
    train("moe_mined", [f"run.dir={tmp_path / 'run'}", *TINY, *SETTINGS])
    assert "the final table leaves them out" in caplog.text
    results = json.loads((tmp_path / "run" / "results.json").read_text())["benchmarks"]
    assert {system for table in results.values() for system in table["systems"]} == {"trained"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN: required"),
        (["RUN=nowhere"], "nowhere is not a run's folder"),
        (["RUN={run}", "map=x"], "map: expected a whole number, got 'x'"),
    ],
)
@pytest.mark.slow
def test_wrong_argument_raises_user_error(run, arguments, message):
    with pytest.raises(UserError, match=message):
        main([argument.format(run=run) for argument in arguments])


# Find text whose contrast with its background is below 4.5, the limit of WCAG 2 for this size.
CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const element of document.querySelectorAll('body *')) {
    if (['TITLE', 'title', 'SCRIPT'].includes(element.tagName)) continue;
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(rgb(element.closest('svg') ? style.fill : style.color)), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) poor.push([element.textContent.slice(0, 40), contrast]);
  }
  return poor;
})()
"""
TROUBLE = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
WIDER = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (apt-get install chromium)")
def test_page_is_readable_on_phones_and_desktops_in_both_colour_schemes(run, tmp_path):
    url = (run / "report.html").resolve().as_uri()
    backgrounds = {}

    async def visit():
        async with chromium(tmp_path / "profile") as page:
            for width in (360, 1280):
                for scheme in ("light", "dark"):
                    await page.open(url, width, scheme)
                    content, window = await page.run(WIDER)
                    assert content <= window, f"{content} pixels of page in a window of {window}"
                    assert await page.run(CONTRAST) == []
                    assert await page.run("document.querySelectorAll('figure svg').length") > 10
                    backgrounds[scheme] = await page.run("getComputedStyle(document.body).backgroundColor")
                    await page.screenshot(tmp_path / f"{width}-{scheme}.png")
            click = "document.querySelector('#map circle').dispatchEvent(new Event('click', {bubbles: true})), "
            title = await page.run(click + "document.querySelector('#map output').textContent")
            assert title in json.loads((run / "report.json").read_text())["map"]["titles"]
            return page.events

    events = asyncio.run(visit())
    requested = {event["request"]["url"] for name, event in events if name == "Network.requestWillBeSent"}
    assert {address for address in requested if not address.startswith("data:")} == {url}
    assert [event for event in events if event[0] in TROUBLE] == []
    assert backgrounds["light"] != backgrounds["dark"]


@pytest.mark.parametrize(
    "values", [[1.5e-5, 2e-5], [1.25e-7, 3e-5], [-1.5e-5, 1e-5], [0.1, 0.2], [0.91, 0.99], [12345.6, 99999.0]]
)
def test_numbers_of_an_axis_are_inside_the_chart(values):
    """1.5e-05 was cut to 5e-05."""
    sources = [Source(value, "x") for value in values]
    for form in (".2g", ".3f", ".1%") if max(values) < 10 else (".2g", ".3f"):
        chart = line_chart("Learning rate", [Series("a", [1, 2], sources, 0)], form)
        ends = re.findall(r'<text x="(.*?)" .*? text-anchor="end" .*?>(.*?)</text>', "\n".join(chart.shapes))
        assert len(ends) > 1
        for x, text in ends:
            assert float(x) - 6.4 * len(text) >= 0
            number = text.replace("\u2212", "-").rstrip("k%")
            assert not re.search(r"e.0\d", text)
            assert float(number) is not None
