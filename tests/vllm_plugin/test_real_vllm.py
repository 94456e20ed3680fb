# SPDX-License-Identifier: Apache-2.0
"""Real vLLM, on a CPU, in an environment of its own: `make vllm`. All else is skipped without one, aloud."""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import optq
from conftest import tiny_llama_config
from optq import GPTQConfig

PYTHON = os.environ.get("OPTQ_TEST_VLLM")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="OPTQ_TEST_VLLM names no Python that has vLLM; `make vllm` makes one"),
]

IDS = [[5, 17, 100, 4, 88, 23, 61, 7], [9, 8, 7, 6, 5]]
OWN_PRODUCT = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # whether vLLM's is built for this CPU
LARGEST = 0.05  # difference of a log-probability: half of it is the rounding of activations to 16 bits


def ask(model, engine=None, tokens=1, adapter=None, **variables):
    """What vLLM answers, or what it said at its end."""
    asked = {"model": str(model), "engine": engine or {}, "ids": IDS, "tokens": tokens, "adapter": adapter}
    ended = subprocess.run(
        [PYTHON, Path(__file__).with_name("in_vllm.py")],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
    if ended.returncode:
        return {}, ended.stdout
    answer = next(line for line in ended.stdout.splitlines() if line.startswith('{"method"'))
    return json.loads(answer), ended.stdout


def expected_of(model):
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0, -1].float().log_softmax(-1) for row in IDS]


def difference(answer, model):
    found = torch.tensor(answer["log_probabilities"])
    return float((found - torch.stack(expected_of(model))[:, : found.shape[1]]).abs().max())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = tiny_llama_config(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """Quantized in the way that is asked for, once each."""
    made = {}

    def of(**settings):
        key = repr(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "model"
            rows = torch.randint(120, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
            config = GPTQConfig(
                **{"bits": 4, "group_size": 32, **settings},
                dataset=[{"input_ids": row} for row in rows],
                effort="fast",
                quality_gate="off",
            )
            optq.quantize(dense, config, output_dir=made[key], dtype=torch.float32)
        return made[key]

    return of


def dequantized(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize()


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2, "sym": False},
        {"bits": 3, "desc_act": True},
        {"bits": 8, "group_size": -1},
        {"group_size": 96},
        {"sym": False, "format": "gptq_v2"},
        {"bits": 3, "lm_head": True},
        {"dynamic": {r"+:.*\.q_proj": {"bits": 8}, r"-:.*\.v_proj": {}, r"+:.*\.up_proj": {"bits": 3}}},
        {"bits": 3, "modules_in_block_to_quantize": ["mlp.gate_proj", "mlp.down_proj"]},
    ],
    ids=str,
)
def test_it_serves_what_vllm_refuses(settings, packed):
    folder = packed(**settings)
    _, said = ask(folder, OPTQ_VLLM="0")
    assert "Error" in said
    answer, said = ask(folder)
    assert answer["method"] == "optq", said
    assert "optq serves this checkpoint, since vLLM by itself does not read it right" in said
    assert difference(answer, dequantized(folder)) <= LARGEST


def test_what_vllm_serves_stays_with_it_unless_asked_for(packed):
    """Its own product for CPUs needs AVX-512: it fails without, although its table takes the checkpoint."""
    folder = packed()
    answer, said = ask(folder)
    assert answer["method"] == ("auto_gptq" if OWN_PRODUCT else "optq")
    assert OWN_PRODUCT or "not built for this CPU" in said
    asked, said = ask(folder, {"quantization": "optq"})
    assert asked["method"] == "optq"
    assert "as --quantization asks for" in said
    for found in (answer, asked):
        assert difference(found, dequantized(folder)) <= LARGEST


@pytest.mark.parametrize("plugins", [{"VLLM_PLUGINS": "another"}, {"OPTQ_VLLM": "0"}])
def test_it_can_be_switched_off(plugins, packed):
    _, said = ask(packed(bits=3, desc_act=True), **plugins)
    assert "desc_act=True) is no longer supported" in said


def test_a_file_whose_label_hides_the_order_of_columns_is_served_as_it_is(packed, tmp_path):
    folder = shutil.copytree(packed(desc_act=True), tmp_path / "mislabelled")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = False
    (folder / "config.json").write_text(json.dumps(config))
    right = dequantized(packed(desc_act=True))
    answer, said = ask(folder)
    assert answer["method"] == "optq", said
    assert difference(answer, right) <= LARGEST
    wrong, _ = ask(folder, OPTQ_VLLM="0")
    assert difference(wrong, right) > 0.5 if OWN_PRODUCT else not wrong  # what the plugin is there for


@pytest.mark.parametrize(
    ("engine", "largest"),
    [
        ({"dtype": "bfloat16"}, 0.3),
        ({"dtype": "float32"}, 1e-3),
        ({"enforce_eager": False}, LARGEST),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, LARGEST),
        ({"enable_prefix_caching": True, "max_num_batched_tokens": 16, "max_num_seqs": 4}, LARGEST),
    ],
    ids=str,
)
def test_each_way_to_run_it(engine, largest, packed):
    folder = packed(bits=3, desc_act=True)
    answer, said = ask(folder, engine)
    assert answer, said
    assert difference(answer, dequantized(folder)) <= largest


@pytest.mark.parametrize("eager", [True, False])
def test_experts(eager, tmp_path):
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=128,
            moe_intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    model.save_pretrained(tmp_path / "dense")
    rows = torch.randint(120, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    config = GPTQConfig(
        bits=3, group_size=32, dataset=[{"input_ids": row} for row in rows], effort="fast", quality_gate="off"
    )
    folder = tmp_path / "packed"
    optq.quantize(tmp_path / "dense", config, output_dir=folder, dtype=torch.float32)
    answer, said = ask(folder, {"enforce_eager": eager})
    assert answer, said
    assert difference(answer, dequantized(folder)) <= LARGEST


def test_an_adapter_on_packed_linears(packed, tmp_path):
    peft = pytest.importorskip("peft")
    folder = packed(bits=3, desc_act=True)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        dequantized(folder),
        peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    answer, said = ask(folder, {"enable_lora": True, "max_lora_rank": 8}, adapter=str(tmp_path))
    assert answer, said
    plain, _ = ask(folder)
    assert difference(plain, adapted) > 0.5
    assert difference(answer, adapted) <= 2 * LARGEST


def test_a_quantized_draft_changes_no_token(packed):
    folder = packed(sym=False, format="gptq_v2")
    alone, _ = ask(folder, tokens=16)
    draft = {"model": str(packed(bits=3, desc_act=True)), "num_speculative_tokens": 3, "method": "draft_model"}
    together, said = ask(folder, {"speculative_config": draft}, tokens=16)
    assert together, said
    assert together["tokens"] == alone["tokens"]


class TestDamaged:
    """It ends with the name of the tensor, not with an answer."""

    @pytest.mark.parametrize(
        ("tensor", "change", "message"),
        [
            ("model.layers.0.self_attn.q_proj.g_idx", lambda t: t + 1, "column 3 is of group 4, and there are 4"),
            ("model.layers.1.mlp.down_proj.scales", lambda t: t * torch.inf, "scales are finite and not 0"),
            ("model.layers.0.mlp.up_proj.qzeros", None, "not qzeros"),
        ],
    )
    def test_a_tensor(self, tensor, change, message, packed, tmp_path):
        folder = shutil.copytree(packed(bits=3, desc_act=True), tmp_path / "damaged")
        (file,) = (file for file in folder.glob("*.safetensors") if tensor in load_file(file))
        tensors = load_file(file)
        if change is None:
            del tensors[tensor]
        else:
            tensors[tensor] = change(tensors[tensor])
        save_file(tensors, file, {"format": "pt"})
        answer, said = ask(folder, {"quantization": "optq"})
        assert not answer
        assert message in said


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """vLLM's OpenAI server with a real model in 3 bits; its address and the folder."""
    from smollm2 import fetch

    folder = tmp_path_factory.mktemp("served")
    dense = fetch()
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[2].glob("docs/*.md"))]
    config = GPTQConfig(
        bits=3, group_size=64, dataset=texts, num_samples=32, model_seqlen=512, effort="fast", quality_gate="off"
    )
    optq.quantize(dense, config, output_dir=folder / "packed", dtype=torch.float32)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "packed", "--port", port]
    command += ["--dtype", "float16", "--max-model-len", 1024, "--served-model-name", "smol", "--host", "127.0.0.1"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **variables}
        )
    try:
        for _ in range(300):
            if process.poll() is not None:
                break
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (URLError, OSError):
                time.sleep(1)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait(60)


CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="none")
how = {"model": "smol", "temperature": 0}
def complete(n):
    found = client.completions.create(prompt="The capital of France is", max_tokens=8, logprobs=1, **how).choices[0]
    return [found.text, found.logprobs.tokens[0], found.logprobs.token_logprobs[0]]
def chat(n):
    said = [{"role": "user", "content": "What is the capital of France?"}]
    return client.chat.completions.create(messages=said, max_tokens=24, **how).choices[0].message.content
with ThreadPoolExecutor(8) as pool:
    print(json.dumps([list(pool.map(complete, range(8))), list(pool.map(chat, range(8)))]))
"""


def test_a_real_model_answers_eight_clients_at_once(server):
    address, folder = server
    ended = subprocess.run([PYTHON, "-c", CLIENT, address], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    completions, chats = json.loads(ended.stdout.splitlines()[-1])
    assert len(completions) == len(chats) == 8
    model = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "packed")
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    best = logits.log_softmax(-1).max(-1)
    for _, token, log_probability in completions:
        assert token == tokenizer.decode(best.indices)
        assert abs(log_probability - float(best.values)) <= 2 * LARGEST
    assert all(text.strip() for text, *_ in completions)
    assert all(text.strip() for text in chats)
    assert "optq serves this checkpoint" in (folder / "log").read_text()
