# SPDX-License-Identifier: Apache-2.0
"""Draw the picture of solver.md with the solver itself, on arbitrary weights and inputs: `python docs/solver.py`."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from optq.gptq import fit_grid, output_energy, round_to_nearest, solve
from optq.scheme import LayerScheme, trivial_groups

PICTURE = Path(__file__).with_name("solver.png")
ROWS, COLUMNS, TOKENS, GROUP = 64, 256, 4096, 64
PLAIN = LayerScheme(bits=3, group_size=GROUP, act_order="none", grid="minmax", damping=0.01)
STEPS = {
    "rounded to nearest": None,
    "GPTQ, left to right": PLAIN,
    "important columns first": replace(PLAIN, act_order="static"),
    "searched grids": replace(PLAIN, act_order="static", grid="weighted"),
    "three rounds of refinement": replace(PLAIN, act_order="static", grid="weighted", refinement=3),
}
BITS = (4, 3)


def layer() -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) and the mean of x·xᵀ (columns, columns) of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TOKENS, COLUMNS, generator=generator)
    inputs = inputs + 3 * torch.randn(TOKENS, 8, generator=generator) @ torch.randn(8, COLUMNS, generator=generator)
    inputs *= torch.exp(torch.randn(COLUMNS, generator=generator) / 2)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    return weight, inputs.T @ inputs / TOKENS


@dataclass(frozen=True)
class Course:
    """Codes (rows, columns), and after each column the energy of the output error so far, (rows, columns) both."""

    codes: Tensor
    energy: Tensor


def optimal_brain_surgeon(weight: Tensor, hessian: Tensor, scheme: LayerScheme) -> Course:
    """Round column by column as solver.md says it, with one inverse per step: what the Cholesky factor spares.

    Args:
        weight: (rows, columns) float32.
        hessian: (columns, columns) float32, undamped.
    """
    groups = trivial_groups(weight.shape[1], GROUP, weight.device)
    grid = fit_grid(weight, groups, scheme)
    damped = hessian.double()
    damped = damped + scheme.damping * damped.diagonal().mean() * torch.eye(len(damped), dtype=damped.dtype)
    open_weight, codes, steps = weight.double(), torch.zeros_like(weight), []
    for j, group in enumerate(groups.tolist()):
        inverse = torch.linalg.inv(damped[j:, j:])
        scale, zero = grid.scales[:, group].double(), grid.zeros[:, group].double()
        code = (open_weight[:, j] / scale).round().add(zero).clamp(0, grid.max_code)
        error = open_weight[:, j] - (code - zero) * scale
        open_weight[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0]
        codes[:, j] = code
        steps.append(error**2 / inverse[0, 0])
    return Course(codes=codes, energy=torch.stack(steps, 1).cumsum(1))


def to_nearest(weight: Tensor, hessian: Tensor, scheme: LayerScheme) -> Course:
    """The same of rounding every column to nearest; `weight` (rows, columns), `hessian` (columns, columns)."""
    rounded = round_to_nearest(weight, scheme)
    error = weight - rounded.decode()
    energy = [output_energy(error[:, : j + 1], hessian[: j + 1, : j + 1]) for j in range(weight.shape[1])]
    return Course(codes=rounded.codes, energy=torch.stack(energy, 1))


def relative_losses(bits: int) -> dict[str, float]:
    """By step of STEPS: the energy of the output error over that of the outputs."""
    weight, hessian = layer()
    found = {}
    for name, scheme in STEPS.items():
        if scheme is None:
            error = weight - round_to_nearest(weight, replace(PLAIN, bits=bits)).decode()
            loss = output_energy(error, hessian)
        else:
            loss = solve(weight, hessian, replace(scheme, bits=bits)).loss
        found[name] = float(loss.sum() / output_energy(weight, hessian).sum())
    return found


def draw() -> None:
    """Write the picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from optq.report.figures import BLUE, GREY, ORANGE, STYLE

    weight, hessian = layer()
    total = float(output_energy(weight, hessian).sum())
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        course, bars = figure.subplots(1, 2, width_ratios=(4, 5))
        for rounding, name, colour in (
            (to_nearest, "rounded to nearest", GREY),
            (optimal_brain_surgeon, "errors pushed into open columns", BLUE),
        ):
            energy = rounding(weight, hessian, PLAIN).energy.sum(0) / total
            course.semilogy(range(1, COLUMNS + 1), energy.tolist(), color=colour, label=name)
        course.set(title=f"While columns are rounded ({PLAIN.bits} bits)", xlabel="columns rounded", xlim=(0, COLUMNS))
        course.set(ylabel="relative loss", ylim=(1e-5, 0.2))
        course.legend(loc="lower right")
        for place, (bits, colour) in enumerate(zip(BITS, (BLUE, ORANGE), strict=True)):
            losses = relative_losses(bits)
            heights = [row + 0.2 - 0.4 * place for row in range(len(losses))]
            drawn = bars.barh(heights, list(losses.values()), 0.38, color=colour, label=f"{bits} bits")
            bars.bar_label(drawn, [f"{loss:.3%}" for loss in losses.values()], padding=2, fontsize=7)
        bars.set(title="What each step leaves", xlabel="relative loss", xscale="log")
        bars.set_xlim(right=bars.get_xlim()[1] * 2.5)
        bars.set_yticks(range(len(STEPS)), ["rounded to nearest", *(f"+ {name}" for name in list(STEPS)[1:])])
        bars.invert_yaxis()
        bars.legend(loc="lower right")
        for axis in (course.yaxis, bars.xaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
            axis.set_minor_formatter(NullFormatter())
        figure.savefig(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    draw()
