"""Ctrl-C, SIGTERM and a closed terminal, noted while a run works, so that it is finished and saved."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAID = b"\nStopping: this iteration is finished and saved; once more stops at once, without its programs.\n"


@contextmanager
def stoppable() -> Iterator[None]:
    """While a run is opened, SIGTERM and a closed terminal are as Ctrl-C: what was begun is taken away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether an interrupt has come; a second one stops at once.

    Outside the main thread, where Python delivers no signals, it never says so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []

    def note(number: int, _: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        with suppress(OSError):  # the terminal may be gone
            os.write(2, SAID)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
