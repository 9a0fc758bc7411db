"""Bad steps, judged on the device: without the host waiting for any step.

A step is bad if its loss or gradient is not finite, or if its loss exceeds a limit that the host sets from window to
window: `config.guard.spike` times the running median of the loss. Under `config.guard.on_bad = "skip"` the update of a
bad step is left out where it would have been made; otherwise a bad step is only marked, and the host acts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.train import step as steps
from diffjax.train.parallel.mesh import place

DEFAULTS = dict(on_bad="stop", spike=0.0, patience=5, max_events=20)
# How many skipped steps of one window are known by number.
LISTED = 16


class Guard(NamedTuple):
    """What a window carries besides its metrics.

    Attributes:
      limit: the loss above which a step is bad, float32; infinite for none.
      skipped: how many steps were left out, int32.
      steps: [16] indices (from 0) of the first of them, then `NEVER`.
      batch: the `BatchStats` of the first of them.
    """

    limit: jax.Array
    skipped: jax.Array
    steps: jax.Array
    batch: steps.BatchStats


def is_active(settings) -> bool:
    """Whether steps are judged at all beyond what the metrics do."""
    return settings.on_bad == "skip" or settings.spike > 0


def guarded(settings, window: steps.Metrics) -> steps.Metrics:
    """The empty window with an empty guard in it, if the settings of `config.guard` ask for one."""
    if not is_active(settings):
        return window
    never = np.full(LISTED, steps.NEVER, np.int32)
    return window._replace(guard=Guard(np.array(np.inf, np.float32), np.zeros((), np.int32), never, window.batch))


def with_window(settings, train_step: Callable) -> Callable:
    """`(state, window, batch) -> (state, window)`, as `diffjax.train.step.with_window`, under `config.guard`."""
    if not is_active(settings):
        return steps.with_window(train_step)
    act = _skip if settings.on_bad == "skip" else _mark

    def step(state, window, batch):
        after, metrics = train_step(state, batch)
        return act(state, after, window, metrics)

    return step


def _mark(state, after, window, metrics):
    marked = jnp.where(metrics.loss > window.guard.limit, state.step, metrics.bad_step)
    return after, _added(window, metrics._replace(bad_step=marked))


def _skip(state, after, window, metrics):
    guard = window.guard
    bad = (metrics.loss > guard.limit) | ~jnp.isfinite(metrics.loss) | ~jnp.isfinite(metrics.grad_norm)
    choose = lambda old, new: jax.tree.map(lambda a, b: jnp.where(bad, a, b), old, new)
    first = bad & (guard.skipped == 0)
    noted = Guard(
        limit=guard.limit,
        skipped=guard.skipped + bad,
        steps=jnp.where(bad, guard.steps.at[guard.skipped].set(state.step, mode="drop"), guard.steps),
        batch=jax.tree.map(lambda old, new: jnp.where(first, new, old), guard.batch, metrics.batch),
    )
    # The count of steps goes on, so that the next step draws other noise.
    left = choose(state, after)._replace(step=after.step)
    return left, choose(window, _added(window, metrics))._replace(guard=noted)


def _added(window, metrics):
    return steps.add(window._replace(guard=()), metrics)._replace(guard=window.guard)


def limited(window: Any, limit: float) -> Any:
    """An empty window whose steps are bad above a loss."""
    if not isinstance(window.guard, Guard):
        return window
    placed = place(np.float32(limit), window.guard.limit.sharding)
    return window._replace(guard=window.guard._replace(limit=placed))


def scalars(window: steps.Metrics) -> dict[str, float]:
    """`skipped`, the steps of a fetched window that were left out, if there were any."""
    skipped = int(window.guard.skipped) if isinstance(window.guard, Guard) else 0
    return {"skipped": float(skipped)} if skipped else {}
