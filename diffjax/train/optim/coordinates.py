"""The coordinate check: how far activations move in the first steps, and how that grows with the width.

Yang et al. 2022, arXiv:2203.03466, appendix D.1: under muP the typical change of a coordinate does not depend on the
width; where it grows, a learning rate that is right at one width is too large at the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffjax.core.types import Model
from diffjax.nn.taps import tapped


def activations(model: Model, params: Any, *inputs) -> dict[str, jax.Array]:
    """What the network computes on the way, by the names of its taps, and its output as `"output"`.

    Of activations with one name, those of all blocks, the last is kept. A network that scans over its blocks must be
    built with `scan=False`: what a loop holds cannot be taken out of it.
    """
    seen = {}

    def keep(name, x):
        seen[name] = x
        return x

    with tapped(keep):
        output = model.apply(params, *inputs)
    return {**seen, "output": output}


def movements(
    model: Model, optimizer: optax.GradientTransformation, inputs: tuple, target: jax.Array, *, steps: int,
    keys: Sequence[jax.Array],
) -> dict[str, float]:  # fmt: skip
    """How far each activation is from where it started after `steps` updates: RMS over coordinates, mean over keys.

    Args:
      model: `apply(params, *inputs)`.
      optimizer: of the mean squared error between the output and `target`, on this one batch.
      inputs: arrays of the batch.
      target: like the output.
      steps: how many updates.
      keys: of the initial parameters of as many runs.
    """
    loss = lambda params: jnp.mean((model.apply(params, *inputs) - target) ** 2)

    @jax.jit
    def start(key):
        params = model.init(key)
        return params, optimizer.init(params)

    @jax.jit
    def update(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    look = jax.jit(lambda params: activations(model, params, *inputs))
    rms = lambda a, b: float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)))
    found = []
    for key in keys:
        params, state = start(key)
        first = look(params)
        for _ in range(steps):
            params, state = update(params, state)
        found.append({name: rms(value, first[name]) for name, value in look(params).items()})
    return {name: float(np.mean([run[name] for run in found])) for name in found[0]}


def slopes(widths: Sequence[int], found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The slope of log movement against log width, for each activation, by least squares; 0 is flat.

    Args:
      widths: two or more.
      found: the movements at each.
    """
    logs = np.log([[row[name] for name in found[0]] for row in found])
    fitted = np.polyfit(np.log(np.asarray(widths, np.float64)), logs, 1)[0]
    return dict(zip(found[0], fitted.tolist(), strict=True))
