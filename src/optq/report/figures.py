# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report. This module alone needs matplotlib.

Colours: viridis and cividis, which keep their order for colour-blind people and in grey print; for categories those of
Okabe and Ito ("Color Universal Design", 2008).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from optq.errors import counted
from optq.events import BlockQuantized, BlockReconstructed, LinearQuantized

from .run import Run, bits_per_weight, percent

BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#BBBBBB"
ABSENT = "#EEEEEE"  # of a heat map: nothing was quantized there
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "text.parse_math": False,  # a name may hold a dollar sign
}
WIDTH = 9.0  # inches
MOST_TICKS = 32
NUMBERED = 5  # worst cells
LEAST_SHOWN, MOST_AT_LEAST = 0.5, 2.0  # times the kind's median loss: what is lower does not hurt; noise is not bright


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG file, what it shows in words for who cannot see it, and how to read it."""

    file: Path
    title: str
    alt: str
    caption: str


@contextmanager
def _drawing(file: Path, height: float) -> Iterator[Figure]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        figure.savefig(file)


def _share(fraction: float) -> str:
    """A percentage at an axis."""
    return f"{100 * fraction:g} %"


def _label_blocks(axes: Axes, blocks: Sequence[str], *, vertical: bool = False) -> None:
    """Name the blocks by their numbers, as many as fit, and where there are several stacks, each stack."""
    axis = axes.yaxis if vertical else axes.xaxis
    step = math.ceil(len(blocks) / MOST_TICKS)
    numbers = [name.rpartition(".")[2] for name in blocks]
    shown = [index for index in range(0, len(blocks), step) if numbers[index].isdigit()]
    axis.set_ticks(shown, [numbers[index] for index in shown])
    stacks = [
        (name, len(list(members)))
        for name, members in groupby(blocks, lambda block: block.rpartition(".")[0] or block)
    ]
    axis.set_label_text("block of " + ", then ".join(name for name, _ in stacks))
    for position in np.cumsum([length for _, length in stacks])[:-1]:
        (axes.axhline if vertical else axes.axvline)(position - 0.5, color="white", linewidth=2)


def _table(
    linears: Iterable[LinearQuantized], value: Callable[[list[LinearQuantized]], float]
) -> dict[tuple[str, str], float]:
    """`value` of the linears of each kind in each block; experts have many linears of one kind."""
    cells: dict[tuple[str, str], list[LinearQuantized]] = {}
    for linear in linears:
        cells.setdefault((linear.kind, linear.block), []).append(linear)
    return {cell: value(members) for cell, members in cells.items()}


def _heat_map(
    axes: Axes,
    values: dict[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    norm: Normalize,
    *,
    label: str,
    colours: str = "viridis",
    below: str | None = None,
    format_value: Callable[[float], str] = "{:g}".format,
) -> Axes:
    """Cells by the names of row and column; what is not there is grey.

    Args:
        below: the colour of what is below the scale.
    Returns:
        The axes of the colour bar.
    """
    grid = np.full((len(rows), len(columns)), np.nan)
    row_of, column_of = ({name: index for index, name in enumerate(names)} for names in (rows, columns))
    for (row, column), value in values.items():
        grid[row_of[row], column_of[column]] = value
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        norm=norm,
        cmap=matplotlib.colormaps[colours].with_extremes(bad=ABSENT, under=below),
        aspect="auto",
        interpolation="nearest",
    )
    axes.spines[:].set_visible(False)
    axes.set_yticks(range(len(rows)), rows)
    bar = axes.figure.colorbar(image, ax=axes, label=label, pad=0.01)
    if isinstance(norm, LogNorm):
        _log_ticks(bar.ax.yaxis, format_value)
    else:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
    return bar.ax


def _log_ticks(axis: Axis, format_value: Callable[[float], str]) -> None:
    """Label enough of a logarithmic axis, also where it is short."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
    axis.set_minor_locator(NullLocator())


def _log_norm(values: Iterable[float]) -> LogNorm:
    """Up to the largest value, from the smallest positive one; half a decade at least, nine at most."""
    positive = [value for value in values if value > 0] or [1.0]
    highest = max(positive)
    return LogNorm(min(max(min(positive), highest / 10**9), highest / 3), highest)


def _kinds(run: Run) -> list[str]:
    return list(dict.fromkeys(linear.kind for linear in run.linears))


def draw_loss(run: Run, file: Path) -> Picture:
    """Draw the loss of every kind of linear in every block, and that of rounding to nearest."""
    blocks, kinds = run.blocks, _kinds(run)
    losses = _table(run.linears, lambda found: fmean(linear.relative_loss for linear in found))
    worst = sorted(losses, key=lambda cell: -losses[cell])[:NUMBERED]
    ratios = {cell: loss / run.median_loss[cell[0]] for cell, loss in losses.items() if loss}
    with _drawing(file, 2.9 + 0.24 * len(kinds)) as figure:
        above, below = figure.subplots(2, sharex=True, height_ratios=(1.5, 0.24 * len(kinds)))
        for attribute, name, style in (
            ("rtn_relative_loss", "rounded to nearest", {"color": GREY, "linestyle": "--"}),
            ("relative_loss", "this run", {"color": BLUE, "marker": "o", "markersize": 3}),
        ):
            means = [
                fmean(getattr(linear, attribute) for linear in run.linears if linear.block == block)
                for block in blocks
            ]
            above.plot(range(len(blocks)), [mean or math.nan for mean in means], label=name, **style)
        above.set_yscale("log")
        _log_ticks(above.yaxis, _share)
        above.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        above.set_ylabel("relative loss")
        above.set_title("Mean over the linears of each block")
        above.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        below.set_title("Every kind of linear against its own median, at the left; those that lose most are numbered")
        _heat_map(
            below,
            ratios,
            kinds,
            blocks,
            LogNorm(LEAST_SHOWN, max(MOST_AT_LEAST, *ratios.values())),
            label="times the median",
        )
        below.set_yticks(range(len(kinds)), [f"{kind}  {percent(run.median_loss.get(kind, 0))}" for kind in kinds])
        for number, (kind, block) in enumerate(worst, 1):
            _number_cell(below, blocks.index(block), kinds.index(kind), number, 8 if len(blocks) < 48 else 5)
        _label_blocks(below, blocks)
    return Picture(
        file=file,
        title="Loss by block and kind: which layers hurt",
        alt=f"Heat map of the relative loss, {counted(len(kinds), 'kind')} of linears by "
        f"{counted(len(blocks), 'block')}. The worst: "
        + "; ".join(f"{kind} in {block}, {percent(losses[kind, block])}" for kind, block in worst)
        + ".",
        caption="Relative loss: the energy of the error that rounding makes in a linear's outputs, over the energy of "
        "these outputs, on the calibration data. Bright cells lose more than others of their kind, whose median is "
        "beside its name; the darkest lose half of it or less. Experts are averaged.",
    )


def _number_cell(axes: Axes, column: int, row: int, number: int, size: float) -> None:
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=VERMILLION, linewidth=1.5))
    axes.annotate(
        str(number),
        (column, row),
        ha="center",
        va="center",
        fontsize=size,
        fontweight="bold",
        bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": VERMILLION},
    )


def draw_bits(run: Run, file: Path) -> Picture:
    """Draw the bits that a budget, or the configuration, gave to every linear."""
    return _draw_kinds(
        run,
        file,
        _table(run.linears, bits_per_weight),
        norm=Normalize(),
        label="stored bits per weight",
        title="Bits by block and kind",
        caption="Stored bits per weight, scales and zeros included. Bright cells got more.",
    )


def draw_damping(run: Run, file: Path) -> Picture:
    """Draw where the Hessian was singular, so that more damping was needed."""
    raised = _table(run.linears, lambda found: max(linear.damping / linear.damping_asked for linear in found))
    return _draw_kinds(
        run,
        file,
        raised,
        norm=LogNorm(1, max(raised.values())),
        label="damping used / asked for",
        title="Damping that had to be raised",
        caption="Where the Hessian was singular, damping was raised tenfold, up to three times. Such linears are "
        "fitted less closely to the calibration data: use more of it, or more varied data.",
    )


def draw_dead_columns(run: Run, file: Path) -> Picture:
    """Draw where inputs were always zero during calibration."""
    return _draw_kinds(
        run,
        file,
        _table(run.linears, lambda found: fmean(linear.dead_columns / linear.shape[1] for linear in found)),
        norm=Normalize(vmin=0),
        label="share of the inputs",
        title="Inputs that were always zero",
        caption="The calibration data never used these inputs; their weights are rounded to nearest.",
        format_value=_share,
    )


def _draw_kinds(
    run: Run,
    file: Path,
    values: dict[tuple[str, str], float],
    *,
    norm: Normalize,
    label: str,
    title: str,
    caption: str,
    format_value: Callable[[float], str] = "{:g}".format,
) -> Picture:
    blocks, kinds = run.blocks, _kinds(run)
    with _drawing(file, 1.1 + 0.24 * len(kinds)) as figure:
        axes = figure.subplots()
        _heat_map(axes, values, kinds, blocks, norm, label=label, format_value=format_value)
        _label_blocks(axes, blocks)
    lowest, highest = (choose(values, key=lambda cell: values[cell]) for choose in (min, max))
    return Picture(
        file=file,
        title=title,
        alt=f"Heat map of {label}, {counted(len(kinds), 'kind')} of linears by {counted(len(blocks), 'block')}, "
        f"from {values[lowest]:.3g} ({lowest[0]} in {lowest[1]}) "
        f"to {values[highest]:.3g} ({highest[0]} in {highest[1]}).",
        caption=caption,
    )


def draw_experts(run: Run, file: Path) -> Picture:
    """Draw the number of calibration tokens that every expert saw."""
    members = [linear for linear in run.linears if linear.expert is not None]
    tokens = {(str(linear.experts), str(linear.expert)): linear.tokens for linear in members}
    block_of = {str(linear.experts): linear.block for linear in members}
    layers = list(block_of)
    experts = sorted({expert for _, expert in tokens}, key=int)
    inputs = max(linear.shape[1] for linear in members)
    norm = _log_norm([*tokens.values(), inputs])
    below = min(count for count in (*tokens.values(), inputs) if count) / 4  # the scale: zero has no logarithm
    with _drawing(file, min(1.4 + 0.24 * len(layers), 9)) as figure:
        axes = figure.subplots()
        colour_bar = _heat_map(
            axes,
            {cell: count or below for cell, count in tokens.items()},
            layers,
            experts,
            norm,
            label="calibration tokens",
            colours="cividis_r",
            below="white",
        )
        colour_bar.axhline(inputs, color=VERMILLION, linewidth=2)
        colour_bar.annotate(
            "inputs",
            (0, inputs),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            color=VERMILLION,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        _label_blocks(axes, list(block_of.values()), vertical=True)
        axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS // 2, integer=True))
        axes.set_xlabel("expert")
    idle, starved = list(tokens.values()).count(0), sum(0 < count < inputs for count in tokens.values())
    return Picture(
        file=file,
        title="Calibration tokens by expert",
        alt=f"Heat map of the calibration tokens of {counted(len(experts), 'expert')} in "
        f"{counted(len(layers), 'layer')}: from {min(tokens.values())} to {max(tokens.values())}; "
        f"{idle} saw none, {starved} fewer than {inputs}.",
        caption=f"An expert that saw fewer tokens than it has inputs ({inputs}) is calibrated in part on its layer's "
        "mean over all experts; one that saw none (white) wholly. More calibration data helps both.",
    )


def draw_time_and_memory(run: Run, file: Path) -> Picture:
    """Draw the seconds that every block took, and the peak of memory so far."""
    done = {event.block: event for event in run.events_of(BlockQuantized)}
    reconstructed = {event.block: event.seconds for event in run.events_of(BlockReconstructed)}
    blocks = list(done)
    solving = dict.fromkeys(blocks, 0.0)
    for linear in run.linears:
        if linear.block in solving:
            solving[linear.block] += linear.seconds
    parts = {
        "running the data, summing Hessians": (BLUE, [done[block].observing_seconds for block in blocks]),
        "solving": (ORANGE, list(solving.values())),
        "block reconstruction": (GREEN, [reconstructed.get(block, 0.0) for block in blocks]),
    }
    parts = {name: part for name, part in parts.items() if any(part[1])}
    known = [sum(seconds) for seconds in zip(*(seconds for _, seconds in parts.values()), strict=True)]
    rest = [max(done[block].seconds - seconds, 0.0) for block, seconds in zip(blocks, known, strict=True)]
    parts["reading, running to the next block, packing, writing"] = (GREY, rest)
    peaks = [done[block].peak_gib for block in blocks]
    measured = any(peak is not None for peak in peaks)
    with _drawing(file, 4.2 if measured else 2.8) as figure:
        above, *below = np.atleast_1d(figure.subplots(1 + measured, sharex=True, height_ratios=(2, 1)[: 1 + measured]))
        bottom = np.zeros(len(blocks))
        for name, (colour, seconds) in parts.items():
            above.bar(range(len(blocks)), seconds, bottom=bottom, color=colour, width=0.85, label=name)
            bottom += seconds
        above.set_ylabel("seconds")
        above.set_xlim(-0.5, len(blocks) - 0.5)
        above.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, fontsize=8)
        for axes in below:
            axes.plot(
                range(len(blocks)), [math.nan if peak is None else peak for peak in peaks], color=BLUE, marker="."
            )
            axes.set_ylim(0, 1.15 * max(peak for peak in peaks if peak is not None))
            axes.set_ylabel("peak GiB so far")
        _label_blocks(figure.axes[-1], blocks)
    slowest = max(done.values(), key=lambda event: event.seconds)
    share = sum(solving.values()) / sum(event.seconds for event in done.values())
    return Picture(
        file=file,
        title="Time and memory by block",
        alt=f"Stacked bars of the seconds of {counted(len(blocks), 'block')}; the slowest is {slowest.block} with "
        f"{slowest.seconds:.1f} s; solving takes {share:.0%} in all."
        + (f" Below, the peak of memory, {max(filter(None, peaks)):.2f} GiB at the end." if measured else ""),
        caption="Peak memory is that of the whole process so far (on an accelerator: what torch allocated there). It "
        "cannot fall, and should hardly rise from block to block.",
    )


def draw_comparison(runs: Sequence[Run], file: Path) -> Picture:
    """Draw quality against bits per weight, each model on axes of its own; runs are numbered from 1."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for number, run in enumerate(runs, 1):
        if run.standing is not None:
            points.setdefault(run.model, []).append((number, *run.standing))
    with _drawing(file, 1 + 3 * len(points)) as figure:
        drawn = np.atleast_1d(figure.subplots(len(points), sharex=True))
        for axes, (model, standings) in zip(drawn, points.items(), strict=True):
            for number, bits, divergence in standings:
                axes.plot(bits, divergence, "o", color=BLUE, markersize=15, markeredgecolor="white")
                axes.annotate(
                    str(number), (bits, divergence), ha="center", va="center_baseline", color="white", weight="bold"
                )
            axes.set_title(model)
            axes.set_yscale("log")
            axes.margins(0.1)
            _log_ticks(axes.yaxis, "{:g}".format)
            axes.grid(color="#DDDDDD", linewidth=0.6)
            axes.set_ylabel("KL divergence, nats per token")
        drawn[-1].set_xlabel("stored bits per weight")
    return Picture(
        file=file,
        title="Quality against bits per weight",
        alt="Scatter plot: "
        + "; ".join(
            f"run {number} of {model}, {bits:.2f} bits per weight, {loss:.4f} nats"
            for model, standings in points.items()
            for number, bits, loss in standings
        )
        + ".",
        caption="KL divergence from the original: lower is closer to it; further left is smaller. Numbers are those "
        "of the table. Every model has its own scale of divergence.",
    )
