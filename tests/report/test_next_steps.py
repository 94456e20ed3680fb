# SPDX-License-Identifier: Apache-2.0
"""What to try next is computed from the log of the run, and its commands are ones that the command line takes."""

import argparse
import shlex
from dataclasses import replace

import pytest

import optq
from optq import GPTQConfig
from optq.cli import EXPORT
from optq.cli.quantizing import _config
from optq.config.fields import as_options
from optq.events import Quality
from optq.report import next_steps, read_run


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    """A run that asked for something in every kind of option."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "a text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 20)
    config = GPTQConfig(
        bits=2, group_size=32, sym=False, effort="fast", dataset=text, dynamic={"+:.*o_proj": {"bits": 4}}, seed=3
    )
    return read_run(optq.quantize(tiny_llama, config, output_dir=folder / "out"))


def rated(run, ratio):
    quality = replace(run.last(Quality), perplexity_ratio=ratio)
    return replace(run, events=(*(event for event in run.events if not isinstance(event, Quality)), quality))


def parsed(command):
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("optq", "quantize")
    parser = argparse.ArgumentParser()
    EXPORT.declare(parser)
    return parser.parse_args(arguments)


def test_every_command_is_the_runs_own_but_for_one_thing(run):
    steps = next_steps(rated(run, 1.5))
    assert len(steps) == 4
    own = {"bits": 2, "group_size": 32, "sym": False, "effort": "fast", "seed": 3, "serving": None}
    changed = []
    for step in steps:
        arguments = parsed(step.command)
        config = _config(arguments)
        assert arguments.model == run.started.model and arguments.output.startswith(f"{run.folder}-")
        changed += [name for name, value in own.items() if getattr(config, name) != value]
        changed += [name for name in ("dataset",) if "wikitext2:0.5" in config.dataset]
        changed += [name for name in ("dynamic",) if len(config.dynamic) > 1]
    assert changed == ["dataset", "effort", "dynamic", "bits"]


def test_the_worst_linears_get_eight_bits_and_what_is_fused_with_them(run):
    (step,) = [step for step in next_steps(rated(run, 1.5)) if "8 bits" in step.why]
    config = _config(parsed(step.command))
    worst = sorted((x for x in run.linears if x.bits < 8), key=lambda linear: -linear.relative_loss)[:5]
    widened = {x.linear for x in run.linears if config.scheme_for(x.linear).bits == 8}
    assert {x.linear for x in worst} <= widened < {x.linear for x in run.linears}
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for block in run.blocks:
            found = [x.linear in widened for x in run.linears if x.block == block and x.linear.endswith(parts)]
            assert len(set(found)) == 1
    total = sum(x.weights for x in run.linears)
    after = sum(config.scheme_for(x.linear).stored_bits(*x.shape) for x in run.linears) / total
    assert f" to {after:.2f} bits per weight" in step.why


@pytest.mark.parametrize(("ratio", "wanted"), [(1.0, False), (None, False), (1.2, True)])
def test_nothing_is_advised_where_nothing_is_to_be_gained_or_known(run, ratio, wanted):
    steps = next_steps(rated(run, ratio))
    assert bool(steps) == wanted
    assert not any("bits instead" in step.why for step in steps)


def test_a_budget_and_more_of_named_text_are_advised_where_they_apply(run):
    started = replace(run.started, run={"options": ["--bits", "4", "--dataset", "code", "--effort", "max"]})
    changed = replace(rated(run, 1.2), events=(started, *rated(run, 1.2).events[1:]))
    whys = {step.why.partition(",")[0]: parsed(step.command) for step in next_steps(changed)}
    assert whys["more calibration text"].num_samples > run.started.calibration["samples"]
    (budget,) = [arguments for why, arguments in whys.items() if why.startswith("a budget")]
    assert budget.target_bits_per_weight == pytest.approx(run.bits_per_weight + 0.25, abs=0.01)
    assert not any("more time" in why for why in whys)


def test_options_say_what_a_config_asks_for():
    config = GPTQConfig(bits=3, dataset=["a secret text"], lm_head=True, dynamic={"-:a": {}}, true_sequential=False)
    options = as_options(config)
    assert options == [
        *("--bits", "3", "--dataset", "DATASET", "--no-true-sequential", "--dynamic", '{"-:a": {}}', "--lm-head")
    ]
    assert as_options(GPTQConfig(bits=4, fit=2**33)) == ["--bits", "4", "--fit", f"{2**33}B"]  # a size has a unit
