"""SIGTERM: how a run that a scheduler stops comes to an orderly end.

A loop that saves its state by itself asks `asked()` at every step, saves when it is True and raises
`checkpoints.Preempted`. Everywhere else the signal handler raises `Stopped` in the main thread, as
Ctrl-C raises KeyboardInterrupt: files appear complete or not at all, so an exception can hurt no
more than a `kill -9` could.

Who is asked is found out by the asking: the handler leaves a process alone that asked within the
last minute, and raises after all if nothing has come of it after `PATIENCE` seconds, which is less
than the 30 that Slurm and Kubernetes wait before they kill. An exception that something swallowed
(a destructor, say) is raised again as late.

A Python handler waits for the compiled call that the main thread is in. So a thread reads the
signal as well: `asked` is true at once, and a second SIGTERM ends the process wherever it is.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["EXIT_CODE", "Stopped", "asked", "came", "check", "held", "listening"]

PATIENCE = 20.0  # seconds that a loop gets to come to its next question
_RECENT = 60.0  # seconds for which a question says that there is such a loop
_SAVING = 120.0  # seconds that a loop gets that was told to save
EXIT_CODE = 128 + signal.SIGTERM


class Stopped(BaseException):
    """SIGTERM came. Like KeyboardInterrupt no Exception, so that nothing takes it for an error."""


class _Signal:
    """What is known of the signal in this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As before any signal."""
        self.came = False
        self.last_question = -float("inf")
        self.num_held = 0


_signal = _Signal()


def asked() -> bool:
    """Whether SIGTERM came; who calls this promises to save and end if it did."""
    _signal.last_question = time.monotonic()
    if _signal.came and threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, _SAVING, PATIENCE)
    return _signal.came


def came() -> bool:
    """Whether SIGTERM came, of an error that may come of it: the thread may have to read it yet."""
    for _ in range(10):
        if _signal.came:
            break
        time.sleep(0.01)
    return _signal.came


def check() -> None:
    """End here if SIGTERM came.

    Raises:
      Stopped: if it did.
    """
    if _signal.came:
        raise Stopped


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, SIGTERM raises nothing: for a file that is being written and would be lost."""
    _signal.num_held += 1
    try:
        yield
    finally:
        _signal.num_held -= 1
    # Not for what is within another one, and not in place of an error.
    if not _signal.num_held and not _is_loop_at_work():
        check()


def _is_loop_at_work() -> bool:
    """Whether somebody asks, and is to be left alone until the alarm."""
    return time.monotonic() - _signal.last_question < _RECENT


def _on_signal(number: int, frame: FrameType | None) -> None:
    del frame
    first = number == signal.SIGTERM
    _signal.came = True
    if first:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    if not (first and _is_loop_at_work()) and not _signal.num_held:
        raise Stopped


def _watch(reader: int) -> None:
    """Read the numbers of signals as the system delivers them, until the other end is closed."""
    num_terms = 0
    while number := os.read(reader, 1):
        if number[0] == signal.SIGTERM:
            _signal.came = True
            num_terms += 1
            if num_terms > 1:
                os._exit(EXIT_CODE)


def _forget_in_child() -> None:
    # The worker of a pool is ended by SIGTERM as if nobody listened, and must not write into the
    # pipe of its parent.
    if signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGTERM is a request. Does nothing outside the main thread.

    `jax.distributed.initialize` would take the signal for itself, unless its preemption service is
    off.
    """
    # Not a POSIX system: SIGTERM ends the process as ever.
    if not hasattr(signal, "setitimer") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    _signal.forget()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader,), daemon=True, name="SIGTERM")
    thread.start()
    numbers = (signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, _on_signal) for number in numbers}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(writer)
        thread.join()
        os.close(reader)
        _signal.forget()
