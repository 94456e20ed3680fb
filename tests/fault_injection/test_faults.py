# SPDX-License-Identifier: Apache-2.0
"""Whatever call fails, and whenever the process is killed, a run ends finished, can be gone on with, or has not begun.

A sample of the points; `benchmarks/faults.py` tries them all, and kills runs at random moments, which no test should.
"""

import json
import shutil
import sys

import pytest

import faults

EVERY = 130


@pytest.fixture(scope="module")
def found():
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        pytest.skip("takes LD_PRELOAD and a compiler of C")
    return faults.measured(EVERY)


@pytest.mark.minutes
def test_no_run_is_lost(found):
    assert not found["problems"], json.dumps(found["problems"], indent=1)
    assert found["all"]["all"]["points"] >= 20
    assert found["all"]["all"]["lost"] == 0


@pytest.mark.minutes
def test_the_faults_have_happened(found):
    """Negative controls: runs that nothing had happened to would all be finished, and careless ones are lost."""
    assert all(found["calls"].values())
    assert found["all"]["all"]["finished"] < found["all"]["all"]["points"] / 2
    assert found["errors"]["named by optq"] > 0
    assert found["control"]["a journal that checks nothing"]["lost"] == 2
