# SPDX-License-Identifier: Apache-2.0
"""What lm-evaluation-harness has measured of two models, task by task."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optq.errors import ConfigError

from .verdict import Verdict, verdict_of_scores

METRICS = ("acc_norm", "exact_match", "acc", "f1", "pass@1", "word_perplexity", "perplexity")
"""The first of these that a task has is the one that is compared; else its first number."""

LARGE_LOSS = 0.02  # of the original's score


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task's score of both models.

    Args:
        margin: the larger of the two standard errors; None where the harness gives none.
    """

    name: str
    metric: str
    original: float
    quantized: float
    higher_is_better: bool
    margin: float | None

    @property
    def kept(self) -> float:
        """The part of the original's score that is left; above 1 if the quantized model is better."""
        better, worse = (self.quantized, self.original) if self.higher_is_better else (self.original, self.quantized)
        return better / worse if worse else 1.0

    @property
    def is_large_loss(self) -> bool:
        return self.kept < 1 - LARGE_LOSS


@dataclass(frozen=True, kw_only=True)
class HarnessComparison:
    """All tasks that both models were tested on; `left_out` names those of one model only."""

    tasks: tuple[Task, ...]
    left_out: tuple[str, ...]

    @property
    def kept(self) -> float:
        """Mean over the tasks."""
        return statistics.fmean(task.kept for task in self.tasks)

    @property
    def verdict(self) -> Verdict:
        return verdict_of_scores(self.kept)


def read_harness_results(path: Path) -> dict[str, Any]:
    """Read a results_*.json of lm-evaluation-harness, or the newest one in a folder.

    Raises:
        ConfigError: there is none, or it is something else.
    """
    files = sorted(path.rglob("results_*.json"), key=lambda file: file.stat().st_mtime) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds no results_*.json of lm-evaluation-harness.")
    try:
        found = json.loads(files[-1].read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{files[-1]} is not valid JSON: {error}.") from error
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise ConfigError(f"{files[-1]} is no result of lm-evaluation-harness: it has no 'results' by task.")
    return found


def compare_harness(original: Mapping[str, Any], quantized: Mapping[str, Any]) -> HarnessComparison:
    """Compare two results of lm-evaluation-harness.

    Raises:
        ConfigError: they have no task in common.
    """
    both = [task for task in original["results"] if task in quantized["results"]]
    tasks = tuple(task for name in both if (task := _task(name, original, quantized)) is not None)
    if not tasks:
        raise ConfigError(
            f"The results have no task in common: {', '.join(original['results']) or 'none'} and "
            f"{', '.join(quantized['results']) or 'none'}. Run the harness with the same --tasks for both models."
        )
    compared = {task.name for task in tasks}
    all_names = dict.fromkeys([*original["results"], *quantized["results"]])
    return HarnessComparison(tasks=tasks, left_out=tuple(name for name in all_names if name not in compared))


def _task(name: str, original: Mapping[str, Any], quantized: Mapping[str, Any]) -> Task | None:
    before, after = original["results"][name], quantized["results"][name]
    # Keys are "metric,filter"; "_stderr" is part of the metric's name.
    numbers = [
        key
        for key, value in before.items()
        if "," in key and "_stderr" not in key and isinstance(value, (int, float)) and key in after
    ]
    if not numbers:
        return None
    wanted = {metric: place for place, metric in reversed(list(enumerate(METRICS)))}
    key = min(numbers, key=lambda key: wanted.get(key.split(",")[0], len(METRICS)))
    metric, _, filtered = key.partition(",")
    errors = [scores.get(f"{metric}_stderr,{filtered}") for scores in (before, after)]
    known = [error for error in errors if isinstance(error, (int, float))]
    directions = original.get("higher_is_better", {}).get(name) or {}
    return Task(
        name=name,
        metric=metric,
        original=float(before[key]),
        quantized=float(after[key]),
        higher_is_better=directions.get(metric, "perplexity" not in metric),
        margin=max(known) if known else None,
    )
