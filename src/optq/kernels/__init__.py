# SPDX-License-Identifier: Apache-2.0
"""The kernel table: ways to multiply by a packed weight, and why each of them can or cannot run a given layer.

A kernel is a row, not a class. `why_not` answers in words, and the same words feed the selection, error messages and
explanations. To add a kernel, add a row; rows are tried from fastest to slowest.
"""

from .held import CHANGING as CHANGING
from .held import Held as Held
from .modes import as_in_no_mode as as_in_no_mode
from .modes import autocast_dtype as autocast_dtype
from .op import grouped_gemm as grouped_gemm
from .op import matmul as matmul
from .prepared import Prepared as Prepared
from .prepared import has_bfloat16_instructions as has_bfloat16_instructions
from .table import BACKENDS as BACKENDS
from .table import KERNELS as KERNELS
from .table import Kernel as Kernel
from .table import choose_kernel as choose_kernel
from .table import explain as explain
from .table import known_backend as known_backend
from .tuning import tune as tune
