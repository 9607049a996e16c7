"""MMSci: articles from Nature Communications with their subjects, references, figures and captions.

Source: Li et al., MMSci: A Dataset for Graduate-Level Multi-Discipline Multimodal Scientific Understanding, 2024
(github.com/Leezekun/MMSci).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from datamodules.leakage import normal
from datamodules.options import REQUIRED, option
from datamodules.readers.checks import SPLITS, check_percentages, split_of
from datamodules.readers.collecting import FolderReader, check_collection
from datamodules.readers.io import check_folder, find_optional_file, find_split_files
from datamodules.readers.json_files import as_object, read_entries, read_lists, read_members, read_whole_json
from datamodules.readers.rows import BadLines, Record, Row
from datamodules.records import Collection, Document, Qrels, UserError, check_choice, explained

log = logging.getLogger(__name__)

MATCHING, GENERATION = "image_caption_matching_data.json", "image_caption_generation_data.json"
MISSING = ("No caption available", "No description available")  # placeholders for an empty caption
NUMBER = re.compile(r"\s*fig\w*\.?\s*(\d{1,3})\s*[:.|]?\s*", re.IGNORECASE)  # "Figure 2: ..."
PANEL = re.compile(r"(?:^|(?<=[.!?;:] ))\(([a-z])\)")  # panels of a caption: "(a) Spectra. (b) ..."
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])")
MENTION = re.compile(r"(?<!Supplementary )\bFig(?:ure)?s?\.?\s*(\d{1,3})([a-z]?)")
OPTION = re.compile(r"\n([A-D]): ")


@dataclass
class _Figure:
    """A figure. number: number in the caption. caption, description: "" if missing; the description has the panels."""

    id: str
    number: int
    caption: str
    description: str

    def captions(self) -> dict[str, str]:
        """Return letter -> caption for each panel, or "" -> caption for the whole figure."""
        parts = PANEL.split(self.description)
        panels = {letter: text.strip() for letter, text in zip(parts[1::2], parts[2::2], strict=True) if text.strip()}
        return panels if len(panels) > 1 else {"": f"{self.caption} {self.description}".strip()}


@dataclass
class _Article:
    """An article, without the members that a view does not need."""

    id: str
    split: str
    subjects: Sequence[str]
    title: str = ""
    abstract: str = ""
    figures: list[_Figure] = field(default_factory=list)
    references: list[tuple[str, str]] = field(default_factory=list)  # title and link of each
    sections: list[str] = field(default_factory=list)

    @property
    def document(self) -> Document:
        return Document(self.id, self.title, self.abstract)


# Corpus, queries, and the split and judgements of each query.
_View = tuple[Mapping[str, Document], Mapping[str, Document], Mapping[str, tuple[str, Mapping[str, int]]]]

MEMBERS = {
    "captions": ("images",),
    "figures": ("images", "sections"),
    "subjects": (),
    "references": ("references",),
    "choices": ("images", "sections"),
}


@dataclass
class MMSciReader(FolderReader):
    """Reader of MMSci's source data and multiple-choice questions.

    folder/rawdata/CATEGORY/SUBJECT/ID/ID_data.json    an article: {"title", "abstract",
        "images": [{"image_filename", "caption", "description"}], "sections": [{"section", "content"}],
        "references": [{"title", "link"}]}; ID_processed_data.json is read instead if it exists
    folder/rawdata/train_split_ids.json                {CATEGORY: {SUBJECT: [ID]}}; dev and test likewise
    folder/benchmark/dev/image_caption_matching_data.json    three lists of {"uid", "image", "question", "answer"}

    Files may be compressed as .gz or .zst. Figures and references are in the split of their article. If an article is
    in the lists of two splits, test wins over dev, and dev over train. Without lists, the articles in benchmark/dev and
    benchmark/test belong to these splits. Without benchmark, a hash of the id decides.

    view: meaning of queries and documents:
        captions    caption of a figure -> its article. Captions and descriptions that repeat the title or the
                    abstract are left out.
        figures     caption of a panel, or of a figure without panels -> figure
        subjects    article -> its subjects, one for each folder that contains it
        references  article -> articles that it cites. A reference counts if its title is that of an article in the
                    folder (ignoring case, accents and punctuation), or if its link ends with the article's id.
        choices     figure -> its caption, among the four options of a question. The answers to the test
                    questions are not published, so this view only has train and dev.
        The text of a figure has the sentences of its article that mention it, without its caption, or the name of
        its image if no sentence does.
    """

    view: str = option(REQUIRED, "meaning of queries and documents", choices=tuple(MEMBERS))
    setting: int = option(
        1,
        "questions in the view choices, about: 1 whole figures of an article, 2 panels of several figures, 3 panels "
        "of one figure",
        choices=(1, 2, 3),
    )
    dev_percent: int = option(5, "percentage of articles in the dev split, if the folder has no lists")
    test_percent: int = option(5, "percentage of articles in the test split, if the folder has no lists")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_percentages(self.dev_percent, self.test_percent)

    def sources(self) -> list[Path]:
        articles = [path for path, _ in self._article_files().values()]
        return [*self._question_files().values(), *(path for _, path in self._split_files()), *articles]

    def collect(self, bad: BadLines) -> Collection:
        make: Callable[[Mapping[str, _Article]], _View] = {
            "captions": self._captions,
            "figures": self._figures,
            "subjects": self._subjects,
            "references": self._references,
            "choices": lambda articles: self._choices(articles, bad),
        }[self.view]
        articles = {article.id: article for article in self._articles(bad)}
        corpus, queries, judged = make(articles)
        qrels: dict[str, dict[str, Mapping[str, int]]] = {}
        for query, (split, grades) in judged.items():
            qrels.setdefault(split, {})[query] = grades
        ordered: dict[str, Qrels] = {split: qrels[split] for split in SPLITS if split in qrels}
        return check_collection(Collection(corpus, queries, ordered), f"{self.folder}, view {self.view}")

    # --- files ---

    def _article_files(self) -> dict[str, tuple[Path, list[tuple[str, str]]]]:
        """Return the file of each article, and the (category, subject) of each folder that contains it."""
        raw = self.root / "rawdata"
        check_folder(raw, "CATEGORY/SUBJECT/ID/ID_data.json")
        files: dict[str, tuple[Path, list[tuple[str, str]]]] = {}
        for folder in sorted(raw.glob("*/*/*/")):
            id, subject = folder.name, (folder.parts[-3], folder.parts[-2])
            if id in files:
                files[id][1].append(subject)
            elif path := find_optional_file(folder, f"{id}_processed_data.json", f"{id}_data.json"):
                files[id] = path, [subject]
        if not files:
            raise UserError(f"{raw}: contains no articles; expected CATEGORY/SUBJECT/ID/ID_data.json")
        return files

    def _split_files(self) -> list[tuple[str, Path]]:
        """Return (split, file) of each list, or else of each file in benchmark/dev and benchmark/test."""
        names = [(split, f"rawdata/{split}_split_ids.json") for split in SPLITS]
        if not any(find_optional_file(self.root, name) for _, name in names):
            names = [
                (split, f"benchmark/{split}/{name}") for split in ("dev", "test") for name in (GENERATION, MATCHING)
            ]
        return [(split, path) for split, name in names if (path := find_optional_file(self.root, name))]

    def _question_files(self) -> dict[str, Path]:
        if self.view != "choices":
            return {}
        name = f"benchmark/SPLIT/{MATCHING}"
        files = find_split_files(self.root, name, names={"train": "train", "dev": "dev"})
        return files or {"dev": self.find(name.replace("SPLIT", "dev"))}  # raises UserError

    def _splits(self) -> dict[str, str]:
        """Return the published split of each article."""
        splits: dict[str, str] = {}
        for split, path in self._split_files():  # in the order train, dev, test, so that later splits win
            splits |= dict.fromkeys(_listed_ids(path), split)
        return splits

    # --- articles ---

    def _articles(self, bad: BadLines) -> Iterator[_Article]:
        splits = self._splits()
        for id, (path, subjects) in self._article_files().items():
            split = splits.get(id, "train") if splits else split_of(id, self.dev_percent, self.test_percent)
            article = _Article(id, split, list(dict.fromkeys(subject for _, subject in subjects)))
            for key, row in read_members(path, bad, (), optional=("title", "abstract", *MEMBERS[self.view])):
                with row:
                    _add_member(article, key, row)
            bad.gaps.add_document(self.root, article.document, {})
            yield article

    def _captions(self, articles: Mapping[str, _Article]) -> _View:
        queries, judged = {}, {}
        for article in articles.values():
            paper = f" {normal(f'{article.title} {article.abstract}')} "
            for figure in article.figures:
                texts = [text for text in (figure.caption, figure.description) if f" {normal(text)} " not in paper]
                if caption := " ".join(text for text in texts if normal(text)):
                    queries[figure.id] = Document(figure.id, "", caption)
                    judged[figure.id] = article.split, {article.id: 1}
        return {id: article.document for id, article in articles.items()}, queries, judged

    def _figures(self, articles: Mapping[str, _Article]) -> _View:
        corpus, queries, judged, unmentioned = {}, {}, {}, 0
        for article in articles.values():
            mentions = _mentions(article)
            for figure in article.figures:
                text = " ".join(mentions.get((figure.number, ""), ()))
                unmentioned += not text
                corpus[figure.id] = Document(figure.id, "", text or figure.id)
                for letter, caption in figure.captions().items():
                    if normal(caption):
                        query = f"{figure.id}#{letter}" if letter else figure.id
                        queries[query] = Document(query, "", caption)
                        judged[query] = article.split, {figure.id: 1}
        if unmentioned:
            log.warning("%s: no sentence mentions %d of %d figures", self.folder, unmentioned, len(corpus))
        return corpus, queries, judged

    def _subjects(self, articles: Mapping[str, _Article]) -> _View:
        categories: dict[str, list[str]] = {}
        for _, subjects in self._article_files().values():
            for category, subject in subjects:
                if category not in (known := categories.setdefault(subject, [])):
                    known.append(category)
        corpus = {subject: Document(subject, subject, ", ".join(known)) for subject, known in categories.items()}
        queries = {id: article.document for id, article in articles.items() if not article.document.is_blank}
        judged = {id: (articles[id].split, dict.fromkeys(articles[id].subjects, 1)) for id in queries}
        return corpus, queries, judged

    def _references(self, articles: Mapping[str, _Article]) -> _View:
        by_title: dict[str, str] = {}
        for id, article in articles.items():
            title = normal(article.title)
            by_title[title] = "" if title in by_title else id  # if two articles share a title, it identifies neither
        by_title[""] = ""
        judged = {}
        for id, article in articles.items():
            cited = (_cited(title, link, by_title, articles) for title, link in article.references)
            if grades := {other: 1 for other in cited if other and other != id}:
                judged[id] = article.split, grades
        total = sum(len(article.references) for article in articles.values())
        links = sum(len(grades) for _, grades in judged.values())
        log.info("%s: %d of %d references are links between articles in this folder", self.folder, links, total)
        corpus = {id: article.document for id, article in articles.items()}
        return corpus, {id: corpus[id] for id in judged}, judged

    # --- questions ---

    def _choices(self, articles: Mapping[str, _Article], bad: BadLines) -> _View:
        corpus: dict[str, Document] = {}
        queries: dict[str, Document] = {}
        judged = {}
        for split, path in self._question_files().items():
            for number, row in read_lists(path, bad):
                if number != self.setting - 1:
                    continue
                with row:
                    question = _Question.of(as_object(row, " with uid, image, question and answer"))
                    id = f"{question.image}#{question.panel}" if question.panel else question.image
                    if id in queries:  # another question about the same figure
                        id += f".{len(queries)}"
                    text = _text_of_panel(articles.get(question.article), question.image, question.panel)
                    queries[id] = Document(id, "", text or question.image)
                    options = {f"{id}.{letter}": caption for letter, caption in question.options.items()}
                    corpus |= {option: Document(option, "", caption) for option, caption in options.items()}
                    judged[id] = split, {option: int(option == f"{id}.{question.answer}") for option in options}
        return corpus, queries, judged


def _listed_ids(path: Path) -> list[str]:
    """Return the ids of the articles in a list, or in a file of benchmark, except those in bad lines."""
    ids: list[str] = []
    if path.name.startswith((GENERATION, MATCHING)):
        bad = BadLines("skip", os.devnull)  # the view "choices" reports bad lines
        rows = (row for _, row in read_lists(path, bad)) if path.name.startswith(MATCHING) else read_entries(path, bad)
        for row in rows:
            with row:
                ids.append(as_object(row).words("uid"))
        return ids
    categories = read_whole_json(path)
    with explained(f"{path}: expected {{CATEGORY: {{SUBJECT: [ID]}}}}", AttributeError, TypeError):
        for subjects in categories.values():
            for listed in subjects.values():
                ids += map(str, listed)
    return ids


def _add_member(article: _Article, key: str, row: Row) -> None:
    """Add a member of an article's JSON to the article. Raises UserError if its type is wrong."""
    if key in ("title", "abstract"):
        setattr(article, key, Record({key: row.value}).text(key).strip())
        return
    record = as_object(row)
    if key == "sections":
        article.sections.append(record.text("content"))
    elif key == "references":
        article.references.append((record.text("title"), record.text("link")))
    else:
        id = f"{article.id}_{record.words('image_filename')}"  # as in the published questions
        if any(figure.id == id for figure in article.figures):
            raise UserError(f"image_filename: an earlier image is also called {record['image_filename']!r}")
        caption, description = (record.text(name).strip() for name in ("caption", "description"))
        caption, description = ("" if text in MISSING else text for text in (caption, description))
        match = NUMBER.match(caption)
        number = int(match[1]) if match else len(article.figures) + 1
        article.figures.append(_Figure(id, number, caption[match.end() :] if match else caption, description))


def _cited(title: str, link: str, by_title: Mapping[str, str], articles: Mapping[str, _Article]) -> str:
    """Return the id of the article that a reference cites, or "".

    title: title of the reference, or the whole reference, as in "Reik, W. & Walter, J. The title.Science 293, 1089
        (2001)". In a whole reference, any run of parts between full stops may be the title.
    """
    if (id := unquote(link).rpartition("/")[2]) in articles:
        return id
    parts = list(filter(None, map(normal, re.split(r"[.?!]", title))))
    runs = (" ".join(parts[i:j]) for j in range(len(parts), 0, -1) for i in range(j))  # long ones first
    return next((by_title[run] for run in runs if by_title.get(run)), "")


def _mentions(article: _Article) -> dict[tuple[int, str], list[str]]:
    """Return the sentences that mention each figure and panel, by number and letter ("" for the whole figure).

    Sections in the published files contain the captions, which are removed.
    """
    captions = [text for figure in article.figures for text in (figure.caption, figure.description) if normal(text)]
    plain_captions = [normal(caption) for caption in captions]
    mentions: dict[tuple[int, str], list[str]] = {}
    for section in article.sections:
        for caption in captions:
            section = section.replace(caption, " ")
        for sentence in SENTENCE.split(section):
            keys = {(int(match[1]), letter) for match in MENTION.finditer(sentence) for letter in ("", match[2])}
            plain = normal(sentence) if keys else ""
            if keys and not any(plain in caption or caption in plain for caption in plain_captions):
                for key in keys:
                    mentions.setdefault(key, []).append(sentence.strip())
    return mentions


@dataclass
class _Question:
    """A question for the caption of a figure.

    article, image: ids of the article and of the figure.
    panel: letter of the panel, "" for the whole figure.
    options: captions by letter, A to D.
    answer: letter of the correct caption.
    """

    article: str
    image: str
    panel: str
    options: dict[str, str]
    answer: str

    @classmethod
    def of(cls, record: Record) -> _Question:
        article, image, question = record.words("uid"), record.words("image"), record.words("question")
        stem, *parts = OPTION.split(question)
        options = {letter: text.strip() for letter, text in zip(parts[::2], parts[1::2], strict=True)}
        if "".join(parts[::2]) != "ABCD" or not all(options.values()):
            raise UserError(f"question: expected the four options A to D, one per line, got {question[-60:]!r}")
        answer = check_choice("answer", record.text("answer", required=True), list(options))
        panel = re.search(r"\(([a-z])\)", stem)
        return cls(article, image, panel[1] if panel else "", options, answer)


def _text_of_panel(article: _Article | None, image: str, panel: str) -> str:
    """Return the sentences that mention a panel of a figure, else those that mention the figure, else ""."""
    if article is None:
        return ""
    for figure in article.figures:
        if figure.id == image:
            mentions = _mentions(article)
            return " ".join(mentions.get((figure.number, panel)) or mentions.get((figure.number, ""), []))
    return ""
