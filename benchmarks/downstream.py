# SPDX-License-Identifier: Apache-2.0
"""Does a quantized model answer as the original does? Multiple-choice questions of five tasks of BIG-bench, offline.

The tasks are taken out of PyPI's `bigbench` 1.0.0 (Apache-2.0), which is downloaded (360 MB, once) and not installed.
The first QUESTIONS of each are asked without examples, in BIG-bench's own form. A choice's score is the log-likelihood
of its tokens after the question; the scores of a question's choices, as probabilities, are compared with those of the
original: how often both prefer the same choice, and the KL divergence. Accuracy is what the preferred choice is worth.
Small models are near chance on some tasks, so agreement tells more. 95 % intervals are by bootstrap over questions.

    python benchmarks/downstream.py --data FOLDER [--model NAME] [--only PATTERN …] [--tools optq peers]

Rows are those of quality.py, with seed 0; their checkpoints are taken from .cache/quality, or made. Results are in
benchmarks/results/downstream.json, by model.
"""

import argparse
import json
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import quality
import record
from real_models import MODELS, smollm2

PACKAGE = "bigbench==1.0.0"
TASKS = ("general_knowledge", "strategyqa", "hindu_knowledge", "known_unknowns", "logical_deduction/three_objects")
QUESTIONS, SEED, RESAMPLES = 200, 0, 2000
RESULT = "downstream"
DEFAULT_ROWS = ("original", "4-bit g64 sym, *", "3-bit g64 sym, *", "2-bit g64 asym, *")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, its choices, and what each choice is worth: 1 for the right ones, else 0."""

    prompt: str
    choices: tuple[str, ...]
    worth: tuple[float, ...]


def tasks_folder() -> Path:
    """The task.json of all TASKS, by task, fetched at the first call."""
    return smollm2.made_once(smollm2.CACHE / "bigbench", _extract)


def _extract(folder: Path) -> None:
    wanted = {f"/bigbench/benchmark_tasks/{task}/task.json": task for task in TASKS}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        package = smollm2.download(PACKAGE, Path(scratch))
        with tarfile.open(package) as archive:
            for member in archive:
                task = wanted.get(member.name[member.name.find("/") :])
                if task is not None:
                    file = folder / task / "task.json"
                    file.parent.mkdir(parents=True)
                    file.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]


def questions_of(task: dict[str, Any], most: int) -> list[Question]:
    """The first `most` questions of a task.json, in BIG-bench's form and with its defaults."""
    opening, before = task.get("task_prefix", ""), task.get("example_input_prefix", "\nQ: ")
    after, bullet = task.get("example_output_prefix", "\nA: "), task.get("choice_prefix", "\n  choice: ")
    found = []
    for example in task["examples"][:most]:
        choices = example["target_scores"]
        listed = (
            "".join(f"{bullet}{choice}" for choice in choices) if task.get("append_choices_to_input", True) else ""
        )
        # The space before an answer belongs to its first token.
        prompt = f"{opening}{before}{example['input']}{listed}{after}".rstrip(" ")
        found.append(Question(prompt=prompt, choices=tuple(choices), worth=tuple(choices.values())))
    return found


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: Question) -> Tensor:
    """Log-probabilities of the choices, (choices,) float64: the softmax of their log-likelihoods after the prompt."""
    opening = tokenizer("").input_ids[:1]
    prompt = torch.tensor([opening + tokenizer(question.prompt, add_special_tokens=False).input_ids])
    tokens = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in question.choices]
    longest = max(map(len, tokens))
    ids = torch.tensor([each + [0] * (longest - len(each)) for each in tokens])
    read = model(prompt, use_cache=True, logits_to_keep=1)
    logits = read.logits.expand(len(ids), -1, -1)
    if longest > 1:
        read.past_key_values.batch_repeat_interleave(len(ids))
        logits = torch.cat([logits, model(ids[:, :-1], past_key_values=read.past_key_values).logits], 1)
    likelihoods = log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]
    lengths = torch.tensor([len(each) for each in tokens])
    return log_softmax((likelihoods * (torch.arange(longest) < lengths[:, None])).sum(1), -1)


def interval(values: Tensor) -> list[float]:
    """The 95 % bootstrap interval of the mean of `values`, (questions,)."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    return torch.quantile(values[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def compared(questions: list[Question], original: list[Tensor], found: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Means over the questions and their intervals: agreement with the original, divergence in nats, accuracy."""
    each = {"agreement": [], "divergence": [], "accuracy": []}  # type: dict[str, list[float]]
    for question, reference, scores in zip(questions, original, found, strict=True):
        preferred = int(scores.argmax())
        each["agreement"].append(float(preferred == int(reference.argmax())))
        each["divergence"].append(float((reference.exp() * (reference - scores)).sum()))
        each["accuracy"].append(float(question.worth[preferred]))
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in each.items()}
    return {
        name: {"mean": round(float(values.mean()), 5), "interval": [round(end, 5) for end in interval(values)]}
        for name, values in tensors.items()
    }


def judged(
    questions: dict[str, list[Question]], original: dict[str, list[Tensor]], found: dict[str, list[Tensor]]
) -> dict[str, Any]:
    """A row: all questions together, and each task."""
    joined = [[each for task in questions for each in part[task]] for part in (questions, original, found)]
    tasks = {task: compared(questions[task], original[task], found[task]) for task in questions}
    return {"all": compared(*joined), "tasks": tasks}  # type: ignore[arg-type]


def answers(model: Any, tokenizer: Any, questions: dict[str, list[Question]]) -> dict[str, list[Tensor]]:
    return {task: [answer(model, tokenizer, question) for question in asked] for task, asked in questions.items()}


def model_of(name: str, row_name: str, data: Path, calibration: Path) -> Any:
    """The dense model of a row, or None if its tool failed."""
    model, row = MODELS[name], quality.rows()[row_name]
    if row["tool"] == "nearest":
        return quality.loaded(model, str(model.fetch()), None, row)
    made = quality.checkpoint_of(name, row_name, data, calibration)
    return None if made is None else quality.loaded(model, str(model.fetch()), made[0])


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=[name for name in MODELS if not MODELS[name].embeds], default="smollm2")
    parser.add_argument("--only", nargs="+", default=DEFAULT_ROWS, help="patterns of row names")
    parser.add_argument("--tools", nargs="+", choices=("optq", "peers"), default=["optq"])
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of each task at most")
    arguments = parser.parse_args()
    name, model = arguments.model, MODELS[arguments.model]
    texts = {task: (tasks_folder() / task / "task.json").read_text(encoding="utf-8") for task in TASKS}
    questions = {task: questions_of(json.loads(text), arguments.questions) for task, text in texts.items()}
    tokenizer = AutoTokenizer.from_pretrained(model.fetch())
    original = answers(model.load(model.fetch()), tokenizer, questions)
    calibration = quality.calibration_file(name, arguments.data, 0)
    for row_name in quality.chosen(arguments.only, arguments.tools):
        tool = quality.rows()[row_name]["tool"]
        if tool == "original":
            found = original
        else:
            quantized = model_of(name, row_name, arguments.data, calibration)
            if quantized is None:
                continue
            found = answers(quantized, tokenizer, questions)
        results = record.read(RESULT)
        measured_at = {**record.measured_at(), "with": quality.made_with(tool)}
        row = {**judged(questions, original, found), "measured_at": measured_at}
        results.setdefault(name, {})[row_name] = row
        results[name] = {each: results[name][each] for each in quality.rows() if each in results[name]}
        print(name, row_name, row["all"], flush=True)
        settings = {
            "tasks": {task: len(asked) for task, asked in questions.items()},
            "package": PACKAGE,
            "intervals": f"95 %, bootstrap over questions, {RESAMPLES} resamples",
            "seed": SEED,
            "models": {each: MODELS[each].title for each in results},
        }
        record.write(RESULT, settings, results, quiet=True)


if __name__ == "__main__":
    main()
