# SPDX-License-Identifier: Apache-2.0
"""The page of a report: what happened in words and tables, and the pictures, in one file that needs no network."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from optq.errors import OutputError, ReportError, counted
from optq.events import BlockQuantized, Failed, Gate, LinearQuantized, Quality, RunFinished
from optq.version import how_to_install

from .next_steps import next_steps
from .run import Run, bits_per_weight, notes_on, percent, read_run

if TYPE_CHECKING:
    from .figures import Picture

WORST = 10


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files that `report` has written.

    Args:
        page: the HTML file; it holds the pictures as well.
        pictures: PNG files beside it.
        runs: the facts on the page.
    """

    page: Path
    pictures: tuple[Path, ...]
    runs: tuple[Run, ...]


def report(folders: Sequence[Path], output: Path) -> Report:
    """Write `output`/report.html and its pictures: which layers hurt, where bits, time and memory went.

    Args:
        folders: output folders of `optq.quantize`, also of runs that failed or go on. Several are compared.
        output: is created; earlier reports in it are overwritten.
    Raises:
        ReportError: a folder holds no readable log, or matplotlib is not installed.
        OutputError: `output` cannot be written, or lies in the folder of a run that is not finished.
    """
    if not folders:
        raise ReportError("A report was asked for, but of no run. Name the output folder of at least one.")
    try:
        import jinja2

        from . import figures
    except ImportError as error:
        raise ReportError(f"A report needs the package {error.name}: {how_to_install('report')}.") from error
    runs = [read_run(Path(folder)) for folder in folders]
    for run in runs:
        if run.size_gib is None and run.folder.resolve() in (output.resolve(), *output.resolve().parents):
            raise OutputError(
                f"The report was to go to {str(output)!r}, but {str(run.folder)!r} holds no finished checkpoint, and "
                "the run could not go on there beside files that are not its own. Name a folder outside of it."
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        drawn = [_draw(run, output, number) for number, run in enumerate(runs, 1)]
        comparable = len([run for run in runs if run.standing is not None]) > 1
        compared = figures.draw_comparison(runs, output / "comparison.png") if comparable else None
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
        page = output / "report.html"
        page.write_text(
            template.render(
                title=f"Quantization of {runs[0].model}" if len(runs) == 1 else f"{len(runs)} quantizations",
                comparison=_comparison(runs, compared) if len(runs) > 1 else None,
                runs=[_facts(run, pictures) for run, pictures in zip(runs, drawn, strict=True)],
                embedded=lambda file: base64.b64encode(file.read_bytes()).decode(),
            ).lstrip(),
            encoding="utf-8",
        )
    except OSError as error:
        raise OutputError(f"The report could not be written to {str(output)!r}: {error}.") from error
    pictures = [picture.file for found in drawn for picture in found] + ([compared.file] if compared else [])
    return Report(page=page, pictures=tuple(pictures), runs=tuple(runs))


def _draw(run: Run, output: Path, number: int) -> list["Picture"]:
    """The pictures that the run has something for."""
    from . import figures

    linears = run.linears
    wanted = {
        "loss": (any(linear.relative_loss for linear in linears), figures.draw_loss),
        "bits": (len({(linear.bits, linear.group_size) for linear in linears}) > 1, figures.draw_bits),
        "experts": (any(linear.expert is not None for linear in linears), figures.draw_experts),
        "damping": (any(linear.is_damped for linear in linears), figures.draw_damping),
        "dead-columns": (any(linear.dead_columns for linear in linears), figures.draw_dead_columns),
        "time": (bool(run.events_of(BlockQuantized)), figures.draw_time_and_memory),
    }
    return [draw(run, output / f"run{number}-{name}.png") for name, (is_wanted, draw) in wanted.items() if is_wanted]


def _facts(run: Run, pictures: list["Picture"]) -> dict[str, Any]:
    """What the template shows of a run."""
    started = run.started
    calibration = started.calibration
    return {
        "name": run.name,
        "subtitle": f"{started.utc.replace('T', ' ').replace('+00:00', ' UTC')} · "
        f"{started.device} · calibrated on {counted(calibration['samples'], 'sample')}, "
        f"{counted(calibration['tokens'], 'token')} ({calibration['source']})",
        "verdict": _verdict(run),
        "hurting": _hurting(run),
        "next_steps": next_steps(run),
        "tiles": _tiles(run),
        "notes": notes_on(run),
        "pictures": pictures,
        "worst_columns": [
            "linear",
            "relative loss",
            "times its kind's median",
            "rounded to nearest",
            "bits",
            "group",
            "damping",
            "tokens",
        ],
        "worst": [
            [
                linear.linear,
                percent(linear.relative_loss),
                _times_its_kind(run, linear),
                percent(linear.rtn_relative_loss),
                linear.bits,
                linear.group_size,
                f"{linear.damping:g}",
                linear.tokens,
            ]
            for linear in sorted(run.linears, key=lambda linear: -linear.relative_loss)[:WORST]
        ],
        "block_columns": ["block", "linears", "mean relative loss", "worst", "bits per weight", "seconds", "peak GiB"],
        "blocks": _block_rows(run),
        "expert_columns": ["experts of", "inputs", "fewest tokens", "median", "most", "fewer than inputs", "none"],
        "experts": _expert_rows(run),
        "recipe": [
            (key, value) for key, value in sorted(run.info.items()) if isinstance(value, (str, int, float, bool))
        ],
    }


def _verdict(run: Run) -> dict[str, str]:
    """How the run ended, and whether its result is good, in plain words."""
    quality, gate, failed = run.last(Quality), run.last(Gate), run.last(Failed)
    if quality is not None and gate is not None:
        where = "held-out rows" if quality.held_out else "calibration rows (too few to hold some out)"
        ratio = quality.perplexity_ratio
        found = (
            "its outputs are not all finite"
            if not quality.finite
            else ("" if ratio is None else f"perplexity is {ratio:.3f} times the original's, and ")
            + f"both models think the same token most likely {quality.agreement:.0%} of the time"
        )
        limit = f" The limit is a perplexity ratio of {gate.max_perplexity_ratio:g}." if ratio is not None else ""
        opening = (run.verdict or ("within the limits" if gate.green else "beyond the limits")).capitalize()
        text = f"{opening}: on {counted(quality.tokens, 'token')} of {where}, {found}.{limit}"
        return {"tone": "good" if gate.green and run.verdict != "poor" else "bad", "text": text}
    done = f"{len(run.finished_blocks)} of {counted(run.started.blocks, 'block')}"
    if failed is not None:
        return {"tone": "bad", "text": f"Failed after {done}: {failed.error}"}
    if run.last(RunFinished) is None:
        text = f"Not finished: the log ends after {done}. The run goes on, or was killed; the same call continues it."
        return {"tone": "open", "text": text}
    text = "Finished, but not judged: the quality gate was off, or the model returns no logits."
    return {"tone": "open", "text": text}


def _hurting(run: Run) -> str:
    """The one linear to look at first."""
    if not run.median_loss:
        return ""
    worst = max(run.linears, key=lambda linear: linear.relative_loss)
    return (
        f"{worst.linear} hurts most: rounding changes {percent(worst.relative_loss)} of the energy of its outputs, "
        f"{_times_its_kind(run, worst)} times the median of its kind."
    )


def _times_its_kind(run: Run, linear: LinearQuantized) -> str:
    """How far the linear's loss is from the median of the same kind in all blocks."""
    usual = run.median_loss.get(linear.kind)
    return _or_dash(usual and linear.relative_loss / usual, "{:.1f}")


def _tiles(run: Run) -> list[tuple[str, str]]:
    quality = run.last(Quality)
    return _known(
        [
            ("bits per weight", run.bits_per_weight, "{:.2f}"),
            ("size of the files", run.size_gib, "{:.3g} GiB"),
            ("perplexity ratio", quality.perplexity_ratio if quality else None, "{:.3f}"),
            ("KL, nats", quality.divergence if quality else None, "{:.4f}"),
            ("same top token", quality.agreement if quality else None, "{:.1%}"),
            ("time", run.seconds / 60, "{:.1f} min"),
            ("peak memory", run.peak_gib, "{:.2f} GiB"),
        ]
    )


def _known(facts: list[tuple[str, float | None, str]]) -> list[tuple[str, str]]:
    return [(name, template.format(value)) for name, value, template in facts if value is not None]


def _block_rows(run: Run) -> list[list[Any]]:
    of_block: dict[str, list[LinearQuantized]] = {}
    for linear in run.linears:
        of_block.setdefault(linear.block, []).append(linear)
    done = {event.block: event for event in run.events_of(BlockQuantized)}
    rows = []
    for block, linears in of_block.items():
        event = done.get(block)
        worst = max(linears, key=lambda linear: linear.relative_loss)
        rows.append(
            [
                block,
                len(linears),
                percent(fmean(linear.relative_loss for linear in linears)),
                f"{worst.kind} {percent(worst.relative_loss)}",
                f"{bits_per_weight(linears):.2f}",
                _or_dash(event.seconds if event else None, "{:.1f}"),
                _or_dash(event.peak_gib if event else None, "{:.2f}"),
            ]
        )
    return rows


def _expert_rows(run: Run) -> list[list[Any]]:
    of_layer: dict[str, dict[int, LinearQuantized]] = {}
    for linear in run.linears:
        if linear.experts is not None and linear.expert is not None:
            seen = of_layer.setdefault(linear.experts, {})
            seen[linear.expert] = max(seen.get(linear.expert, linear), linear, key=lambda found: found.shape[1])
    rows = []
    for layer, experts in of_layer.items():
        tokens = [linear.tokens for linear in experts.values()]
        inputs = next(iter(experts.values())).shape[1]
        starved = sum(count < inputs for count in tokens)
        rows.append([layer, inputs, min(tokens), f"{median(tokens):g}", max(tokens), starved, tokens.count(0)])
    return rows


def _comparison(runs: list[Run], picture: "Picture | None") -> dict[str, Any]:
    """The table of all runs, and whether they are comparable."""
    rows = []
    for number, run in enumerate(runs, 1):
        quality = run.last(Quality)
        rows.append(
            [
                f"{number}. {run.name}",
                run.model,
                _or_dash(run.bits_per_weight, "{:.2f}"),
                _or_dash(run.size_gib, "{:.3g}"),
                _or_dash(quality.divergence if quality else None, "{:.4f}"),
                _or_dash(quality.agreement if quality else None, "{:.1%}"),
                _or_dash(quality.perplexity_ratio if quality else None, "{:.3f}"),
                run.verdict or "–",
                f"{run.seconds / 60:.1f}",
            ]
        )
    columns = [
        "run",
        "model",
        "bits per weight",
        "GiB",
        "KL, nats",
        "same top token",
        "perplexity ratio",
        "verdict",
        "min",
    ]
    judged = {(run.model, run.started.calibration["sha256"], run.started.calibration["seed"]) for run in runs}
    caution = "The runs differ in model or calibration data, so their figures are not measured on the same tokens."
    return {"picture": picture, "columns": columns, "rows": rows, "caution": caution if len(judged) > 1 else ""}


def _or_dash(value: float | None, template: str) -> str:
    return "–" if value is None else template.format(value)
