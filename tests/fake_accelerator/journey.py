# SPDX-License-Identifier: Apache-2.0
"""Tiny models on the fake device, in a process of its own: what was seen is printed as one line of JSON each.

python journey.py LIBRARY FOLDER '[{"model": "llama", …}, …]'
"""

import gc
import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import accelerator

DEVICES = 2
SETTINGS: dict[str, Any] = {
    "model": "llama",
    "effort": "fast",
    "config": {},
    "dtype": "float32",
    "used_in": None,  # the dtype that the quantized model is loaded in, if another one
    "present": 0,  # the current device
    "device_map": None,
    "limit": 0,  # memory of the device that quantizing may use, times what the journey before took
    "fault": None,  # of faults.py
    "used": True,  # and not only quantized
    "interpreted": False,  # Triton's programs run, in its interpreter; of all journeys of a process
}


PEAKS: dict[str, int] = {}


def main() -> None:
    library, folder, journeys = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    interpreted = any(asked.get("interpreted") for asked in journeys)
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))  # before anyone imports Triton
    fake = accelerator.install(library, devices=DEVICES)
    import torch

    import faults

    torch.set_num_threads(1)
    if interpreted:
        interpret()
    if "RANK" in os.environ:
        meet_over_the_host()
    for number, asked in enumerate(journeys):
        settings = {**SETTINGS, **asked}
        fake.exchange_device(settings["present"])
        fake.reset_counts()
        accelerator.WAITS.clear()
        found: dict[str, Any] = {}
        with faults.FAULTS[settings["fault"]]() if settings["fault"] else nullcontext():
            try:
                travel(fake, settings, folder / str(number), found)
            except Exception as error:  # whatever it is, the test is told
                found["raised"] = f"{type(error).__name__}: {error}"
        fake.set_limit(settings["present"], 0)
        gc.enable()
        gc.collect()
        print(json.dumps(found), flush=True)


def interpret() -> None:
    """Have Triton's interpreter run our programs on the device: without assembly, and in fewer and larger programs.

    It takes as long for eight rows of a weight as for sixty-four. Its own copies to the host are not counted.
    """
    from triton.runtime.interpreter import GridExecutor

    from interpreter import quicken
    from optq.gptq import columns
    from optq.kernels import triton_gpu

    quicken()
    execute = GridExecutor.__call__

    def uncounted(self: Any, *arguments: Any, **constants: Any) -> None:
        before = accelerator.WAITS.copy()
        execute(self, *arguments, **constants)
        accelerator.WAITS.clear()
        accelerator.WAITS.update(before)

    GridExecutor.__call__ = uncounted
    triton_gpu._takes_ptx = lambda device: False
    triton_gpu.TRIED_ROWS, triton_gpu.TRIED_COLUMNS = (3, 70), 256
    columns.FUSED_BLOCK, columns.FUSED_ROWS = 32, 64


def meet_over_the_host() -> None:
    """Have processes sum through gloo, by way of the host: NCCL is not in this torch."""
    import torch
    import torch.distributed as dist

    from optq import distributed

    all_reduce = dist.all_reduce

    def through_the_host(tensor: torch.Tensor, **settings: Any) -> None:
        host = tensor.cpu()
        all_reduce(host, **settings)
        tensor.copy_(host)

    dist.all_reduce = through_the_host
    dist.init_process_group = partial(dist.init_process_group, backend="gloo")
    distributed._group = cache(lambda: dist.new_group(timeout=distributed.PATIENCE, backend="gloo"))


def travel(fake: Any, asked: dict[str, Any], folder: Path, found: dict[str, Any]) -> None:
    import models
    import torch

    before = len(fake.mismatches())
    dense = models.create(asked["model"], folder / "dense", getattr(torch, asked["dtype"]))
    packed = quantize(fake, asked, dense, folder / "packed", found)
    if asked["used"]:
        use(asked, packed, folder, found)
    found["mismatches"] = fake.mismatches()[before:]


def waits() -> dict[str, int]:
    """By kind and line, since the last time."""
    found = {f"{what} @ {where}": times for (what, where), times in accelerator.WAITS.items()}
    accelerator.WAITS.clear()
    return found


def quantize(fake: Any, asked: dict[str, Any], dense: Path, packed: Path, found: dict[str, Any]) -> Path:
    import models
    import torch

    from optq import QuantLinear
    from optq.events import OutOfMemory, Started

    before = [fake.allocated(index) for index in range(DEVICES)]
    gc.disable()  # what refers to itself keeps the device's memory for long: that is to be seen
    taken = fake.peak(asked["present"]) - before[asked["present"]]
    fake.reset_peak(asked["present"])
    if asked["limit"]:
        PEAKS.setdefault("unlimited", taken)
        fake.set_limit(asked["present"], before[asked["present"]] + int(asked["limit"] * PEAKS["unlimited"]))
    else:
        PEAKS.clear()
    model = models.quantized(
        asked["model"],
        dense,
        asked["effort"],
        dtype=getattr(torch, asked["dtype"]),
        device_map=asked["device_map"],
        **asked["config"],
    )
    fake.set_limit(asked["present"], 0)
    log = model.hf_quantizer.log.events
    found |= {
        "linears": sum(isinstance(module, QuantLinear) for module in model.modules()),
        "started_on": next(event.device for event in log if isinstance(event, Started)),
        "homes": sorted({str(tensor.device) for tensor in model.state_dict().values()}),
        "events": Counter(type(event).__name__ for event in log),
        "remedies": [event.remedy for event in log if isinstance(event, OutOfMemory)],
        "peak": fake.peak(asked["present"]) - before[asked["present"]],
        "waits_while_quantizing": waits(),
    }
    found["digest_in_memory"] = models.digest_of(model)
    model.save_pretrained(packed)
    if os.environ.get("RANK", "0") == "0":  # the others write nothing
        found["digest"] = models.digest(packed)
    held = sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.is_cuda)
    del model, log
    if held or asked["interpreted"]:
        gc.collect()  # accelerate's hooks and a model refer to one another, and so do parts of Triton's interpreter
    after = [fake.allocated(index) for index in range(DEVICES)]
    found |= {
        "kept_bytes": sum(after) - sum(before),
        "held_bytes": held,
        "counts": {name: times for name, times in fake.counts().items() if not name.startswith("aten::")},
    }
    gc.enable()
    return packed


def use(asked: dict[str, Any], packed: Path, folder: Path, found: dict[str, Any]) -> None:
    """Load it on the device, and do what users do with a model."""
    import models
    import torch

    from optq import QuantLinear
    from optq.gptq import columns

    device = torch.device("cuda", asked["present"])
    dtype = getattr(torch, asked["used_in"] or asked["dtype"])
    kind = models.kind_of(asked["model"])
    exact = kind.from_pretrained(packed, dtype=torch.float32, device_map="cpu")
    model = kind.from_pretrained(packed, dtype=dtype, device_map=device)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    inputs = models.inputs(asked["model"])
    there = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.no_grad():
        wanted, got = exact(**inputs).logits, model(**there).logits
    found |= {
        "fused_columns_not_run": columns.why_not_fused(torch.device("cuda", torch.cuda.current_device())),
        "kernels": sorted({str(layer.kernel_name) for layer in layers}),
        "logits_on": str(got.device),
        "error": difference(got, wanted),
    }
    if asked["model"] in models.DECODERS:
        ids = there["input_ids"]
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            waits()
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            found["waits_per_step"] = waits()
        asking = {"max_new_tokens": 6, "do_sample": False}
        found["tokens"] = [
            each.generate(ids.to(each.device), attention_mask=torch.ones_like(ids.to(each.device)), **asking).tolist()
            for each in (model, exact)
        ]
    model.save_pretrained(folder / "again")
    found["digest_again"] = models.digest(folder / "again")
    layer = layers[0]
    x = torch.randn(3, layer.in_features, device=device, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    found["gradient_on"] = str(x.grad.device)
    found["error_in_a_server"] = as_served(layer, device, dtype)
    model.to("cpu")
    with torch.no_grad():
        moved = model(**inputs).logits
        model.to(device)
        back = model(**there).logits
    found |= {"same_after_moves": bool(torch.equal(back, got)), "error_on_cpu": difference(moved, wanted)}
    dense = model.dequantize()
    with torch.no_grad():
        found["error_dequantized"] = difference(dense(**there).logits, wanted)
    found["dense_on"] = sorted({str(parameter.device) for parameter in dense.parameters()})


def as_served(layer: Any, device: Any, dtype: Any) -> float:
    """The difference that the layer of the vLLM plugin makes, all of it but vLLM."""
    import torch

    from optq.vllm.weights import ArrivingWeight

    packed = layer.packed()
    arriving = ArrivingWeight(
        "a linear",
        outputs=packed.out_features,
        all_inputs=packed.in_features,
        inputs=slice(0, packed.in_features),
        zero_format=packed.checkpoint_format,
        device=device,
        dtype=dtype,
    )
    for name, tensor in packed.tensors().items():
        arriving.take(name, tensor.cpu(), None, lambda count: torch.arange(count))
    x = torch.randn(3, packed.in_features, device=device, dtype=dtype)
    waits()
    product = arriving.product()
    waits()
    served = product(x)
    assert not waits()  # of CUDA graphs' making
    return difference(served, x.float().cpu() @ packed.columns(0, packed.out_features).cpu())


def difference(found: Any, wanted: Any) -> float:
    """Relative, of the logits of all tokens."""
    return float((found.float().cpu() - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    main()
