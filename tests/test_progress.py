# SPDX-License-Identifier: Apache-2.0
import json
import statistics

import pytest

from optq.progress import RunLog


def log_of(blocks, seconds, restored=0):
    log = RunLog(bar=False)
    log.expect(blocks)
    for _ in range(restored):
        log.emit("restored", block="b", seconds=0.1)
    for value in seconds:
        log.emit("block", block="b", seconds=value)
    return log


def test_a_slow_first_block_does_not_spoil_the_estimate():
    log = log_of(30, [9.0, 4.0, 4.1])
    assert log.blocks_left == 27
    assert log.seconds_left == pytest.approx(27 * 4.1)


def test_blocks_of_an_earlier_session_count_as_done_but_not_as_fast():
    log = log_of(30, [4.0], restored=20)
    assert log.blocks_left == 9
    assert log.seconds_left == pytest.approx(36.0)


def test_nothing_is_estimated_before_the_first_block():
    with pytest.raises(statistics.StatisticsError):
        _ = log_of(30, [], restored=20).seconds_left


def test_events_are_in_the_file_as_they_happen(tmp_path):
    with RunLog(tmp_path / "log.jsonl", bar=False) as log:
        log.emit("block", block="b", seconds=1.0)
        assert json.loads((tmp_path / "log.jsonl").read_text())["seconds"] == 1.0
