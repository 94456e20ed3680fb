# SPDX-License-Identifier: Apache-2.0
"""`report_to`: what trackers of experiments are told of a run, and what is refused before it."""

import copy
from typing import ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from transformers import AutoModelForCausalLM

import optq
from optq import GPTQConfig
from optq.errors import ConfigError
from optq.events import BlockQuantized, BlockRestored, LinearQuantized, Quality, RunFinished
from optq.runs.trackers import trackers_of

ABSENT = next(name for name in LOGGER_TYPE_TO_CLASS if LoggerType(name) not in get_available_trackers())


class Notebook(GeneralTracker):
    """Notes what it is told."""

    name, requires_logging_directory = "notebook", False
    failing: tuple[str, ...] = ()
    told: ClassVar[list] = []

    def __init__(self, project, folder=None):
        super().__init__()
        self.told.append(("made", project, folder))

    @property
    def tracker(self):
        return self.told

    def _note(self, kind, *facts):
        if kind in self.failing:
            raise RuntimeError("the wire was cut")
        self.told.append((kind, *facts))

    def start(self):
        self._note("start")

    def store_init_configuration(self, values):
        self._note("settings", values)

    def log(self, values, step=None, **kwargs):
        self._note("log", step, values)

    def finish(self):
        self._note("finish")


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "told", [])
    return Notebook


@pytest.fixture
def tiny(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def config(token_rows):
    return GPTQConfig(bits=4, group_size=32, dataset=token_rows, report_to="notebook")


def figures(notebook, section):
    """What was told of a section, by step."""
    logged = [fact[1:] for fact in notebook.told if fact[0] == "log"]
    return [(step, values) for step, values in logged if next(iter(values)).startswith(section)]


def test_a_tracker_is_told_every_block_and_the_verdict(notebook, config, tiny):
    log = optq.quantize(tiny, config).hf_quantizer.log
    kinds = [fact[0] for fact in notebook.told]
    assert kinds[:3] == ["made", "start", "settings"] and kinds[-1] == "finish" and kinds.count("finish") == 1
    assert notebook.told[0] == ("made", "optq", None)
    assert notebook.told[2][1]["bits"] == 4 and "dataset" not in notebook.told[2][1]
    blocks = [event for event in log.events if isinstance(event, BlockQuantized)]
    assert [step for step, _ in figures(notebook, "block")] == list(range(1, len(blocks) + 1))
    for block, (_, told) in zip(blocks, figures(notebook, "block"), strict=True):
        losses = [x.relative_loss for x in log.events if isinstance(x, LinearQuantized) and x.block == block.block]
        assert told["block/loss_mean"] == block.relative_loss and told["block/loss_max"] == max(losses)
        assert told["block/seconds"] == block.seconds and told["block/bits_per_weight"] == block.bits_per_weight
    (quality,) = (event for event in log.events if isinstance(event, Quality))
    (end,) = (event for event in log.events if isinstance(event, RunFinished))
    told = {
        name: value
        for section in ("quality", "run")
        for _, x in figures(notebook, section)
        for name, value in x.items()
    }
    assert told["quality/kl_divergence"] == quality.divergence
    assert told["quality/perplexity_ratio"] == quality.perplexity_ratio
    assert told["quality/verdict"] in ("as good as the original", "good", "usable", "poor")
    assert told["run/bits_per_weight"] == end.bits_per_weight == 4 + 20 / 32


def test_a_run_that_goes_on_counts_what_was_done_before(notebook, config, tiny_llama, tmp_path, monkeypatch):
    emit, seen = optq.events.RunLog.emit, []

    def dying(self, event):
        emit(self, event)
        seen.append(event)
        if isinstance(event, BlockQuantized) and sum(isinstance(x, BlockQuantized) for x in seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(optq.events.RunLog, "emit", dying)
    with pytest.raises(KeyboardInterrupt):
        optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    assert notebook.told[-1] == ("finish",)  # also of a run that is interrupted
    monkeypatch.setattr(optq.events.RunLog, "emit", emit)
    notebook.told.clear()
    optq.quantize(tiny_llama, config, output_dir=tmp_path / "out")
    events = optq.events.read_events(tmp_path / "out" / optq.events.LOG_NAME)
    restored = sum(isinstance(event, BlockRestored) for event in events)
    first = figures(notebook, "block")[0][0] if figures(notebook, "block") else restored + 1
    assert restored and first == restored + 1
    ((_, end),) = figures(notebook, "run")
    assert end["run/bits_per_weight"] == 4 + 20 / 32  # of all, not of what was left


def test_nothing_of_it_stays_in_the_checkpoint_or_the_model(notebook, config, tiny):
    with_it = optq.quantize(copy.deepcopy(tiny), config)
    config.report_to = None
    without = optq.quantize(tiny, config)
    assert with_it.config.quantization_config.to_dict() == without.config.quantization_config.to_dict()
    copied = copy.deepcopy(with_it.hf_quantizer.log)
    copied.emit(copied.events[0])
    assert notebook.told[-1] == ("finish",)


@pytest.mark.parametrize(("failing", "told"), [("log", []), ("finish", None)])
def test_a_tracker_that_fails_does_not_end_the_run(failing, told, notebook, config, tiny, monkeypatch, caplog):
    monkeypatch.setattr(Notebook, "failing", (failing,))
    assert optq.quantize(tiny, config).hf_quantizer.quality is not None
    said = [record.getMessage() for record in caplog.records if "notebook failed" in record.getMessage()]
    assert len(said) == 1 and "the wire was cut" in said[0]
    assert told is None or figures(notebook, "block") == told


def test_a_tracker_that_cannot_be_opened_is_named_before_the_work(notebook, config, tiny, monkeypatch):
    monkeypatch.setattr(Notebook, "failing", ("start",))
    with pytest.raises(ConfigError, match="notebook could not be opened: RuntimeError: the wire was cut"):
        optq.quantize(tiny, config)
    assert not figures(notebook, "block")


def test_a_tracker_that_writes_files_gets_a_folder_of_its_own(notebook, config, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(Notebook, "requires_logging_directory", True)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    optq.quantize(tiny, config)
    assert notebook.told[0][2].startswith(str(tmp_path / "20"))


def test_names_are_names_of_trackers_that_are_installed(notebook):
    assert trackers_of(None) == trackers_of("none") == trackers_of(["none"]) == []
    assert trackers_of("notebook, notebook") == trackers_of(["notebook"]) == ["notebook"]
    assert "notebook" in trackers_of("all") and ABSENT not in trackers_of("all")
    with pytest.raises(ConfigError, match=r"'tensorbord' is no tracker: allowed are .*tensorboard.* all, none"):
        trackers_of("notebook,tensorbord")
    said = f"report_to='{ABSENT}' was asked for, but {ABSENT} is not installed here; .*pip install {ABSENT}"
    with pytest.raises(ConfigError, match=said):
        trackers_of(ABSENT)


def test_it_is_refused_by_plan_as_well_and_before_a_model_is_looked_for():
    with pytest.raises(ConfigError, match="is no tracker"):
        optq.plan("nowhere/nothing", GPTQConfig(bits=4, report_to="wanbd"))
