import torch

from datamodules.records import Document
from datamodules.text import input_text, length_sorted_chunks, pad, token_ids


def test_papers_labels_and_queries_as_the_paper_writes_them():
    assert input_text(Document("p", "A title", "An abstract."), "[SEP]") == "A title [SEP] An abstract."
    assert input_text(Document("l", "Name", ""), "[SEP]") == "Name"
    assert input_text(Document("q", "", "a query"), "[SEP]") == "a query"
    assert input_text(Document("p", "A title", "An abstract."), "</s>") == "A title </s> An abstract."


def test_segments_of_a_query_get_the_tokenizers_separator():
    assert input_text(Document("q", "", "one\ttwo"), "</s>") == "one </s> two"
    assert input_text(Document("q", "", "one [SEP] two"), "</s>") == "one </s> two"


def test_separator_is_one_token_between_title_and_text(make_backbone):
    _, tokenizer = make_backbone()
    (ids,) = token_ids([input_text(Document("p", "bara", "beli bomu"), tokenizer.sep_token)], tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "bara", "[SEP]", "beli", "bomu", "[SEP]"]


def test_long_texts_are_cut_with_the_closing_separator(make_backbone):
    _, tokenizer = make_backbone()
    (ids,) = token_ids([" ".join(["bara"] * 50)], tokenizer, 8)
    assert len(ids) == 8
    assert ids[-1] == tokenizer.sep_token_id


def test_chunks_hold_every_text_once_within_the_budget_and_sorted():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (200,), generator=generator).tolist()
    chunks = list(length_sorted_chunks(lengths, 128))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(200))
    flat = [lengths[i] for chunk in chunks for i in chunk]
    assert flat == sorted(flat)
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= 128


def test_a_text_longer_than_the_budget_is_a_chunk_of_its_own():
    assert list(length_sorted_chunks([5, 300, 4], 100)) == [[2, 0], [1]]


def test_padding():
    tokens = pad([[2, 7, 3], [2, 3]], pad_id=0)
    assert tokens.input_ids.tolist() == [[2, 7, 3], [2, 3, 0]]
    assert tokens.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
