"""What happens after a window with bad steps in it: the run stops, goes on, or goes back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffjax.train import step as steps
from diffjax.train.errors import NonFiniteError
from diffjax.train.survival import evidence, saving
from diffjax.train.survival.guard import Guard

log = logging.getLogger(__name__)


class BadWindow(Exception):
    """A window with a bad step that was applied. Attributes: `window` on the host, `step` it ended at."""

    def __init__(self, window: steps.Metrics, step: int):
        super().__init__(f"bad step in the window that ends at {step}")
        self.window, self.step = window, step


def persist(run: Callable, session: Any, step: int, state: Any) -> Any:
    """`run(session, step, state)`, again from the last good checkpoint for as long as `config.guard` says so.

    Raises:
      NonFiniteError: with the default policy "stop", or once there were `max_events` events.
    """
    while True:
        try:
            return run(session, step, state)
        except BadWindow as error:
            bad = error.window, error.step
        # Only here, where the exception no longer holds the frames of the run and the bad state in them.
        step, state = recover(session, *bad)


def recover(session: Any, window: steps.Metrics, end: int) -> tuple[int, Any]:
    """`(step, state)` of the last good checkpoint, from where the run goes on without the batches of the window.

    Raises:
      NonFiniteError: if the run is to stop.
    """
    settings, memory = session.config.guard, session.iterator
    saving.settle(session.checkpoints)
    limit = float(window.guard.limit) if isinstance(window.guard, Guard) else np.inf
    saved = session.checkpoints.steps()
    text = evidence.message(window, limit, saved, str(session.checkpoints.directory))
    bad, first = int(window.bad_step), end - int(window.steps)
    skips, events, batches = memory.skips, memory.events + 1, (memory.batch_of(first), memory.batch_of(end - 1) + 1)
    try:
        step, state = restart(session)
    except Exception as error:
        if settings.on_bad == "rollback":
            raise
        log.warning("no evidence about step %d: %s: %s", bad + 1, type(error).__name__, error)
    else:
        memory.skips = skips
        text += "".join(f"; evidence: {path}" for path in evidence.write(session, state, {bad: text}, window.batch))
    if settings.on_bad != "rollback":
        raise NonFiniteError(text)
    if events > settings.max_events:
        raise NonFiniteError(f"rolled back {settings.max_events} times, config.guard.max_events; now {text}")
    memory.events = events
    memory.skip(*batches)
    session.files.rewind(step)
    session.windows.clear()
    note = f"{text}; going on from step {step} without batches {batches[0]} to {batches[1] - 1}"
    log.warning("%s", note)
    session.terminal.write_texts(step, {"note": note})
    return step, state


def restart(session: Any) -> tuple[int, Any]:
    """The last good checkpoint, or the initial state, with the iterator set to it."""
    session.iterator.set_state({"next_index": 0})
    return session.restart()


def note_skipped(session: Any, window: steps.Metrics, state: Any) -> None:
    """Counts, reports and writes down the steps of a fetched window that were skipped, of which there are some.

    Raises:
      NonFiniteError: if there were more than `patience` in the window, or more than `max_events` in the run.
    """
    guard, settings = window.guard, session.config.guard
    count, memory = int(guard.skipped), session.iterator
    memory.events += count
    listed = [int(s) for s in guard.steps if s != steps.NEVER]
    shown = window._replace(bad_step=guard.steps[0], batch=guard.batch)
    text = evidence.describe(shown, float(guard.limit))
    told = {bad: f"step {bad + 1} is bad" for bad in listed} | {listed[0]: text}
    paths = evidence.write(session, state, told, guard.batch)
    text += f"; evidence: {paths[0]}" if paths else ""
    numbers = ", ".join(str(bad + 1) for bad in listed)
    if count > settings.patience:
        raise NonFiniteError(f"{count} bad steps ({numbers}) since the last log line, more than guard.patience: {text}")
    if memory.events > settings.max_events:
        raise NonFiniteError(f"{memory.events} bad steps in the run, more than guard.max_events: {text}")
    note = f"skipped {count} bad step{'s' if count > 1 else ''} ({numbers}): {text}"
    log.warning("%s", note)
    session.terminal.write_texts(int(jax.device_get(state.step)), {"note": note})
