# SPDX-License-Identifier: Apache-2.0
"""Bases that are quantized already: fp8 and mxfp4 are read as what they stand for, all others refused by name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
)

import optq
from conftest import interrupted_after, rewritten, save_tiny_tokenizer, tiny_llama_config
from optq import GPTQConfig
from optq.errors import CheckpointError, ModelError, OptqError
from optq.files.source import forget_nested_quantization, nested_quantization
from optq.hf import quantizing
from optq.hf.bases import check_base
from optq.quantization.cost_estimate import Duration

BLOCK = 32  # of fp8 scales, in both directions


def fp8_of(weight, block=BLOCK):
    """The weight in fp8, its scales, and what they stand for; the last blocks may be narrower."""
    rows, columns = weight.shape
    whole = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    blocks = whole.reshape(whole.shape[0] // block, block, whole.shape[1] // block, block)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448  # the largest number of float8_e4m3fn
    codes = (blocks / scales).to(torch.float8_e4m3fn)
    dense = (codes.float() * scales).reshape(whole.shape)[:rows, :columns].contiguous()
    stored = codes.view(torch.uint8).reshape(whole.shape)[:rows, :columns].contiguous().view(codes.dtype)
    return stored, scales[:, 0, :, 0].contiguous(), dense


def mxfp4_of(weight, generator):
    """Arbitrary codes and scales in the shapes for an expert's weight (experts, in, out), and what they stand for."""
    experts, in_features, out_features = weight.shape
    blocks = torch.randint(256, (experts, out_features, in_features // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 124, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    decoded = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(-2)
    decoded = decoded * torch.exp2(scales.float() - 127)[..., None]
    return blocks, scales, decoded.flatten(-2).transpose(1, 2).contiguous()


def in_two_forms(folder, encoded, stated):
    """A model's folder, once with encoded weights and once with what they stand for.

    Args:
        encoded: (name, weight) -> None, or the stored tensors by what their names end with, and the dense weight.
    """
    stored, dense = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        found = encoded(name, weight)
        stored |= {name: weight} if found is None else {name + end: tensor for end, tensor in found[0].items()}
        dense[name] = weight if found is None else found[1]
    for form, tensors in (("stored", stored), ("dense", dense)):
        shutil.copytree(folder, folder / form, ignore=shutil.ignore_patterns("dense", "stored"))
        save_file(tensors, folder / form / "model.safetensors", metadata={"format": "pt"})
    with rewritten(folder / "stored/config.json") as config:
        config["quantization_config"] = stated
    return folder / "stored", folder / "dense"


def encoded_in_fp8(name, weight):
    if weight.ndim != 2 or "layers" not in name or name.endswith("mlp.gate.weight"):
        return None
    codes, scales, dense = fp8_of(weight)
    return {"": codes, "_scale_inv": scales}, dense


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
SHAPE = {
    **{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 256, "dtype": "float32"},
}


@pytest.fixture(scope="module")
def bases(tiny_llama, tmp_path_factory):
    """Folders by the name of the format: as it is stored, and what that stands for. Not to be changed."""
    folders = {name: tmp_path_factory.mktemp(name) / "model" for name in ("fp8", "fp8-experts", "mxfp4")}
    shutil.copytree(tiny_llama, folders["fp8"])
    torch.manual_seed(0)
    mixture = Qwen3MoeConfig(**SHAPE, intermediate_size=96, moe_intermediate_size=32, num_experts=4)
    oss = GptOssConfig(
        **{**SHAPE, "max_position_embeddings": 4096 * 32},
        **{"intermediate_size": 64, "num_local_experts": 4, "sliding_window": 32, "pad_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": 2},
    )
    for name, config in (("fp8-experts", mixture), ("mxfp4", oss)):
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        save_tiny_tokenizer(folders[name])
    generator = torch.Generator().manual_seed(3)

    def encoded_in_mxfp4(name, weight):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        blocks, scales, dense = mxfp4_of(weight, generator)
        return {"_blocks": blocks, "_scales": scales}, dense

    return {
        "fp8": in_two_forms(folders["fp8"], encoded_in_fp8, FP8),
        "fp8-experts": in_two_forms(folders["fp8-experts"], encoded_in_fp8, FP8),
        "mxfp4": in_two_forms(folders["mxfp4"], encoded_in_mxfp4, {"quant_method": "mxfp4"}),
    }


@pytest.fixture
def tiny_llava(tmp_path):
    """The folder of a model with two parts."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **vision},
            text_config=tiny_llama_config().to_dict(),
            image_token_index=100,
        )
    ).save_pretrained(tmp_path / "llava")
    save_tiny_tokenizer(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.fixture
def config(token_rows):
    def make(**settings):
        return GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows, **settings})

    return make


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("base", ["fp8", "fp8-experts", "mxfp4"])
def test_a_base_is_read_as_what_it_stands_for(bases, config, base, tmp_path):
    stored, dense = bases[base]
    expected = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config())
    model = AutoModelForCausalLM.from_pretrained(stored, quantization_config=config())
    assert same_tensors(model.state_dict(), expected.state_dict())
    for name, one in (("expected", expected), ("found", model)):
        one.save_pretrained(tmp_path / name)
    saved = load_file(tmp_path / "found/model.safetensors")
    assert same_tensors(saved, load_file(tmp_path / "expected/model.safetensors"))
    stated = optq.inspect(tmp_path / "found").config
    assert stated.meta["dequantized_from"] == base.removesuffix("-experts")
    assert "fp8" not in (tmp_path / "found/config.json").read_text().replace('"dequantized_from": "fp8"', "")


def test_a_base_is_quantized_block_by_block_and_goes_on_after_an_interruption(bases, config, tmp_path, monkeypatch):
    stored, dense = bases["fp8"]
    output = tmp_path / "out"
    interrupted_after(1, monkeypatch, lambda: optq.quantize(stored, config(), output_dir=output))
    optq.quantize(stored, config(), output_dir=output)
    optq.quantize(dense, config(), output_dir=tmp_path / "expected")
    for file in sorted(output.glob("*.safetensors")):
        assert same_tensors(load_file(file), load_file(tmp_path / "expected" / file.name))
    assert "The original is stored in fp8; it was dequantized" in (output / "README.md").read_text()


def test_a_base_that_is_read_at_once_is_dequantized_as_well(bases, config, monkeypatch):
    stored, dense = bases["fp8"]
    expected = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config())
    monkeypatch.setattr(quantizing, "why_not_streamed", lambda *arguments: "the test wants it")
    model = AutoModelForCausalLM.from_pretrained(stored, quantization_config=config())
    assert same_tensors(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("rest", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_gets_the_dtype_that_is_asked_for(bases, config, tmp_path, rest, asked):
    folder = tmp_path / "model"
    shutil.copytree(bases["fp8"][0], folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor.to(rest) if tensor.dtype == torch.float32 else tensor for name, tensor in tensors.items()}
    kept |= {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {asked}
    assert model.config.dtype == asked
    optq.quantize(folder, config(), output_dir=tmp_path / "out", dtype=str(asked).removeprefix("torch."))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.dtype == asked
    assert same_tensors(again.state_dict(), model.state_dict())


def test_a_base_writes_its_text_in_the_dtype_that_is_asked_for(bases, config):
    settings = config(dataset="self", num_samples=2, model_seqlen=32)
    model = AutoModelForCausalLM.from_pretrained(bases["fp8"][0], quantization_config=settings, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_a_base_writes_the_text_that_it_stands_for(bases, config):
    settings = config(dataset="self", num_samples=2, model_seqlen=64)
    found, expected = (
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings) for folder in bases["fp8"]
    )
    assert (
        found.config.quantization_config.meta["calibration"] == expected.config.quantization_config.meta["calibration"]
    )


@pytest.mark.parametrize("block", [48, 80])  # 64 and 32 rows are no multiples; 96 columns are two of 48
def test_a_last_block_that_is_narrower_has_its_own_scale(tiny_llama, config, tmp_path, block):
    def encoded(name, weight):
        if weight.ndim != 2 or "layers" not in name:
            return None
        codes, scales, dense = fp8_of(weight, block)
        return {"": codes, "_scale_inv": scales}, dense

    shutil.copytree(tiny_llama, tmp_path / "model")
    folders = in_two_forms(tmp_path / "model", encoded, {**FP8, "weight_block_size": [block, block]})
    found, expected = (AutoModelForCausalLM.from_pretrained(f, quantization_config=config()) for f in folders)
    assert same_tensors(found.state_dict(), expected.state_dict())


def test_a_plan_knows_such_a_base(bases, config, monkeypatch):
    monkeypatch.setattr("optq.api.plan._duration", lambda *arguments: Duration(seconds={}))
    stored, dense = bases["fp8"]
    assert optq.plan(stored, config()).linears == optq.plan(dense, config()).linears


def ways_to_quantize(folder, config, output, model_class=AutoModelForCausalLM):
    return (
        lambda: model_class.from_pretrained(folder, quantization_config=config),
        lambda: optq.quantize(folder, config, output_dir=output),
        lambda: optq.plan(folder, config),
        lambda: optq.check(folder, config),
    )


METHODS = {
    "awq": "to='dense'",
    "compressed-tensors": "to='dense'",
    "bitsandbytes": r"dequantize\(\)",
    "fbgemm_fp8": r"dequantize\(\)",
    "hqq": r"dequantize\(\)",
}


@pytest.mark.parametrize("method", METHODS)
def test_any_other_is_refused_by_name_by_all(tiny_llama, config, tmp_path, method):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    with rewritten(folder / "config.json") as stated:
        stated["quantization_config"] = {"quant_method": method, "load_in_4bit": method == "bitsandbytes"}
    for way in ways_to_quantize(folder, config(), tmp_path / "out"):
        with pytest.raises(ModelError, match=rf"quantized already \({method}\).*{METHODS[method]}"):
            way()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "error"),
    [({}, "an empty quantization_config"), ("fp8", "quantization_config='fp8'"), ([4], r"quantization_config=\[4\]")],
)
def test_an_entry_that_says_nothing_is_refused_by_all(tiny_llama, config, tmp_path, entry, error):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    with rewritten(folder / "config.json") as stated:
        stated["quantization_config"] = entry
    for way in ways_to_quantize(folder, config(), tmp_path / "out"):
        with pytest.raises(OptqError, match=error):
            way()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_a_part_that_is_quantized_already_is_refused_by_name_by_all(tiny_llava, config, tmp_path, method):
    with rewritten(tiny_llava / "config.json") as stated:
        stated["vision_config"]["quantization_config"] = {"quant_method": method}
    ways = ways_to_quantize(tiny_llava, config(), tmp_path / "out", LlavaForConditionalGeneration)
    for way in ways:
        with pytest.raises(ModelError, match=rf"vision_config.quantization_config \({method}\)"):
            way()
    assert not (tmp_path / "out").exists()


def test_parts_that_only_repeat_what_holds_for_all_are_forgotten(tiny_llava):
    model_config = AutoConfig.from_pretrained(tiny_llava)
    model_config.vision_config.quantization_config = {"quant_method": "fp8", "modules_to_not_convert": ["patch"]}
    model_config.audio_config = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ModelError, match="vision_config"):
        check_base(model_config, "a model")
    model_config.quantization_config = FP8
    assert check_base(model_config, "a model") == "fp8"
    forget_nested_quantization(model_config)
    assert nested_quantization(model_config) == {}
    assert model_config.quantization_config == FP8


def test_a_gptq_checkpoint_is_not_quantized_again_but_loaded(saved, config, tmp_path):
    with pytest.raises(ModelError, match=r"quantized already \(gptq\).*leave out dataset="):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=config())
    with pytest.raises(ModelError, match=r"quantized already \(gptq\).*to='dense'"):
        optq.quantize(saved, config(), output_dir=tmp_path / "out")
    with pytest.warns(UserWarning, match="already has a"):
        model = AutoModelForCausalLM.from_pretrained(
            saved, quantization_config=GPTQConfig(bits=4, backend="reference")
        )
    assert model.model.layers[0].mlp.up_proj.kernel_name == "reference"


def test_codes_that_the_config_does_not_explain_are_not_taken_for_weights(bases, config, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bases["fp8"][0], folder)
    with rewritten(folder / "config.json") as stated:
        del stated["quantization_config"]
    with pytest.raises(ModelError, match=r"down_proj.weight is stored as F8_E4M3"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())


@pytest.mark.parametrize("stored", [True, False], ids=["fp8", "dense"])
@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_weights_that_are_not_whole_are_refused_by_name_by_all(bases, config, tmp_path, stored, damage):
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(bases["fp8"][1])
    model.save_pretrained(folder, max_shard_size="100KB")
    save_tiny_tokenizer(folder)
    if stored:
        with rewritten(folder / "config.json") as stated:
            stated["quantization_config"] = FP8
    shard = sorted(folder.glob("*.safetensors"))[-1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    for way in ways_to_quantize(folder, config(), tmp_path / "out")[:3]:  # optq.check asks for no weights
        with pytest.raises(CheckpointError, match=shard.name):
            way()
    assert not (tmp_path / "out").exists()


def test_a_packed_checkpoint_that_is_cut_short_is_refused_by_name(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for way in (AutoModelForCausalLM.from_pretrained, optq.inspect):
        with pytest.raises(CheckpointError, match=r"model.safetensors is no whole"):
            way(tmp_path / "model")
