# SPDX-License-Identifier: Apache-2.0
"""Time of one mixture's experts by shape and tokens: one expert after the other, and all at once where the kernel can.

Random codes, and experts chosen at random for each token, five times. On a GPU both are started from Python, as
`generate` does it, and "at once, replayed" is a CUDA graph, as a compiled model runs it; one after the other cannot be
captured, as the host looks at the routing. On CPUs there is no product for all experts: "products alone" is what is
left to gain there.

    python benchmarks/experts.py                        # a minute on a GPU, two on a CPU
    python benchmarks/experts.py --models Mixtral-8x7B --tokens 1 64
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import record
from kernels import bytes_moved, on_cpu, packed_weights
from peaks import peaks

SHAPES: dict[str, tuple[int, int, int, int]] = {  # experts, of which a token gets, hidden features, an expert's
    "OLMoE-1B-7B": (64, 8, 2048, 1024),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "Mixtral-8x7B": (8, 2, 4096, 14336),
}
GPU_TOKENS, CPU_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024), (1, 2, 4, 8)
CPU_MODELS = ("OLMoE-1B-7B", "Qwen3-30B-A3B")
TURNS, CHOICES, SEED = 15, 5, 0


def mixture(shape: tuple[int, int, int, int], bits: int, group_size: int, device: str) -> Any:
    """Packed experts as a loaded model has them."""
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from optq.layers import QuantLinear, fuse_experts
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
    experts.grouped_gemm = fuse_experts(*experts.linears())
    for layer in experts.modules():
        if isinstance(layer, QuantLinear):
            layer.prepare(torch.bfloat16)
    return experts.eval()


def products_alone(experts: Any, x: Any, chosen: Any) -> None:
    """What the experts cannot do without."""
    from torch.nn.functional import silu

    from optq.kernels import KERNELS

    for index in chosen.unique().tolist():
        first, last = experts.linear(index, "up_proj"), experts.linear(index, "down_proj")
        kernel = KERNELS[first.kernel_name]
        (_, joint, _), (_, down, _) = first.products()[-1], last.products()[0]
        up, gate = kernel.matmul(x[(chosen == index).any(-1)], joint).chunk(2, -1)
        kernel.matmul(silu(gate) * up, down)


def on_gpu(run: Callable[[], Any]) -> float:
    """Microseconds from the start of a call until the GPU is done."""
    import torch

    run()
    times = []
    for _ in range(TURNS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - started))
    return statistics.median(times)


def floor_us(shape: tuple[int, int, int, int], bits: int, group_size: int, inputs: list[Any], device: str) -> float:
    """The time to read the experts that get tokens, or for the arithmetic, whichever is longer; the mean of inputs."""
    _, choices, hidden, inner = shape
    total = 0.0
    for x, chosen, _ in inputs:
        rows, busy = x.shape[0] * choices, chosen.unique().numel()
        moved = sum(
            busy * bytes_moved(features, 0, bits, group_size) + 2 * rows * sum(features)
            for features in ((hidden, 2 * inner), (inner, hidden))
        )
        total += peaks(device).floor_seconds(moved, 2 * rows * 3 * hidden * inner)
    return 1e6 * total / len(inputs)


def measure(name: str, bits: int, group_size: int, all_tokens: tuple[int, ...]) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    count, choices, hidden, _ = SHAPES[name]
    experts = mixture(SHAPES[name], bits, group_size, device)
    grouped_gemm = experts.grouped_gemm
    found: dict[str, Any] = {}
    for tokens in all_tokens:
        inputs = []
        for _ in range(CHOICES):
            scores = torch.rand(tokens, count, device=device).topk(choices)
            x = torch.randn(tokens, hidden, device=device).bfloat16()
            inputs.append((x, scores.indices, scores.values.bfloat16()))

        def run(products: Any, inputs: Any = inputs) -> None:
            experts.grouped_gemm = products
            for arguments in inputs:
                experts(*arguments)

        def run_products(inputs: Any = inputs) -> None:
            for x, chosen, _ in inputs:
                products_alone(experts, x, chosen)

        with torch.no_grad():
            if gpu:
                times = {"one after the other": on_gpu(partial(run, None))}
                if grouped_gemm.why_not(tokens * choices, inputs[0][0]) is None:
                    times["at once"] = on_gpu(partial(run, grouped_gemm))
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        run(grouped_gemm)
                    times["at once, replayed"] = on_gpu(graph.replay)
            else:
                times = on_cpu({"one after the other": [partial(run, None)], "products alone": [run_products]})
        found[str(tokens)] = {
            "us": {way: round(taken / CHOICES, 1) for way, taken in times.items()},
            "floor_us": round(floor_us(SHAPES[name], bits, group_size, inputs, device), 1),
        }
        print(name, f"{tokens} tokens:", found[str(tokens)], flush=True)
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
    settings = {
        "group_size": arguments.group_size,
        "activations": "bfloat16",
        "unit": "us per layer; " + (f"median of {TURNS} turns" if gpu else "best of the turns"),
        "seed": SEED,
    }
    name = "experts-" + (torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu")
    results = record.read(name)  # what was measured of other models stays
    for model in arguments.models:
        results[f"{model}, {arguments.bits} bits"] = measure(
            model, arguments.bits, arguments.group_size, tuple(arguments.tokens)
        )
        record.write(name, settings, results, quiet=True)


if __name__ == "__main__":
    main()
