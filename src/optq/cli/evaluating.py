# SPDX-License-Identifier: Apache-2.0
"""Commands that judge models: evaluate, compare and bench."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optq.datasets import check_sources
from optq.errors import ConfigError, QualityError, counted

from .command import DONE, command
from .loading import add_loading, loading, positive
from .printing import as_json, print_json, print_table

if TYPE_CHECKING:
    from optq.api.evaluate import Evaluation
    from optq.evaluation import HarnessComparison


def _add_text(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("what they are measured on")
    text.add_argument("--dataset", metavar="DATA", help="as for calibration; of a name, its part for evaluation")
    text.add_argument("--window", type=positive, metavar="N", help="tokens read at once (2048, or the model's limit)")
    text.add_argument("--stride", type=positive, metavar="N", help="of the sliding window (512)")
    text.add_argument("--tokens", type=positive, metavar="N", help="of the text to use at most, from its start (all)")
    text.add_argument("--tokenizer", metavar="ID_OR_DIR", help="if it is not in the model's folder")
    text.add_argument("--answers", action="store_true", help="show what each model makes of a few prompts")
    text.add_argument("--fail-above", type=float, metavar="RATIO", help="exit code 4 above this perplexity ratio")
    parser.add_argument("--device", metavar="DEVICE", help="where models run (the accelerator, if there is one)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    add_loading(parser)


def _measured(arguments: argparse.Namespace, models: Sequence[str], baseline: str | None) -> "list[Evaluation]":
    check_sources(arguments.dataset)  # before what takes seconds to import
    import optq

    names = ("dataset", "window", "stride", "tokens", "tokenizer", "device")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return optq.compare(models, baseline=baseline, answers=arguments.answers, **given, **loading(arguments))


def _print_evaluations(arguments: argparse.Namespace, rows: "list[Evaluation]") -> int:
    if arguments.json:
        print_json([{**as_json(row), "verdict": row.verdict} for row in rows])
    else:
        compared = any(row.comparison for row in rows)
        columns = ["model", "bits per weight", "GiB", *(f"perplexity, {name}" for name in rows[0].perplexities)]
        print_table(
            "",
            [*columns, *(("KL, nats", "same top token", "verdict") if compared else ())],
            [_cells(row, compared) for row in rows],
            markdown=arguments.markdown,
        )
        for place, prompt in enumerate(_prompts() if arguments.answers else ()):
            print(f"\n> {prompt!r}")
            for row in rows:
                print(f"  {row.model}: {row.answers[place]!r}")
    if arguments.fail_above is not None:
        _refuse_above(arguments.fail_above, rows)
    return DONE


def _refuse_above(limit: float, rows: "list[Evaluation]") -> None:
    ratios = {row.model: row.comparison.perplexity_ratio for row in rows if row.comparison}
    worse = {model: ratio for model, ratio in ratios.items() if ratio is None or not ratio <= limit}
    if worse:
        told = ", ".join(
            f"{'unknown' if ratio is None else f'{ratio:.4g}'} for {model}" for model, ratio in worse.items()
        )
        raise QualityError(f"--fail-above {limit:g} was asked for; the perplexity, times the original's, is {told}.")


def _prompts() -> tuple[str, ...]:
    from optq.api.evaluate import PROMPTS

    return PROMPTS


def _cells(row: "Evaluation", compared: bool) -> list[str]:
    cells = [row.model, f"{row.bits_per_weight:.2f}", f"{row.size_gib:.3f}"]
    cells += [f"{found.perplexity:.3f}" for found in row.perplexities.values()]
    if compared and row.comparison is not None:
        cells += [f"{row.comparison.divergence:.4f}", f"{row.comparison.agreement:.1%}", row.verdict or ""]
    elif compared:
        cells += ["", "", "the original"]
    return cells


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="ID_OR_DIR", help="a model, quantized or dense")
    parser.add_argument("--baseline", metavar="ID_OR_DIR", help="the original that it is compared with")
    _add_text(parser)


@command(
    "evaluate",
    "Measure a model: perplexity by two protocols and, beside the original, KL divergence and agreement.",
    _add_evaluate,
    "out --baseline org/model --dataset wikitext2",
    "out --dataset my.txt --tokens 65536 --json",
)
def evaluate(arguments: argparse.Namespace) -> int:
    if arguments.fail_above is not None and arguments.baseline is None:
        raise ConfigError("--fail-above compares with the original: name it as --baseline.")
    models = [arguments.model] if arguments.baseline is None else [arguments.baseline, arguments.model]
    return _print_evaluations(arguments, _measured(arguments, models, arguments.baseline))


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="ID_OR_DIR",
        help="the original first, then any number of others; or two results_*.json of lm-evaluation-harness",
    )
    parser.add_argument("--lm-eval", metavar="TASKS", help="run lm-evaluation-harness on these tasks, commas between")
    _add_text(parser)


@command(
    "compare",
    "Measure any number of models by the same protocols, beside the original.",
    _add_compare,
    "org/model out other-tools-out --dataset wikitext2",
    "org/model out --dataset self --tokens 1024 --answers",
    "org/model out --fail-above 1.1",
)
def compare(arguments: argparse.Namespace) -> int:
    if len(arguments.models) < 2:
        raise ConfigError("Name at least two models to compare, the original first; `gptq evaluate` measures one.")
    of_tasks = arguments.lm_eval is not None or all(map(_is_harness_result, arguments.models))
    if of_tasks and arguments.fail_above is not None:
        raise ConfigError("--fail-above is a ratio of perplexities; results of lm-evaluation-harness are scores.")
    if arguments.lm_eval is not None:
        return _print_tasks(arguments, [_run_harness(model, arguments) for model in arguments.models])
    if of_tasks:
        from optq.evaluation import read_harness_results

        return _print_tasks(arguments, [read_harness_results(Path(model)) for model in arguments.models])
    return _print_evaluations(arguments, _measured(arguments, arguments.models, arguments.models[0]))


def _is_harness_result(name: str) -> bool:
    path = Path(name)
    return path.suffix == ".json" or (path.is_dir() and not (path / "config.json").exists())


def _run_harness(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigError("--lm-eval needs lm-evaluation-harness: pip install lm-eval.") from error
    options = {"pretrained": model, "dtype": "auto", **loading(arguments)}
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf", model_args=options, tasks=arguments.lm_eval.split(","), device=arguments.device
    )
    return found


def _print_tasks(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> int:
    from optq.evaluation import compare_harness

    tables = [compare_harness(results[0], other) for other in results[1:]]
    if arguments.json:
        print_json([{**as_json(table), "kept": table.kept, "verdict": table.verdict} for table in tables])
        return DONE
    for name, table in zip(arguments.models[1:], tables, strict=True):
        _print_task_table(name, table, markdown=arguments.markdown)
    return DONE


def _print_task_table(name: str, table: "HarnessComparison", *, markdown: bool) -> None:
    print_table(
        name,
        ("task", "metric", "original", "quantized", "change", "standard error", ""),
        [
            (
                task.name,
                task.metric,
                f"{task.original:.4f}",
                f"{task.quantized:.4f}",
                f"{task.quantized - task.original:+.4f}",
                "" if task.margin is None else f"{task.margin:.4f}",
                "loses more than 2 %" if task.is_large_loss else "",
            )
            for task in table.tasks
        ],
        markdown=markdown,
    )
    print(f"on average {table.kept:.1%} of the original's scores is left: {table.verdict}")
    if table.left_out:
        print(f"not tried on both: {', '.join(table.left_out)}")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="ID_OR_DIR", help="models, quantized or dense")
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[1, 16, 32, 64], metavar="N", help="(1 16 32 64)"
    )
    parser.add_argument("--prompt", type=positive, default=128, metavar="TOKENS", help="length of the prompt (128)")
    parser.add_argument("--new", type=positive, default=32, metavar="TOKENS", help="tokens to generate (32)")
    parser.add_argument("--runs", type=positive, default=3, metavar="N", help="of which medians are taken (3)")
    parser.add_argument("--device", metavar="DEVICE", help="where models run (the accelerator, if there is one)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    add_loading(parser)


@command(
    "bench",
    "Measure how fast models read prompts and generate, as `generate` delivers it.",
    _add_bench,
    "org/model out --batch-sizes 1 16 --dtype bfloat16",
)
def bench(arguments: argparse.Namespace) -> int:
    import optq

    speeds = {
        model: optq.bench(
            model,
            batch_sizes=arguments.batch_sizes,
            prompt=arguments.prompt,
            new=arguments.new,
            runs=arguments.runs,
            device=arguments.device,
            **loading(arguments),
        )
        for model in arguments.models
    }
    if arguments.json:
        print_json(speeds)
        return DONE
    print_table(
        f"prompts of {counted(arguments.prompt, 'token')}, {counted(arguments.new, 'new token')}, "
        f"medians of {counted(arguments.runs, 'run')}",
        (
            "model",
            "batch",
            "prompt tokens/s",
            "first token, ms",
            "new tokens/s",
            "a step, ms: 50 %",
            "90 %",
            "99 %",
            "peak GiB",
        ),
        [
            (
                model,
                str(speed.batch),
                f"{speed.prompt_tokens_per_second:.0f}",
                f"{1000 * speed.first_seconds:.0f}",
                f"{speed.new_tokens_per_second:.1f}",
                *(f"{1000 * seconds:.1f}" for seconds in speed.step_seconds),
                "" if speed.peak_gib is None else f"{speed.peak_gib:.2f}",
            )
            for model, measured in speeds.items()
            for speed in measured
        ],
        markdown=arguments.markdown,
    )
    return DONE
