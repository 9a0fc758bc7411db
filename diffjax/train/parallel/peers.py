"""Watching the other processes of a run, so that none waits for one that will not come.

Each process tells JAX's coordination service every few seconds that it lives and at which step it is. Process 0 reads
all of it. Who is silent for too long, or makes no step for too long, is named in a verdict that every process reads and
stops by; so does a process that stops because of an error of its own. What JAX does without this: a process whose peer
has died hangs in a collective, or is aborted after its heartbeat limit with a message that names no process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from diffjax.train.errors import RESUME

BEAT_S = 3.0
# Longer than any pause in which a process holds the interpreter lock; with the beats around it below a minute.
SILENT_S = 36.0
# Enough to say who it was, once a collective has failed.
SUSPECT_S = 3.5 * BEAT_S
STALL_S = 1800.0

_BEATS, _VERDICT, _DONE = "diffjax/beat/", "diffjax/verdict", "done"


class Verdict(NamedTuple):
    """Why the processes of a run stop: an exit code and a sentence."""

    code: int
    text: str


class Watch:
    """Tells the others that this process lives, and ends it with a message when the run cannot go on.

    Args:
      client: of JAX's coordination service.
      coordinator: `HOST:PORT` of it.
      index: this process.
      count: how many there are.
      stall_s: seconds without a step of any process, once there was one, after which all stop; 0 for never.
    """

    def __init__(self, client: Any, coordinator: str, index: int, count: int, stall_s: float = STALL_S):
        self.index, self.count = index, count
        self._client, self._coordinator, self._stall_s = client, coordinator, stall_s
        self._step, self._answered = -1, time.monotonic()
        self._seen: dict[int, tuple[str, float]] = {}
        self._moved = (-1, time.monotonic())
        self._over, self._said, self._speaking = threading.Event(), threading.Lock(), threading.Lock()

    def start(self) -> None:
        """Begins to watch, in a thread; from here on an abort by JAX because of a lost peer is a message and a code."""
        self._handler = catch_abort(self._lost_by_now, self.stop)
        self._beat()
        self._answered = time.monotonic()
        for target in (self._run, self._wait_for_answers):
            threading.Thread(target=target, name="peers", daemon=True).start()

    def step(self, step: int) -> None:
        """Says how many updates this process has handed to its devices; costs nothing."""
        self._step = step

    def finish(self) -> None:
        """Ends the watch; the others no longer miss this process."""
        self._over.set()
        # After a beat that is under way: the last word must be this one.
        with self._speaking, contextlib.suppress(Exception):
            self._put(_DONE)

    def verdict(self) -> Verdict | None:
        """What a process has already found, or None."""
        for _, text in self._client.key_value_dir_get(_VERDICT):
            return Verdict(**json.loads(text))
        return None

    def announce(self, verdict: Verdict) -> Verdict:
        """Tells all processes to stop; the verdict that counts: the first."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_VERDICT}/0", json.dumps(verdict._asdict()))
        with contextlib.suppress(Exception):
            return self.verdict() or verdict
        return verdict

    def explain(self) -> Verdict | None:
        """Why a computation over all processes failed here: the verdict once there is one; None if every peer lives."""
        until = time.monotonic() + SUSPECT_S + 3 * BEAT_S
        while time.monotonic() < until:
            try:
                found = self.verdict() or self.judge(SUSPECT_S)
            except Exception:
                found = self._unreachable()
            if found:
                return found
            time.sleep(BEAT_S / 3)
        return None

    def stop(self, verdict: Verdict) -> None:
        """Writes the verdict, lets every process read it, and ends this process at once: nothing after this runs."""
        if not self._said.acquire(blocking=False):
            time.sleep(2 * SILENT_S)  # Another thread is about to end the process.
        self._over.set()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"diffjax: {self.name()}: {verdict.text}\n".encode())
        if self.index == 0:
            # Where process 0 ends the service ends, and with it the verdict.
            time.sleep(2.5 * BEAT_S)
        os._exit(verdict.code)

    def name(self) -> str:
        """`process 1 of 4`."""
        return f"process {self.index} of {self.count}"

    def _run(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):
                self._beat()
                found = self.verdict() or (self.judge(SILENT_S) if self.index == 0 else None)
                self._answered = time.monotonic()
                if found and not self._over.is_set():
                    self.stop(self.announce(found))

    def _wait_for_answers(self) -> None:
        """Beside the thread that asks, because a frozen coordinator never ends a call."""
        while not self._over.wait(BEAT_S):
            if time.monotonic() - self._answered > SILENT_S:
                text = f"process 0 of {self.count}, the coordinator at {self._coordinator}, does not answer{_AGAIN}"
                self.stop(self._unreachable() or Verdict(RESUME, text))

    def _beat(self) -> None:
        with self._speaking:
            if not self._over.is_set():
                self._put(str(self._step))

    def _put(self, state: str) -> None:
        text = f"{state} {time.monotonic():.3f}"
        self._client.key_value_set(f"{_BEATS}{self.index}", text, allow_overwrite=True)

    def judge(self, limit: float) -> Verdict | None:
        """Compares what all processes say with what they said before; a process's own clock measures the silence."""
        now, steps = time.monotonic(), {}
        for key, text in self._client.key_value_dir_get(_BEATS):
            index, state = int(key.rpartition("/")[2]), text.split()[0]
            if self._seen.get(index, ("", 0.0))[0] != text:
                self._seen[index] = (text, now)
            steps[index] = state
        lost = sorted(
            i for i, (_, at) in self._seen.items() if now - at > limit and i != self.index and steps.get(i) != _DONE
        )
        if lost:
            return Verdict(RESUME, f"{_names(lost)} of {self.count} died or lost the network{_AGAIN}")
        return self._stalled(now, {i: int(s) for i, s in steps.items() if s != _DONE})

    def _stalled(self, now: float, steps: dict[int, int]) -> Verdict | None:
        most = max(steps.values(), default=-1)
        if most != self._moved[0]:
            self._moved = (most, now)
        if not self._stall_s or most < 0 or now - self._moved[1] < self._stall_s:
            return None
        behind = sorted(i for i, step in steps.items() if step < most)
        who = f"{_names(behind)} behind at step {min(steps.values())}, the others at {most}" if behind else "all alike"
        return Verdict(RESUME, f"no step for {now - self._moved[1]:.0f} s, though every process lives ({who}){_AGAIN}")

    def _unreachable(self) -> Verdict | None:
        """A verdict if nothing listens at the coordinator any more."""
        error = refused(self._coordinator)
        text = f"process 0 of {self.count}, the coordinator at {self._coordinator}, is gone ({error})"
        return Verdict(RESUME, text + _AGAIN) if error else None

    def _lost_by_now(self) -> Verdict | None:
        """Why JAX aborts this process, if it is because of the others: the service then no longer answers it."""
        error: list = [True]

        def ask():
            with contextlib.suppress(Exception):
                self._client.key_value_dir_get(_VERDICT)
                error.clear()

        # In a thread, because the one that aborts may hold a lock of the service.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2.0)
        if not error:
            return None
        return self._unreachable() or Verdict(
            RESUME, f"{self._missing()} died, lost the network or was restarted{_AGAIN}"
        )

    def _missing(self) -> str:
        now = time.monotonic()
        lost = sorted(i for i, (_, at) in self._seen.items() if i != self.index and now - at > SUSPECT_S)
        return f"{_names(lost)} of {self.count}" if lost and self.index == 0 else f"one of the {self.count} processes"


def refused(address: str) -> OSError | None:
    """Why no connection to `HOST:PORT` can be opened; None if one can."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return None
    except OSError as error:
        return error


def catch_abort(explain: Callable[[], Verdict | None], stop: Callable[[Verdict], None]) -> Any:
    """From here on an abort that `explain` knows the reason of ends in `stop`, which must not return; any other stays
    an abort. Returns what must be kept as long as this is to hold.

    JAX ends a process by `abort()` when it cannot join the others, and the moment that the coordinator is gone, and no
    Python code runs between. A handler of the signal is what is left.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number):
        found = explain()
        if found:
            stop(found)
        release_abort()

    _libc().signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    return handler


def release_abort() -> None:
    """Gives `abort()` its usual effect back."""
    _libc().signal(signal.SIGABRT, None)


def _libc():
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return libc


_AGAIN = f"; this process stops with code {RESUME}: start all of them again, and they go on from the last checkpoint"


def _names(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {shown}"
