# SPDX-License-Identifier: Apache-2.0
"""Judgement: how good and how fast a model is."""

from .comparison import Comparer as Comparer
from .comparison import Comparison as Comparison
from .gate import is_good as is_good
from .gate import judge as judge
from .harness import HarnessComparison as HarnessComparison
from .harness import compare_harness as compare_harness
from .harness import read_harness_results as read_harness_results
from .overflow import Overflow as Overflow
from .perplexity import Perplexity as Perplexity
from .perplexity import Protocol as Protocol
from .perplexity import Span as Span
from .perplexity import compare_on as compare_on
from .perplexity import no_perplexity as no_perplexity
from .perplexity import perplexity as perplexity
from .perplexity import perplexity_on as perplexity_on
from .perplexity import spans as spans
from .speed import Speed as Speed
from .speed import generation_speed as generation_speed
from .verdict import VERDICTS as VERDICTS
from .verdict import Verdict as Verdict
from .verdict import verdict_of as verdict_of
