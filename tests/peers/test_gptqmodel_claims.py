# SPDX-License-Identifier: Apache-2.0
"""What GPTQModel's own tests claim of it, claimed of optq: on files as its writer makes them, made by numpy."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import optq
from conftest import VOCABULARY, rewritten, save_tiny_tokenizer
from optq import GPTQConfig, QuantLinear
from optq.checkpoint import pack_codes, unpack_codes
from optq.errors import CheckpointError, ConfigError
from other_formats import Grid, grids_of, random_grid, stream_of, tensors_of, words_of, write_folder

BY_GPTQMODEL = {"quant_method": "gptq", "desc_act": False, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
BITS = (2, 3, 4, 8)


def stored_zeros(grid: Grid, version: int) -> torch.Tensor:
    """As GPTQModel writes them: v1 takes one from each field, by whole words, or of 3 bits from each alone."""
    zeros = grid.zeros.T  # (groups, out)
    if version == 1 and grid.bits == 3:
        zeros = (zeros - 1) % 8
    words = words_of(zeros, grid.bits).numpy()
    if version == 1 and grid.bits != 3:
        words = (words.view(np.uint32) - np.uint32(ONES[grid.bits])).view(np.int32)
    return torch.from_numpy(words.copy())


def written(model, folder, grids, version=1, parts=("qweight", "qzeros", "scales", "g_idx"), **stated):
    """A folder as GPTQModel would write these grids."""
    packed = {}
    for name, grid in grids.items():
        tensors = {
            "qweight": words_of(grid.codes, grid.bits).T.contiguous(),
            "qzeros": stored_zeros(grid, version),
            "scales": torch.from_numpy(grid.scales.T.copy()),
            "g_idx": torch.from_numpy(grid.groups.astype(np.int32)),
        }
        packed |= {f"{name}.{part}": tensors[part] for part in parts}
    some = next(iter(grids.values()))
    formats = {"checkpoint_format": "gptq_v2" if version == 2 else "gptq", "bits": some.bits, "group_size": 32}
    return write_folder(model, folder, packed, {**BY_GPTQMODEL, "sym": False, **formats, **stated})


@pytest.fixture(scope="module")
def dense(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def logits_of(dense, probe_ids):
    """logits_of(grids) -> those of the dense model with the weights that the grids stand for."""

    def compute(grids):
        weights = {f"{name}.weight": grid.weight() for name, grid in grids.items()}
        with torch.no_grad():
            return torch.func.functional_call(dense, weights, (probe_ids,), {}, tie_weights=False).logits

    return compute


def logits(folder, ids, **kwargs):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)(ids).logits


# --- packing and zeros


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_one_stream_of_bits_and_unpacked_again(bits):
    codes = torch.from_numpy(np.random.default_rng(bits).integers(0, 2**bits, (96, 5)))
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert torch.equal(words, words_of(codes.T.numpy(), bits).T)
    assert torch.equal(unpack_codes(words, bits), codes)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int64"])
def test_words_of_another_width_are_refused_by_name(dtype):
    with pytest.raises(ConfigError, match=f"pack_dtype='{dtype}'.*int32"):
        GPTQConfig(bits=4, pack_dtype=dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("version", "symmetric"), [(1, True), (1, False), (2, True), (2, False)])
def test_a_file_of_either_version_is_computed_with_as_it_is_meant(
    tiny_llama, tmp_path, logits_of, probe_ids, bits, version, symmetric
):
    grids = grids_of(tiny_llama, bits=bits, symmetric=symmetric, lowest_zero=0)
    folder = written(tiny_llama, tmp_path / "model", grids, version, sym=symmetric)
    torch.testing.assert_close(logits(folder, probe_ids), logits_of(grids), rtol=1e-4, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    before, after = tensors_of(folder), tensors_of(tmp_path / "saved")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", BITS)
def test_version_1_becomes_version_2_without_a_change_of_the_weights(tiny_llama, tmp_path, probe_ids, bits):
    grids = grids_of(tiny_llama, bits=bits, lowest_zero=0)
    folder = written(tiny_llama, tmp_path / "model", grids)
    newer = optq.convert(folder, output_dir=tmp_path / "v2", to="gptq_v2")
    name, grid = next(iter(grids.items()))
    assert np.array_equal(stream_of(tensors_of(newer)[f"{name}.qzeros"], bits), grid.zeros.T)
    assert torch.equal(logits(newer, probe_ids), logits(folder, probe_ids))


@pytest.mark.parametrize("bits", BITS)
def test_version_2_becomes_version_1_where_every_zero_has_room(tiny_llama, tmp_path, probe_ids, bits):
    folder = written(tiny_llama, tmp_path / "model", grids_of(tiny_llama, bits=bits), version=2)
    older = optq.convert(folder, output_dir=tmp_path / "v1", to="gptq")
    assert torch.equal(logits(older, probe_ids), logits(folder, probe_ids))
    grids = grids_of(tiny_llama, bits=bits, lowest_zero=0)
    with pytest.raises(CheckpointError, match="stored as -1"):
        optq.convert(written(tiny_llama, tmp_path / "0", grids, version=2), output_dir=tmp_path / "no", to="gptq")


def test_without_the_writers_name_zeros_of_0_are_doubted_by_name(tiny_llama, tmp_path, caplog):
    folder = written(tiny_llama, tmp_path / "model", grids_of(tiny_llama, lowest_zero=0), meta=None)
    AutoModelForCausalLM.from_pretrained(folder)
    assert "_proj.qzeros and 13 more linears: zeros of 0" in caplog.text
    assert any("zeros of 0" in contradiction for contradiction in optq.inspect(folder).contradictions)


@pytest.mark.parametrize(
    "stated", [{"meta": {"quantizer": ["autoround:0.9"]}}, {"meta": None, "autoround_version": "0.9"}]
)
def test_auto_round_writes_the_same_words(tiny_llama, tmp_path, logits_of, probe_ids, stated, caplog):
    grids = grids_of(tiny_llama, lowest_zero=0)
    folder = written(tiny_llama, tmp_path / "model", grids, **stated)
    torch.testing.assert_close(logits(folder, probe_ids), logits_of(grids), rtol=1e-4, atol=1e-4)
    assert "zeros of 0" not in caplog.text


# --- layouts


@pytest.mark.parametrize("group_size", [-1, 64])  # 64 leaves down_proj, 96 wide, a narrower last group
def test_whole_rows_and_narrower_last_groups(tiny_llama, tmp_path, logits_of, probe_ids, group_size):
    grids = grids_of(tiny_llama, group_size=group_size)
    folder = written(tiny_llama, tmp_path / "model", grids, group_size=group_size)
    torch.testing.assert_close(logits(folder, probe_ids), logits_of(grids), rtol=1e-4, atol=1e-4)


def test_groups_in_activation_order(tiny_llama, tmp_path, logits_of, probe_ids):
    shuffle = np.random.default_rng(0).permutation
    grids = {name: replace(grid, groups=shuffle(grid.groups)) for name, grid in grids_of(tiny_llama).items()}
    folder = written(tiny_llama, tmp_path / "model", grids, desc_act=True)
    torch.testing.assert_close(logits(folder, probe_ids), logits_of(grids), rtol=1e-4, atol=1e-4)


def test_g_idx_may_be_left_out(tiny_llama, tmp_path, logits_of, probe_ids):
    grids = grids_of(tiny_llama)
    folder = written(tiny_llama, tmp_path / "model", grids, parts=("qweight", "qzeros", "scales"))
    torch.testing.assert_close(logits(folder, probe_ids), logits_of(grids), rtol=1e-4, atol=1e-4)


def test_biases_are_added(tmp_path, probe_ids):
    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "attention_bias": True, "mlp_bias": True},
    )
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config)
    for name, parameter in original.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    original.save_pretrained(tmp_path / "dense")
    grids = grids_of(tmp_path / "dense")
    folder = written(tmp_path / "dense", tmp_path / "model", grids)
    biases = {name: tensor for name, tensor in tensors_of(tmp_path / "dense").items() if name.endswith("bias")}
    assert len(biases) == len(grids)
    save_file(tensors_of(folder) | biases, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {f"{name}.weight": grid.weight() for name, grid in grids.items()}
    with torch.no_grad():
        expected = torch.func.functional_call(original, weights, (probe_ids,)).logits
    torch.testing.assert_close(logits(folder, probe_ids), expected, rtol=1e-4, atol=1e-4)


def test_settings_beside_the_model_are_read(tiny_llama, tmp_path, logits_of, probe_ids):
    grids = grids_of(tiny_llama, lowest_zero=0)
    folder = written(tiny_llama, tmp_path / "model", grids)
    with rewritten(folder / "config.json") as config:
        (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    torch.testing.assert_close(logits(folder, probe_ids), logits_of(grids), rtol=1e-4, atol=1e-4)


def test_each_module_may_have_its_own_bits_groups_and_symmetry(tiny_llama, tmp_path, logits_of, probe_ids):
    grids = grids_of(tiny_llama, lowest_zero=0)
    for seed, name in enumerate([name for name in grids if "down_proj" in name]):
        grids[name] = random_grid((64, 96), bits=8, group_size=-1, symmetric=True, seed=seed)
    skipped = [name for name in grids if name.endswith("layers.0.self_attn.k_proj")]
    for name in skipped:
        del grids[name]
    dynamic = {r"+:.*\.down_proj": {"bits": 8, "group_size": -1, "sym": True}, r"-:model\.layers\.0\..*\.k_proj": {}}
    folder = written(tiny_llama, tmp_path / "model", grids, bits=4, dynamic=dynamic)
    assert optq.inspect(folder).contradictions == ()
    torch.testing.assert_close(logits(folder, probe_ids), logits_of(grids), rtol=1e-4, atol=1e-4)


def test_a_packed_head_is_loaded_beside_a_dense_embedding(tiny_llama, tmp_path, logits_of, probe_ids):
    grids = {**grids_of(tiny_llama), "lm_head": random_grid((VOCABULARY, 64), seed=99)}
    folder = written(tiny_llama, tmp_path / "model", grids, lm_head=True)
    with rewritten(folder / "config.json") as config:
        config["tie_word_embeddings"] = False
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.lm_head, QuantLinear)
    torch.testing.assert_close(logits(folder, probe_ids), logits_of(grids), rtol=1e-4, atol=1e-4)


# --- use


@pytest.fixture(scope="module")
def packed_folder(tiny_llama, tmp_path_factory):
    """4 bits, version 1, asymmetric, by GPTQModel. Not to be changed."""
    return written(tiny_llama, tmp_path_factory.mktemp("packed") / "model", grids_of(tiny_llama, lowest_zero=0))


def test_a_model_that_is_loaded_twice_is_the_same(packed_folder, probe_ids):
    assert torch.equal(logits(packed_folder, probe_ids), logits(packed_folder, probe_ids))


def test_inference_mode_and_generation(packed_folder, probe_ids):
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    expected = logits(packed_folder, probe_ids)
    with torch.inference_mode():
        assert torch.equal(model(probe_ids).logits, expected)
        settings = {"max_new_tokens": 4, "do_sample": False}
        cached, anew = (model.generate(probe_ids, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, anew)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(packed_folder, probe_ids, dtype):
    expected, found = logits(packed_folder, probe_ids), logits(packed_folder, probe_ids, dtype=dtype).float()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_dequantized_it_is_the_dense_model(packed_folder, probe_ids):
    model = AutoModelForCausalLM.from_pretrained(packed_folder).dequantize()
    with torch.no_grad():
        torch.testing.assert_close(model(probe_ids).logits, logits(packed_folder, probe_ids), rtol=1e-4, atol=1e-4)


# --- writing


@pytest.fixture(scope="module")
def quantized_here(tiny_llama, token_rows):
    """With bits and groups of their own for some, and one skipped. Not to be changed."""
    config = GPTQConfig(
        **{"bits": 4, "group_size": 32, "effort": "fast", "dataset": token_rows, "act_group_aware": True},
        dynamic={
            "mlp.up_proj": {"bits": 2},  # matched from the start of the name, so it matches nothing
            r"+:.*layers\.1\.mlp\.up_proj": {"bits": 8, "group_size": 64},
            r"-:.*layers\.0\.self_attn\.o_proj": {},
            r".*\.up_proj": {"bits": 3},  # without a sign it means "+"; the first match counts
        },
    )
    return AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


@pytest.mark.parametrize(
    ("module", "bits", "groups"),
    [
        ("model.layers.0.mlp.up_proj", 3, 2),
        ("model.layers.1.mlp.up_proj", 8, 1),
        ("model.layers.1.mlp.down_proj", 4, 3),
        ("model.layers.0.self_attn.o_proj", None, None),
        ("model.layers.1.self_attn.o_proj", 4, 2),
    ],
)
def test_rules_are_matched_from_the_start_and_the_first_one_counts(quantized_here, module, bits, groups):
    layer = quantized_here.get_submodule(module)
    assert getattr(layer, "bits", None) == bits
    assert isinstance(layer, QuantLinear) == (bits is not None)
    assert bits is None or layer.scales.shape[0] == groups


def test_group_aware_order_leaves_groups_where_they_are(quantized_here):
    layer = quantized_here.model.layers[1].mlp.down_proj
    assert torch.equal(layer.g_idx, torch.arange(96, dtype=torch.int32) // 32)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_saved_in_one_file_or_many_it_loads_as_the_same(quantized_here, probe_ids, tmp_path, shard):
    quantized_here.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard == "20KB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(files) > 2 and set(index.values()) == set(files)
        assert all(name in load_file(tmp_path / file) for name, file in index.items())
    with torch.no_grad():
        assert torch.equal(logits(tmp_path, probe_ids), quantized_here(probe_ids).logits)


def test_tied_embeddings_stay_tied(quantized_here, tmp_path):
    quantized_here.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


# --- failures


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": 0}, "bits=0"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"damp_percent": -0.1}, "damp_percent=-0.1"),
        ({"damp_percent": 1.0}, "damp_percent=1.0"),
        ({"format": "gguf"}, "format='gguf'"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "not a regular expression"),
        ({"dynamic": {"+:.*up_proj": {"bits": 7}}}, "bits=7"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        GPTQConfig(**{"bits": 4, **settings})


def test_a_group_size_that_does_not_fit_is_refused_before_the_work(tiny_llama, token_rows):
    config = GPTQConfig(bits=4, group_size=48, dataset=token_rows)
    with pytest.raises(ConfigError, match="not a multiple of group_size 48"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


def test_a_folder_without_packed_words_is_no_checkpoint(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    with rewritten(tmp_path / "model/config.json") as config:
        config["quantization_config"] = {**BY_GPTQMODEL, "bits": 4, "group_size": 32}
    save_tiny_tokenizer(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"none of its tensors is named \*\.qweight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
