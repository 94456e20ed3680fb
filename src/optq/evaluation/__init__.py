# SPDX-License-Identifier: Apache-2.0
"""Judgement: how good and how fast a model is."""

from .comparison import Comparer as Comparer
from .comparison import Comparison as Comparison
from .gate import GOOD_PERPLEXITY_RATIO as GOOD_PERPLEXITY_RATIO
from .gate import judge as judge
from .perplexity import Perplexity as Perplexity
from .perplexity import perplexity as perplexity
from .speed import DecodeSpeed as DecodeSpeed
from .speed import decode_speed as decode_speed
