# SPDX-License-Identifier: Apache-2.0
"""The bytes of a GPTQ checkpoint: how codes become int32 words, and how tensors and files are named."""

from .layout import CHECKPOINT_FORMATS as CHECKPOINT_FORMATS
from .layout import TENSOR_NAMES as TENSOR_NAMES
from .layout import PackedWeight as PackedWeight
from .layout import QuantizedTensors as QuantizedTensors
from .layout import find_quantized_linears as find_quantized_linears
from .layout import pack as pack
from .layout import read_headers as read_headers
from .layout import repack_zeros as repack_zeros
from .layout import unpack as unpack
from .matmul_nbits import BlockedWeight as BlockedWeight
from .matmul_nbits import to_blocks as to_blocks
from .packing import pack_codes as pack_codes
from .packing import unpack_codes as unpack_codes
