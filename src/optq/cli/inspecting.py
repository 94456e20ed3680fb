# SPDX-License-Identifier: Apache-2.0
"""Commands that say what a checkpoint is and how it was made: inspect, kernels, report and card."""

import argparse
from pathlib import Path

from .command import DONE, MODEL, command
from .loading import add_loading, add_source, loading, positive
from .printing import as_json, print_either, print_json, print_table


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="ID_OR_DIR", help="a checkpoint, quantized or dense")
    parser.add_argument(
        "--tensor-parallel", type=positive, default=1, metavar="N", help="GPUs that serve it together (1)"
    )
    parser.add_argument(
        "--reader",
        type=_reader,
        action="append",
        default=[],
        metavar="NAME=VERSION",
        help="answer for this version of a reader, as vllm=0.29; may be repeated (the newest that is known)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="list all that is wrong with it, and do not stop at the first"
    )
    add_source(parser)


def _reader(text: str) -> tuple[str, str]:
    name, _, version = text.partition("=")
    if not version:
        raise argparse.ArgumentTypeError(f"{text!r} names no version; say vllm=0.32, for example")
    return name, version


@command(
    "inspect",
    "Say what a checkpoint holds, who reads it and why others do not, and whether its bytes are what its "
    "labels say. Reads headers and a few small tensors.",
    _add_inspect,
    "out",
    "out --reader vllm=0.29 --tensor-parallel 2",
)
def inspect(arguments: argparse.Namespace) -> int:
    import optq
    from optq.readers import rules_of

    versions = dict(arguments.reader)
    found = optq.inspect(
        arguments.model,
        tensor_parallel=arguments.tensor_parallel,
        versions=versions,
        verify=arguments.verify,
        **loading(arguments),
    )
    if arguments.json:
        linears = [
            {"kind": kind, "out_features": out, "in_features": columns, "count": count, **as_json(scheme)}
            for (kind, out, columns, scheme), count in found.linears.items()
        ]
        config = None if found.config is None else found.config.to_dict()
        print_json({**as_json(found), "config": config, "linears": linears})
        return MODEL if found.contradictions else DONE
    shape = f"{found.bits_per_weight:.2f} bits per weight, {found.size_gib:.2f} GiB"
    if found.config is None:
        print(f"{found.model}: not quantized; {shape}")
        return DONE
    print(f"{found.model}: {found.config.format}, {'symmetric' if found.config.sym else 'asymmetric'}; {shape}")
    print_table(
        "quantized linears",
        ("kind", "count", "outputs", "inputs", "bits", "group"),
        [
            (kind, str(count), str(out), str(columns), str(scheme.bits), str(scheme.group_size))
            for (kind, out, columns, scheme), count in found.linears.items()
        ],
    )
    for kind, count in found.dense.items():
        print(f"not quantized: {count} x {kind}")
    for reader, reasons in found.refused.items():
        name = f"{reader} {versions.get(reader) or rules_of(reader).versions[-1]}"
        print(f"{name} reads it" if not reasons else f"{name} does not read it:")
        for reason in reasons:
            print(f"  {reason}")
    for contradiction in found.contradictions:
        print(f"WRONG: {contradiction}")
    return MODEL if found.contradictions else DONE


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="ID_OR_DIR", help="a GPTQ checkpoint")
    parser.add_argument("--device", metavar="DEVICE", help="where it will run (the accelerator, if there is one)")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="a kernel by name (auto)")
    add_loading(parser)


@command(
    "kernels",
    "Say which kernel multiplies each linear here, and why the others do not.",
    _add_kernels,
    "out --dtype bfloat16",
)
def kernels(arguments: argparse.Namespace) -> int:
    import optq

    found = optq.kernel_choices(
        arguments.model, device=arguments.device, backend=arguments.backend, **loading(arguments)
    )
    if arguments.json:
        print_json(found)
        return DONE
    print_table(
        f"{arguments.model}: what multiplies its linears",
        ("kind", "count", "outputs", "inputs", "bits", "kernel"),
        [(x.kind, str(x.count), str(x.out_features), str(x.in_features), str(x.bits), x.kernel) for x in found],
    )
    for kernel, reason in dict.fromkeys(refusal for x in found for refusal in x.refused.items()):
        print(f"not {kernel}: {reason}")
    return DONE


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output folders of exports, also unfinished ones")
    parser.add_argument("--output", metavar="DIR", help="where the page goes (the folder `report` in the first run's)")


@command(
    "report",
    "Make a page with pictures of one or several runs: which layers hurt, where bits, time and memory went.",
    _add_report,
    "out",
    "out-4bit out-3bit --output report",
)
def report(arguments: argparse.Namespace) -> int:
    from optq.report import report

    folders = [Path(run) for run in arguments.runs]
    written = report(folders, Path(arguments.output) if arguments.output else folders[0] / "report")
    print_either(arguments, str(written.page), page=written.page, pictures=written.pictures)
    return DONE


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a finished export")
    parser.add_argument("--repo-id", metavar="USER/NAME", help="what it will be called on the Hub")


@command(
    "card",
    "Print a model card made from what the run measured, as every export writes one.",
    _add_card,
    "out --repo-id me/model-4bit",
)
def card(arguments: argparse.Namespace) -> int:
    import optq

    text = optq.card(arguments.folder, repo_id=arguments.repo_id)
    print_either(arguments, text, card=text)
    return DONE
