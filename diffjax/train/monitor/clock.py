"""Where the time of a run goes."""

from __future__ import annotations

import contextlib
import time


class Clock:
    """Rates between log lines, without the time of checkpoints: steps per second, and the share of the time that was
    spent waiting for data."""

    def __init__(self, step: int):
        self._start, self._step, self._waited = time.perf_counter(), step, 0.0

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def lap(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        rates = {"steps_per_s": (step - self._step) / elapsed, "data_wait": self._waited / elapsed}
        self._start, self._step, self._waited = now, step, 0.0
        return rates
