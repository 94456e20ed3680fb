# SPDX-License-Identifier: Apache-2.0
"""`generate` at batch 1 with the quantized model and with its original: decoding, reading a prompt, loading.

On a CPU the model is SmolLM2-135M-Instruct; on a GPU one of random weights with the shape of Llama-3.1-8B, in eager
mode and compiled for a static cache. Weights are rounded to nearest: speed does not depend on the codes. All models
live in one process and take turns, so that the machine's other load falls on all of them; ratios are of the medians.

    python benchmarks/generate.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
from peaks import peaks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

TOKENS, PROMPT_TOKENS, ROUNDS, SEED = 48, 512, 9, 0


def original(gpu: bool, dtype: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if not gpu:
        import smollm2

        return AutoModelForCausalLM.from_pretrained(str(smollm2.fetch()), dtype=dtype)
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype).eval()


def quantized(model: Any, bits: int, group_size: int) -> Any:
    """The linears of the model's blocks rounded to nearest and packed, in place."""
    from optq.checkpoint import pack
    from optq.gptq import round_to_nearest
    from optq.layers import QuantLinear
    from optq.model import find_blocks, find_linears
    from optq.scheme import LayerScheme

    scheme = LayerScheme(bits=bits, group_size=group_size)
    for block in find_blocks(model).values():
        for name, view in find_linears(block).items():
            packed = pack(round_to_nearest(view.weight, scheme))
            block.set_submodule(name, QuantLinear(packed, view.module.bias))
    return model


def prepare(model: Any, dtype: Any, *, joined: bool = True) -> dict[str, Any]:
    """Derive what the kernels want, as loading does: seconds, and bytes in memory beside those on disk."""
    from optq.layers import QuantLinear, fuse_projections

    if joined:
        fuse_projections(model)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    on_disk = sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())
    started = time.perf_counter()
    for layer in layers:
        layer.prepare(dtype)
    seconds = time.perf_counter() - started
    held: dict[int, int] = {}
    for layer in layers:
        prepared = layer.held.prepared
        tensors = [*layer.buffers(), prepared.codes, *prepared.extras, prepared.scales, prepared.zeros]
        for tensor in [*tensors, prepared.group_of_column]:
            if tensor.device.type != "meta":
                held[tensor.data_ptr()] = tensor.nbytes
    return {
        "kernels": sorted({layer.kernel_name for layer in layers}),
        "prepare_seconds": round(seconds, 2),
        "packed_bytes_on_disk": on_disk,
        "bytes_in_memory": sum(held.values()),
        "memory_to_disk": round(sum(held.values()) / on_disk, 3),
    }


def seconds_to_read(model: Any, prompt: Any) -> float:
    import torch

    with torch.no_grad():
        started = time.perf_counter()
        model(prompt, logits_to_keep=1)
        if prompt.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def seconds_to_decode(model: Any, prompt: Any, **arguments: Any) -> float:
    import torch

    started = time.perf_counter()
    tokens = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **tokens, **arguments)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def most_tokens_per_second(model: Any, held: int, tokens: int) -> float:
    """What memory and arithmetic allow: for `tokens` tokens, of which the last one gets logits, all weights but the
    embedding's are read once.

    Args:
        held: bytes of what was quantized, as `prepare` returns it; 0: nothing was.
    """
    dense = sum(
        parameter.nbytes
        for parameter in model.parameters()
        if parameter is not model.get_input_embeddings().weight or model.config.tie_word_embeddings
    )
    head = model.get_output_embeddings()
    sizes = {
        layer: layer.in_features * layer.out_features for layer in model.modules() if hasattr(layer, "out_features")
    }
    operations = 2 * tokens * (sum(sizes.values()) - sizes[head]) + 2 * sizes[head]
    return tokens / peaks(model.device.type).floor_seconds(dense + held, operations)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    gpu = torch.cuda.is_available()
    parser.add_argument("--group-size", type=int, default=128 if gpu else 64)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    ours = quantized(original(gpu, torch.bfloat16), arguments.bits, arguments.group_size)
    results: dict[str, Any] = {"loading": prepare(ours, torch.bfloat16)}
    alone = quantized(original(gpu, torch.bfloat16), arguments.bits, arguments.group_size)
    prepared = {
        "quantized": results["loading"],
        "quantized, no products joined": prepare(alone, torch.bfloat16, joined=False),
    }
    held = {name: facts["bytes_in_memory"] for name, facts in prepared.items()}
    models = {
        "quantized": ours,
        "quantized, no products joined": alone,
        "original bfloat16": original(gpu, torch.bfloat16),
    }
    if not gpu:
        models["original float32"] = original(gpu, torch.float32)
    prompt = torch.randint(0, ours.config.vocab_size, (1, PROMPT_TOKENS), device=ours.device)
    ways: dict[str, Callable[[Any, Any], float]] = {
        "read a prompt of 512 tokens": seconds_to_read,
        "decode": lambda model, ids: seconds_to_decode(model, ids[:, :12]),
    }
    if gpu:
        ways["decode, compiled for a static cache"] = lambda model, ids: seconds_to_decode(
            model, ids[:, :12], cache_implementation="static"
        )
    settings = {
        "model": "Llama-3.1-8B's shape, random weights" if gpu else "SmolLM2-135M-Instruct",
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "new_tokens": TOKENS,
        "rounds": ROUNDS,
        "seed": SEED,
    }
    kind = torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu"
    for way, seconds in ways.items():
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(ROUNDS + 2):
            for name, model in models.items():
                taken = seconds(model, prompt)
                if turn > 1:  # the first ones warm up and compile
                    times[name].append(round(taken, 4))
        medians = {name: statistics.median(values) for name, values in times.items()}
        tokens = PROMPT_TOKENS if "prompt" in way else TOKENS
        at_once = PROMPT_TOKENS if "prompt" in way else 1
        results[way] = {
            "tokens_per_second": {name: round(tokens / value, 2) for name, value in medians.items()},
            "most_tokens_per_second": {
                name: round(most_tokens_per_second(model, held.get(name, 0), at_once), 2)
                for name, model in models.items()
            },
            "ratios": {name: round(value / medians["quantized"], 3) for name, value in medians.items()},
            "seconds": times,
        }
        print(way, results[way]["tokens_per_second"], results[way]["ratios"], flush=True)
        record.write(f"generate-{kind}", settings, results, quiet=True)
    print(results["loading"])


if __name__ == "__main__":
    main()
