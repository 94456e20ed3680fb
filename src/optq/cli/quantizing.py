# SPDX-License-Identifier: Apache-2.0
"""Commands that make a checkpoint, say what making it will take, or publish it."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from optq.errors import ConfigError

from .command import DONE, RESOURCES, Command
from .loading import add_loading, add_source, loading, positive
from .printing import as_json, print_either, print_json


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The fields of `GPTQConfig`. Defaults are its own: an option that is not given is not passed on."""
    parser.add_argument("--model", required=True, metavar="ID_OR_DIR", help="the model to quantize")
    data = parser.add_argument_group("calibration data")
    data.add_argument(
        "--dataset",
        "--data-path",
        metavar="DATA",
        help="a name (wikitext2, code, …), a file or folder, a mix (wikitext2:0.5,./my.jsonl:0.5), or self: text that "
        "the model writes (self)",
    )
    data.add_argument("--num-samples", type=int, metavar="N", help="sequences to use at most (128, or all of a list)")
    data.add_argument("--seq-len", "--max-len", type=int, metavar="N", help="tokens of one at most (2048, or fewer)")
    data.add_argument("--tokenizer", metavar="ID_OR_DIR", help="if it is not in the model's folder")
    data.add_argument("--seed", type=int, metavar="N", help="chooses the sequences where there are more (0)")

    grid = parser.add_argument_group("what is stored")
    grid.add_argument("--bits", type=int, default=4, metavar="N", help="2, 3, 4 or 8 (4)")
    grid.add_argument(
        "--group-size", type=int, metavar="N", help="columns that share a scale; -1 for whole rows (128)"
    )
    grid.add_argument("--sym", action=argparse.BooleanOptionalAction, help="zeros in the middle of the grid (yes)")
    grid.add_argument("--desc-act", action=argparse.BooleanOptionalAction, help="groups in activation order (no)")
    grid.add_argument(
        "--target-bits-per-weight", type=float, metavar="BITS", help="choose bits for each linear instead"
    )
    grid.add_argument("--target-size-gib", type=float, metavar="GIB", help="the same, as the size of all weights")
    grid.add_argument("--serving", metavar="SERVER", help="vllm: refuse, and do not choose, what it does not read")
    grid.add_argument("--format", metavar="FORMAT", help="gptq (v1), which all read, or gptq_v2")
    grid.add_argument("--lm-head", action="store_true", default=None, help="quantize the output head too")
    grid.add_argument("--dynamic", type=_json, metavar="JSON", help="""by layer: '{"+:.*down_proj": {"bits": 8}}'""")

    work = parser.add_argument_group("how it is made")
    work.add_argument("--effort", metavar="EFFORT", help="fast, default or max: how much time may be spent")
    work.add_argument("--batch-size", type=int, metavar="N", help="sequences per forward (as many as are 2048 tokens)")
    work.add_argument("--damp-percent", type=float, metavar="FRACTION", help="damping of the Hessian (0.1)")
    work.add_argument(
        "--calibrate-all-experts", action="store_true", default=None, help="show every expert all tokens"
    )
    work.add_argument(
        "--quality-gate", metavar="GATE", help="warn, raise or off: if the result is far from the original"
    )
    work.add_argument("--max-perplexity-ratio", type=float, metavar="RATIO", help="how far that is (1.5)")
    work.add_argument("--device", metavar="DEVICE", help="where blocks are solved (the accelerator, if there is one)")
    work.add_argument(
        "--activation-memory",
        type=_json,
        metavar="JSON",
        help="""for what waits between blocks: '{"0": "8GiB", "cpu": "32GiB"}' (40 %% of what is free)""",
    )
    add_loading(parser)


_FIELDS = (
    *("bits", "group_size", "sym", "desc_act", "target_bits_per_weight", "target_size_gib", "serving", "format"),
    *("lm_head", "dynamic", "effort", "batch_size", "damp_percent", "calibrate_all_experts", "quality_gate"),
    *("max_perplexity_ratio", "device", "activation_memory", "dataset", "num_samples", "tokenizer", "seed"),
)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error


def _config(arguments: argparse.Namespace) -> Any:
    from optq import GPTQConfig

    given = {field: getattr(arguments, field) for field in _FIELDS if getattr(arguments, field) is not None}
    if arguments.seq_len is not None:
        given["model_seqlen"] = arguments.seq_len
    return GPTQConfig(**given)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", help="a new or empty folder, or one that an interrupted run left")
    _add_settings(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what it will take, as `gptq plan` does")
    hub = parser.add_argument_group("publishing")
    hub.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the result, to a repository claimed at once")
    _add_private(hub)


def _add_private(parser: Any) -> None:
    parser.add_argument("--private", action="store_true", help="the repository is to be seen by its owners only")


def _export(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        arguments.tensor_parallel = 1
        return _plan(arguments)
    if arguments.private and not arguments.push_to_hub:
        raise ConfigError(
            "--private says how --push-to-hub USER/NAME uploads, which was not given. Give both or none."
        )
    import optq
    from optq.api.push import claim
    from optq.events import LOG_NAME, Quality, RunFinished, read_events

    config, access = _config(arguments), {"private": arguments.private, "token": arguments.token}
    if arguments.push_to_hub:
        claim(arguments.push_to_hub, **access)  # a wrong name or token is found before the work, not after
    folder = optq.quantize(arguments.model, config, output_dir=arguments.output, **loading(arguments))
    url = optq.push(folder, arguments.push_to_hub, **access) if arguments.push_to_hub else None
    if arguments.json:
        events = [event for event in read_events(folder / LOG_NAME) if isinstance(event, (Quality, RunFinished))]
        print_json({"folder": folder, "url": url, **{event.event: asdict(event) for event in events}})
    else:
        if url:
            print(f"{url} holds it now.")
        print(f"{folder} is finished. How good it is: optimum-cli gptq compare {arguments.model} {folder}")
    return DONE


EXPORT = Command(
    name="gptq",
    summary="Quantize a model with GPTQ to a folder that vLLM, SGLang, GPTQModel and transformers read. "
    "Called again after an interruption, it goes on where it was.",
    add_arguments=_add_export,
    run=_export,
)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that will serve it together (1)"
    )


def _plan(arguments: argparse.Namespace) -> int:
    import optq

    estimate = optq.plan(
        arguments.model, _config(arguments), tensor_parallel=arguments.tensor_parallel, **loading(arguments)
    )
    if arguments.json:
        linears = [
            {"out_features": out, "in_features": columns, "count": count, **as_json(scheme)}
            for (out, columns, scheme), count in estimate.linears.items()
        ]
        print_json({**as_json(estimate), "linears": linears, "fits": estimate.fits, "advice": estimate.advice})
    else:
        print(estimate)
    return DONE if estimate.fits else RESOURCES


PLAN = Command(
    name="plan",
    summary="Say what quantizing a model will take and give, before any weight is read.",
    add_arguments=_add_plan,
    run=_plan,
)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="ID_OR_DIR",
        help="a checkpoint of GPTQ, by any tool, of AWQ or compressed-tensors; or FILE.gguf",
    )
    parser.add_argument("output", metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="gptq (v1), gptq_v2, compressed-tensors, or dense: an ordinary model",
    )
    parser.add_argument(
        "--without-desc-act", action="store_true", help="write desc_act=false, if every group is a run of columns"
    )
    parser.add_argument("--gguf-file", metavar="NAME", help="convert this GGUF file of the folder or repository")
    add_source(parser)


def _convert(arguments: argparse.Namespace) -> int:
    import optq

    folder = optq.convert(
        arguments.model,
        output_dir=arguments.output,
        to=arguments.to,
        without_desc_act=arguments.without_desc_act,
        gguf_file=arguments.gguf_file,
        **loading(arguments),
    )
    print_either(arguments, f"{folder} holds the same weights as {arguments.to}", folder=folder, to=arguments.to)
    return DONE


CONVERT = Command(
    name="convert",
    summary="Write a quantized checkpoint in another format. Exact: no weight changes, or it is refused.",
    add_arguments=_add_convert,
    run=_convert,
)


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="ID_OR_DIR", help="a GPTQ checkpoint of any tool")
    parser.add_argument("output", metavar="OUT", help="a new or empty folder")
    add_source(parser)


def _onnx(arguments: argparse.Namespace) -> int:
    import optq

    folder = optq.export_onnx(arguments.model, output_dir=arguments.output, **loading(arguments))
    print_either(arguments, f"{folder} holds model.onnx now, for onnxruntime.", folder=folder)
    return DONE


ONNX = Command(
    name="onnx",
    summary="Write a GPTQ checkpoint as an ONNX model that onnxruntime runs with its packed weights.",
    add_arguments=_add_onnx,
    run=_onnx,
)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a finished export")
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; is created if it does not exist")
    _add_private(parser)
    parser.add_argument("--token", metavar="TOKEN", help="one that may write; by default that of `hf auth login`")


def _push(arguments: argparse.Namespace) -> int:
    import optq

    url = optq.push(arguments.folder, arguments.repo_id, private=arguments.private, token=arguments.token)
    print_either(arguments, f"{url} holds {arguments.folder} now.", folder=arguments.folder, url=url)
    return DONE


PUSH = Command(
    name="push",
    summary="Upload a finished export to the Hub. Called again after an interruption, it goes on where it was.",
    add_arguments=_add_push,
    run=_push,
)
