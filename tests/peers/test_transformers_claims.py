# SPDX-License-Identifier: Apache-2.0
"""What transformers' tests claim of a quantized model, with the GPTQ quantizer that is ours."""

import copy
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationMethod

from optq import GPTQConfig, QuantLinear
from optq.hf.quantizer import OptqHfQuantizer

PROMPT = torch.randint(4, 90, (1, 12), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def config(token_rows):
    return GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows)


@pytest.fixture(scope="module")
def quantized(tiny_llama, config):
    """Just quantized. Not to be changed."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


@pytest.fixture(scope="module")
def folder(quantized, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    quantized.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    """Loaded. Not to be changed."""
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def dense(folder):
    """The same weights in plain linears. Not to be changed."""
    return AutoModelForCausalLM.from_pretrained(folder).dequantize()


@pytest.fixture(scope="module")
def original(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@torch.no_grad()
def logits(model, ids=PROMPT):
    return model(ids).logits


def written(model, ids=PROMPT, **settings):
    settings = {"do_sample": False, "min_new_tokens": 10, "max_new_tokens": 10, **settings}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


class TestMemory:
    def test_the_footprint_shrinks(self, model, original):
        assert model.get_memory_footprint() < 0.6 * original.get_memory_footprint()

    def test_the_footprint_counts_packed_words(self, model):
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
        assert model.get_memory_footprint() == sum(tensor.nbytes for tensor in tensors)
        assert model.get_memory_footprint() > model.get_memory_footprint(return_buffers=False)

    def test_fewer_bits_take_less(self, tiny_llama, token_rows, model):
        config = GPTQConfig(bits=2, group_size=32, effort="fast", dataset=token_rows[:2], quality_gate="off")
        smaller = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
        assert sum(layer.qweight.nbytes for layer in layers(smaller).values()) * 2 == sum(
            layer.qweight.nbytes for layer in layers(model).values()
        )

    def test_parameters_are_those_that_were_not_packed(self, model, original):
        packed = sum(original.get_submodule(name).weight.numel() for name in layers(model))
        assert model.num_parameters() == original.num_parameters() - packed


class TestIdentity:
    def test_the_method_is_gptq(self, model, quantized):
        for each in (model, quantized):
            assert each.quantization_method == QuantizationMethod.GPTQ
            assert each.is_quantized
            assert isinstance(each.hf_quantizer, OptqHfQuantizer)

    def test_the_class_is_the_models_own(self, model, quantized):
        assert type(model) is type(quantized) is LlamaForCausalLM
        assert not model.training

    def test_every_linear_of_the_blocks_is_converted_and_nothing_else(self, model, original):
        linears = {name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear)}
        assert layers(model).keys() == linears - {"lm_head"}
        assert type(model.lm_head) is torch.nn.Linear
        assert type(model.model.embed_tokens) is torch.nn.Embedding

    def test_the_dtype_is_the_originals_and_is_written_down(self, model, quantized, folder):
        assert {str(each.config.dtype).removeprefix("torch.") for each in (model, quantized)} == {"float32"}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"

    def test_it_can_be_saved_and_trained_upon(self, model):
        assert model.hf_quantizer.is_serializable()
        assert model.hf_quantizer.is_trainable
        assert not model.hf_quantizer.is_qat_trainable

    def test_the_registry_finds_it(self, folder, model):
        stated = AutoQuantizationConfig.from_pretrained(folder)
        assert type(stated) is GPTQConfig
        assert stated == model.config.quantization_config
        assert isinstance(AutoHfQuantizer.from_config(stated, pre_quantized=True), OptqHfQuantizer)
        assert AutoHfQuantizer.supports_quant_method(stated.to_dict())


class TestDtypes:
    def test_a_cast_is_refused(self, model):
        for cast in (
            lambda: model.to(torch.float16),
            lambda: model.to(dtype=torch.bfloat16),
            model.half,
            model.float,
        ):
            with pytest.raises(ValueError, match="cast"):
                cast()
        assert model.dtype == torch.float32

    def test_a_move_is_not(self, folder):
        moved = AutoModelForCausalLM.from_pretrained(folder).to("cpu")
        assert moved.device.type == "cpu"
        assert moved.to(torch.device("cpu")) is moved

    def test_tensors_have_the_types_of_the_format(self, quantized):
        state = quantized.state_dict()
        kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.items() if ".self_attn." in name}
        assert kinds["qweight"] == kinds["qzeros"] == kinds["g_idx"] == torch.int32
        assert kinds["scales"].is_floating_point

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_another_dtype_is_chosen_when_loading(self, folder, model, dtype):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert loaded.dtype == logits(loaded).dtype == dtype
        assert torch.allclose(logits(loaded).float(), logits(model), atol=0.1 * logits(model).abs().max().item())

    def test_modules_that_stay_in_float32_do(self, folder, monkeypatch):
        monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"post_attention_layernorm"})
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        norms = {name: weight.dtype for name, weight in loaded.named_parameters() if "norm" in name}
        assert {dtype for name, dtype in norms.items() if "post_attention" in name} == {torch.float32}
        assert {dtype for name, dtype in norms.items() if "post_attention" not in name} == {torch.bfloat16}
        assert loaded.model.layers[0].mlp.up_proj.scales.is_floating_point()


class TestConfig:
    def test_it_goes_to_a_dict_and_back(self, model):
        stated = model.config.quantization_config
        assert GPTQConfig.from_dict(stated.to_dict()) == stated
        assert GPTQConfig(**{**stated.to_dict(), "bits": 8}) != stated

    def test_it_goes_to_json_and_back(self, model, tmp_path):
        stated = model.config.quantization_config
        stated.to_json_file(tmp_path / "config.json")
        assert GPTQConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == stated
        assert json.loads(stated.to_json_string(use_diff=False)) == json.loads(json.dumps(stated.to_dict()))

    def test_what_it_does_not_know_is_handed_back_or_kept(self):
        config, unused = GPTQConfig.from_dict({"bits": 4, "group_size": 32}, return_unused_kwargs=True, sym=False)
        assert (config.bits, config.group_size) == (4, 32)
        assert config.sym is False or unused == {"sym": False}

    def test_it_survives_the_models_round_trip(self, quantized, model, tmp_path):
        assert model.config.quantization_config == quantized.config.quantization_config
        model.save_pretrained(tmp_path)
        again = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert again == json.loads(json.dumps(model.config.quantization_config.to_dict()))

    def test_it_is_copied_and_pickled(self, config):
        assert copy.deepcopy(config) == config
        assert pickle.loads(pickle.dumps(config)) == config

    @pytest.mark.parametrize("kind", [GPTQConfig, transformers.GPTQConfig])
    def test_loading_attributes_can_be_changed(self, folder, kind):
        with pytest.warns(UserWarning, match="loading attributes"):
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=kind(bits=4, backend="reference")
            )
        assert {layer.kernel_name for layer in layers(loaded).values()} == {"reference"}

    def test_nothing_else_can(self, folder):
        with pytest.warns(UserWarning, match="quantization_config"):
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=GPTQConfig(bits=8, group_size=16)
            )
        stated = loaded.config.quantization_config
        assert (stated.bits, stated.group_size) == (4, 32)


class TestSaving:
    def test_what_is_loaded_computes_what_was_saved(self, quantized, model):
        assert torch.equal(logits(model), logits(quantized))

    def test_shards(self, quantized, tmp_path):
        quantized.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert (tmp_path / "model.safetensors.index.json").exists()
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(quantized))

    def test_a_variant(self, quantized, tmp_path):
        quantized.save_pretrained(tmp_path, variant="four")
        assert (tmp_path / "model.four.safetensors").exists()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant="four")
        assert torch.equal(logits(loaded), logits(quantized))

    def test_pushing_uploads_what_saving_writes(self, quantized, monkeypatch):
        sent = {}

        def upload(self, working_dir, repo_id, files_timestamps, **settings):
            sent[repo_id] = {path.name for path in Path(working_dir).iterdir()}

        monkeypatch.setattr(type(quantized), "_upload_modified_files", upload)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **settings: SimpleNamespace(repo_id=repo_id)
        )
        quantized.push_to_hub("user/tiny")
        assert {"config.json", "model.safetensors", "generation_config.json"} <= sent["user/tiny"]

    def test_dequantized_it_is_a_plain_model(self, folder, dense, model, tmp_path):
        assert not layers(dense)
        assert getattr(dense.config, "quantization_config", None) is None
        assert not getattr(dense, "is_quantized", False)
        assert torch.allclose(logits(dense), logits(model), atol=1e-4)
        dense.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(dense))
        assert dense.to(torch.bfloat16).to(torch.float32).dtype == torch.float32


class TestPlaces:
    @pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu")], ids=str)
    def test_device_maps(self, folder, model, device_map):
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
        assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
        assert torch.equal(logits(loaded), logits(model))

    def test_a_part_on_the_disk(self, folder, model, tmp_path):
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
        assert torch.allclose(logits(loaded), logits(model), atol=1e-4)

    def test_the_model_without_its_head(self, folder, model):
        base = AutoModel.from_pretrained(folder)
        assert len(layers(base)) == 14
        with torch.no_grad():
            assert torch.equal(model.lm_head(base(PROMPT).last_hidden_state), logits(model))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_attention_can_be_chosen(self, folder, model, attention):
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
        assert loaded.config._attn_implementation == attention
        assert torch.allclose(logits(loaded), logits(model), atol=1e-4)

    def test_loading_says_nothing_of_missing_weights(self, folder, caplog):
        with caplog.at_level(logging.WARNING, logger="transformers"):
            _, facts = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not facts["missing_keys"]
        assert not facts["unexpected_keys"]
        assert "newly initialized" not in caplog.text


class TestGeneration:
    def test_the_dense_model_writes_the_same(self, model, dense, original):
        assert written(model) == written(dense)
        assert not torch.allclose(logits(model), logits(original), atol=1e-2)  # negative control: other weights

    def test_beams(self, model, dense):
        assert written(model, num_beams=3) == written(dense, num_beams=3)

    def test_sampling_with_a_seed(self, model, dense):
        found = []
        for each in (model, dense):
            torch.manual_seed(0)
            found.append(written(each, do_sample=True, temperature=1.5, top_k=20))
        assert found[0] == found[1] != written(model)

    def test_a_static_cache(self, model, dense):
        assert written(model, cache_implementation="static", disable_compile=True) == written(dense)

    def test_without_a_cache(self, model, dense):
        assert written(model, use_cache=False) == written(dense)

    def test_an_assistant(self, model, dense, original):
        assert written(model, assistant_model=original) == written(dense)
        assert written(original, assistant_model=model) == written(original)

    def test_looking_up_in_the_prompt(self, model, dense):
        assert written(model, prompt_lookup_num_tokens=2) == written(dense)

    def test_a_padded_batch(self, model):
        short = PROMPT[:, 4:]
        ids = torch.cat([PROMPT, torch.nn.functional.pad(short, (4, 0))])
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        settings = {"do_sample": False, "min_new_tokens": 10, "max_new_tokens": 10}
        both = model.generate(ids, attention_mask=mask, **settings)[:, PROMPT.shape[1] :].tolist()
        assert both == [written(model)[0][12:], written(model, short)[0][8:]]

    def test_a_pipeline(self, folder, model):
        ours = pipeline("text-generation", model=str(folder))
        assert len(layers(ours.model)) == 14
        tokenizer = AutoTokenizer.from_pretrained(folder)
        (found,) = ours("some text", max_new_tokens=5, do_sample=False)
        ids = torch.tensor([tokenizer("some text")["input_ids"]])
        expected = written(model, ids, min_new_tokens=None, max_new_tokens=5)
        assert found["generated_text"].startswith("some text")
        continued = tokenizer.decode(expected[0][ids.shape[1] :], skip_special_tokens=True)
        assert found["generated_text"] == f"some text{continued}"


class TestChanges:
    def test_embeddings_can_be_resized(self, folder, model):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        loaded.resize_token_embeddings(140, mean_resizing=False)
        assert logits(loaded).shape[-1] == 140
        assert torch.equal(logits(loaded)[..., :128], logits(model))

    def test_a_copy_computes_the_same(self, model):
        assert torch.equal(logits(copy.deepcopy(model)), logits(model))

    def test_gradients_reach_the_embeddings(self, folder):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        loaded(PROMPT, labels=PROMPT).loss.backward()
        assert loaded.model.embed_tokens.weight.grad.abs().sum() > 0
