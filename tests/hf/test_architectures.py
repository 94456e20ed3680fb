# SPDX-License-Identifier: Apache-2.0
"""The sample of benchmarks/coverage.py that is run every time: the most used types, and the odd ones."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AlbertConfig, AlbertForMaskedLM

from optq import GPTQConfig
from optq.calibration import Sampling, prepare_calibration
from optq.errors import CalibrationError
from optq.evaluation import Comparer
from optq.model import find_blocks
from optq.quantization.coroutines import BlockCall, SuspendedForwards

COVERAGE = Path(__file__).parents[2] / "benchmarks/coverage.py"
CAUSAL = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom"),
    *("falcon", "cohere2", "glm4", "olmo2", "starcoder2", "smollm3", "mamba", "jamba", "xlnet", "granitemoeshared"),
    "falcon_h1",
)
OTHERS = {
    "encoder and decoder": ("t5", "bart", "switch_transformers"),
    "masked language models": ("bert", "big_bird", "albert"),
    "images and text, the language model": ("qwen2_vl", "gemma3", "aya_vision", "blip-2", "kosmos-2"),
    "speech": ("whisper", "moonshine", "speech_to_text", "voxtral", "dia"),
}
SAMPLE = [("causal language models", name) for name in CAUSAL]
SAMPLE += [(title, name) for title, names in OTHERS.items() for name in names]
LONG = {
    *("mistral", "qwen2", "phi3", "bloom", "falcon", "glm4", "olmo2", "starcoder2", "smollm3", "xlnet"),
    *("granitemoeshared", "big_bird", "gemma3", "kosmos-2", "speech_to_text", "dia"),
}
"""Types whose blocks are like those of another one here; benchmarks/coverage.py tries all that transformers has."""

PARAMETERS = [pytest.param(title, name, id=name, marks=[pytest.mark.long] * (name in LONG)) for title, name in SAMPLE]


@pytest.fixture(scope="module")
def coverage(monkeypatch_module):
    monkeypatch_module.syspath_prepend(str(COVERAGE.parent))
    return runpy.run_path(str(COVERAGE))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("title", "model_type"), PARAMETERS)
def test_a_tiny_model_of_the_type_goes_all_the_way(coverage, title, model_type):
    (class_name,) = (name for found, other, name in coverage["types"]() if (found, other) == (title, model_type))
    row = coverage["checked"](model_type, class_name)
    assert row["passed"], f"{row['step']}: {row['reason']}"
    assert row["linears"] >= 4


def test_the_check_can_fail(coverage, monkeypatch):
    from optq import QuantLinear

    forward = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    row = coverage["checked"]("llama", "LlamaForCausalLM")
    assert not row["passed"]
    assert row["step"] == "dequantized weights"


def test_linears_that_the_original_keeps_in_another_form_are_saved_as_they_are(coverage, tmp_path):
    """Gte's checkpoints have q, k and v in one tensor, and transformers would join packed ones along a wrong side."""
    if "gte" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not know the model")
    model = coverage["instantiated"]("gte", "GteForMaskedLM")
    model.save_pretrained(tmp_path / "original")
    assert any("qkv" in name for name in coverage["names_in"](tmp_path / "original"))
    rows = [{"input_ids": list(range(12, 60))}] * 4
    config = GPTQConfig(bits=4, group_size=32, dataset=rows, quality_gate="off")
    quantized = type(model).from_pretrained(tmp_path / "original", quantization_config=config, dtype=torch.float32)
    quantized.save_pretrained(tmp_path / "quantized")
    reloaded = type(model).from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    inputs = {"input_ids": torch.arange(12, 44)[None]}
    assert torch.equal(coverage["outputs_of"](reloaded, inputs), coverage["outputs_of"](quantized, inputs))
    reloaded.save_pretrained(tmp_path / "again")
    assert coverage["names_in"](tmp_path / "again") == coverage["names_in"](tmp_path / "quantized")


def test_encoder_and_decoder_read_the_same_text(coverage, tmp_path):
    model = coverage["instantiated"]("t5", "T5ForConditionalGeneration")
    model.save_pretrained(tmp_path / "original")
    rows = [{"input_ids": list(range(12, 12 + length))} for length in (48, 20, 48, 30)]  # padded
    log = tmp_path / "log.jsonl"
    config = GPTQConfig(bits=4, group_size=32, dataset=rows, log_file=str(log), batch_size=4)
    quantized = type(model).from_pretrained(tmp_path / "original", quantization_config=config, dtype=torch.float32)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    blocks = [event["block"] for event in events if event["event"] == "block"]
    assert blocks == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert quantized.hf_quantizer.quality.divergence < 0.5
    generated = quantized.generate(torch.arange(12, 30)[None], max_new_tokens=4, decoder_start_token_id=0)
    assert generated.shape[1] <= 5


@pytest.mark.parametrize("effort", ["fast", "max"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_block_that_is_called_several_times_is_solved_once_on_all_its_calls(tmp_path, effort, groups):
    config = AlbertConfig(
        vocab_size=160,
        embedding_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=3 * groups,
        num_hidden_groups=groups,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = AlbertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "original")
    rows = [{"input_ids": torch.randint(4, 160, (length,)).tolist()} for length in (48, 40, 48, 30)]
    log = tmp_path / "log.jsonl"
    config = GPTQConfig(bits=3, group_size=32, dataset=rows, log_file=str(log), batch_size=2, effort=effort)
    quantized = AlbertForMaskedLM.from_pretrained(tmp_path / "original", quantization_config=config, dtype="float32")
    solved = [event for line in log.read_text().splitlines() if (event := json.loads(line))["event"] == "linear"]
    assert len(solved) == 6 * groups
    assert {event["tokens"] for event in solved} == {3 * (48 + 40 + 48 + 30)}
    comparer, probe = Comparer(), torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        comparer.add(model(probe).logits, quantized(probe).logits, None, None)
    assert comparer.result().divergence > 0
    assert quantized.hf_quantizer.quality.divergence == pytest.approx(comparer.result().divergence, rel=1e-3)


def quantized_from_samples(folder, model, rows, **settings):
    """The quantized model, reloaded, after checking that loading changes nothing; and the blocks that were done."""
    model.save_pretrained(folder / "original")
    log = folder / "log.jsonl"
    config = GPTQConfig(bits=4, group_size=32, dataset=rows, log_file=str(log), effort="fast", **settings)
    quantized = type(model).from_pretrained(folder / "original", quantization_config=config, dtype=torch.float32)
    quantized.save_pretrained(folder / "quantized")
    reloaded = type(model).from_pretrained(folder / "quantized", dtype=torch.float32)
    inputs = {name: value for name, value in rows[0].items() if name != "labels"}
    if "labels" in rows[0]:
        inputs["decoder_input_ids"] = rows[0]["labels"].clamp(min=0)
    with torch.no_grad():
        found, expected = quantized(**inputs).logits, model(**inputs).logits
        assert torch.equal(found, reloaded(**inputs).logits)
    assert float((found - expected).square().mean() / expected.square().mean()) < 0.5
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert quantized.hf_quantizer.quality.divergence < 0.5
    return reloaded, [event["block"] for event in events if event["event"] == "block"]


def test_speech_models_are_calibrated_on_sound_and_its_text(tmp_path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in SIZES.items()}
    config = WhisperConfig(
        vocab_size=160,
        d_model=64,
        num_mel_bins=16,
        max_source_positions=40,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    rows = [
        {"input_features": torch.randn(1, 16, 80), "labels": torch.randint(4, 160, (1, 12 + index))}
        for index in range(6)
    ]
    rows[0]["labels"][0, -1] = -100
    reloaded, blocks = quantized_from_samples(tmp_path, model, rows)
    assert blocks == [f"model.{part}.layers.{index}" for part in ("encoder", "decoder") for index in range(2)]
    info = reloaded.config.quantization_config.meta["calibration"]
    assert info["inputs"] == ["decoder_input_ids", "input_features"]
    assert info["tokens"] == sum(12 + index for index in range(6))


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}


@pytest.mark.parametrize("vision_tower", [False, True])
def test_images_reach_the_language_model_and_on_request_the_vision_tower(tmp_path, vision_tower):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from conftest import tiny_llama_config

    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **vision},
        text_config=tiny_llama_config().to_dict(),
        image_token_index=5,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    rows = [
        {
            "input_ids": torch.cat((torch.full((1, 16), 5), torch.randint(6, 100, (1, 20))), 1),
            "attention_mask": torch.ones(1, 36, dtype=torch.int64),
            "pixel_values": torch.randn(1, 3, 32, 32),
        }
        for _ in range(6)
    ]
    names = [name for name, _ in model.named_modules() if name.endswith("layers.1")]
    vision_list = next(name.removesuffix(".1") for name in names if "vision" in name)
    asked = vision_list if vision_tower else None
    _, done = quantized_from_samples(tmp_path, model, rows, block_name_to_quantize=asked)
    assert done == [f"{asked or 'model.language_model.layers'}.{index}" for index in range(2)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a text", "sample 1 is a str, but others have images or sound"),
        ({"pixel_values": torch.randn(1, 3, 32, 32)}, "sample 1 has pixel_values, but no input_ids"),
        ({"input_ids": torch.arange(5), "pixel_values": torch.randn(3, 32, 32)}, "of shape"),
        ({"input_ids": torch.tensor([[500]]), "pixel_values": torch.randn(1, 3, 32, 32)}, "token id 500"),
    ],
)
def test_samples_that_do_not_fit_the_others_are_refused(row, message):
    good = {"input_ids": torch.arange(5)[None], "pixel_values": torch.randn(1, 3, 32, 32)}
    with pytest.raises(CalibrationError, match=message):
        prepare_calibration([good, row], lambda: None, Sampling(vocabulary=100, window=64))


def test_sound_without_text_is_refused_for_models_that_decode():
    with pytest.raises(CalibrationError, match="nothing for the decoder to read"):
        prepare_calibration(
            [{"input_features": torch.randn(1, 4, 8)}], None, Sampling(vocabulary=9, window=9, decoded=True)
        )


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
        ("bamba", "BambaForCausalLM"),
        ("falcon_mamba", "FalconMambaForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("qwen3_next", "Qwen3NextForCausalLM"),
    ],
)
def test_a_forward_that_waits_at_every_block_computes_what_a_plain_one_does(coverage, model_type, class_name):
    model = coverage["instantiated"](model_type, class_name)
    batch = coverage["sample"](model, model_type, 2, torch.Generator().manual_seed(0))
    expected = coverage["outputs_of"](model, batch)
    blocks = find_blocks(model)
    with torch.no_grad(), SuspendedForwards(model, blocks, torch.device("cpu")) as forwards:
        (waiting,) = forwards.start([batch])
        seen = []
        while isinstance(waiting, BlockCall):
            seen.append(waiting.block)
            for _ in range(2):  # as the driver does: a block that keeps something would notice
                output = forwards.original_forwards[waiting.block](*waiting.args, **waiting.kwargs)
            waiting = forwards.resume(waiting, output)
    assert seen == list(range(len(blocks)))
    assert torch.equal(waiting.output.logits, expected)
