"""A profiler trace of chosen steps."""

from __future__ import annotations

import os
from typing import Any

import jax

FOLDER = "profile"


class Profile:
    """Traces steps `first + 1 ... last` of a run into `workdir/profile`, for TensorBoard's profiler or Perfetto.

    Args:
      steps: `(first, last)` in updates done, or empty for no trace. A run that begins within traces the rest.
      workdir: of the run.
    """

    def __init__(self, steps: tuple[int, ...], workdir: str):
        self._steps, self._folder, self._on = tuple(steps), os.path.join(workdir, FOLDER), False

    def before(self, step: int) -> None:
        """To be called before the update that follows `step` updates is handed to the device."""
        if self._steps and not self._on and self._steps[0] <= step < self._steps[1]:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, state: Any) -> str | None:
        """To be called with the state after `step` updates; where the trace is, when it has just ended."""
        if not self._on or step < self._steps[1]:
            return None
        # Without this the trace would end before the device has run its steps.
        jax.block_until_ready(state)
        return self.close()

    def close(self) -> str | None:
        """Ends a trace that is still being taken; where it is, or None."""
        if not self._on:
            return None
        self._on = False
        jax.profiler.stop_trace()
        return self._folder
