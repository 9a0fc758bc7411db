"""Networks that are given, or give, more than one image: an estimate of x0 beside x, a variance beside the output."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax import core
from diffjax.core.types import Array, Head, Level, Model

# The top-level name of the parameters that belong to the objective and not to the network.
OWN = "objective"


def extend(network: Model, *, init: Callable | None, self_condition: bool, variance: bool) -> Model:
    """The network with the objective's parameters beside its own under `"objective"`, which it is never given.

    Args:
      network: built with input channels for an estimate of x0 (`self_condition`), output channels for a variance
        (`variance`), or as it is.
      init: `(key) -> {name: params}` of the objective; None for one without parameters.
      self_condition: `apply` takes `estimate [B, ...]`, None for zeros, and puts it behind the channels of x.
      variance: `apply` returns `(out, aux)`, both of the shape of x, instead of the network's output.
    """

    def init_all(key):
        # A stream of its own: the network starts as it does without an objective.
        return network.init(key) | {OWN: init(jax.random.fold_in(key, 1))}

    def apply(params, x, *inputs, estimate=None, **options):
        if init is not None:
            params = {name: value for name, value in params.items() if name != OWN}
        if self_condition:
            estimate = jnp.zeros_like(x) if estimate is None else estimate.astype(x.dtype)
            x = jnp.concatenate([x, estimate], axis=-1)
        out = network.apply(params, x, *inputs, **options)
        return tuple(jnp.split(out, 2, axis=-1)) if variance else out

    if init is None and not (self_condition or variance):
        return network
    config = network.config | {"self_condition": self_condition, "variance": variance}
    rules = ((rf"^{OWN}/", ()), *network.rules) if init is not None else network.rules
    return network._replace(init=network.init if init is None else init_all, apply=apply, config=config, rules=rules)


def self_conditioned(f: Callable, head: Head, x: Array, level: Level, use: Array) -> Callable:
    """`f` with an estimate of x0: that which `f` itself makes of x without one where `use`, else none.

    Chen et al. 2022, arXiv:2208.04202, Algorithm 1; no gradient flows into the estimate.

    Args:
      f: `(x, t, estimate=None) -> out`.
      head: what `out` means.
      x: noisy data [B, ...].
      level: fields [B].
      use: [B] bool, the same for the whole batch in the paper; the first call is skipped if it is False for all.
    """

    def guess(x):
        x0 = core.denoiser(f, head)(x, level).x0
        return jnp.where(core.expand(use, x), jax.lax.stop_gradient(x0), 0.0)

    estimate = jax.lax.cond(jnp.any(use), guess, jnp.zeros_like, x)
    return lambda x, t: f(x, t, estimate=jax.lax.stop_gradient(estimate))
