"""Optimisers from a config: clip by global norm, scale, decay the weights by rule, multiply by the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax.registry import build, lookup, nearest
from diffjax.train import paths

DEFAULTS = {
    "name": "adam",
    "lr": 1e-3,
    "schedule": "constant()",
    "warmup": 0,
    "clip": 0.0,
    "weight_decay": 0.0,
    "decay_rules": (),
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
}


def build_optimizer(config: Mapping[str, Any], num_steps: int) -> optax.GradientTransformation:
    """The optimiser that `config` describes; the missing keys are those of `DEFAULTS`.

    One update is: clip the gradient by its global norm (`clip`, 0 for none), scale it (`name` with `b1, b2, eps`), add
    `weight_decay * factor * params` with the factor of `decay_rules` (Loshchilov and Hutter 2019, arXiv:1711.05101:
    decoupled), multiply by `-lr`.

    Args:
      config: any of `name` (`adam`, `adamw`, `lion`, `sgd` with momentum `b1`, or `"package.module:fn"`, called with
        `b1, b2, eps`), `lr`, `schedule`, `warmup`, `clip`, `weight_decay`, `decay_rules` (`[(regex, factor), ...]` over
        names `"a/b/c"`, the first match wins, every parameter must be covered if there are any; none means factor 1),
        `b1`, `b2`, `eps`.
      num_steps: length of the training, in optimiser steps.

    Raises:
      ValueError: for an unknown key or name (with the nearest), or a value out of range. The `init` of the result
        raises it if the rules leave a parameter uncovered.
    """
    config = _checked(config)
    scale = lookup(config["name"], OPTIMIZERS, "optimizer")
    parts = [optax.clip_by_global_norm(config["clip"])] if config["clip"] else []
    parts += [scale(b1=config["b1"], b2=config["b2"], eps=config["eps"])]
    if config["weight_decay"] or config["decay_rules"]:
        parts += [decayed_weights(config["weight_decay"], config["decay_rules"] or [(".*", 1.0)])]
    return optax.chain(*parts, optax.scale_by_learning_rate(build_lr(config, num_steps)))


def build_lr(config: Mapping[str, Any], num_steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """The learning rate of a config as a function of the number of steps done: `step (0, 1, ...) -> float32 []`.

    It rises linearly over the first `warmup` steps, `lr * (step + 1) / warmup`, then `schedule` runs over the other
    `num_steps - warmup`.

    Raises:
      ValueError: as `build_optimizer`, or if the warm-up is longer than the training.
    """
    config = _checked(config)
    warmup = config["warmup"]
    if not 0 <= warmup <= num_steps:
        raise ValueError(f"optim warmup {warmup!r}: expected 0 <= warmup <= num_steps = {num_steps}")
    factor = build(config["schedule"], LR_SCHEDULES, "lr schedule", num_steps=max(1, num_steps - warmup))

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        return jnp.float32(config["lr"]) * rise * factor(jnp.maximum(step - warmup, 0.0))

    return lr


def decayed_weights(weight_decay: float, rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Adds `weight_decay * factor * param` to each update, the factor of the first rule that matches the name.

    Args:
      weight_decay: the common coefficient.
      rules: `[(regex, factor), ...]`; they must cover every parameter.

    Raises:
      ValueError: from `init` and `update`, if a parameter is covered by no rule, or `params` is not given.
    """

    def factors(params):
        table = paths.match(rules, paths.named_leaves(params), "decay")
        return jax.tree_util.tree_map_with_path(lambda path, _: table[paths.name(path)], params)

    def init(params):
        factors(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
        decayed = jax.tree.map(lambda u, f, p: u + weight_decay * f * p, updates, factors(params), params)
        return decayed, state

    return optax.GradientTransformation(init, update)


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


def _adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def _lion(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=b1, b2=b2)


def _sgd(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    return optax.trace(decay=b1) if b1 else optax.identity()


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its defaults, its values in range."""
    for key in config:
        if key not in DEFAULTS:
            raise ValueError(f"unknown optim key {key!r}; known: {', '.join(DEFAULTS)}{nearest(key, DEFAULTS)}")
    full = DEFAULTS | {key: config[key] for key in config}
    ranges = {
        "lr": ("0 < lr < inf", lambda v: 0 < v < math.inf),
        "clip": ("0 <= clip < inf, 0 for none", lambda v: 0 <= v < math.inf),
        "weight_decay": ("0 <= weight_decay < inf", lambda v: 0 <= v < math.inf),
        "warmup": ("an integer number of steps, >= 0", lambda v: v >= 0 and v == int(v)),
        "b1": ("0 <= b1 < 1", lambda v: 0 <= v < 1),
        "b2": ("0 <= b2 < 1", lambda v: 0 <= v < 1),
        "eps": ("0 < eps < inf", lambda v: 0 < v < math.inf),
    }
    for key, (allowed, holds) in ranges.items():
        if not (isinstance(full[key], (int, float)) and holds(full[key])):
            raise ValueError(f"optim {key} {full[key]!r}: expected {allowed}")
    for rule in full["decay_rules"]:
        if len(rule) != 2 or not (isinstance(rule[1], (int, float)) and 0 <= rule[1] < math.inf):
            raise ValueError(f"optim decay_rules {rule!r}: expected (regex, factor) with 0 <= factor < inf")
    if full["name"] == "adam" and (full["weight_decay"] or full["decay_rules"]):
        raise ValueError("optim name 'adam' with weight decay is ambiguous; use 'adamw' for decoupled decay")
    return full


OPTIMIZERS = {"adam": _adam, "adamw": _adam, "lion": _lion, "sgd": _sgd}
LR_SCHEDULES = {"constant": constant, "cosine": cosine, "flat_linear": flat_linear, "inverse_sqrt": inverse_sqrt}
