"""The nouns of the library: `Level`, `Prediction`, `Denoiser`, `Head`, `Solver`, `Model`.

A noisy sample is `x = alpha * x0 + sigma * eps` with clean data `x0` and unit Gaussian noise `eps`. Everything else in
the library is a function from one of these types to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Level(NamedTuple):
    """One noise level, a batch of them, or a sampling grid: `x = alpha * x0 + sigma * eps`.

    The fields have one shape: `[]` (a step), `[B]` (training) or `[n + 1]` (a grid, noise first). numpy float64 on the
    host, jax arrays when traced.

    Attributes:
      t: what the network receives as its time.
      alpha: scale of the clean data, >= 0.
      sigma: scale of the noise, >= 0.
    """

    t: Array
    alpha: Array
    sigma: Array

    @property
    def logsnr(self) -> Array:
        """`2 log(alpha / sigma)`; `+inf` at `sigma = 0`, `-inf` at `alpha = 0`."""
        xp = namespace(self.alpha, self.sigma)
        with np.errstate(divide="ignore"):
            return 2 * (xp.log(self.alpha) - xp.log(self.sigma))

    @property
    def s(self) -> Array:
        """`sigma / alpha`, the noise of `x / alpha` (Karras' sigma); `inf` at `alpha = 0`."""
        with np.errstate(divide="ignore"):
            return namespace(self.alpha, self.sigma).divide(self.sigma, self.alpha)

    def at(self, index) -> Level:
        """The level (or levels) of a grid at `index`: anything that indexes an array."""
        return Level(*(field[index] for field in self))


class Prediction(NamedTuple):
    """Both halves of `x` as the network sees them: `alpha * x0 + sigma * eps = x` unless a guidance changes one.

    Attributes:
      x0: estimate of the clean data, shape of `x`.
      eps: estimate of the unit noise, shape of `x`.
      aux: whatever else the network returned; a pytree.
    """

    x0: Array
    eps: Array
    aux: Any = ()


class Denoiser(Protocol):
    """Any function `(x [B, ...], level) -> Prediction`; the level's fields are scalars or `[B]`.

    It may carry an attribute `check(levels)` that raises `ValueError` for grids on which it is undefined; `sample`
    calls it before the loop when the grid is concrete.
    """

    def __call__(self, x: Array, level: Level) -> Prediction: ...


class Head(NamedTuple):
    """What the raw output of a network means. `N` heads replace `N * N` converters.

    Attributes:
      target: `(x0, eps, level) -> target`, what the network is trained to output.
      split: `(out, x, level) -> Prediction`, the inverse of `target` given the noisy `x`.
      scale_in: `(level) -> factor` of `x` at the network's input, shape of the level's fields.
      check: `(levels)` raises `ValueError` where `split` is undefined.
    """

    target: Callable[[Array, Array, Level], Array]
    split: Callable[[Array, Array, Level], Prediction]
    scale_in: Callable[[Level], Array]
    check: Callable[[Level], None]


class Step(NamedTuple):
    """What a solver is told about the step it takes.

    Attributes:
      index: which step, from 0; a traced or a Python integer.
      level: where `x` is, scalar fields.
      next: where it goes, scalar fields.
      coef: this step's row of the coefficients that `Solver.init` returned.
      draw: `draw(j) -> [B, ...]` unit Gaussian noise, draw `j` of this step; the same `j` gives the same noise.
    """

    index: Array | int
    level: Level
    next: Level
    coef: Any
    draw: Callable[[int], Array]


class Solver(NamedTuple):
    """One step of a sampler as pure functions, as optax does it for optimisers.

    Attributes:
      init: `(x, levels) -> (memory, coef)`. `memory` is a pytree carried from step to step, `coef` a pytree of arrays
        `[n, ...]`: every coefficient of every step, computed before the loop.
      step: `(denoise, x, memory, at: Step) -> (x, memory, prediction)`.
      order: global order of convergence; for a stochastic solver, that of its deterministic part.
      nfe: `nfe(n)` is the number of network calls of `n` steps down to `sigma = 0`.
      ascending: whether the noise may also grow along the grid: inversion, resampling that goes back and forth.
    """

    init: Callable[[Array, Level], tuple[Any, Any]]
    step: Callable[[Denoiser, Array, Any, Step], tuple[Array, Any, Prediction]]
    order: int
    nfe: Callable[[int], int]
    ascending: bool = False


class Model(NamedTuple):
    """A network as a pair of pure functions, whatever library it is written with.

    Attributes:
      init: `(key) -> params`, a plain nested dict of arrays.
      apply: `(params, *inputs, method=None) -> out`; `method` names another entry point (encode, decode).
      config: the settings it was built from, a plain dict.
      rules: sharding rules, `[(regex over "a/b/c" parameter paths, axis names), ...]`; first match wins.
      activations: the same over the names of activations (`diffjax.nn.tap`); "batch" stands for the axes that split it.
      fixed: names of parameters that are constants of a checkpoint: no gradient reaches them, no optimiser moves them.
    """

    init: Callable[[jax.Array], dict]
    apply: Callable[..., Any]
    config: dict
    rules: tuple = ()
    activations: tuple = ()
    fixed: tuple[str, ...] = ()

    def __repr__(self) -> str:
        # The whole config and all rules are thousands of characters.
        config = self.config.get("network") or self.config
        return f"Model({config.get('_class_name') or config.get('name')!r}, {len(self.config)} settings)"


def namespace(*arrays):
    """`jax.numpy` if any of the arrays is a jax array, else `numpy`: host grids stay in float64."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def expand(a: Array, x: Array) -> Array:
    """`a` of shape `[]` or `[B]`, with axes of size 1 appended until it broadcasts against `x [B, ...]`."""
    if jnp.ndim(a) == 0:
        return a
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))
