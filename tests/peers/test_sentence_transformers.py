# SPDX-License-Identifier: Apache-2.0
"""A quantized encoder inside sentence-transformers, which loads it by transformers' own means.

pip install sentence-transformers
"""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from conftest import save_tiny_tokenizer
from optq import GPTQConfig, QuantLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # the package's dependencies' own
sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.models")

TEXTS = ["a cat sat on the mat", "rain falls on the plain in spring", "seven"]
LENGTH = 48


def save_tokenizer(folder):
    """Without its chat template: the package would take every text for a user's turn."""
    save_tiny_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()


@pytest.fixture(scope="module")
def encoder(token_rows, tmp_path_factory):
    """A folder with a tiny random BERT, 4-bit, and a tokenizer that adds no special tokens."""
    parent = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, vocab_size=128, max_position_embeddings=LENGTH)).save_pretrained(parent / "dense")
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)
    BertModel.from_pretrained(parent / "dense", quantization_config=config).save_pretrained(parent / "quantized")
    for name in ("dense", "quantized"):
        save_tokenizer(parent / name)
    return parent / "quantized"


@pytest.fixture(scope="module")
def dequantized(encoder, tmp_path_factory):
    """The same weights in plain linears, in a folder."""
    folder = tmp_path_factory.mktemp("dequantized")
    BertModel.from_pretrained(encoder).dequantize().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def embedder(folder, pooling="mean", **settings):
    transformer = modules.Transformer(str(folder), **settings)
    return sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(64, pooling_mode=pooling)], device="cpu"
    )


@pytest.fixture(scope="module")
def ours(encoder):
    return embedder(encoder)


@pytest.fixture(scope="module")
def theirs(dequantized):
    return embedder(dequantized)


def embeddings(model, texts=TEXTS, **settings):
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False, **settings)


def layers(model):
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def test_the_encoder_stays_packed(ours, theirs):
    assert len(layers(ours)) == 12
    assert not layers(theirs)


def test_embeddings_are_those_of_the_dequantized_encoder(ours, theirs, encoder):
    assert torch.allclose(embeddings(ours), embeddings(theirs), atol=1e-4)
    original = embedder(encoder.parent / "dense")
    assert not torch.allclose(embeddings(ours), embeddings(original), atol=1e-3)  # negative control: other weights


@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_whatever_the_pooling(encoder, dequantized, pooling):
    assert torch.allclose(
        embeddings(embedder(encoder, pooling)), embeddings(embedder(dequantized, pooling)), atol=1e-4
    )


def test_they_are_those_of_the_model_itself(ours, encoder):
    tokens = AutoTokenizer.from_pretrained(encoder)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(encoder)(**tokens).last_hidden_state[0]
    assert torch.allclose(embeddings(ours, TEXTS[:1])[0], hidden.mean(0), atol=1e-5)


def test_batches_of_texts_of_unequal_length_change_nothing(ours):
    one_by_one = torch.stack([embeddings(ours, text) for text in TEXTS])
    assert torch.allclose(embeddings(ours, batch_size=3), one_by_one, atol=1e-5)


def test_similarities_are_those_of_the_dequantized_encoder(ours, theirs):
    found, expected = (model.similarity(embeddings(model), embeddings(model)) for model in (ours, theirs))
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(found.diagonal(), torch.ones(3), atol=1e-5)


def test_normalized_embeddings_and_tokens(ours, theirs):
    unit = embeddings(ours, normalize_embeddings=True)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(3))
    for mine, other in zip(
        embeddings(ours, output_value="token_embeddings"),
        embeddings(theirs, output_value="token_embeddings"),
        strict=True,
    ):
        assert torch.allclose(mine, other, atol=1e-4)


def test_texts_longer_than_its_positions_are_cut(ours, theirs):
    assert ours.max_seq_length == LENGTH
    text = "long " * 40
    assert torch.allclose(embeddings(ours, text), embeddings(theirs, text), atol=1e-4)


def test_a_saved_folder_is_packed_and_loads_the_same(ours, tmp_path):
    ours.save(str(tmp_path))
    stated = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "gptq"
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert len(layers(loaded)) == 12
    assert torch.equal(embeddings(loaded), embeddings(ours))


def test_an_encoder_is_quantized_while_it_is_loaded(encoder, token_rows, ours):
    config = GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)
    made = embedder(encoder.parent / "dense", model_kwargs={"quantization_config": config})
    assert torch.equal(embeddings(made), embeddings(ours))


def test_a_kernel_is_chosen_through_it(encoder, ours):
    config = GPTQConfig(bits=4, backend="reference")
    chosen = embedder(encoder, model_kwargs={"quantization_config": config})
    assert torch.allclose(embeddings(chosen), embeddings(ours), atol=1e-4)
    assert {layer.kernel_name for layer in layers(chosen)} == {"reference"}
