# SPDX-License-Identifier: Apache-2.0
import math
import re
from pathlib import Path

import pytest

from optq.evaluation.verdict import SCORE_VERDICTS, VERDICTS, verdict_of, verdict_of_scores


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(0.9, "as good as the original"), (1.02, "good"), (1.25, "usable"), (1.251, "poor"), (math.nan, "poor")],
)
def test_the_word_follows_the_perplexity(ratio, verdict):
    assert verdict_of(ratio) == verdict
    assert verdict_of(ratio, sound=False) == "poor"


def test_what_is_not_known_has_no_word():
    assert verdict_of(None) is None
    assert verdict_of_scores(math.nan) == "poor"


def test_the_limits_stand_nowhere_else_and_on_the_page():
    root = Path(__file__).parents[2]
    page = (root / "docs/evaluation.md").read_text(encoding="utf-8")
    assert all(f"| at most {limit} | {verdict} |" in page for verdict, limit in VERDICTS.items())
    assert VERDICTS.keys() == SCORE_VERDICTS.keys()
    tables = [
        file for file in (root / "src").rglob("*.py") if re.search(r'"usable": \d', file.read_text(encoding="utf-8"))
    ]
    assert [file.name for file in tables] == ["verdict.py"]
