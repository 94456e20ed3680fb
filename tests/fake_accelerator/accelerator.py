# SPDX-License-Identifier: Apache-2.0
"""A "cuda" device for a torch that was built for CPUs: `install()` before anything else imports torch.

What it shows is said in docs/testing.md. In short: an operator that mixes devices raises, as on a GPU; memory that
nobody has written to, or that has been freed, is NaN; copies on a stream of their own happen when somebody waits for
them, not before; what would wait for the device is counted with the line of optq that it comes from; there may be
several devices, and little memory. Arithmetic is the CPU's, to the last bit.
"""

import collections
import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
import sysconfig
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("accelerator.cpp")
MEMORY = 8 * 2**30

WAITS: "collections.Counter[tuple[str, str]]" = collections.Counter()
"""What waited for the device, and the line of optq or transformers that had it do so."""

_library: Any = None
_here = threading.local()


def torch_folder() -> Path:
    """Where torch is, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """Compile the device, in half a minute. Raises OSError without a compiler."""
    torch, target = torch_folder(), folder / "fake_cuda.so"
    include = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    command = ["g++", "-std=c++20", "-O0", "-w", "-fPIC", "-shared", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    command += [part for path in include for part in ("-isystem", str(path))]
    command += [str(SOURCE), "-o", str(target), f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
    command += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    subprocess.run(command, check=True)
    return target


def load(path: Path) -> None:
    """Bring the device into this process. Its hooks must be there before torch asks whether there are any."""
    global _library
    assert "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401

    spec = importlib.util.spec_from_file_location("fake_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    _library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_library)


class Stream:
    """In the place of torch.cuda.Stream."""

    made = 0

    def __init__(self, device: Any = None, priority: int = 0, **settings: Any) -> None:
        Stream.made += 1
        self.stream_id = settings.get("stream_id", Stream.made)
        self.cuda_stream = self.stream_id

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        _library.count("wait_event")
        event.flush()

    def wait_stream(self, other: "Stream") -> None:
        _library.flush(other.stream_id, 2**62)

    def synchronize(self) -> None:
        WAITS["stream.synchronize", caller()] += 1
        _library.flush(self.stream_id, 2**62)

    def query(self) -> bool:
        return True


DEFAULT = Stream(stream_id=0)


class Event:
    """In the place of torch.cuda.Event: whoever waits for it sees what its stream had been given before."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._stream, self._copies = 0, 0

    def record(self, stream: Stream | None = None) -> None:
        self._stream = (stream or present_stream()).stream_id
        self._copies = _library.queued(self._stream)

    def flush(self) -> None:
        _library.flush(self._stream, self._copies)

    wait = synchronize = flush

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


def present_stream(device: Any = None) -> Stream:
    found: Stream = getattr(_here, "stream", DEFAULT)
    return found


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    before = present_stream()
    _here.stream = stream or before
    _library.set_stream(_here.stream.stream_id)
    try:
        yield
    finally:
        _here.stream = before
        _library.set_stream(before.stream_id)


def caller() -> str:
    """The line of optq that is being run, or else of transformers."""
    frame, other = sys._getframe(1), None
    while frame is not None:
        name, line = frame.f_code.co_filename, frame.f_lineno
        if "/optq/" in name:
            return f"{name.rpartition('/optq/')[2]}:{line}"
        if other is None and "/transformers/" in name:
            other = f"transformers/{name.rpartition('/transformers/')[2]}:{line}"
        frame = frame.f_back  # type: ignore[assignment]
    return other or "elsewhere"


def index_of(device: Any) -> int:
    import torch

    if isinstance(device, int):
        return device
    found = None if device is None else torch.device(device).index
    return int(_library.device() if found is None else found)


def install(library: Path, *, devices: int = 1, capability: tuple[int, int] = (9, 0)) -> Any:
    """Bring the device into this process, and have torch.cuda and torch.accelerator speak of it.

    Returns:
        the module of C++: set_limit, allocated, peak, counts, mismatches and so on.
    """
    load(library)
    import torch

    _library.set_devices(devices)
    _library.on_wait(lambda what: WAITS.update({(what, caller()): 1}))
    nothing = types.SimpleNamespace

    def properties(device: Any = None) -> Any:
        return nothing(
            name="Fake GPU",
            major=capability[0],
            minor=capability[1],
            total_memory=MEMORY,
            multi_processor_count=4,
            warp_size=32,
        )

    torch.version.cuda = "13.0"
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "_is_compiled": lambda: False,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: devices,
        "current_device": _library.device,
        "_exchange_device": _library.exchange_device,
        "_maybe_exchange_device": _library.exchange_device,
        "set_device": lambda device: _library.exchange_device(index_of(device)),
        "synchronize": lambda device=None: WAITS.update({("synchronize", caller()): 1}),
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "current_stream": present_stream,
        "default_stream": lambda device=None: DEFAULT,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "Fake GPU",
        "get_device_properties": properties,
        "mem_get_info": lambda device=None: (MEMORY - _library.allocated(index_of(device)), MEMORY),
        "memory_allocated": lambda device=None: _library.allocated(index_of(device)),
        "memory_reserved": lambda device=None: _library.allocated(index_of(device)),
        "max_memory_allocated": lambda device=None: _library.peak(index_of(device)),
        "max_memory_reserved": lambda device=None: _library.peak(index_of(device)),
        "reset_peak_memory_stats": lambda device=None: _library.reset_peak(index_of(device)),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "is_bf16_supported": lambda *_, **__: capability >= (8, 0),
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "get_rng_state_all": lambda: [],
        "set_rng_state_all": lambda states: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    accelerator = {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "current_device_index": _library.device,
        "set_device_index": lambda device: _library.exchange_device(index_of(device)),
        "synchronize": answers["synchronize"],
        "empty_cache": lambda: None,
    }
    for name, answer in accelerator.items():
        setattr(torch.accelerator, name, answer)
    torch.Tensor.record_stream = lambda self, stream: _library.count("record_stream")  # type: ignore[assignment]
    return _library


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    print(build(Path(sys.argv[1])))
