"""Learning rates as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.registry import build
from diffjax.train.optim.settings import checked


def build_lr(config: Mapping[str, Any], num_steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """The learning rate of a config as a function of the number of steps done: `step (0, 1, ...) -> float32 []`.

    It rises linearly over the first `warmup` steps, `lr * (step + 1) / warmup`, then `schedule` runs over the other
    `num_steps - warmup`.

    Raises:
      ValueError: as `build_optimizer`, or if the warm-up is longer than the training.
    """
    config = checked(config)
    warmup = config["warmup"]
    if not 0 <= warmup <= num_steps:
        raise ValueError(f"optim warmup {warmup!r}: expected 0 <= warmup <= num_steps = {num_steps}")
    factor = build(config["schedule"], LR_SCHEDULES, "lr schedule", num_steps=max(1, num_steps - warmup))

    @jax.jit
    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        return jnp.float32(config["lr"]) * rise * factor(jnp.maximum(step - warmup, 0.0))

    return lr


def constant(*, num_steps: int) -> Callable:
    """The factor 1 at every step."""
    return lambda step: jnp.ones_like(step)


def cosine(final: float = 0.0, *, num_steps: int) -> Callable:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5 without restarts)."""
    return lambda step: final + (1 - final) * 0.5 * (1 + jnp.cos(math.pi * jnp.minimum(step / num_steps, 1.0)))


def flat_linear(flat: float = 0.4, final: float = 0.02, *, num_steps: int) -> Callable:
    """1 for the fraction `flat` of the steps, then a line down to `final` at the last.

    Raises:
      ValueError: if `flat` is not in `[0, 1)`.
    """
    if not 0 <= flat < 1:
        raise ValueError(f"lr schedule flat {flat!r}: expected 0 <= flat < 1")
    return lambda step: 1 - (1 - final) * jnp.clip((step / num_steps - flat) / (1 - flat), 0.0, 1.0)


def inverse_sqrt(ref: float, *, num_steps: int) -> Callable:
    """`1 / sqrt(max(step / ref, 1))` (Karras et al. 2024, arXiv:2312.02696, appendix B).

    Raises:
      ValueError: if `ref`, in steps, is not positive.
    """
    if not ref > 0:
        raise ValueError(f"lr schedule ref {ref!r}: expected a positive number of steps")
    return lambda step: 1 / jnp.sqrt(jnp.maximum(step / ref, 1.0))


LR_SCHEDULES = {"constant": constant, "cosine": cosine, "flat_linear": flat_linear, "inverse_sqrt": inverse_sqrt}
