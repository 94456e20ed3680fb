# SPDX-License-Identifier: Apache-2.0
"""Commands that make a checkpoint, say what making it will take, or publish it."""

import argparse
import json
import logging
from dataclasses import asdict
from typing import Any

from optq.config.field import Field
from optq.config.fields import FIELDS, SECTIONS, with_preset
from optq.datasets import check_sources
from optq.errors import ConfigError

from .command import DONE, RESOURCES, command
from .loading import add_loading, add_source, loading, positive
from .printing import as_json, print_either, print_json

logger = logging.getLogger(__name__)

DEFAULT_BITS = 4
METAVARS: dict[Any, str] = {int: "N", float: "X", dict: "JSON", list: "JSON"}


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The fields of `GPTQConfig`. Defaults are its own: an option that is not given is not passed on."""
    parser.add_argument(
        "--model", "--model-name-or-path", required=True, metavar="ID_OR_DIR", help="the model to quantize"
    )
    for section in SECTIONS:
        group = parser.add_argument_group(section.lower())
        for field in FIELDS.values():
            if field.section == section and field.flags:
                _add_field(group, field)
    add_loading(parser)


def _add_field(group: Any, field: Field) -> None:
    default = DEFAULT_BITS if field.name == "bits" else field.shown_default
    shown = f"{field.help} ({default})".replace("`", "").replace("%", "%%")
    kind: dict[str, Any] = {"metavar": METAVARS.get(field.kind, field.name.rpartition("_")[2].upper())}
    if field.choices:
        kind["metavar"] = f"{{{','.join(map(str, field.choices))}}}"
    if field.kind is bool:
        kind = {"action": argparse.BooleanOptionalAction}
    elif field.kind in METAVARS:
        kind["type"] = _json if METAVARS[field.kind] == "JSON" else field.kind
    action = group.add_argument(*field.flags, dest=field.name, default=argparse.SUPPRESS, help=shown, **kind)
    if field.choices:
        action.completer = lambda **_: map(str, field.choices)  # of argcomplete


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error


def _config(arguments: argparse.Namespace) -> Any:
    given = {name: value for name, value in vars(arguments).items() if name in FIELDS}
    for name, value in given.items():  # before what takes seconds to import
        FIELDS[name].checked(value)
    given = with_preset(given)
    check_sources(given.get("dataset"))
    from optq import GPTQConfig

    config = GPTQConfig(**{"bits": DEFAULT_BITS, **given})
    if config.serving is not None and "group_size" not in given:
        from optq.api.check import servable_group_size

        size = servable_group_size(arguments.model, config, config.serving, **loading(arguments))
        if size not in (None, config.group_size):
            logger.info("--group-size %d: with %d, %s would not read it.", size, config.group_size, config.serving)
            config.group_size = size
    return config


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="OUT",
        help="a new or empty folder, or one that an interrupted run left",
    )
    parser.add_argument("--out-path", dest="output", default=argparse.SUPPRESS, metavar="OUT", help="the same")
    _add_settings(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what it will take, as `gptq plan` does")
    hub = parser.add_argument_group("publishing")
    hub.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the result, to a repository claimed at once")
    _add_private(hub)


def _add_private(parser: Any) -> None:
    parser.add_argument("--private", action="store_true", help="the repository is to be seen by its owners only")


@command(
    "gptq",
    "Quantize a model with GPTQ to a folder that vLLM, SGLang, GPTQModel and transformers read. "
    "Called again after an interruption, it goes on where it was.",
    _add_export,
    "--model org/model --dataset wikitext2 out",
    "--model org/model --dataset my.jsonl --bits 4 --group-size 64 out",
    "--model org/model --scheme W4A16 --for vllm out",
    "--model org/model --fit 8GiB --context-length 16384 out",
    "--model org/model --dataset wikitext2:0.5,code:0.5 --effort max out",
    "--model org/model --dry-run out",
)
def export(arguments: argparse.Namespace) -> int:
    if "output" not in arguments:
        raise ConfigError("The folder for the result was not named: add OUT, a new or empty one, to the command.")
    if arguments.dry_run:
        arguments.tensor_parallel = 1
        return plan.run(arguments)
    if arguments.private and not arguments.push_to_hub:
        raise ConfigError(
            "--private says how --push-to-hub USER/NAME uploads, which was not given. Give both or none."
        )
    config, access = _config(arguments), {"private": arguments.private, "token": arguments.token}
    import optq
    from optq.api.push import claim
    from optq.events import LOG_NAME, Quality, RunFinished, read_events
    from optq.report import next_steps, read_run

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
        run = read_run(folder) if (folder / LOG_NAME).exists() else None  # else the log was wanted elsewhere
        for number, step in enumerate(next_steps(run) if run is not None else ()):
            logger.info("%s%s", "To come closer to the original:\n  " if number == 0 else "  ", step)
    return DONE


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser)
    parser.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that will serve it together (1)"
    )


@command(
    "plan",
    "Say what quantizing a model will take and give, before any weight is read.",
    _add_plan,
    "--model org/model --dataset wikitext2",
    "--model org/model --bits 3 --group-size 64 --json",
)
def plan(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    import optq

    estimate = optq.plan(arguments.model, config, tensor_parallel=arguments.tensor_parallel, **loading(arguments))
    if arguments.json:
        linears = [
            {"out_features": out, "in_features": columns, "count": count, **as_json(scheme)}
            for (out, columns, scheme), count in estimate.linears.items()
        ]
        print_json({**as_json(estimate), "linears": linears, "fits": estimate.fits, "advice": estimate.advice})
    else:
        print(estimate)
    return DONE if estimate.fits else RESOURCES


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


@command(
    "convert",
    "Write a quantized checkpoint in another format. Exact: no weight changes, or it is refused.",
    _add_convert,
    "autogptq-checkpoint out --to gptq --without-desc-act",
    "model.Q4_0.gguf out --to gptq",
    "out dense --to dense",
)
def convert(arguments: argparse.Namespace) -> int:
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


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="ID_OR_DIR", help="a GPTQ checkpoint of any tool")
    parser.add_argument("output", metavar="OUT", help="a new or empty folder")
    add_source(parser)


@command(
    "onnx",
    "Write a GPTQ checkpoint as an ONNX model that onnxruntime runs with its packed weights.",
    _add_onnx,
    "out onnx-out",
)
def onnx(arguments: argparse.Namespace) -> int:
    import optq

    folder = optq.export_onnx(arguments.model, output_dir=arguments.output, **loading(arguments))
    print_either(arguments, f"{folder} holds model.onnx now, for onnxruntime.", folder=folder)
    return DONE


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a finished export")
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; is created if it does not exist")
    _add_private(parser)
    parser.add_argument("--token", metavar="TOKEN", help="one that may write; by default that of `hf auth login`")


@command(
    "push",
    "Upload a finished export to the Hub. Called again after an interruption, it goes on where it was.",
    _add_push,
    "out me/model-4bit --private",
)
def push(arguments: argparse.Namespace) -> int:
    import optq

    url = optq.push(arguments.folder, arguments.repo_id, private=arguments.private, token=arguments.token)
    print_either(arguments, f"{url} holds {arguments.folder} now.", folder=arguments.folder, url=url)
    return DONE
