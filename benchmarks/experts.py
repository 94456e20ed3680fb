# SPDX-License-Identifier: Apache-2.0
"""Time of one mixture's experts by shape and tokens: one expert after the other, and all at once where the kernel can.

Random codes and a random choice of experts for each token, another one in each turn. On a GPU, "at once, replayed" is
the same in a CUDA graph, as a compiled model runs it; one after the other cannot be captured, as the host looks at the
routing. On CPUs there is no product for all experts; "gate and up apart" is what one product for both of them saves.

    python benchmarks/experts.py                        # a minute on a GPU, two on a CPU
    python benchmarks/experts.py --models Mixtral-8x7B --tokens 1 64
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import record
from kernels import packed_weights

SHAPES: dict[str, tuple[int, int, int, int]] = {  # experts, of which a token gets, hidden features, an expert's
    "OLMoE-1B-7B": (64, 8, 2048, 1024),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "Mixtral-8x7B": (8, 2, 4096, 14336),
}
GPU_TOKENS, CPU_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024), (1, 2, 4, 8)
CPU_MODELS = ("OLMoE-1B-7B", "Qwen3-30B-A3B")
TURNS, CALLS, SEED = 15, 5, 0


def mixture(shape: tuple[int, int, int, int], bits: int, group_size: int, device: str) -> Any:
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from optq.layers import QuantLinear
    from optq.model import Experts

    count, choices, hidden, inner = shape
    config = SimpleNamespace(num_experts=count, num_local_experts=count, num_experts_per_tok=choices)
    config.hidden_size, config.moe_intermediate_size, config.hidden_act = hidden, inner, "silu"
    config._experts_implementation = "eager"
    with torch.device("meta"):
        experts = Experts(Qwen3MoeExperts(config))
    for role in experts.layout.roles:
        features = (inner, hidden) if role == "down_proj" else (hidden, inner)
        for index, packed in enumerate(packed_weights(features, bits, group_size, count, device)):
            experts.set_submodule(f"{index}.{role}", QuantLinear(packed))
    return experts.eval()


def prepared(experts: Any, *, joined: bool) -> Any:
    import torch

    from optq.layers import QuantLinear, join_experts

    if joined:
        experts.grouped = join_experts(*experts.linears())
    for layer in experts.modules():
        if isinstance(layer, QuantLinear):
            layer.prepare(torch.bfloat16)
    return experts


def microseconds(calls: list[Callable[[], Any]], wait: Callable[[], Any]) -> float:
    times = []
    for _ in range(TURNS):
        wait()
        started = time.perf_counter()
        for call in calls:
            call()
        wait()
        times.append(1e6 * (time.perf_counter() - started) / len(calls))
    return round(statistics.median(times), 1)


def measure(name: str, bits: int, group_size: int, all_tokens: list[int]) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    device, wait = ("cuda", torch.cuda.synchronize) if gpu else ("cpu", lambda: None)
    count, choices, hidden, _ = shape = SHAPES[name]
    apart = prepared(mixture(shape, bits, group_size, device), joined=False)
    joined = prepared(mixture(shape, bits, group_size, device), joined=True)
    grouped = joined.grouped
    found: dict[str, Any] = {}
    for tokens in all_tokens:
        inputs = []
        for _ in range(CALLS):
            scores = torch.rand(tokens, count, device=device).topk(choices)
            x = torch.randn(tokens, hidden, device=device).bfloat16()
            inputs.append((x, scores.indices, scores.values.bfloat16()))
        ways: dict[str, Callable[[], float]] = {}

        def timed(experts: Any, products: Any, inputs: Any = inputs) -> float:
            experts.grouped = products
            calls = [lambda arguments=arguments: experts(*arguments) for arguments in inputs]
            calls[0]()
            return microseconds(calls, wait)

        def replayed(inputs: Any = inputs) -> float:
            joined.grouped = grouped
            joined(*inputs[0])
            wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for arguments in inputs:
                    joined(*arguments)
            return round(microseconds([graph.replay], wait) / len(inputs), 1)

        ways["one after the other, gate and up apart"] = lambda: timed(apart, None)
        ways["one after the other"] = lambda: timed(joined, None)
        if grouped.why_not(tokens * choices, inputs[0][0]) is None:
            ways["at once"] = lambda: timed(joined, grouped)
            if gpu:
                ways["at once, replayed"] = replayed
        with torch.no_grad():
            found[str(tokens)] = {"us": {way: run() for way, run in ways.items()}}
        print(name, f"{tokens} tokens:", found[str(tokens)]["us"], flush=True)
    return found


def main() -> None:
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES) if gpu else CPU_MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=GPU_TOKENS if gpu else CPU_TOKENS)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    results = {
        f"{name}, {arguments.bits} bits": measure(name, arguments.bits, arguments.group_size, arguments.tokens)
        for name in arguments.models
    }
    settings = {
        "group_size": arguments.group_size,
        "activations": "bfloat16",
        "unit": f"us per layer; median of {TURNS} turns of {CALLS} choices of experts",
        "seed": SEED,
    }
    name = "experts-" + (torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu")
    record.write(name, settings, results, quiet=True)


if __name__ == "__main__":
    main()
