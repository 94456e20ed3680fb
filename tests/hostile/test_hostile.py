# SPDX-License-Identifier: Apache-2.0
"""Every kind of damage, and what loading, inspecting and converting make of it: docs/reliability.md says more."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import save_tiny_llama
from optq import GPTQConfig

sys.path.insert(0, str(Path(__file__).parent))
try:
    import cases
    import trial
finally:
    sys.path.pop(0)

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.skipif(sys.platform != "linux", reason="each trial is a fork of this process"),
]

MANY = 20
"""Of groups with more kinds, every fifth one is tried."""

ALL_VERBS = 10
"""Of so many kinds, one is tried with all verbs."""

GROUPS = sorted({case.group for case in cases.cases()})


@pytest.fixture(scope="module")
def good(tmp_path_factory, token_rows):
    """By format, a checkpoint and the logits that it has; GPTQ's is in two files."""
    folder = tmp_path_factory.mktemp("good")
    dense = save_tiny_llama(folder / "dense")
    trial.make_good(dense, folder / "packed", GPTQConfig(bits=4, group_size=32), token_rows)
    return trial.make_others(dense, folder / "packed")


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors", "gguf"])
def test_the_good_checkpoint_is_right(form, good, tmp_path):
    verbs = trial.VERBS if form == "gptq" else ("convert",)
    nothing = cases.Case("none", "nothing", lambda folder: None, (), verbs)
    found = trial.trial(nothing, good[form][0], tmp_path, good[form][1])
    assert {verb: made["outcome"] for verb, made in found.items()} == dict.fromkeys(verbs, "right")


@pytest.mark.parametrize("group", GROUPS)
def test_damage_is_named_and_nothing_else_comes_of_it(group, good, tmp_path):
    bad = []
    found = [case for case in cases.cases() if case.group == group]
    for number, case in enumerate(found[:: 1 + 4 * (len(found) > MANY)]):
        if number % ALL_VERBS:  # one verb has to do: they share what is checked, and benchmarks/hostile.py tries all
            case = replace(case, verbs=case.verbs[number % len(case.verbs) :][:1])
        folder, wanted = good[case.form]
        for verb, made in trial.trial(case, folder, tmp_path / "scratch", wanted).items():
            if made["outcome"] not in trial.GOOD:
                bad.append(f"{case.name}: {verb}: {made['outcome']}: {made['said'][:300]}")
    assert not bad, "\n".join(bad)
