# SPDX-License-Identifier: Apache-2.0
import time

import pytest

from optq import GPTQConfig
from optq.config.dynamic import matching
from optq.errors import ConfigError


class TestPatternsOfStrangers:
    """A file's patterns take a bounded time, whatever they are."""

    @pytest.mark.parametrize("pattern", [r"(\w|\w\w|.)+[A-Z]$", r"(.+)\1*(.+)\2*(.+)\3*\s$"])
    def test_a_match_that_takes_too_long_is_refused_by_name(self, pattern):
        began = time.monotonic()
        with pytest.raises(ConfigError, match="takes longer than"):
            matching({pattern: {}}, "model.layers.0.self_attn.some_projection_of_the_attention" * 3)
        assert time.monotonic() - began < 2

    def test_a_pattern_may_not_be_a_book(self):
        with pytest.raises(ConfigError, match="has 4001 characters; 4000 are allowed"):
            GPTQConfig(bits=4, dynamic={"a" * 4001: {}})

    def test_there_may_not_be_millions(self):
        with pytest.raises(ConfigError, match="dynamic has 10001 patterns; 10000 are allowed"):
            GPTQConfig(bits=4, dynamic={f"-:.*{number}.*": {} for number in range(10_001)})

    def test_rules_that_list_names_are_looked_up(self):
        rules = {rf"^model\.layers\.{number}\.mlp\.(?:up_proj|down_proj)$": {"bits": 8} for number in range(20_000)}
        config = GPTQConfig(bits=4, dynamic=rules)
        began = time.monotonic()
        found = [config.scheme_for(f"model.layers.{number}.mlp.down_proj") for number in range(0, 20_000, 200)]
        assert {scheme.bits for scheme in found} == {8}
        assert config.scheme_for("model.layers.7.mlp.gate_proj").bits == 4
        assert time.monotonic() - began < 5

    def test_the_first_rule_counts_whether_it_lists_names_or_not(self):
        listed, pattern = r"^model\.(?:q|k)$", r"model\..*"
        assert matching({listed: {}, pattern: {}}, "model.q") == listed
        assert matching({pattern: {}, listed: {}}, "model.q") == pattern
        assert matching({listed: {}, pattern: {}}, "model.v") == pattern
        assert matching({listed: {}}, "model.v") is None
        assert matching({r"^a\-b\.(?:q\-k)$": {}}, "a-b.q-k") is not None
        assert matching({"^model.q$": {}}, "modelXq") is not None  # the dot is not escaped, so this is a pattern
