"""MMSci's views beyond the contract of all readers: splits, texts of figures, and captions that a paper repeats."""

import pytest

from datamodules.readers.mmsci import GENERATION, MATCHING, MMSciReader
from datamodules.records import Document, UserError
from tests.datamodules.readers.worlds import MMSCI, mmsci_articles, mmsci_choices, mmsci_subjects, put, put_article


def read(folder, view, **arguments):
    return MMSciReader(str(folder), view, **arguments).read()


def article_of(id: str) -> str:
    return id.partition("_")[0]


def test_subjects_of_an_article_are_the_folders_that_it_is_in(tmp_path):
    expected = mmsci_subjects(tmp_path)
    assert read(tmp_path, "subjects") == expected


def test_figures_are_read_as_the_sentences_that_mention_them(tmp_path, caplog):
    mmsci_articles(tmp_path)
    figures = read(tmp_path, "figures")
    first = "We see n1 in Fig. 1a. And Figs. 1 and n1."
    assert figures.corpus["n1_figure_0.png"].text == first
    assert figures.corpus["n1_figure_1.png"].text == "See Fig. 2 of n1."  # without its caption, "As in Fig. 2."
    assert figures.corpus["n2_figure_2.png"].text == "n2_figure_2.png"
    assert "no sentence mentions 1 of 7 figures" in caplog.text
    assert figures.qrels["test"]["n0_figure_0.png#b"] == {"n0_figure_0.png": 1}
    assert figures.queries["n0_figure_0.png#b"].text == "Of tin."
    assert figures.queries["n1_figure_0.png"].text == "Cells ä."


def test_what_an_article_repeats_of_a_caption_is_left_out(tmp_path):
    images = [
        {"image_filename": "0.png", "caption": "Figure 1: growth of Wheat", "description": "In spring."},
        {"image_filename": "1.png", "caption": "Fig. 2: Of RYE.", "description": "growth, of wheat"},
    ]
    put_article(tmp_path, "a/b", "n", title="On growth of wheat!", abstract="and of rye", images=images)
    put_article(tmp_path, "a/b", "m", title="Rye", images=[images[0]])
    captions = read(tmp_path, "captions", dev_percent=0, test_percent=0)
    assert {id: query.text for id, query in captions.queries.items()} == {
        "n_0.png": "In spring.",
        "m_0.png": "growth of Wheat In spring.",
    }


@pytest.mark.parametrize("published", [True, False])
def test_figures_and_references_of_an_article_are_in_one_split(tmp_path, published):
    for number in range(60):
        images = [{"image_filename": f"{i}.png", "caption": f"c{i} of {number}"} for i in range(3)]
        title, references = f"Title {number}", [{"title": f"Title {(number + i) % 60}"} for i in range(4)]
        more = {"references": references, "sections": [{"content": "See Fig. 1."}]}
        put_article(tmp_path, "a/b", f"n{number}", title=title, images=images, **more)
    if published:
        put(tmp_path / "rawdata" / "dev_split_ids.json", {"a": {"b": ["n1", "n2"]}})
        put(tmp_path / "rawdata" / "test_split_ids.json", {"a": {"b": ["n2", "n3"]}})
    splits: dict[str, str] = {}
    for view in ("captions", "figures", "references"):
        qrels = read(tmp_path, view, dev_percent=20, test_percent=30).qrels
        assert list(qrels) == ["train", "dev", "test"]
        for split, judged in qrels.items():
            for query in judged:
                assert splits.setdefault(article_of(query), split) == split
    assert len(splits) == 60
    if published:
        assert {id for id, split in splits.items() if split == "dev"} == {"n1"}
        assert {id for id, split in splits.items() if split == "test"} == {"n2", "n3"}


def test_articles_of_the_benchmark_are_not_trained_on_without_lists(tmp_path):
    for number in range(6):
        images = [{"image_filename": "0.png", "caption": f"c{number}"}]
        put_article(tmp_path, "a/b", f"n{number}", title=f"t{number}", images=images)
    put(tmp_path / "benchmark" / "dev" / GENERATION, [{"uid": "n0", "caption": "x"}, {"uid": 3}, {"uid": "n1"}])
    put(tmp_path / "benchmark" / "test" / MATCHING, [[{"uid": "n2"}], [{"uid": "n1"}, {"uid": "n9"}], []])
    put(tmp_path / "benchmark" / "train" / MATCHING, [[{"uid": "n0"}], [], []])
    qrels = read(tmp_path, "captions").qrels
    assert {split: [article_of(id) for id in judged] for split, judged in qrels.items()} == {
        "train": ["n3", "n4", "n5"],
        "dev": ["n0"],
        "test": ["n1", "n2"],
    }
    assert len(MMSciReader(str(tmp_path), "captions").sources()) == 6 + 2


def test_a_title_of_two_articles_is_not_a_link(tmp_path):
    for id, title in (("n0", "Reply"), ("n1", "Reply"), ("n2", "On rye. A study"), ("n3", "")):
        references = [{"title": "Ann, B. Reply.Cell1 (2001)"}, {"title": "Ann, B. On rye. A study?Cell2 (2002)."}]
        put_article(tmp_path, "a/b", id, title=title, abstract="x", references=references)
    references = read(tmp_path, "references", dev_percent=0, test_percent=0)
    assert references.qrels == {"train": {id: {"n2": 1} for id in ("n0", "n1", "n3")}}


def test_processed_file_is_preferred(tmp_path):
    mmsci_articles(tmp_path)
    folder = tmp_path / "rawdata" / "Matter" / "Cells" / "n3"
    put(folder / "n3_processed_data.json", {"title": "new", "abstract": None, "images": [{"image_filename": "x.png"}]})
    captions = read(tmp_path, "captions")
    assert captions.corpus["n3"] == Document("n3", "new", "")
    assert {article_of(id) for id in captions.queries} == set(MMSCI) - {"n3"}  # its caption is missing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"setting": 4}, "setting: expected one of 1, 2, 3, got 4"),
        ({"dev_percent": 50, "test_percent": 50}, "add up to less than 100, got 50 and 50"),
        ({"view": "choices", "setting": 1}, "contains no documents"),
    ],
)
def test_wrong_arguments_raise_user_error(tmp_path, arguments, message):
    mmsci_choices(tmp_path)
    with pytest.raises(UserError, match=message):
        read(tmp_path, **{"view": "captions"} | arguments)


def test_missing_questions_and_articles_raise_user_error(tmp_path):
    (tmp_path / "rawdata").mkdir()
    with pytest.raises(UserError, match="contains no articles; expected CATEGORY/SUBJECT/ID/ID_data.json"):
        read(tmp_path, "captions")
    mmsci_articles(tmp_path)
    with pytest.raises(UserError, match="image_caption_matching_data.json: no such file"):
        MMSciReader(str(tmp_path), "choices").sources()
    put(tmp_path / "rawdata" / "dev_split_ids.json", {"Life": ["n0"]})
    with pytest.raises(UserError, match="dev_split_ids.json: expected {CATEGORY: {SUBJECT: "):
        read(tmp_path, "captions")
