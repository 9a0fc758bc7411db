"""Training a noise schedule: the variational bound for the network, its variance for the schedule."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.schedules import Learned
from diffjax.core.types import Array, Level


def levels_of(schedule: Learned, t: Array) -> tuple[Level, Array]:
    """The levels at times t [B], and there `-1/2 d logsnr / dt`, the weight of the continuous bound."""
    logsnr_at = lambda t: schedule(t).logsnr
    _, slope = jax.jvp(logsnr_at, (t,), (jnp.ones_like(t),))
    return schedule(t), -0.5 * slope


def squared_for_levels(measure: Callable) -> Callable:
    """`measure` with another gradient for the schedule: that of the squares of its losses.

    The bound itself does not depend on the path between its ends, the variance of its estimate at random times does,
    and the mean of the squares differs from it by a constant (Kingma et al. 2021, arXiv:2107.00630, section 5.1 and
    appendix I.2). As the loss of a sample depends on its own level alone, the gradient is that of the loss times
    `2 loss`: one backward pass serves the network and the schedule.

    Args:
      measure: `(params, levels) -> (losses [B], aux)`, where every leaf of `levels` is [B].
    """

    def forward(params, levels):
        losses, pull, aux = jax.vjp(measure, params, levels, has_aux=True)
        return (losses, aux), (losses, pull)

    def backward(saved, cotangents):
        losses, pull = saved
        params, levels = pull(cotangents[0])
        return params, jax.tree.map(lambda g: 2 * losses * g, levels)

    squared = jax.custom_vjp(measure)
    squared.defvjp(forward, backward)
    return squared
