# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from optq.evaluation import compare_harness, read_harness_results


def results(**tasks):
    return {
        "results": tasks,
        "higher_is_better": {"arc": {"acc": True, "acc_norm": True}, "wikitext": {"word_perplexity": False}},
    }


ORIGINAL = results(
    arc={"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.02},
    wikitext={"alias": "wikitext", "word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A"},
    gsm8k={"alias": "gsm8k", "exact_match,strict-match": 0.4},
)


def quantized(arc=0.6, wikitext=20.0):
    return results(
        arc={"acc,none": 0.1, "acc_norm,none": arc, "acc_norm_stderr,none": 0.03},
        wikitext={"word_perplexity,none": wikitext},
        other={"acc,none": 1.0},
    )


def test_each_task_is_compared_by_its_usual_metric():
    found = compare_harness(ORIGINAL, quantized())
    arc, wikitext = found.tasks
    assert (arc.metric, arc.original, arc.quantized, arc.margin) == ("acc_norm", 0.6, 0.6, 0.03)
    assert (wikitext.metric, wikitext.higher_is_better, wikitext.margin) == ("word_perplexity", False, None)
    assert found.left_out == ("gsm8k", "other")


def test_a_loss_over_two_percent_is_flagged_in_either_direction():
    arc, wikitext = compare_harness(ORIGINAL, quantized(arc=0.6 * 0.979, wikitext=20.0 * 1.03)).tasks
    assert arc.is_large_loss
    assert wikitext.is_large_loss
    arc, wikitext = compare_harness(ORIGINAL, quantized(arc=0.6 * 0.981, wikitext=20.0 * 0.9)).tasks
    assert not arc.is_large_loss
    assert not wikitext.is_large_loss
    assert wikitext.kept > 1


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "as good as the original"), (0.985, "good"), (0.96, "usable"), (0.9, "poor")]
)
def test_the_verdict_follows_the_mean(factor, verdict):
    assert compare_harness(ORIGINAL, quantized(0.6 * factor, 20.0 / factor)).verdict == verdict


def test_results_without_a_common_task_are_refused():
    with pytest.raises(ValueError, match="no task in common: arc, wikitext, gsm8k and other"):
        compare_harness(ORIGINAL, results(other={"acc,none": 1.0}))


def test_the_newest_file_of_a_folder_is_read(tmp_path):
    inner = tmp_path / "model__name"
    inner.mkdir()
    (inner / "results_2026-01-01.json").write_text(json.dumps(ORIGINAL))
    assert read_harness_results(tmp_path) == ORIGINAL


@pytest.mark.parametrize("content", ['{"results": 3}', "[]", "{"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "results_1.json").write_text(content)
    with pytest.raises(ValueError, match=r"results_1\.json"):
        read_harness_results(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        read_harness_results(tmp_path)
