"""What each format's parser makes of one record, and of the traps in it."""

import gzip
import json
import sys
import zipfile

import pytest

from datamodules.papers.columns import MAX_EXCEL
from datamodules.papers.formats import FORMATS, files_of, format_of, read_papers, warn_of_unread
from datamodules.papers.paper_record import Label, Paper, doi_names, split_list, without_tags, year_of
from datamodules.papers.splits import Splits
from datamodules.readers import io
from datamodules.readers.rows import BadLines
from datamodules.records import UserError


def read(path, content, policy="fail", format=""):
    """Write a file and return its papers."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with BadLines(policy, str(path.with_name("quarantine.jsonl"))) as bad:
        return list(read_papers(files_of(path), bad, format))


def test_list_of_papers_may_be_one_line_that_is_longer_than_other_lines_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "MAX_LINE", 1000)
    records = [{"id": f"p{number}", "title": "A title", "abstract": "x" * 50} for number in range(100)]
    assert len(read(tmp_path / "papers.json", json.dumps(records))) == 100


def error(path, content) -> str:
    with pytest.raises(UserError) as caught:
        read(path, content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("H<sub>2</sub>O and CO<sub>2</sub>", "H2O and CO2"),
        ("<jats:title>Abstract</jats:title><jats:p>We <jats:italic>do</jats:italic></jats:p>", "  We do "),
        ("if a < b and c > d", "if a < b and c > d"),
        ("p <b and c> q &amp; &lt;r&gt;", "p <b and c> q & <r>"),
        ('a <a href="http://x">link</a>', "a  link "),
    ],
)
def test_tags_are_removed_and_comparisons_are_kept(text, expected):
    assert without_tags(text) == expected


def test_years_are_found_in_dates():
    dates = (2015, "2015", "2015-03-01", "c. 1999", "Mon, 2 Apr 2007 19:18:42 GMT", "12015", None, True, "n.d.", 3)
    assert [year_of(date) for date in dates] == [2015, 2015, 2015, 1999, 2007, None, None, None, None, None]


def test_dois_have_one_name():
    for doi in ("10.1234/ABC", "https://doi.org/10.1234/abc", "doi: 10.1234/Abc"):
        assert doi_names(doi) == ["doi:10.1234/abc"]
    assert doi_names("none") == doi_names(None) == []


def test_lists_are_split_at_the_first_separator_that_occurs():
    assert split_list("a, b; c,d", ";|,") == ["a, b", "c,d"]
    assert split_list("a, b", ";|,") == ["a", "b"]
    assert split_list(" ", ";") == []
    assert split_list("图神经网络；蛋白质") == ["图神经网络", "蛋白质"]
    assert split_list("تعلم، شبكات,a", ";,") == ["تعلم", "شبكات", "a"]


def test_text_has_no_control_characters_and_ids_have_no_white_space():
    paper = Paper("a\u2028b c", "x\x1b[31m\x00y", " a\n\tb ")
    assert (paper.id, paper.title, paper.abstract) == ("a_b_c", "x [31m y", "a b")
    assert Paper("", "T", "A", names=["doi:10.1/x"]).id == "10.1/x"
    assert Paper("", "T", "A").id == Paper(" ", " T ", "A").id != Paper("", "T", "B").id
    with pytest.raises(UserError, match="title contains half of a surrogate pair"):
        Paper("a", "\ud800")


def test_latex_becomes_plain_text(tmp_path):
    entry = r"""@string{nlp = "language"}
    @Article(k1,
      TITLE = "A {B}ERT for {\"o}l: 50% of R\&D & $x^2$",
      abstract = {Cost $5 -- or \emph{less}~now},
      keywords = nlp,
      date = {2019-05},
      note = {a}, note = {b},
    )
    @article{k1, title = {the same key}}
    Some text {with braces}.
    """
    first, second = read(tmp_path / "a.bib", entry)
    assert first.title == "A BERT for öl: 50% of R&D & $x^2$"
    assert first.abstract == "Cost $5 – or less now"
    assert (first.id, first.year, first.labels) == ("k1", 2019, {"keywords": [Label("language", "language")]})
    assert second.id == "k1"


def test_characters_and_arguments_that_pylatexenc_drops_are_kept(tmp_path):
    """p {\\textless} 0.05 became p 0.05, \\mbox lost its text, and a paper with \\href was a bad record."""
    title = r"p {\textless} 0.05, {\textalpha}-helix, hy\-phen, \mbox{BERT}, \textcolor{red}{red} \href{http://x}{link}"
    (paper,) = read(tmp_path / "a.bib", f"@article{{a, title = {{{title}}}}}")
    assert paper.title == "p < 0.05, α-helix, hyphen, BERT, red link"


def test_parts_of_bibtex_values_are_joined(tmp_path):
    """They became text such as 'pre # " networks"'. A # inside braces or quotes is text."""
    entry = """@string{pre = "Deep"} @string{both = pre # { neural}}
    @article{a, title = both # " networks" # {: a # b}, abstract = "1 # 2", keywords = "x" # {, } # PRE, year = 20 # 19}
    """
    (paper,) = read(tmp_path / "a.bib", entry)
    assert (paper.title, paper.abstract, paper.year) == ("Deep neural networks: a # b", "1 # 2", 2019)
    assert [label.name for label in paper.labels["keywords"]] == ["x", "Deep"]
    bomb = "@string{s0 = {ten chars.}}" + "".join(f"@string{{s{i + 1} = s{i} # s{i}}}\n" for i in range(64))
    assert "a value expands to more than 1,048,576 characters" in error(tmp_path / "b.bib", bomb)


def test_papers_of_a_bibtex_volume_inherit_its_year_and_keywords(tmp_path):
    """Title and abstract of a volume are not those of its papers. The volume may come later, or not at all."""
    entries = """@inproceedings{a, title = {A}, crossref = {VOL}}
    @inproceedings{b, title = {B}, date = {2001-02}, keywords = {own}, crossref = {vol}}
    @inproceedings{c, title = {C}, crossref = {nowhere}}
    @proceedings{vol, title = {Proceedings}, abstract = {About}, year = 1999, keywords = {all}, doi = {10.1/v}}"""
    papers = {paper.id: paper for paper in read(tmp_path / "a.bib", entries)}
    labels = {id: [label.name for label in paper.labels["keywords"]] for id, paper in papers.items()}
    assert [(papers[id].title, papers[id].abstract, papers[id].year, labels[id]) for id in "abc"] == [
        ("A", "", 1999, ["all"]),
        ("B", "", 2001, ["own"]),
        ("C", "", None, []),
    ]


def test_html_is_removed_in_every_format_and_formulas_are_kept(tmp_path):
    """BibTeX, RIS and PubMed kept the tags and entities that publishers' exports have in titles and abstracts."""
    title = r"<i>E. coli</i> in H<sub>2</sub>O \&amp; {\textless}b{\textgreater}salt{\textless}/b{\textgreater}"
    entry = f"@article{{a, title = {{{title}}}, abstract = {{<p>At $a<b>c$ and 5 < 6</p>}}}}"
    (paper,) = read(tmp_path / "a.bib", entry)
    assert (paper.title, paper.abstract) == ("E. coli in H2O & salt", "At $a<b>c$ and 5 < 6")
    (paper,) = read(tmp_path / "a.ris", "TY  - JOUR\nTI  - A <i>b</i> &amp; c\nAB  - <p>x</p>\nER  - \n")
    assert (paper.title, paper.abstract) == ("A b & c", "x")
    text = "<ArticleTitle>A</ArticleTitle><Abstract><AbstractText>&lt;b&gt;Aim:&lt;/b&gt; x</AbstractText></Abstract>"
    article = f"<MedlineCitation><PMID>1</PMID><Article>{text}</Article></MedlineCitation>"
    (paper,) = read(tmp_path / "a.xml", f"<MedlineCitationSet>{article}</MedlineCitationSet>")
    assert paper.abstract == "Aim: x"


@pytest.mark.parametrize(
    "date",
    [
        "<Year>2019</Year><Month>12</Month><Day>31</Day>",
        "<Year>2019</Year>\n<Season>Winter</Season>",
        "<MedlineDate>2019 Dec-2020 Jan</MedlineDate>",
    ],
)
def test_year_of_pubmed_needs_no_space_between_elements(tmp_path, date):
    """The first date was read as 20191231, which is not a year."""
    journal = f"<Journal><JournalIssue><PubDate>{date}</PubDate></JournalIssue></Journal>"
    article = f"<PMID>1</PMID><Article>{journal}<ArticleTitle>A</ArticleTitle></Article>"
    citation = f"<MedlineCitationSet><MedlineCitation>{article}</MedlineCitation></MedlineCitationSet>"
    assert [paper.year for paper in read(tmp_path / "a.xml", citation)] == [2019]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("@article{a, title = {x}\n\n@article{b, title = {y}}\n@article{c, title = {z}}", "not valid BibTeX"),
        ("article{a, title = {x}}\n@article{b, title={y}}", "expected an entry that starts with @"),
    ],
)
def test_bad_entry_of_bibtex_is_reported_with_its_line(tmp_path, entry, reason):
    message = error(tmp_path / "a.bib", entry)
    assert message.startswith(f"{tmp_path / 'a.bib'}, line 1")
    assert reason in message
    papers = read(tmp_path / "a.bib", entry, policy="skip")
    assert [paper.id for paper in papers][-1] == entry[entry.rindex("{", 0, entry.rindex(",")) + 1 :].partition(",")[0]


def test_ris_reads_the_fields_of_databases(tmp_path):
    start = "Provider: x\n\n"
    record = (
        f"{start}TY  - JOUR\nT1  - A\nN2  - one\n\ntwo\nY1  - 2001///\nKW  - a; b\nKW  - c\nDO  - 10.1234/X\nER  - "
    )
    (paper,) = read(tmp_path / "a.ris", record)
    assert (paper.id, paper.title, paper.abstract, paper.year) == ("10.1234/x", "A", "one two", 2001)
    assert [label.name for label in paper.labels["keywords"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("TY  - JOUR\nTI  - A\nTY  - JOUR\nTI  - B\nER  - ", "line 1, entry 1: the record does not end with ER"),
        ("TI  - A\nER  - \n", "line 1, entry 1: expected TY as the first field"),
    ],
)
def test_incomplete_record_of_ris_is_reported(tmp_path, content, message):
    assert message in error(tmp_path / "a.ris", content)


def test_medline_citations_and_books_of_pubmed(tmp_path):
    citation = (
        "<MedlineCitation><PMID>1</PMID><Article><ArticleTitle>A <i>b</i></ArticleTitle><Abstract>"
        '<AbstractText Label="AIM">x</AbstractText><AbstractText>y</AbstractText></Abstract></Article>'
        "</MedlineCitation>"
    )
    (paper,) = read(tmp_path / "a.xml", f"<MedlineCitationSet>{citation}</MedlineCitationSet>")
    assert (paper.id, paper.title, paper.abstract) == ("1", "A b", "AIM: x y")
    article = f"<PubmedArticle>{citation}</PubmedArticle>"
    books = "<PubmedBookArticle/><DeleteCitation><PMID>3</PMID></DeleteCitation>"
    assert read(
        tmp_path / "b.xml.gz", gzip.compress(f"<PubmedArticleSet>{article}{books}</PubmedArticleSet>".encode())
    ) == [
        paper,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><PubmedArticleSet/>", "defines XML entities"),
        ("<PubmedArticleSet>" + "<a>" * 1000, "more than 200 nested elements"),
        ("<feed/>", "expected PubmedArticleSet or MedlineCitationSet, got feed"),
        ("<PubmedArticleSet><PubmedArticle>", "the XML file is damaged"),
        ("<PubmedArticleSet><PubmedArticle/></PubmedArticleSet>", "the article has no PMID"),
    ],
)
def test_hostile_or_damaged_xml_raises_user_error(tmp_path, content, message):
    assert message in error(tmp_path / "a.xml", content)


def test_open_quote_costs_one_row(tmp_path):
    content = 'title,abstract\na,"b\nc,d\ne,f\n"g\nh",i\n'
    papers = read(tmp_path / "a.csv", content, policy="skip")
    assert [(paper.title, paper.abstract) for paper in papers] == [("c", "d"), ("e", "f"), ("g h", "i")]
    assert "line 2, entry 1: not valid CSV" in error(tmp_path / "b.csv", content)


def test_separator_and_columns_of_a_table(tmp_path):
    content = "Artikel;Abstract;Author Keywords;Publication Year\nA;x, y;b, c;2001\n"
    path = tmp_path / "a.csv"
    path.write_text(content, encoding="utf-8-sig")
    with BadLines() as bad:
        (paper,) = read_papers([path], bad, names={"title": "Artikel"})
    assert (paper.title, paper.abstract, paper.year) == ("A", "x, y", 2001)
    assert [label.name for label in paper.labels["keywords"]] == ["b", "c"]


def test_blank_cell_under_another_name_is_a_missing_value(tmp_path):
    """Rows without an id or split were bad if the user had named the column, and good if it had its usual name."""
    path = tmp_path / "a.csv"
    path.write_text("Nr,title,Teil\n,A,\n7,B,test\n")
    with BadLines() as bad:
        papers = list(read_papers([path], bad, names={"id": "Nr", "split": "Teil"}))
    assert [(paper.title, paper.split) for paper in papers] == [("A", ""), ("B", "test")]
    assert papers[1].id == "7"


def test_first_value_of_columns_with_the_same_name_counts(tmp_path):
    """The last cell counted, even a blank one."""
    (paper,) = read(tmp_path / "a.csv", "title,abstract,keywords,keywords\nA,x,b,\n")
    assert [label.name for label in paper.labels["keywords"]] == ["b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x,y\n1,2\n", "no column is called title or abstract (found: x, y)"),
        ("title,abstract\na\n", "line 2, entry 1: has 1 cells, but the header has 2"),
        ("title,abstract\na,b".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("title,abstract\ncaf\u00e9,b".encode("latin-1"), "title is not UTF-8 (byte 0xe9 at character 4)"),
    ],
)
def test_wrong_table_raises_user_error(tmp_path, content, message):
    assert message in error(tmp_path / "a.csv", content)


def test_file_of_windows_says_how_to_convert_it(tmp_path):
    """The error asked whether the format was right, and named the reason as 'not UTF-... ...'."""
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.csv", "title,abstract\nMüller,b\n".encode("cp1252"), policy="skip")
    assert "(1 x title is not UTF-8 ...). Save the file as UTF-8, or convert it (if" in str(caught.value)


def test_first_line_of_a_csv_file_for_excel_names_the_separator(tmp_path):
    """The line was the header, and all rows were bad."""
    for line in ("sep=;", '"sep=;"'):
        (paper,) = read(tmp_path / "a.csv", f"{line}\r\ntitle;abstract\r\nA, b;c\r\n")
        assert (paper.title, paper.abstract) == ("A, b", "c")


def test_cell_of_a_table_may_be_long(tmp_path):
    """A cell of more than 131,072 characters, such as the references of a review, cost the paper."""
    (paper,) = read(tmp_path / "a.csv", f"title,abstract,notes\nA,b,{'x' * 200_000}\n")
    assert paper.abstract == "b"


def test_workbook_may_have_blank_rows_missing_cells_and_further_sheets(tmp_path, caplog):
    """A blank first row was the header. A missing last cell of the first row was a missing column."""
    import openpyxl

    workbook = openpyxl.Workbook()
    for row in ([], ["Title", "Summary"], ["A"], [], ["B", "b"]):
        workbook.active.append(row)
    workbook.create_sheet("empty")
    workbook.create_sheet("more").append(["Title"])
    workbook.save(tmp_path / "a.xlsx")
    papers = read(tmp_path / "a.xlsx", (tmp_path / "a.xlsx").read_bytes())
    assert [(paper.title, paper.abstract) for paper in papers] == [("A", ""), ("B", "b")]
    assert caplog.messages == [f"{tmp_path / 'a.xlsx'}: reading only the sheet Sheet; not read: more"]


def test_workbook_that_expands_without_end_is_refused(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True) as member,
    ):
        for _ in range(MAX_EXCEL // 2**24 + 1):
            member.write(bytes(2**24))
    assert "expands to" in error(tmp_path / "a.xlsx", (tmp_path / "a.xlsx").read_bytes())


def test_formats_of_json_are_recognised_by_their_records(tmp_path):
    records = {
        "openalex": {"id": "https://openalex.org/W1", "title": "T"},
        "semantic_scholar": {"paperId": "a", "title": "T"},
        "zotero": {"key": "K", "data": {"itemType": "book", "title": "T"}},
        "crossref": {"DOI": "10.1/x", "title": ["T"]},
        "arxiv": {"id": "2001.00001", "title": "T", "categories": "cs.CL", "update_date": "2020-01-01"},
        "csl": {"id": "x", "type": "book", "title": "T"},
        "json": {"id": "x", "title": "T"},
    }
    for name, record in records.items():
        for number, content in enumerate(([record], record, {"results": [record]}, {"message": {"items": [record]}})):
            path = tmp_path / f"{name}{number}.json"
            for indent in (None, 1):
                (paper,) = read(path, json.dumps(content, indent=indent))
                assert format_of(path) == name
                assert paper.title == "T"
    path = tmp_path / "part_000.gz"
    read(path, gzip.compress(json.dumps(records["openalex"]).encode()))
    assert format_of(path) == "openalex"


def test_position_in_an_inverted_index_needs_no_memory(tmp_path):
    record = {"id": "https://openalex.org/W1", "abstract_inverted_index": {"b": [10**15], "a": [0, 3]}}
    (paper,) = read(tmp_path / "a.jsonl", json.dumps(record))
    assert paper.abstract == "a a b"


@pytest.mark.parametrize(("package", "suffix"), [("bibtexparser", "bib"), ("rispy", "ris"), ("openpyxl", "xlsx")])
def test_missing_package_is_named(tmp_path, monkeypatch, package, suffix):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"need the package {package}" in error(tmp_path / f"a.{suffix}", "x")


def test_folder_without_papers_and_unknown_suffix_raise_user_error(tmp_path):
    (tmp_path / "a.pdf").touch()
    with pytest.raises(UserError, match="contains no files of papers"):
        files_of(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        files_of(tmp_path / "nowhere")
    assert "unknown format; expected one of .bib" in error(tmp_path / "a.pdf", "x")


def test_file_without_a_record_is_named(tmp_path, caplog):
    """Next to other files, a RIS file with the suffix .bib was nothing, without a word."""
    assert read(tmp_path / "a.bib", "TY  - JOUR\nTI  - A\nER  - \n") == []
    assert caplog.messages == [
        f"{tmp_path / 'a.bib'}: no record could be read as bibtex; if the file has another format, set format"
    ]


def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path, caplog):
    """They were left out without a word, and the output of an earlier import was read again, with its labels."""
    hidden = (".hidden", ".out-a1b2c3d4.partial/papers.jsonl")  # the second one is that of a killed import
    for name in ("a.bib", "b.nbib", "c.PDF", "d.pdf", *hidden, "out.quarantine.jsonl", "out/search/corpus.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("import.json", "papers.jsonl"):
        (tmp_path / "out" / name).touch()
    assert files_of(tmp_path) == [tmp_path / "a.bib"]
    warn_of_unread(tmp_path, files_of(tmp_path))
    assert caplog.messages == [
        f"{tmp_path}: not read, because these are outputs of imports: {tmp_path / 'out'}",
        f"{tmp_path}: not read, because of an unknown suffix: 2 x .pdf, 1 x .nbib",
    ]
    assert files_of(tmp_path / "out") == [tmp_path / "out" / "papers.jsonl"]
    warn_of_unread(tmp_path / "out", files_of(tmp_path / "out"))
    assert len(caplog.messages) == 2


def test_splits_by_year_and_by_column():
    by_year = [Splits("2010/2015").of(Paper("a", year=year)) for year in (2010, 2011, 2015, 2016, None)]
    assert by_year == ["train", "dev", "dev", "test", ""]
    assert [Splits("2010").of(Paper("a", year=year)) for year in (2010, 2011)] == ["train", "test"]
    assert Splits("given").of(Paper("a", split="dev")) == "dev"
    assert {Splits("100/0/0").of(Paper(str(i))) for i in range(100)} == {"train"}
    for wrong in ("", "80/20", "0/50/50", "80/10/10/0", "x", "2015/2015", "-1", "given/2"):
        with pytest.raises(UserError, match="split: expected"):
            Splits(wrong)


def test_every_format_is_in_the_documentation():
    from tests.experiments.test_import_page import PAGE

    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in FORMATS)
