"""MMSci: training on captions, and the multiple choice compared with a script that reads the published file itself."""

import json
import random

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from datamodules.readers.mmsci import MATCHING, MMSciReader
from datamodules.tasks import SearchDataModule
from experiments.build.benchmarks import BenchmarkOptions, CollectionReader, build_benchmark, suite_benchmarks
from experiments.build.suite import load_suite
from lightning_modules import ContrastiveModule
from lightning_modules.encoders.backbone import random_backbone, word_vocabulary
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from tests.datamodules.readers.worlds import mmsci_choices, put, put_article
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_training_on_captions_finds_articles_of_the_test_split(tmp_path, seed):
    write_world(tmp_path, seed)
    reader = MMSciReader(str(tmp_path), "captions", dev_percent=0, test_percent=25)
    collection = reader.read()
    assert (len(collection.corpus), len(collection.queries)) == (40, 120)
    torch.manual_seed(seed)
    vocabulary = word_vocabulary(
        [" ".join(words_of(f, v, c)) for f in range(3) for v in range(VALUES) for c in (0, 1)], 200
    )
    encoder = SharedEncoder(*random_backbone(SHAPE, vocabulary), {"caption": "caption"}, max_length=32, pooling="mean")
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
