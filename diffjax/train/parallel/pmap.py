"""Classic data parallelism: `jax.pmap` around the step, one mean of the gradients inside it.

The state goes in and comes out in its ordinary layout, whole on every device, so checkpoints know nothing of it. The
noise of the batch is drawn by every device for all rows, and each takes the gradient of its own: as everywhere else, an
update does not depend on the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from diffjax.train.parallel.accumulate import Gradient

AXIS = "devices"


def own_rows(gradient: Gradient) -> Gradient:
    """The gradient of all rows inside `trace`'s map, from that of each device's own.

    Dropout draws from `fold_in(key, i)` on device i.
    """

    def mean(params, rows, key):
        i, n = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
        mine = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * (len(a) // n), len(a) // n), rows)
        losses, aux, grads = gradient(params, mine, jax.random.fold_in(key, i))
        losses, aux = jax.lax.all_gather((losses, aux), AXIS, tiled=True)
        return losses, aux, jax.lax.pmean(grads, AXIS)

    return mean


class Mapped(NamedTuple):
    """What stands for `jax.stages.Traced`, which `jax.pmap` does not give.

    Attributes:
      lower: `() -> jax.stages.Lowered`.
      jaxpr: None.
    """

    lower: Callable[[], jax.stages.Lowered]
    jaxpr: None = None


def trace(step: Callable, mesh: Mesh, state: Any, window: Any, batch: Any) -> Mapped:
    """The step `(state, window, batch) -> (state, window)` for all devices of the mesh, to be lowered.

    Args:
      step: a step whose gradient is `own_rows(...)`.
      mesh: its devices are used in order, its axes are not.
      state, window, batch: shapes and dtypes of a whole state, window and batch.
    """
    devices = list(mesh.devices.flat)

    def on_each(state, window, rows):
        return step(state, window, jax.lax.all_gather(rows, AXIS, tiled=True))

    mapped = jax.pmap(
        on_each, AXIS, in_axes=(None, None, 0), out_axes=(None, None), devices=devices, donate_argnums=(0, 1)
    )
    rows = jax.eval_shape(lambda rows: split(rows, len(devices)), batch)
    return Mapped(lambda: mapped.lower(state, window, rows))


def split(batch: Any, ways: int) -> Any:
    """`[B, ...] -> [ways, B / ways, ...]`: the rows of each device."""
    return jax.tree.map(lambda a: a.reshape(ways, -1, *a.shape[1:]), batch)
