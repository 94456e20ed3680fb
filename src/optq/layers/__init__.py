# SPDX-License-Identifier: Apache-2.0
"""The packed layers of a model: `QuantLinear`, projections of one input and experts that make one product each."""

from .linear import QuantLinear as QuantLinear
from .linear import fuse_experts as fuse_experts
from .linear import fuse_projections as fuse_projections
