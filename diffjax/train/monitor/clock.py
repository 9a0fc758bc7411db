"""Where the time of a run goes."""

from __future__ import annotations

import contextlib
import time


def duration(seconds: float) -> str:
    """`"M:SS"`, or `"H:MM:SS"` from an hour on."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Clock:
    """Rates between log lines, and the seconds that each kind of work took since the start.

    What is `paused` (checkpoints, samples) does not count in the rates; waiting for data does.

    Args:
      step: updates done before.
      batch_size: images of one update.
    """

    def __init__(self, step: int, batch_size: int):
        self._begun = self._start = time.perf_counter()
        self._first, self._step, self._batch_size, self._waited = step, step, batch_size, 0.0
        self._seconds: dict[str, float] = {"input": 0.0}

    @contextlib.contextmanager
    def waiting(self):
        """Around what waits for the next batch."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._waited += elapsed
        self._seconds["input"] += elapsed

    @contextlib.contextmanager
    def paused(self, kind: str):
        """Around work that is no training, such as `"checkpoints"`."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._start += elapsed
        self._seconds[kind] = self._seconds.get(kind, 0.0) + elapsed

    def lap(self, step: int) -> dict[str, float]:
        """The rates since the last lap, whose steps are known to be done by now.

        `steps_per_s`, `step_ms`, `images_per_s`, and `data_wait`, the share of the time spent waiting for batches.
        """
        now = time.perf_counter()
        elapsed, done = max(now - self._start, 1e-9), step - self._step
        rates = {
            "steps_per_s": done / elapsed,
            "step_ms": 1e3 * elapsed / max(done, 1),
            "images_per_s": done * self._batch_size / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self._start, self._step, self._waited = now, step, 0.0
        return rates

    def seconds(self) -> dict[str, float]:
        """Wall clock by kind since the clock was made: `"total"`, `"input"`, and each that was paused for."""
        return {"total": time.perf_counter() - self._begun, **self._seconds}
