"""MMSci: training on captions, and the multiple choice compared with a script that reads the published file itself."""

import json
import random

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from datamodules.readers.mmsci import MATCHING, MMSciReader
from datamodules.records import UserError
from datamodules.tasks import SearchDataModule
from experiments.build.benchmarks import BenchmarkOptions, CollectionReader, build_benchmark, suite_benchmarks
from experiments.build.suite import load_suite
from experiments.train import train
from lightning_modules import ContrastiveModule, load_encoder
from lightning_modules.encoders.backbone import random_backbone, word_vocabulary
from lightning_modules.encoders.figures import FigureEncoder
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from tests.datamodules.readers.worlds import mmsci_choices, put, put_article
from tests.experiments.test_train import check_complete, two_steps
from tests.lightning_modules.quiet_trainer import quiet_trainer

FACETS, VALUES = ("material", "method", "effect"), 6
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def words_of(facet: int, value: int, in_caption: bool) -> list[str]:
    """Return the words of a value. Those of articles and of captions differ, so that matching words finds nothing."""
    first = 2 * (2 * (facet * VALUES + value) + in_caption)
    letters = "abcdefghij"
    return ["w" + "".join(letters[int(digit)] for digit in f"{number:03}") for number in (first, first + 1)]


def write_world(folder, seed: int) -> None:
    """Write 40 articles of 3 subjects with 3 figures each. An article and its captions have the same three values."""
    rng = random.Random(seed)
    combinations = [(a, b, c) for a in range(VALUES) for b in range(VALUES) for c in range(VALUES)]
    for number, values in enumerate(rng.sample(combinations, 40)):

        def text(in_caption: bool, values=values) -> str:
            words = [rng.choice(words_of(facet, value, in_caption)) for facet, value in enumerate(values)]
            return " ".join(rng.sample(words, 3))

        images = [
            {"image_filename": f"figure_{i}.png", "caption": f"Figure {i + 1}: {text(True)}", "description": text(True)}
            for i in range(3)
        ]
        place = ("Life/Cells", "Life/Genes", "Matter/Optics")[number % 3]
        put_article(folder, place, f"n{number}", title=text(False), abstract=text(False), images=images)


def image_vectors(folder, shuffled: bool, seed: int) -> str:
    """Write a vector for each figure: the sum of a random vector for each word of its caption, or that of another."""
    rng = np.random.default_rng(seed)
    captions = MMSciReader(str(folder), "captions", dev_percent=0, test_percent=25).read().queries
    codes: dict[str, np.ndarray] = {}
    for facet in range(3):
        for value in range(VALUES):
            codes |= dict.fromkeys(words_of(facet, value, True), rng.normal(size=16))
    vectors = np.array([sum(codes[word] for word in query.text.split()) for query in captions.values()])
    path = folder / f"images{shuffled:d}.npz"
    np.savez(path, ids=np.array(list(captions)), vectors=rng.permutation(vectors) if shuffled else vectors)
    return str(path)


def vocabulary() -> dict[str, int]:
    words = [word for f in range(3) for v in range(VALUES) for c in (False, True) for word in words_of(f, v, c)]
    return word_vocabulary([" ".join(words), "n0123456789_figure.png"], 200)


def score_of_figures(folder, seed: int, **images) -> float:
    """Train on caption -> figure, and return the nDCG@10 of the test articles."""
    torch.manual_seed(seed)
    data = SearchDataModule(
        "figure",
        MMSciReader(str(folder), "figures", dev_percent=0, test_percent=25),
        batch_size=30,
        max_length=32,
    )
    encoder = FigureEncoder(
        *random_backbone(SHAPE, vocabulary()), {"figure": "figure"}, max_length=32, pooling="mean", **images
    )
    module = ContrastiveModule(encoder, similarity="cosine", temperature=0.05, optim=OptimOptions(lr=5e-3))
    quiet_trainer(folder, max_steps=100).fit(module, data)
    (benchmark,) = data.benchmarks("test")
    return evaluate(encoder.eval(), benchmark, ["ndcg@10"], similarity="cosine").metrics["ndcg@10"]


@pytest.mark.slow
def test_image_vectors_find_figures_unless_they_are_shuffled(tmp_path):
    """No sentence mentions these figures, so their texts say nothing. Differences of three seeds, with t intervals."""
    gains = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        write_world(folder, seed)
        without = score_of_figures(folder, seed)
        arms = [
            score_of_figures(folder, seed, image_size=16, vectors=image_vectors(folder, shuffled, seed))
            for shuffled in (False, True)
        ]
        print(f"seed {seed}: without {without:.3f}, with {arms[0]:.3f}, shuffled {arms[1]:.3f}")
        gains.append([arm - without for arm in arms])
    means, deviations = np.mean(gains, axis=0), np.std(gains, axis=0, ddof=1)
    widths = 4.303 * deviations / 3**0.5  # 97.5 % quantile of t with 2 degrees of freedom
    print(f"gains {means.round(3)} +- {widths.round(3)}")
    assert means[0] - widths[0] > 0
    assert means[1] - widths[1] <= 0


@pytest.mark.slow
def test_experiment_reads_image_vectors(tmp_path):
    write_world(tmp_path, 0)
    reader = f"{{_target_: mmsci.MMSciReader, folder: {tmp_path}, view: figures, test_percent: 25}}"
    vectors = image_vectors(tmp_path, False, 0)
    settings = ["tasks=[figure]", f"task.figure.data={{figures: {reader}}}", f"encoder.vectors={vectors}"]
    run = two_steps(tmp_path / "run", *settings, "backbone.config.hidden_size=32", "data.cache=null")
    with pytest.raises(
        UserError, match=r"images0.npz: expected ids .* vectors of shape \(n, 17\), according to image_size"
    ):
        train("mmsci", [*run, "encoder.image_size=17"])
    train("mmsci", [*run, "encoder.image_size=16"])
    encoder = load_encoder(tmp_path / "run")
    assert len(encoder.features["images"]) == 120
    assert check_complete(tmp_path / "run", benchmarks=1)["benchmarks"].keys() == {"figures"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_training_on_captions_finds_articles_of_the_test_split(tmp_path, seed):
    write_world(tmp_path, seed)
    reader = MMSciReader(str(tmp_path), "captions", dev_percent=0, test_percent=25)
    collection = reader.read()
    assert (len(collection.corpus), len(collection.queries)) == (40, 120)
    torch.manual_seed(seed)
    encoder = SharedEncoder(
        *random_backbone(SHAPE, vocabulary()), {"caption": "caption"}, max_length=32, pooling="mean"
    )
    data = SearchDataModule("caption", reader, batch_size=30, max_length=32)
    module = ContrastiveModule(encoder, similarity="cosine", temperature=0.05, optim=OptimOptions(lr=5e-3))
    data.setup()
    (benchmark,) = data.benchmarks("test")
    before = evaluate(encoder.eval(), benchmark, ["ndcg@10"], similarity="cosine")
    encoder.train()
    quiet_trainer(tmp_path, max_steps=100).fit(module, data)
    after = evaluate(encoder.eval(), benchmark, ["ndcg@10"], similarity="cosine")
    vectors = normalize(encoder.encode(list(collection.corpus.values()), "caption"))
    cosine = float((vectors @ vectors.T)[~torch.eye(40, dtype=torch.bool)].mean())
    scores = [result.metrics["ndcg@10"] for result in (before, after)]
    print(f"seed {seed}: nDCG@10 {scores[0]:.3f} -> {scores[1]:.3f}, mean cosine {cosine:.3f}")
    assert scores[1] > scores[0] + 0.1
    assert cosine < 0.9


def accuracy_by_script(encoder, path, setting: int, texts: dict[str, str]) -> float:
    """Answer each question of the published file with the option nearest to its figure's text, and count."""
    correct = []
    for entry in json.loads(path.read_text())[setting - 1]:
        options = {}
        for line in entry["question"].split("\n")[1:]:
            options[line[0]] = line[3:]
        query, *candidates = encoder.encode([texts[entry["question"]], *options.values()], "search").numpy()
        scores = [float(np.dot(query, candidate)) for candidate in candidates]
        correct.append("ABCD"[int(np.argmax(scores))] == entry["answer"])
    return sum(correct) / len(correct)


def write_questions(folder, rng) -> dict[str, str]:
    """Write 20 questions of each setting. Return the text of the figure for each question."""
    texts, settings = {}, []
    for setting in (1, 2, 3):
        questions = []
        for number in range(20):
            id, panel = f"s{setting}n{number}", "" if setting == 1 else "bcd"[number % 3]
            mention = f"bara{number} omu{rng.randrange(99)} in Fig. 2{panel}."
            images = [{"image_filename": f"figure_{i}.png", "caption": f"Figure {i + 1}: x{i}"} for i in range(2)]
            put_article(
                folder, "Life/Cells", id, title="t", images=images, sections=[{"content": f"Other. {mention} Words."}]
            )
            question = "Which caption?" if setting == 1 else f"What is in sub-figure ({panel})?"
            question += f" About {number}" + "".join(f"\n{c}: beli{rng.randrange(9999)} {c}" for c in "ABCD")
            texts[question] = mention
            image, answer = f"{id}_figure_1.png", rng.choice("ABCD")
            questions.append({"uid": id, "image": image, "question": question, "answer": answer})
        settings.append(questions)
    put(folder / "benchmark" / "dev" / MATCHING, json.dumps(settings))
    return texts


def test_accuracy_of_the_multiple_choice_equals_that_of_a_script(tmp_path, make_encoder):
    texts, encoder = write_questions(tmp_path / "mmsci", random.Random(0)), make_encoder("shared").eval()
    names = ("mmsci_choice_figures", "mmsci_choice_panels", "mmsci_choice_same_figure")
    suite, path = load_suite(), tmp_path / "mmsci" / "benchmark" / "dev" / MATCHING
    measured = []
    for setting, name in enumerate(names, 1):
        benchmark = build_benchmark(name, suite[name], CollectionReader(tmp_path))
        assert {len(ids) for ids in benchmark.candidates.values()} == {4}
        result = evaluate(encoder, benchmark, similarity="dot").metrics["precision@1"]
        assert result == accuracy_by_script(encoder, path, setting, texts)
        measured.append(result)
    assert min(measured) > 0
    assert max(measured) < 1


def test_task_option_takes_the_expert_of_another_task(tmp_path):
    mmsci_choices(tmp_path / "mmsci")
    chosen = {"benchmarks": ("mmsci_choice_panels",), "data_root": tmp_path}
    tasks = [next(suite_benchmarks(BenchmarkOptions(**chosen, task=task))).task for task in ("", "figure")]
    assert tasks == ["search", "figure"]
