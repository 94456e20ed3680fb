# SPDX-License-Identifier: Apache-2.0
"""What `coroutines` needs of the package greenlet, made of threads: for machines on which that cannot be installed.

Each waiting forward then takes an operating system's thread, and with it a GPU's library handles and workspaces.
"""

import threading

import torch

_RUNNING = threading.local()


class GreenletExit(BaseException):
    """Raised where a greenlet waits, to end it."""


class greenlet:  # noqa: N801  (greenlet's name)
    """A stack of its own. Only one of all runs: who switches to another waits until somebody switches back."""

    def __init__(self) -> None:
        self.parent: greenlet | None = None
        self._turn = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._ended = False
        self._to_raise: BaseException | None = None  # where it waits

    def __bool__(self) -> bool:
        return self._thread is not None and not self._ended

    def run(self) -> None:
        """The body, of a subclass."""
        raise NotImplementedError

    def switch(self) -> None:
        """Begin it, or go on where it waits; what it raises is raised in its parent."""
        caller = getcurrent()
        if self._thread is None:
            # A thread starts on the first GPU, and its caller may be on another.
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self._thread = threading.Thread(target=self._body, args=(device,), daemon=True)
            self._thread.start()
        else:
            self._turn.release()
        caller._turn.acquire()
        error, caller._to_raise = caller._to_raise, None
        if error is not None:
            raise error

    def throw(self) -> None:
        """End it where it waits."""
        self._to_raise = GreenletExit()
        self.switch()

    def _body(self, device: int | None) -> None:
        _RUNNING.greenlet = self
        if device is not None:
            torch.cuda.set_device(device)
        error: BaseException | None = None
        try:
            self.run()
        except GreenletExit:
            pass
        except BaseException as caught:  # the parent's to handle, whatever it is
            error = caught
        self._ended = True
        assert self.parent is not None
        self.parent._to_raise = error
        self.parent._turn.release()


def getcurrent() -> greenlet:
    """The one that runs; of a thread that is none of ours, one that stands for it."""
    running: greenlet | None = getattr(_RUNNING, "greenlet", None)
    if running is None:
        running = _RUNNING.greenlet = greenlet()
        running._thread = threading.current_thread()
    return running
