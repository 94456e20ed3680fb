# SPDX-License-Identifier: Apache-2.0
import time

import pytest

from optq import GPTQConfig
from optq.config import dynamic
from optq.config.dynamic import matching
from optq.errors import ConfigError


class TestPatternsOfStrangers:
    """A file's patterns take a bounded time, whatever they are."""

    @pytest.mark.parametrize("pattern", [r"(\w|\w\w|.)+[A-Z]$", r"(.+)\1*(.+)\2*(.+)\3*\s$"])
    def test_a_match_that_takes_too_long_is_refused_by_name(self, pattern):
        began = time.process_time()
        with pytest.raises(ConfigError, match="takes longer than"):
            matching({pattern: {}}, "model.layers.0.self_attn.some_projection_of_the_attention" * 9)
        assert time.process_time() - began < 2

    def test_a_pattern_may_not_be_a_book(self):
        with pytest.raises(ConfigError, match="has 4001 characters; 4000 are allowed"):
            GPTQConfig(bits=4, dynamic={"a" * 4001: {}})

    @pytest.mark.parametrize(
        "pattern", [r"(?:.{5000}){5000}", r"(?:(?:.{99}){99}){99}", r"(?x)(?:. { 5000 }) { 5000 }", r"a{1,9}.{60000}"]
    )
    def test_counted_repeats_are_bounded_before_they_are_compiled(self, pattern):
        with pytest.raises(ConfigError, match="50000 are allowed"):
            GPTQConfig(bits=4, dynamic={pattern: {}})
        assert matching({r"-:.*\.\d{1,2}\..{3,20}": {}}, "model.layers.12.mlp.down_proj") is not None

    def test_all_patterns_together_are_bounded(self):
        with pytest.raises(ConfigError, match=r"the patterns have .* characters.*; 50000 are allowed"):
            GPTQConfig(bits=4, dynamic={f"{'(?:a|b)?' * 480}{number}": {} for number in range(99)})
        with pytest.raises(ConfigError, match="dynamic has 70000 patterns; 60000 are allowed"):
            GPTQConfig(bits=4, dynamic={f"^a{number}$": {} for number in range(70_000)})
        with pytest.raises(ConfigError, match="has 400000 alternatives in its patterns; 300000 are allowed"):
            GPTQConfig(bits=4, dynamic={f"^(?:{'|'.join('a' * 400_001)})$": {}})

    def test_all_matches_together_are_bounded(self, monkeypatch):
        monkeypatch.setattr(dynamic, "SECONDS_IN_ALL", 0.2)
        rules = {f"(.*)(.*)(.*)(.*)(.*)Q{number}": {} for number in range(300)}
        patterns = dynamic.patterns_in(rules)  # compiled in the meantime
        monkeypatch.setattr(dynamic, "SECONDS_IN_ALL", 0.0)
        monkeypatch.setattr(dynamic, "SECONDS_PER_NAME", 0.0001)
        with pytest.raises(ConfigError, match=r"comparing 300 patterns with \d+ names takes more than"):
            for number in range(50):
                patterns.first(f"model.layers.{number}.self_attn.q_proj")

    def test_there_may_not_be_millions(self):
        with pytest.raises(ConfigError, match="dynamic has 10001 patterns; 10000 are allowed"):
            GPTQConfig(bits=4, dynamic={f"-:.*{number}.*": {} for number in range(10_001)})

    def test_rules_that_list_names_are_looked_up(self):
        rules = {rf"^model\.layers\.{number}\.mlp\.(?:up_proj|down_proj)$": {"bits": 8} for number in range(20_000)}
        config = GPTQConfig(bits=4, dynamic=rules)
        began = time.process_time()
        found = [config.scheme_for(f"model.layers.{number}.mlp.down_proj") for number in range(0, 20_000, 200)]
        assert {scheme.bits for scheme in found} == {8}
        assert config.scheme_for("model.layers.7.mlp.gate_proj").bits == 4
        assert time.process_time() - began < 1

    def test_the_rules_of_a_large_mixture_are_looked_up_at_once(self):
        experts = [(layer, expert) for layer in range(60) for expert in range(256)]
        rules = {rf"^l\.{layer}\.e\.{expert}\.(?:up_proj|down_proj)$": {"bits": 8} for layer, expert in experts}
        config = GPTQConfig.from_dict({"bits": 4, "dynamic": rules})
        began = time.process_time()
        assert all(config.scheme_for(f"l.{layer}.e.{expert}.up_proj").bits == 8 for layer, expert in experts)
        assert time.process_time() - began < 3  # half a minute, if all rules are compared for each linear

    def test_rules_that_are_changed_in_place_are_looked_through_again(self):
        rules = {"a": {}, "b": {}}
        assert matching(rules, "b") == "b"
        rules["c"] = {}
        assert matching(rules, "c") == "c"
        del rules["b"]
        assert matching(rules, "b") is None

    def test_the_first_rule_counts_whether_it_lists_names_or_not(self):
        listed, pattern = r"^model\.(?:q|k)$", r"model\..*"
        assert matching({listed: {}, pattern: {}}, "model.q") == listed
        assert matching({pattern: {}, listed: {}}, "model.q") == pattern
        assert matching({listed: {}, pattern: {}}, "model.v") == pattern
        assert matching({listed: {}}, "model.v") is None
        assert matching({r"^a\-b\.(?:q\-k)$": {}}, "a-b.q-k") is not None
        assert matching({"^model.q$": {}}, "modelXq") is not None  # the dot is not escaped, so this is a pattern
