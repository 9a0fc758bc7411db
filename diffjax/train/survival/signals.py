"""What ends a run before its last step: a signal.

Python's handlers run between two of its own instructions, so not while a step compiles, which may take minutes; what
must be heard then listens in a thread.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

# A Ctrl-C, or a signal to a whole process group, reaches a program twice: from the system, and from the script that
# started it, which got it too and passes it on. That takes milliseconds, or longer on a machine that is busy.
ECHO_S = 2.0
STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is appended to; a second one has its usual effect at once.

    Those that come within `ECHO_S` seconds of the first are taken for its echo and ignored.
    """
    caught: list[int] = []
    with at_first(STOPS, caught.append):
        yield caught


@contextlib.contextmanager
def heard_at_once(act: Callable[[int], None] | None) -> Iterator[Callable[[], None]]:
    """Calls `act(number)`, in a thread, at a SIGINT or SIGTERM that has a handler in Python, whatever the main thread
    does: until what is yielded is called, or the block ends.

    Nothing without `act`, or outside of the main thread.
    """
    if act is None or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    hears, told = socket.socketpair()
    told.setblocking(False)
    before, over = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False), threading.Event()

    def listen():
        # Every signal is one byte, its number; no byte once the other end is closed.
        while number := hears.recv(1):
            if number[0] in STOPS and not over.is_set():
                act(number[0])

    def end():
        if not over.is_set():
            over.set()
            signal.set_wakeup_fd(before)
            told.close()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield end
    finally:
        end()
        thread.join()
        hears.close()


@contextlib.contextmanager
def at_first(numbers: tuple[int, ...], act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act(number)` at the first of some signals while the block lasts; nothing outside of the main thread.

    A signal that the program was started to ignore, as a script does with SIGINT for what it runs in the background,
    stays ignored. What comes within `ECHO_S` seconds is ignored, what comes later has the effect that it had before the
    block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = ((number, signal.getsignal(number)) for number in numbers)
    before = {number: handler for number, handler in handlers if handler is not signal.SIG_IGN}
    first: float | None = None

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number, frame):
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            act(number)
        elif now - first >= ECHO_S:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
