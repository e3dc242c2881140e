"""Work that may never end: on threads that a process can leave behind.

``concurrent.futures`` joins its threads when a process ends, so one hanging call would keep it for ever. These threads
are daemons. Python cannot stop a thread, and one that is inside a library while the interpreter is taken down can bring
the process to a crash; whoever ends a process asks :func:`left_behind` first.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import TypeVar

T = TypeVar("T")

_started: list[threading.Thread] = []


def started(work: Callable[[], T], name: str) -> Future[T]:
    """What ``work`` will return or raise; it begins at once, on a thread with this one's accelerator."""
    future: Future[T] = Future()
    device = _device()

    def run() -> None:
        try:
            if device is not None:
                sys.modules["torch"].accelerator.set_device_index(device)
            future.set_result(work())
        except CancelledError:
            future.cancel()
            future.set_running_or_notify_cancel()
        except BaseException as error:  # noqa: BLE001 - also what would end this thread alone, such as SystemExit
            future.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _started[:] = [*left_behind(), thread]
    thread.start()
    return future


def left_behind() -> list[threading.Thread]:
    """The threads of :func:`started` whose work has not ended."""
    return [thread for thread in _started if thread.is_alive()]


def _device() -> int | None:
    """Which accelerator this thread uses: a new one would begin with the first."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return None
    return int(torch.accelerator.current_device_index())
