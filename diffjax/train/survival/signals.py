"""What ends a run before its last step: a signal."""

from __future__ import annotations

import contextlib
import signal
import threading


@contextlib.contextmanager
def caught_signals():
    """A list that SIGINT and SIGTERM are appended to; a second one has its usual effect at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def catch(number, frame):
        caught.append(number)
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, catch)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
