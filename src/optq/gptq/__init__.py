# SPDX-License-Identifier: Apache-2.0
"""The algorithm: tensors in, tensors out. Knows nothing of models, files or kernels."""

from .cost import SolvingWork as SolvingWork
from .cost import measured as measured
from .cost import seconds_of as seconds_of
from .cost import work_of as work_of
from .grid import Grid as Grid
from .grid import fit_grid as fit_grid
from .grid import stored_scales as stored_scales
from .hessian import Drift as Drift
from .hessian import Hessian as Hessian
from .hessian import output_energy as output_energy
from .solver import Solution as Solution
from .solver import round_to_nearest as round_to_nearest
from .solver import solve as solve
from .solver import stacked as stacked
