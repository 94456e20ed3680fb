# SPDX-License-Identifier: Apache-2.0
"""Whether the values of a packed linear's small tensors can be computed with, which no shape or dtype tells."""

from collections.abc import Iterator

import torch
from torch import Tensor

from optq.scheme import trivial_groups


def value_errors(
    name: str, scales: Tensor, g_idx: Tensor | None, bias: Tensor | None, group_width: int | None
) -> Iterator[str]:
    """Yield one sentence for each tensor of the linear `name` whose values make its outputs nonsense.

    Args:
        name: of the linear; may name the file, too.
        scales: (groups, out) float.
        g_idx: (in,) int32 or int64; None if the groups are runs of columns.
        bias: (out,) float.
        group_width: columns per group that the config states, so all groups have as many; None if it states nothing.
    """
    least, most = scales.abs().aminmax()
    if not (least > 0 and most < torch.inf):  # a NaN is neither
        group, output = (~(scales.isfinite() & (scales != 0))).nonzero()[0].tolist()
        yield (
            f"{name}.scales: that of group {group} and output {output} is {float(scales[group, output])}; scales are "
            "finite and not 0. The file is damaged, or was written with an overflow. Quantize or download it again."
        )
    if g_idx is not None and (wrong := _wrong_groups(g_idx, scales.shape[0], group_width)):
        yield f"{name}.g_idx: {wrong}. The file is damaged; download it again."
    if bias is not None and not bool(bias.isfinite().all()):
        yield f"{name}.bias: it is not finite. The file is damaged; download it again."


def _wrong_groups(g_idx: Tensor, groups: int, width: int | None) -> str:
    """What is wrong with the group of each column, (in,); "" if nothing is."""
    if width is not None and bool((g_idx == trivial_groups(len(g_idx), width, g_idx.device)).all()):
        return ""
    least, most = map(int, g_idx.aminmax())
    if least < 0 or most >= groups:
        column = int(((g_idx < 0) | (g_idx >= groups)).nonzero()[0])
        return f"column {column} is of group {int(g_idx[column])}, and there are {groups}, the first of them 0"
    # The last may be narrower; or wider, by writers that make no narrower one.
    counts = torch.bincount(g_idx, minlength=groups)[:-1]
    if width is not None and bool((counts != width).any()):
        group = int((counts != width).nonzero()[0])
        return f"group {group} has {int(counts[group])} columns, and the config says that groups have {width}"
    return ""
