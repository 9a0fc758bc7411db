"""A bad step leaves no trace but its count; the history of a run survives JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax.train import step as steps
from diffjax.train.survival import guard
from diffjax.train.survival.history import ENOUGH, Batches


def toy(lr=0.5):
    """A step on one number, in the place of a network: x <- x - lr * batch; its loss is the batch."""
    from diffjax.train.state import TrainState

    def step(state, batch):
        params = {"x": state.params["x"] - lr * batch}
        bad = jnp.where(jnp.isfinite(batch) & jnp.isfinite(params["x"]), steps.NEVER, state.step)
        blank = steps.empty_window(1)
        stats = blank.batch._replace(loss=batch, grad_norm=jnp.abs(batch), param_norm=jnp.abs(params["x"]))
        zero = jnp.zeros(8)
        metrics = steps.Metrics(
            jnp.int32(1), batch, {}, zero, zero, jnp.abs(batch), jnp.abs(batch), jnp.abs(params["x"]), bad, stats
        )
        ema = {"e": {"x": 0.5 * state.ema["e"]["x"] + 0.5 * params["x"]}}
        return TrainState(state.step + 1, params, ema, {"count": state.opt_state["count"] + 1}), metrics

    x = jnp.float32(1.0)
    return step, TrainState(jnp.int32(0), {"x": x}, {"e": {"x": x}}, {"count": jnp.int32(0)})


def run(settings, batches, limit=np.inf):
    step, state = toy()
    settings = ConfigDict(dict(guard.DEFAULTS) | settings)
    step = jax.jit(guard.with_window(settings, step))
    window = guard.limited(jax.device_put(guard.guarded(settings, steps.empty_window(1))), limit)
    for batch in batches:
        state, window = step(state, window, jnp.float32(batch))
    return state, jax.device_get(window)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 50.0])
def test_a_skipped_step_leaves_everything_but_the_count_of_steps(poison):
    settings = dict(on_bad="skip", spike=2.0)
    state, window = run(settings, [1.0, 2.0, poison, 3.0, poison], limit=10.0)
    clean, without = run(settings, [1.0, 2.0, 3.0], limit=10.0)
    assert int(state.step) == 5 and int(clean.step) == 3
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(clean, part))
    assert int(window.guard.skipped) == 2 and window.guard.steps[:3].tolist() == [2, 4, steps.NEVER]
    assert int(window.steps) == 3 and float(window.loss) == float(without.loss) == 6.0
    assert window.bad_step == steps.NEVER
    np.testing.assert_equal(float(window.guard.batch.loss), poison)


def test_more_bad_steps_than_can_be_listed_are_counted():
    state, window = run(dict(on_bad="skip"), [np.nan] * 40)
    assert int(window.guard.skipped) == 40 and window.guard.steps.tolist() == list(range(guard.LISTED))
    assert float(state.params["x"]) == 1.0 and int(window.steps) == 0


def test_a_spike_is_marked_where_nothing_is_skipped():
    state, window = run(dict(spike=3.0), [1.0, 9.0, 20.0], limit=5.0)
    assert window.bad_step == 1 and float(window.batch.loss) == 9.0
    assert float(state.params["x"]) == 1.0 - 0.5 * 30.0


def test_without_a_guard_the_step_is_the_plain_one():
    settings = ConfigDict(guard.DEFAULTS)
    step, _ = toy()
    blank = steps.empty_window(1)
    assert not guard.is_active(settings) and guard.guarded(settings, blank) is blank and blank.guard == ()
    state, window = run({}, [1.0, np.nan])
    assert window.bad_step == 1 and np.isnan(state.params["x"])


class Counter:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return self.position - 1

    def get_state(self):
        return {"next_index": self.position}

    def set_state(self, state):
        self.position = state["next_index"]


def test_left_out_batches_stay_out_after_a_resume():
    batches = Batches(Counter())
    assert [next(batches) for _ in range(3)] == [0, 1, 2] and batches.get_state() == {"next_index": 3}
    batches.skip(4, 6)
    batches.skip(9, 12)
    batches.skip(6, 7)
    assert batches.skips == [[4, 7], [9, 12]]
    numbers = [next(batches) for _ in range(2)]
    stored = json.loads(json.dumps(batches.get_state()))
    rest = [next(batches) for _ in range(4)]
    assert numbers + rest == [3, 7, 8, 12, 13, 14]
    resumed = Batches(Counter())
    resumed.set_state(stored)
    assert [next(resumed) for _ in range(4)] == rest
    assert [resumed.batch_of(step) for step in range(9)] == [0, 1, 2, *numbers, *rest]


def test_the_limit_is_a_factor_over_the_median():
    batches = Batches(Counter())
    for i, loss in enumerate([5.0, 1.0, 4.0, 2.0, 100.0]):
        assert batches.limit(3.0) == np.inf and i < ENOUGH
        batches.note(loss)
    assert batches.limit(3.0) == 12.0 and batches.limit(0.0) == np.inf
    resumed = Batches(Counter())
    resumed.set_state(json.loads(json.dumps(batches.get_state())))
    assert resumed.limit(3.0) == 12.0
