# SPDX-License-Identifier: Apache-2.0
import json
import statistics

import pytest
from transformers import AutoModelForCausalLM

from conftest import VOCABULARY
from optq import GPTQConfig
from optq.errors import ReportError
from optq.events import (
    EVENTS,
    BlockQuantized,
    BlockReconstructed,
    BlockRestored,
    Event,
    LinearQuantized,
    Load,
    RunLog,
    Started,
    read_events,
    to_dict,
)


def linear_done(block, seconds):
    sizes = {"shape": [8, 4], "bits": 4, "group_size": 4, "stored_bits": 288, "tokens": 9, "dead_columns": 0}
    losses = {"relative_loss": 0.1, "rtn_relative_loss": 0.2, "damping": 0.1, "damping_asked": 0.1}
    return LinearQuantized(block=block, linear=f"{block}.q", family=None, seconds=seconds, **sizes, **losses)


def block_done(block, seconds):
    return BlockQuantized(
        block=block, relative_loss=0.1, bits_per_weight=4.5, seconds=seconds, observing_seconds=seconds / 2
    )


def log_of(loads, seconds, restored=0):
    """A log of blocks, as many of them restored and then as many done as said: (solving, running) seconds of each."""
    log = RunLog(bar=False)
    log.expect({f"b.{number}": load for number, load in enumerate(loads)})
    for number in range(restored):
        log.emit(BlockRestored(block=f"b.{number}", seconds=0.1))
    for number, (solving, running) in enumerate(seconds, restored):
        for _ in ("q", "k"):
            log.emit(linear_done(f"b.{number}", solving / 2))
        log.emit(block_done(f"b.{number}", solving + running))
    return log


ALIKE = [Load(solving=7, running=3)] * 30


def test_a_slow_first_block_does_not_spoil_the_estimate():
    log = log_of(ALIKE, [(4.0, 5.0), (2.0, 2.0), (2.0, 2.1)])
    assert log.blocks_left == 27
    assert log.seconds_left == pytest.approx(27 * 4.1)


def test_blocks_of_an_earlier_session_count_as_done_but_not_as_fast():
    log = log_of(ALIKE, [(3.0, 1.0)], restored=20)
    assert log.blocks_left == 9
    assert log.seconds_left == pytest.approx(36.0)


def test_a_block_with_more_to_solve_takes_longer_by_what_solving_takes():
    """A head has as many weights as many blocks, but no forward goes through it."""
    head = Load(solving=70, running=0.3)
    log = log_of([*ALIKE[:5], head], [(3.0, 6.0)] * 3)
    assert log.seconds_left == pytest.approx(2 * 9 + 10 * 3.0 + 0.1 * 6.0)


def test_blocks_without_linears_are_done_when_a_later_one_is():
    loads = [ALIKE[0], Load(solving=0, running=3), ALIKE[0], ALIKE[0]]
    log = log_of(loads, [(3.0, 1.0)])
    assert log.blocks_left == 3
    assert log.seconds_left == pytest.approx(4.0 + 4.0 + 1.0)
    log.emit(linear_done("b.2", 3.0))
    log.emit(block_done("b.2", 4.0))
    assert log.blocks_left == 1


def test_stages_that_processes_solve_at_once_take_no_longer_than_their_block():
    log = log_of(ALIKE, [])
    for _ in range(8):
        log.emit(linear_done("b.0", 1.0))
    log.emit(block_done("b.0", 5.0))
    assert log.seconds_left == pytest.approx(29 * 5.0)


def test_nothing_is_estimated_before_the_first_block():
    with pytest.raises(statistics.StatisticsError):
        _ = log_of(ALIKE, [], restored=20).seconds_left


@pytest.fixture
def loads(tiny_llama, token_rows, monkeypatch):
    """loads(settings) -> what a run with these settings says that its blocks have to do, in order."""
    announced, expect = [], RunLog.expect
    monkeypatch.setattr(RunLog, "expect", lambda log, loads: (announced.append(loads), expect(log, loads)))

    def run(rows=token_rows, **settings):
        config = GPTQConfig(**{"bits": 4, "group_size": 32, "effort": "fast", "dataset": rows, **settings})
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
        return list(announced[-1].values())

    return run


def test_the_last_block_runs_longer_than_those_before_as_the_models_are_compared_after_it(loads):
    first, last = loads()
    assert last.solving == first.solving
    assert last.running > first.running
    assert len(set(loads(quality_gate="off"))) == 1


def test_running_takes_as_long_as_there_are_tokens_and_streams_of_them_and_solving_does_not(loads, token_rows):
    (once, _), (half, _) = loads(quality_gate="off"), loads(token_rows[:8], quality_gate="off")
    (both, _) = loads(quality_gate="off", effort="default")
    assert once.solving == half.solving == both.solving
    assert once.running == pytest.approx(2 * half.running, rel=0.15)
    assert both.running == pytest.approx(2 * once.running, rel=0.15)


def test_a_head_is_solved_row_by_row_like_a_block_and_no_block_runs_for_it(loads):
    first, *_, head = loads(lm_head=True)
    rows_of_64, rows_of_96 = 2 * 64 + 2 * 32 + 2 * 96, 64
    of_block = rows_of_64 * 64**2 + rows_of_96 * 96**2  # rounding a column moves all that follow
    assert head.solving / first.solving == pytest.approx(VOCABULARY * 64**2 / of_block)
    assert head.running < first.running


def test_events_are_in_the_file_as_they_happen(tmp_path):
    with RunLog(tmp_path / "log.jsonl", bar=False) as log:
        log.emit(block_done("b", 1.0))
        assert json.loads((tmp_path / "log.jsonl").read_text())["seconds"] == 1.0


def test_a_log_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "log.jsonl"
    with pytest.raises(KeyboardInterrupt), RunLog(file, bar=False) as log:
        log.emit(linear_done("b.0", 1.0))
        log.emit(block_done("b.0", 2.0))
        raise KeyboardInterrupt
    assert read_events(file) == log.events
    assert [event.event for event in log.events] == ["linear", "block", "failed"]


def test_a_log_of_an_earlier_version_is_read_under_todays_names(tmp_path):
    file = tmp_path / "log.jsonl"
    linear = {**to_dict(linear_done("b.0", 1.0)), "nearest_relative_loss": 0.25}
    del linear["rtn_relative_loss"]
    losses = {"held_out_loss_before": 0.2, "held_out_loss": 0.1, "passes": 3, "seconds": 1.0}
    polished = {"event": "polished", "at_seconds": 1.0, "block": "b.0", **losses}
    later = {"event": "of a version to come", "at_seconds": 2.0}
    file.write_text("".join(json.dumps(line) + "\n" for line in (linear, polished, later)))
    found, reconstructed = read_events(file)
    assert found.rtn_relative_loss == 0.25
    assert isinstance(reconstructed, BlockReconstructed)
    assert reconstructed.held_out_loss == 0.1


@pytest.mark.parametrize(
    "line", ["5", "[]", "{}", '{"event": []}', "not JSON", '{"event": "linear", "block": "b"}', "[" * 100_000]
)
def test_a_line_that_is_no_event_is_named(line, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps(to_dict(block_done("b", 1.0))) + f"\n{line}\n")
    with pytest.raises(ReportError, match=r"log\.jsonl, line 2"):
        read_events(file)


STARTED = Started(
    utc="", model="m", from_folder=True, blocks=1, linears=1, skipped={}, weaknesses=[], device="cpu",
    calibration={"source": "list", "samples": 1, "tokens": 9, "seed": 0, "sha256": "0"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("event", "changes"),
    [
        (linear_done("b", 1.0), changes)
        for changes in (
            *({"seconds": None}, {"seconds": "1"}, {"damping": True}, {"linear": 5}, {"family": 3}, {"tokens": 1.5}),
            *({"shape": 3}, {"shape": [8, "x"]}, {"shape": {}}, {"at_seconds": None}, {"peak_gib": []}),
        )
    ]
    + [
        (STARTED, changes)
        for changes in (
            *({"calibration": []}, {"calibration": {}}, {"calibration": {**STARTED.calibration, "tokens": None}}),
            *({"calibration": {**STARTED.calibration, "sources": "x"}}, {"skipped": {"a": 1}}, {"weaknesses": None}),
        )
    ],
)
def test_what_is_of_another_type_is_named(event, changes, tmp_path):
    """Who draws or describes a run relies on the types."""
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps(to_dict(event)) + "\n")
    assert read_events(file) == [event]
    file.write_text(json.dumps(to_dict(event) | changes) + "\n")
    with pytest.raises(ReportError, match=rf"log\.jsonl, line 1 is no event of a run \({next(iter(changes))}"):
        read_events(file)


def test_every_event_has_a_name_of_its_own():
    assert len(EVENTS) == len(Event.__subclasses__())
