# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, made from configs, and data for them."""

import os

# Before any library reads them: tests never reach the network, and their torch threads do not fight over two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where the machine asks for no bytecode, each of the many processes here would compile transformers anew: six seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import json
import logging
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# Without a GPU, Triton's programs run in its interpreter. It must know before anyone imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import interpreter
from optq import GPTQConfig
from optq.device import triton as triton_devices
from optq.kernels import KERNELS, triton_gpu
from optq.quantization.activations import ActivationStore
from optq.quantization.coroutines import Coroutine
from optq.runs.journal import Journal

if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
    interpreter.quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes starts first, so that two workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


def pytest_collection_finish() -> None:
    """The million objects of libraries and collected tests outlive every test: no collection looks at them again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some libraries count at the end what was not freed


VOCABULARY = 128
CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def tiny_llama_config(**changes: object) -> LlamaConfig:
    """Two blocks; the widths are multiples of 32, as every format needs."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    return LlamaConfig(**{**settings, **changes})


def save_tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token per character, with a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(specials + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def save_tiny_llama(folder: Path, **changes: object) -> Path:
    """A tiny random llama, float32, and its tokenizer; `changes` are its config's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama_config(**changes))
    # Larger than the usual initialisation, so that quantization visibly changes the outputs.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random llama and its tokenizer. Not to be changed."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def token_rows() -> list[dict[str, list[int]]]:
    """Sixteen calibration samples of 48 random token ids."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": row.tolist()} for row in torch.randint(4, VOCABULARY - 30, (16, 48), generator=generator)]


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, token_rows: list[dict[str, list[int]]]) -> Any:
    """The tiny llama, 4-bit, quantized in this process. Not to be changed."""
    config = GPTQConfig(bits=4, group_size=32, dataset=token_rows)
    return AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)


@pytest.fixture(scope="module")
def saved(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`quantized` as a checkpoint. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    quantized.save_pretrained(folder)
    return folder


@pytest.fixture
def transformers_adapters() -> None:
    """Skips where transformers asks for a newer PEFT than there is: its minimum rises ahead of releases."""
    from transformers.integrations.peft import MIN_PEFT_VERSION
    from transformers.utils import check_peft_version

    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def optqs_logging_as_before() -> Iterator[None]:
    """For tests that call the command line in this process: it sets up logging, and what happens at SIGTERM."""
    logger, handler = logging.getLogger("optq"), signal.getsignal(signal.SIGTERM)
    before = logger.level, logger.propagate, logger.handlers
    yield
    level, logger.propagate, logger.handlers = before
    logger.setLevel(level)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def mixed_config(token_rows: list[dict[str, list[int]]]) -> GPTQConfig:
    """4 bits, but down_proj 8, and o_proj not quantized."""
    dynamic: dict[str, dict[str, Any]] = {"-:.*o_proj": {}, "+:.*down_proj": {"bits": 8}}
    return GPTQConfig(bits=4, group_size=32, effort="fast", dataset=token_rows, dynamic=dynamic)


@contextmanager
def rewritten(path: Path) -> Iterator[dict[str, Any]]:
    """What a JSON file says, to be changed."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def interrupted_after(blocks: int, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> None:
    """Run `call`, and end it as Ctrl-C would after so many finished blocks."""
    write, done = Journal.write, []

    def writing(self: Journal, name: str) -> None:
        write(self, name)
        done.append(name)
        if len(done) == blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", writing)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.fixture(scope="session")
def probe_ids() -> torch.Tensor:
    """(2, 24) token ids to compare logits on; not in the calibration data."""
    return torch.randint(4, VOCABULARY - 30, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def correlated_problem() -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Makes a weight (out, in) and a Hessian (in, in) of correlated inputs with unequal energies."""

    def make(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
        weight = torch.randn(out_features, in_features, generator=generator)
        mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
        energies = torch.logspace(-1, 1, in_features)[torch.randperm(in_features, generator=generator)]
        inputs = torch.randn(4 * in_features, in_features, generator=generator) @ (mixing + torch.eye(in_features))
        inputs *= energies
        return weight, inputs.T @ inputs / inputs.shape[0]

    return make


def waiting_forwards() -> list[Coroutine[Any]]:
    """Those that have begun and not ended."""
    return [each for each in gc.get_objects() if issubclass(type(each), Coroutine) and each]


class SideStream:
    """What copies ahead, without a device: it says what it was asked for, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, float]] = []

    def begin(self, pinned: torch.Tensor) -> tuple[torch.Tensor, int]:
        self.events.append(("begin", float(pinned.flatten()[0])))
        return pinned.clone(), len(self.events)

    def finish(self, copy: torch.Tensor, complete: int) -> torch.Tensor:
        assert self.events[complete - 1] == ("begin", float(copy.flatten()[0]))
        self.events.append(("finish", float(copy.flatten()[0])))
        return copy


@pytest.fixture
def side_stream(monkeypatch: pytest.MonkeyPatch) -> SideStream:
    """Makes stores on a CPU keep what finds no room in memory, and copy it ahead, as on an accelerator."""
    side, init = SideStream(), ActivationStore.__init__

    def with_side(store: ActivationStore, *arguments: Any, **settings: Any) -> None:
        init(store, *arguments, **settings)
        store._side = side  # type: ignore[assignment]

    monkeypatch.setattr(ActivationStore, "__init__", with_side)
    monkeypatch.setattr(ActivationStore, "_is_memory", False)
    return side


@pytest.fixture(autouse=True)
def _no_program_gives_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton program that cannot be started is an error in tests, and nothing takes its place."""

    def give_up(launch: triton_gpu.Launch, error: Exception) -> None:
        raise error

    if "may_give_up" not in request.keywords:
        monkeypatch.setattr(triton_gpu, "_give_up", give_up)


def triton_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that runs on GPUs with Triton take CPUs for such.

    Less is tried before it is used: the interpreter is slow.
    """
    monkeypatch.setattr(triton_gpu, "TRIED_ROWS", (3, 70))
    monkeypatch.setattr(triton_gpu, "TRIED_COLUMNS", 256)
    monkeypatch.setattr(triton_devices, "DEVICES", ("cpu",))
    for name in ("triton", "gemlite"):
        monkeypatch.setitem(KERNELS, name, replace(KERNELS[name], devices=frozenset({"cpu"})))


@pytest.fixture
def interpreted_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the row `triton` run on CPUs, in Triton's interpreter. Memory that nobody has written to is NaN then."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip(
            "Triton's interpreter is for machines without a GPU; tests/test_gpu.py runs the programs themselves"
        )
    triton_on_cpus(monkeypatch)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Triton products that are launched, but for those that are tried before."""
    made: list[str] = []
    launch, why_wrong = triton_gpu.Launch.__call__, triton_gpu.why_wrong

    def noted(self: triton_gpu.Launch, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        made.append(self.multiply.function.fn.__name__)
        return launch(self, inputs)

    def tried(*arguments: Any) -> str | None:
        before = len(made)
        reason = why_wrong(*arguments)
        del made[before:]
        return reason

    monkeypatch.setattr(triton_gpu.Launch, "__call__", noted)
    monkeypatch.setattr(triton_gpu, "why_wrong", tried)
    return made


def forked(work: Callable[[], object]) -> int:
    """The number of a child of this process that does some work and ends, without the seconds that imports take.

    It ends with status 0, or with 1 and the traceback where the work raised.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def forked_ranks(work: Callable[[], object], count: int, said: Path) -> None:
    """Have so many processes do the same work, with what torchrun gives them; their stderr goes to the file `said`.

    Raises:
        AssertionError: one of them did not end with status 0.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    said.touch()

    def process(rank: int) -> None:
        os.environ |= {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        warnings.simplefilter("default")  # no errors, and nobody who listens: as in a process that no test has begun
        logging.getLogger().handlers.clear()
        work()

    children = [forked(partial(process, rank)) for rank in range(count)]
    assert [os.waitpid(child, 0)[1] for child in children] == count * [0], said.read_text()[-3000:]


def two_ranks(script: Path, *arguments: str, said: Path) -> None:
    """Have two processes run a script together. Forks, unless torch is built for GPUs: its autograd may refuse them.

    Raises:
        AssertionError: one of them did not end with status 0.
    """

    def run() -> None:
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")

    if torch.version.cuda is None:
        forked_ranks(run, 2, said)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments]
    with said.open("w") as stderr:
        assert subprocess.run(command, stderr=stderr, check=False).returncode == 0, said.read_text()[-3000:]


Planted = Callable[..., ModuleType]


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    """planted(module, (right, wrong)) -> a copy of the module of this name, with a fault in its text or without."""

    def load(module: str, fault: tuple[str, str] | None) -> ModuleType:
        found = find_spec(module)
        assert found is not None
        assert found.origin is not None
        text = Path(found.origin).read_text()
        if fault is not None:
            assert fault[0] in text
            text = text.replace(*fault)
        (tmp_path / "planted.py").write_text(text)
        spec = spec_from_file_location("planted", tmp_path / "planted.py")
        assert spec is not None
        assert spec.loader is not None
        copy = module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return load
