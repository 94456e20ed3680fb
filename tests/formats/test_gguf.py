# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config

import optq
from conftest import tiny_llama_config
from gguf_files import on_zeroed_grid, write_gguf
from optq import GPTQConfig
from optq.errors import CheckpointError
from other_formats import compressed_weight, gptq_weight, tensors_of

IDS = torch.arange(5, 37)[None]
BITS = {"Q4_0": 4, "Q8_0": 8}


def tiny_model(architecture="llama", **changes):
    torch.manual_seed(0)
    config = tiny_llama_config(**changes)
    if architecture != "llama":
        kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[architecture]
        known = vars(kind()).keys() - {"head_dim"}  # transformers reads no head_dim of qwen3
        config = kind(**{key: value for key, value in config.to_dict().items() if key in known})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) / 4 if "norm" not in name else torch.rand_like(parameter) + 0.5
    return model


def read_by_transformers(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def logits_of(model):
    return model(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_weight_is_what_transformers_reads_from_the_file(architecture, kind, tmp_path):
    file = write_gguf(tiny_model(architecture), tmp_path / "tiny.gguf", kind)
    original = read_by_transformers(file)
    there = optq.convert(file, output_dir=tmp_path / "out", to="gptq")
    tensors = tensors_of(there)
    linears = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(linears) == 14
    state = original.state_dict()
    for name in linears:
        assert torch.equal(gptq_weight(tensors, name, BITS[kind], offset=1), state.pop(f"{name}.weight")), name
    state.pop("lm_head.weight")  # tied
    assert state.keys() == {name for name in tensors if name.rpartition(".")[0] not in linears or "bias" in name}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
    loaded = AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), logits_of(original), rtol=1e-4, atol=1e-4)
    assert optq.inspect(there).contradictions == ()
    config = GPTQConfig(**json.loads((there / "config.json").read_text())["quantization_config"])
    assert (config.bits, config.group_size, config.sym) == (BITS[kind], 32, True)


def test_the_folder_is_a_whole_model(tmp_path):
    file = write_gguf(tiny_model(tie_word_embeddings=False), tmp_path / "tiny.gguf", "Q8_0")
    there = optq.convert(file, output_dir=tmp_path / "out", to="dense")
    loaded = AutoModelForCausalLM.from_pretrained(there)
    assert type(loaded).__name__ in json.loads((there / "config.json").read_text())["architectures"]
    torch.testing.assert_close(logits_of(loaded), logits_of(read_by_transformers(file)))
    tokenizer = AutoTokenizer.from_pretrained(there)
    assert tokenizer.convert_ids_to_tokens([7]) == ["t7"]
    assert loaded.generation_config.eos_token_id == 2
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in there.glob("*.safetensors")}


def test_mixed_types_become_rules_and_dense_linears_are_excluded(tmp_path):
    kinds = {"blk.0.ffn_down.weight": "Q8_0", "blk.1.ffn_down.weight": "Q8_0", "blk.1.attn_v.weight": "F16"}
    kinds["token_embd.weight"] = "Q5_0"
    file = write_gguf(tiny_model(), tmp_path / "tiny.gguf", "Q4_0", kinds=kinds)
    there = optq.convert(file, output_dir=tmp_path / "out", to="gptq")
    config = GPTQConfig(**json.loads((there / "config.json").read_text())["quantization_config"])
    assert config.scheme_for("model.layers.1.mlp.down_proj").bits == 8
    assert config.scheme_for("model.layers.0.self_attn.v_proj").bits == 4
    assert config.scheme_for("model.layers.1.self_attn.v_proj") is None
    loaded = AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), logits_of(read_by_transformers(file)), rtol=1e-4, atol=1e-4)


def test_blocks_with_a_zero_of_q4_1_are_exact(tmp_path):
    file = write_gguf(on_zeroed_grid(tiny_model()), tmp_path / "tiny.gguf", "Q4_1")
    there = optq.convert(file, output_dir=tmp_path / "out", to="gptq_v2")
    compressed = optq.convert(file, output_dir=tmp_path / "compressed", to="compressed-tensors")
    state = read_by_transformers(file).state_dict()
    for name in (name.removesuffix(".qweight") for name in tensors_of(there) if name.endswith(".qweight")):
        assert torch.equal(gptq_weight(tensors_of(there), name, 4, offset=0), state[f"{name}.weight"]), name
        assert torch.equal(compressed_weight(tensors_of(compressed), name, 4), state[f"{name}.weight"]), name


def test_blocks_without_a_zero_of_q4_1_are_refused(tmp_path):
    file = write_gguf(tiny_model(), tmp_path / "tiny.gguf", "Q4_1")
    with pytest.raises(CheckpointError, match=r"layers.0.*proj: \d+ of \d+ blocks of Q4_1 have no zero"):
        optq.convert(file, output_dir=tmp_path / "out", to="gptq_v2")
    assert not (tmp_path / "out" / "config.json").exists()


def test_other_types_are_refused_by_name(tmp_path):
    kinds = {"blk.1.ffn_up.weight": "Q5_0"}
    file = write_gguf(tiny_model(), tmp_path / "tiny.gguf", "Q4_0", kinds=kinds)
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.up_proj \(blk.1.ffn_up.weight\) is of type Q5_0.*Q4_0, Q4_1, Q8_0 are"
    ):
        optq.convert(file, output_dir=tmp_path / "out", to="gptq")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="There is no file"):
        optq.convert(tmp_path / "nowhere.gguf", output_dir=tmp_path / "out", to="gptq")
    (tmp_path / "other.gguf").write_bytes(b"PK" * 100)
    with pytest.raises(CheckpointError, match="is no GGUF file: GGUF magic invalid"):
        optq.convert(tmp_path / "other.gguf", output_dir=tmp_path / "out", to="gptq")
    file = write_gguf(tiny_model(), tmp_path / "tiny.gguf", "Q4_0")
    dense = write_gguf(tiny_model(), tmp_path / "dense.gguf", "F16")
    with pytest.raises(CheckpointError, match="No linear is quantized in the way of gguf"):
        optq.convert(dense, output_dir=tmp_path / "out", to="gptq")
    monkeypatch.setattr("optq.formats.gguf.ARCHITECTURES", ("qwen2",))
    with pytest.raises(CheckpointError, match="architecture 'llama'; those read are qwen2"):
        optq.convert(file, output_dir=tmp_path / "out", to="gptq")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        optq.convert(file, output_dir=tmp_path / "out", to="gptq")


def test_a_config_that_transformers_does_not_read_whole_is_refused(tmp_path):
    model = tiny_model("qwen3")
    model.config.head_dim = 16
    file = write_gguf(AutoModelForCausalLM.from_config(model.config), tmp_path / "tiny.gguf", "Q4_0")
    with pytest.raises(CheckpointError, match=r"attn_\w+.weight has shape .*, but transformers"):
        optq.convert(file, output_dir=tmp_path / "out", to="gptq")


@pytest.mark.parametrize(
    ("without", "extra", "message"),
    [
        ("blk.1.ffn_up.weight", None, "no tensor for model.layers.1.mlp.up_proj.weight"),
        (None, "rope_freqs.weight", "such as rope_freqs.weight"),
    ],
)
def test_a_file_that_is_not_the_whole_model_or_more_is_refused(tmp_path, without, extra, message):
    file = write_gguf(tiny_model(), tmp_path / "tiny.gguf", "Q4_0", without=without, extra=extra)
    with pytest.raises(CheckpointError, match=message):
        optq.convert(file, output_dir=tmp_path / "out", to="gptq")


def test_blocks_of_zeros_become_scales_that_are_not_zero(tmp_path):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[:40] = 0
    for kind, to in (("Q4_0", "gptq"), ("Q8_0", "gptq_v2")):
        file = write_gguf(model, tmp_path / f"{kind}.gguf", kind)
        there = optq.convert(file, output_dir=tmp_path / kind, to=to)
        assert optq.inspect(there, verify=True).contradictions == ()
        loaded = AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32)
        torch.testing.assert_close(logits_of(loaded), logits_of(read_by_transformers(file)), rtol=1e-4, atol=1e-4)


def test_a_number_of_blocks_that_the_file_does_not_have_is_refused(tmp_path):
    model = tiny_model()
    state = model.state_dict()
    model.config.num_hidden_layers = 10**9  # as many would be made, one after the other
    model.state_dict = lambda: state
    file = write_gguf(model, tmp_path / "tiny.gguf", "Q4_0")
    with pytest.raises(CheckpointError, match=r"tiny.gguf: it states 1000000000 blocks, and has tensors of 2"):
        optq.convert(file, output_dir=tmp_path / "out", to="gptq")


def test_a_file_that_is_cut_short_is_named(tmp_path):
    file = write_gguf(tiny_model(), tmp_path / "tiny.gguf", "Q4_0")
    content = file.read_bytes()
    for length in (6, 30, 700, len(content) // 2, len(content) - 40):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"tiny.gguf is no GGUF file: .*download it again"):
            optq.convert(file, output_dir=tmp_path / "out", to="gptq")
        assert not (tmp_path / "out").exists()
