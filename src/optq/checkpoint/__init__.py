# SPDX-License-Identifier: Apache-2.0
"""The bytes of a GPTQ checkpoint: how codes become int32 words, and how tensors and files are named."""

from .headers import QuantizedTensors as QuantizedTensors
from .headers import find_quantized_linears as find_quantized_linears
from .headers import open_whole as open_whole
from .headers import read_headers as read_headers
from .headers import reader_of as reader_of
from .layout import TENSOR_NAMES as TENSOR_NAMES
from .layout import PackedWeight as PackedWeight
from .layout import groups_of_columns as groups_of_columns
from .layout import pack as pack
from .layout import part_of as part_of
from .layout import relabel as relabel
from .layout import unpack as unpack
from .layout import with_trivial_groups as with_trivial_groups
from .layout import words_of as words_of
from .packing import pack_codes as pack_codes
from .packing import unpack_codes as unpack_codes
from .values import value_errors as value_errors
from .zeros import CHECKPOINT_FORMATS as CHECKPOINT_FORMATS
from .zeros import decode_zeros as decode_zeros
from .zeros import label_of as label_of
from .zeros import rules_differ as rules_differ
