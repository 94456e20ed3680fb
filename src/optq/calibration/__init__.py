# SPDX-License-Identifier: Apache-2.0
"""Calibration data: names, files, objects or the model's own text become micro-batches of tokens.

Every source (`sources`) yields rows, which become lists of token ids without padding (`encoding`). They are cut into
windows and drawn by weight, and padding is added per micro-batch only, and masked (`batches`). What the model writes
itself (`generation`) needs no encoding.
"""

from optq.datasets import DATASETS as DATASETS
from optq.datasets import SELF as SELF
from optq.datasets import accepted as accepted
from optq.datasets import check_sources as check_sources
from optq.datasets import mixture as mixture

from .batches import DEFAULT_SAMPLES as DEFAULT_SAMPLES
from .batches import FEW_TOKENS as FEW_TOKENS
from .batches import TOKENS_PER_MICRO_BATCH as TOKENS_PER_MICRO_BATCH
from .batches import TOKENS_PER_STEP as TOKENS_PER_STEP
from .batches import Calibration as Calibration
from .batches import MicroBatch as MicroBatch
from .batches import Sampling as Sampling
from .batches import bytes_of as bytes_of
from .batches import check_vocabulary as check_vocabulary
from .batches import prepare_calibration as prepare_calibration
from .encoding import read_for_evaluation as read_for_evaluation
from .generation import write_samples as write_samples
