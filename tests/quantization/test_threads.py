# SPDX-License-Identifier: Apache-2.0
"""Without the package greenlet: the same claims, with threads in the greenlets' place."""

import subprocess
import sys
from pathlib import Path

import pytest

from optq.quantization.threads import getcurrent, greenlet


class Counting(greenlet):
    """Says where it is, and waits twice."""

    def __init__(self, says):
        super().__init__()
        self.says = says

    def run(self):
        try:
            for number in range(2):
                self.says.append(number)
                self.parent.switch()
            raise ValueError("the end")
        finally:
            self.says.append("left")


def test_turns_are_taken_and_what_the_body_raises_is_raised_where_it_was_called():
    says = []
    one = Counting(says)
    one.parent = getcurrent()
    assert not one
    one.switch()
    assert one
    assert says == [0]
    one.switch()
    with pytest.raises(ValueError, match="the end"):
        one.switch()
    assert says == [0, 1, "left"]
    assert not one


def test_one_is_ended_where_it_waits():
    says = []
    one = Counting(says)
    one.parent = getcurrent()
    one.switch()
    one.throw()
    assert says == [0, "left"]
    assert not one


@pytest.mark.long
def test_suspended_forwards_do_all_that_they_do_with_greenlets():
    tests = Path(__file__).with_name("test_coroutines.py")
    program = "import sys; sys.modules['greenlet'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    asked = ["-q", "-p", "no:cacheprovider", str(tests), "-k", "not torch_state and not thread_more"]
    ended = subprocess.run([sys.executable, "-c", program, *asked], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    assert " passed" in ended.stdout
