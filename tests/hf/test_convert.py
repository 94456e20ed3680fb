# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.errors import CheckpointError, ConfigError, OutputError

IDS = torch.arange(5, 37)[None]


@pytest.fixture(scope="module", params=[(4, True), (3, False), (2, False), (8, True)], ids=str)
def checkpoint(request, tiny_llama, token_rows, tmp_path_factory):
    bits, sym = request.param
    config = GPTQConfig(bits=bits, sym=sym, group_size=32, effort="fast", dataset=token_rows)
    return optq.quantize(tiny_llama, config, output_dir=tmp_path_factory.mktemp("source") / "out")


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits_of(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)(input_ids=IDS).logits.detach()


def test_to_the_other_format_and_back_gives_the_same_bytes(checkpoint, tmp_path):
    there = optq.convert(checkpoint, output_dir=tmp_path / "v2", to="gptq_v2")
    back = optq.convert(there, output_dir=tmp_path / "v1", to="gptq")
    for file in checkpoint.glob("*.safetensors"):
        assert (back / file.name).read_bytes() == file.read_bytes()
        # Negative control: on the way, the zeros were other ones.
        assert (there / file.name).read_bytes() != file.read_bytes() or not any(
            "qzeros" in name for name in load_file(file)
        )
    stated = json.loads((there / "config.json").read_text())["quantization_config"]
    assert stated["checkpoint_format"] == stated["format"] == "gptq_v2"
    assert torch.equal(logits_of(there), logits_of(checkpoint))


def test_dense_weights_are_the_dequantized_ones(checkpoint, tiny_llama, tmp_path):
    dense = optq.convert(checkpoint, output_dir=tmp_path / "dense", to="dense")
    quantized = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    state = tensors_of(dense)
    names = [name for name, module in quantized.named_modules() if isinstance(module, optq.QuantLinear)]
    assert len(names) == 14
    for name in names:
        layer = quantized.get_submodule(name)
        assert torch.equal(state[f"{name}.weight"], layer.dense(torch.float32).weight)
    assert set(state) == set(tensors_of(tiny_llama))
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    torch.testing.assert_close(logits_of(dense), logits_of(checkpoint), rtol=1e-4, atol=1e-4)


def test_everything_else_is_carried_along(checkpoint, tmp_path):
    there = optq.convert(checkpoint, output_dir=tmp_path / "v2", to="gptq_v2")
    assert {path.name for path in there.iterdir()} == {
        path.name for path in checkpoint.iterdir() if path.name not in ("quantization_log.jsonl", "README.md")
    }
    assert (there / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_a_linear_whose_tensors_lie_in_two_files_is_converted(checkpoint, tmp_path):
    """Tools cut checkpoints between any two tensors."""
    parted = tmp_path / "parted"
    parted.mkdir()
    for name in ("config.json", "generation_config.json"):
        (parted / name).write_bytes((checkpoint / name).read_bytes())
    tensors = tensors_of(checkpoint)
    parts = {
        "model-00001-of-00002.safetensors": {name: t for name, t in tensors.items() if not name.endswith("scales")},
        "model-00002-of-00002.safetensors": {name: t for name, t in tensors.items() if name.endswith("scales")},
    }
    for file, held in parts.items():
        save_file(held, parted / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (parted / "model.safetensors.index.json").write_text(json.dumps(index))
    dense = optq.convert(parted, output_dir=tmp_path / "dense", to="dense")
    whole = optq.convert(checkpoint, output_dir=tmp_path / "whole", to="dense")
    expected = tensors_of(whole)
    found = tensors_of(dense)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.equal(logits_of(dense), logits_of(whole))


def test_a_zero_that_the_other_format_cannot_hold_is_refused_and_nothing_is_left(checkpoint, tmp_path):
    """A stored zero of 0 in v2 means 0, which v1 would have to store as -1."""
    v2 = optq.convert(checkpoint, output_dir=tmp_path / "v2", to="gptq_v2")
    for file in v2.glob("*.safetensors"):
        tensors = load_file(file)
        tensors |= {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith("qzeros")}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"proj: a zero would have to be stored as -1.* cannot become 'gptq'"):
        optq.convert(v2, output_dir=tmp_path / "v1", to="gptq")
    assert list((tmp_path / "v1").iterdir()) == []


def test_mistakes_are_told(checkpoint, tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match=r"to='awq' was asked for; allowed are gptq, gptq_v2, dense"):
        optq.convert(checkpoint, output_dir=tmp_path / "out", to="awq")
    with pytest.raises(CheckpointError, match="is no GPTQ checkpoint"):
        optq.convert(tiny_llama, output_dir=tmp_path / "out", to="dense")
    with pytest.raises(OutputError, match="is not empty"):
        optq.convert(checkpoint, output_dir=checkpoint, to="dense")
