"""Vectors of sentence-transformers folders equal those of the library, or the folder is refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import BertTokenizer

from datamodules.packed import Tokens
from datamodules.records import UserError
from lightning_modules.encoders.export import save_dense
from lightning_modules.encoders.loading import build, describe, load_encoder
from lightning_modules.encoders.sentence_files import FORMER_MODES
from tests.conftest import text_of

TEXTS = [text_of(i, i + 3) for i in range(5)] + [text_of(*range(i, 4 * i)) for i in range(6, 10)]


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("sentence_transformers")


@pytest.fixture
def plain(make_backbone, tmp_path):
    backbone, tokenizer = make_backbone()
    tokenizer.model_max_length = 24
    backbone.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | changes))


def save(library, plain, folder, *more, pooling="mean", include_prompt=True, **settings):
    """Save a model with the library. more: modules after the pooling."""
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(str(plain))
    pool = Pooling(32, pooling_mode=pooling, include_prompt=include_prompt)
    model = library.SentenceTransformer(modules=[transformer, pool, *more], device="cpu", **settings)
    model.save(str(folder))
    return folder


def check_equal(library, folder, texts=TEXTS):
    """Assert that both give the same vectors, not only the same directions."""
    expected = torch.from_numpy(library.SentenceTransformer(str(folder), device="cpu").encode(texts))
    ours = load_encoder(folder).encode(texts, "search")
    cosine = torch.nn.functional.cosine_similarity(ours, expected)
    assert cosine.min() > 0.99999, cosine
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def equal_or_refused(library, folder, name):
    """Assert that the vectors equal the library's, or that loading fails and names the cause."""
    try:
        load_encoder(folder)
        problem = ""
    except UserError as error:
        problem = str(error)
    if problem:
        assert name in problem
        assert "not supported" in problem
        return "refused"
    check_equal(library, folder)
    return "equal"


MODES = [*FORMER_MODES.values(), ("mean", "max"), ("cls", "mean", "lasttoken")]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("form", ["new", "former"])
def test_every_pooling_mode(library, plain, tmp_path, mode, form):
    folder = save(library, plain, tmp_path / "saved", pooling=mode)
    (config,) = folder.glob("*Pooling/config.json")
    if form == "former":
        modes = [mode] if isinstance(mode, str) else mode
        config.write_text(
            json.dumps({"word_embedding_dimension": 32} | {k: m in modes for k, m in FORMER_MODES.items()})
        )
    outcome = equal_or_refused(library, folder, "pooling")
    assert outcome == ("equal" if isinstance(mode, str) else "refused")


def extra_modules():
    from sentence_transformers import models
    from torch import nn

    layers = models.WeightedLayerPooling(32, num_hidden_layers=4)
    return {
        "Normalize": models.Normalize(),
        "Dropout": models.Dropout(0.5),
        "Dense": models.Dense(32, 16),
        "Dense with an activation": models.Dense(32, 32, bias=False, activation_function=nn.GELU()),
        "LayerNorm": models.LayerNorm(32),
        "WeightedLayerPooling": layers,
        "CNN": models.CNN(32, 8),
        "LSTM": models.LSTM(32, 8),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Normalize", "Dropout", "Dense", "Dense with an activation", "LayerNorm", "CNN", "LSTM"]
)
def test_every_further_module(library, plain, tmp_path, name):
    module = extra_modules()[name]
    if name in ("CNN", "LSTM"):  # between transformer and pooling
        from sentence_transformers.models import Pooling, Transformer

        modules = [Transformer(str(plain)), module, Pooling(module.get_word_embedding_dimension())]
        library.SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "saved"))
        folder = tmp_path / "saved"
    else:
        folder = save(library, plain, tmp_path / "saved", module)
    outcome = equal_or_refused(library, folder, name.split()[0])
    assert outcome == ("equal" if name in ("Normalize", "Dropout") else "refused")


@pytest.mark.slow
def test_modules_in_another_order_or_without_pooling_are_refused(library, plain, tmp_path):
    folder = save(library, plain, tmp_path / "saved", *extra_modules_of("Normalize"))
    modules = json.loads((folder / "modules.json").read_text())
    for changed in ([modules[0], modules[2], modules[1]], modules[:1], [*modules, modules[1]], modules[1:]):
        (folder / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(
            UserError, match="modules .* is not supported .expected Transformer, Pooling, then Normalize"
        ):
            load_encoder(folder)
    modules[1]["type"] = "mylab.pooling.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="module mylab.pooling.Pooling is not supported .its code would have to run"):
        load_encoder(folder)


def extra_modules_of(*names):
    modules = extra_modules()
    return [modules[name] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("length", [7, None, 200])
def test_max_seq_length(library, plain, tmp_path, length):
    """Without a length in the file, the library takes the tokenizer's."""
    folder = save(library, plain, tmp_path / "saved")
    if length:
        edit(folder / "sentence_bert_config.json", max_seq_length=length)
    encoder = load_encoder(folder)
    assert encoder.max_length == min(length or 24, 64)
    check_equal(library, folder)


@pytest.mark.slow
def test_do_lower_case(library, make_backbone, tmp_path):
    backbone, tokenizer = make_backbone()
    tokenizer = BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=False)
    backbone.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    folder = save(library, tmp_path / "plain", tmp_path / "saved")
    texts = [text.upper() for text in TEXTS]
    cased = load_encoder(folder).encode(texts, "search")
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    check_equal(library, folder, texts)
    assert (load_encoder(folder).encode(texts, "search") - cased).abs().max() > 1e-3
    encoder = load_encoder(folder)
    saved = [encoder.save_pretrained(tmp_path / "ours"), save_dense(encoder, "search", tmp_path / "dense")]
    for again in (*map(load_encoder, saved), build(describe(encoder))):
        assert again.tokenizer(texts)["input_ids"] == encoder.tokenizer(texts)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", FORMER_MODES.values())
def test_default_prompt(library, plain, tmp_path, pooling, include_prompt):
    prompts = {"prompts": {"query": "bara beli: ", "document": ""}, "default_prompt_name": "query"}
    folder = save(library, plain, tmp_path / "saved", pooling=pooling, include_prompt=include_prompt, **prompts)
    outcome = equal_or_refused(library, folder, "include_prompt")
    assert outcome == ("refused" if pooling == "cls" and not include_prompt else "equal")


@pytest.mark.slow
def test_prompt_that_would_have_other_tokens_is_refused(library, plain, tmp_path):
    folder = save(library, plain, tmp_path / "saved", prompts={"query": "bara"}, default_prompt_name="query")
    with pytest.raises(UserError, match="prompt 'bara' is not supported .expected one that ends in a single space"):
        load_encoder(folder)


@pytest.mark.slow
def test_prompts_without_a_default_are_named_and_not_used_as_in_the_library(library, plain, tmp_path, caplog):
    folder = save(library, plain, tmp_path / "saved", prompts={"query": "bara: ", "passage": "beli: "})
    check_equal(library, folder)
    assert "prompts are ignored, because none of them is the default (passage, query)" in caplog.text


@pytest.mark.parametrize("name", ["cosine", "dot"])
def test_similarity_of_the_files_is_used(plain, name):
    edit(plain / "config_sentence_transformers.json", similarity_fn_name=name)
    assert load_encoder(plain).similarity == name


def test_similarity_that_is_not_supported_raises_user_error(plain):
    edit(plain / "config_sentence_transformers.json", similarity_fn_name="manhattan")
    with pytest.raises(UserError, match="similarity_fn_name='manhattan' is not supported"):
        load_encoder(plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformer_task", "fill-mask"),
        ("module_output_name", "other"),
        ("processing_kwargs", {"text": {"add_special_tokens": False}}),
        ("query_length", 32),
    ],
)
def test_settings_of_the_transformer_that_change_vectors_are_refused(plain, key, value):
    edit(plain / "sentence_bert_config.json", **{key: value})
    with pytest.raises(UserError, match=f"{key}=.* is not supported"):
        load_encoder(plain)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", "{}"),
        ("modules.json", "[1]"),
        ("modules.json", '[{"path": "x"}]'),
        ("modules.json", "["),
        ("1_Pooling/config.json", "[]"),
        ("1_Pooling/config.json", '{"pooling_mode": 3}'),
        ("1_Pooling/config.json", '{"pooling_mode": "mean", "include_prompt": "no"}'),
        ("sentence_bert_config.json", "3"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}'),
        ("sentence_bert_config.json", '{"max_seq_length": true}'),
        ("sentence_bert_config.json", '{"max_seq_length": 1}'),
        ("sentence_bert_config.json", '{"do_lower_case": "yes"}'),
        ("config_sentence_transformers.json", "null"),
        ("config_sentence_transformers.json", '{"prompts": ["a"]}'),
        ("config_sentence_transformers.json", '{"prompts": {"a": 1}}'),
        ("config_sentence_transformers.json", '{"prompts": {"a": "b"}, "default_prompt_name": ["a"]}'),
        ("config_sentence_transformers.json", '{"prompts": {"a": "b"}, "default_prompt_name": "c"}'),
        ("config_sentence_transformers.json", '{"similarity_fn_name": ["dot"]}'),
        ("config_sentence_transformers.json", "\ud83d".encode("utf-16", "surrogatepass").decode("latin-1")),
    ],
)
def test_damaged_files_raise_user_error(plain, file, content):
    (plain / file).parent.mkdir(exist_ok=True)
    (plain / file).write_text(content, encoding="latin-1")
    with pytest.raises(UserError):
        load_encoder(plain)


def test_pooling_without_its_file_is_refused(plain):
    """The vectors were pooled as those of a plain model, whatever the lost file said."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in modules]
    (plain / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="1_Pooling/config.json is missing, but modules.json names it"):
        load_encoder(plain)


def test_tokens_beyond_the_embedding_are_refused_when_loaded(make_backbone, tmp_path):
    """Such a text raised an IndexError, perhaps after hours of training."""
    backbone, tokenizer = make_backbone()
    tokenizer.add_tokens(["[formula]", *(f"[new{i}]" for i in range(3))])
    backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = backbone.config.vocab_size
    with pytest.raises(
        UserError, match=f"the tokenizer has {rows + 4} tokens, but the backbone has embeddings for only {rows}"
    ):
        load_encoder(tmp_path)


@pytest.mark.parametrize("pooling", FORMER_MODES.values())
def test_gradients_of_every_pooling_equal_those_of_padded_texts(make_encoder, pooling):
    """Padded texts are pooled with plain torch, one text at a time."""
    encoder = make_encoder("shared", pooling=pooling).double().eval()
    states = torch.randn(7, 32, dtype=torch.double, requires_grad=True)
    tokens = Tokens.pack([[2, 5, 3], [2, 6, 7, 3]])
    context = SimpleNamespace(tokens=tokens, positions=tokens.positions())
    positions = encoder._computed_positions(encoder.num_layers - 1, states, context)
    vectors = encoder.pool(positions, context, "search")
    expected = []
    for text in states.split([3, 4]):
        weights = torch.arange(1, len(text) + 1)[:, None]
        values = {
            "cls": lambda text=text: text[0],
            "lasttoken": lambda text=text: text[-1],
            "max": lambda text=text: text.max(0).values,
            "mean": lambda text=text: text.mean(0),
            "mean_sqrt_len_tokens": lambda text=text: text.sum(0) / len(text) ** 0.5,
            "weightedmean": lambda text=text, weights=weights: (text * weights).sum(0) / weights.sum(),
        }
        expected.append(values[pooling]())
    expected = torch.stack(expected)
    torch.testing.assert_close(vectors, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((x * weights).sum(), states, retain_graph=True)[0] for x in (vectors, expected)]
    torch.testing.assert_close(*gradients)
