# SPDX-License-Identifier: Apache-2.0
"""Where things are in a model, found by watching it run instead of by a list of architectures."""

from .blocks import find_blocks as find_blocks
from .experts import FUSED as FUSED
from .experts import ROLES as ROLES
from .experts import Expert as Expert
from .experts import Experts as Experts
from .experts import find_fused_experts as find_fused_experts
from .experts import put_fused as put_fused
from .experts import put_split as put_split
from .linears import LINEAR_TYPES as LINEAR_TYPES
from .linears import LinearView as LinearView
from .linears import find_linears as find_linears
from .linears import is_linear as is_linear
from .outputs import fitting_mask as fitting_mask
from .outputs import hidden_states as hidden_states
from .outputs import relative_error as relative_error
from .residuals import watching_sums as watching_sums
from .stages import Stage as Stage
from .stages import feed_stages as feed_stages
from .stages import independent_groups as independent_groups
from .stages import observe_stages as observe_stages
