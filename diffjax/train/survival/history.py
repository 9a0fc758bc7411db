"""What a guarded run remembers: which batches it leaves out, and the losses that the limit of a spike is drawn from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

# How many log lines the running median is over, and how many there must be before anything counts as a spike.
WINDOWS, ENOUGH = 32, 5


class Batches:
    """The iterator of a run, with ranges of batches left out; its state is that of the iterator and its memory.

    Attributes:
      skips: `[start, stop]` ranges of batch numbers that are left out, in order, apart from each other.
      losses: mean losses of the latest windows.
      events: how many steps were skipped, or how many times the run was rolled back.
    """

    def __init__(self, iterator: Any):
        self._iterator = iterator
        self.skips: list[list[int]] = []
        self.losses: list[float] = []
        self.events = 0

    def __getattr__(self, name):
        return getattr(self._iterator, name)

    def __iter__(self):
        return self

    def __next__(self):
        if self.skips:
            state = self._iterator.get_state()
            past = _past(self.skips, state["next_index"])
            if past != state["next_index"]:
                self._iterator.set_state(state | {"next_index": past})
        return next(self._iterator)

    def get_state(self) -> dict:
        """The iterator's own state, with `guard` added if there is anything to remember."""
        memory = {"skips": self.skips, "losses": self.losses, "events": self.events}
        return self._iterator.get_state() | ({"guard": memory} if any(memory.values()) else {})

    def set_state(self, state: Mapping) -> None:
        """Goes on where `get_state` was called; a state without memory has none."""
        memory = state.get("guard", {})
        self._iterator.set_state({key: value for key, value in state.items() if key != "guard"})
        self.skips = [list(pair) for pair in memory.get("skips", ())]
        self.losses, self.events = list(memory.get("losses", ())), memory.get("events", 0)

    def batch_of(self, step: int) -> int:
        """The number of the batch that step `step` (from 0) of the run reads."""
        batch = step
        for start, stop in self.skips:
            batch += (stop - start) if batch >= start else 0
        return batch

    def skip(self, start: int, stop: int) -> None:
        """Leaves out the batches `start .. stop - 1` from here on."""
        merged: list[list[int]] = []
        for low, high in sorted([*self.skips, [start, stop]]):
            if merged and low <= merged[-1][1]:
                merged[-1][1] = max(high, merged[-1][1])
            else:
                merged.append([low, high])
        self.skips = merged

    def note(self, loss: float) -> None:
        """Remembers the mean loss of a window."""
        self.losses = [*self.losses, loss][-WINDOWS:]

    def limit(self, spike: float) -> float:
        """`spike` times the median of the losses; infinite for 0, or while there are too few of them."""
        enough = spike > 0 and len(self.losses) >= ENOUGH
        return spike * statistics.median(self.losses) if enough else math.inf


def _past(skips: list[list[int]], index: int) -> int:
    return next((stop for start, stop in skips if start <= index < stop), index)


def changed_items(iterator: Any) -> list[str]:
    """What to say of data that a run goes on with and that has another number of items than before; else nothing."""
    before, now = iterator.items_before, iterator.items
    change = f"images to train on: {before} -> {now}; what is trained on and what is held out are other images now"
    return [change] if before != now else []
