"""Optimisers from a config: clip, direction, width, weight decay, factors by rule, learning rate; or none of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from diffjax.registry import lookup, parse
from diffjax.train.optim import mup, rules
from diffjax.train.optim.methods import METHODS, build_method
from diffjax.train.optim.rates import build_lr
from diffjax.train.optim.schedule_free import NAME, base_method, schedule_free
from diffjax.train.optim.settings import checked

OPTIMIZERS = {**METHODS, NAME: schedule_free}


def build_optimizer(
    config: Mapping[str, Any], num_steps: int, *, base: Any = None, fixed: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optimiser that `config` describes; the missing keys are those of `DEFAULTS`.

    One update is: clip the gradient by its global norm (`clip`, 0 for none), find the direction (`name` with
    `b1, b2, eps`), multiply it by the factors of muP, add `weight_decay * factor * params` with the factor of
    `decay_rules` (Loshchilov and Hutter 2019, arXiv:1711.05101: decoupled), multiply by the factor of `lr_rules`, then
    by `-lr`. Frozen parameters take no part in any of it.

    Args:
      config: any of `name` (one of `OPTIMIZERS` with its arguments, `"muon(ns_steps=5)"`, or `"package.module:fn"` as
        `build_method`), `lr`, `schedule`, `warmup`, `clip`, `weight_decay`, `decay_rules` and `lr_rules`
        (`[(regex, factor), ...]` over names `"a/b/c"`, the first match wins, every parameter must be covered if there
        are any; none means factor 1), `freeze` (regexes), `mup`, `b1`, `b2`, `eps`.
      num_steps: length of the training, in optimiser steps.
      base: shapes of the base network's parameters, which `mup` needs.
      fixed: names of parameters that are frozen besides (`Model.fixed`).

    Raises:
      ValueError: for an unknown key or name (with the nearest), or a value out of range. The `init` of the result
        raises it if the rules leave a parameter uncovered or a pattern of `freeze` finds none.
    """
    config = checked(config)
    lr, offered = build_lr(config, num_steps), {key: config[key] for key in ("b1", "b2", "eps")}
    name = parse(config["name"])[0]
    lookup(name, OPTIMIZERS, "optimizer")
    free = name == NAME
    method, power = base_method(config["name"], offered) if free else (build_method(config["name"], offered), 0.0)
    clip = [optax.clip_by_global_norm(config["clip"])] if config["clip"] else []
    parts = [method.direction]
    if config["mup"]:
        if base is None:
            raise ValueError("optim mup needs the shapes of the base network: build_optimizer(..., base=shapes)")
        parts += [mup.scaled_by_width(base, method.family)]
    if config["weight_decay"] or config["decay_rules"]:
        parts += [rules.decayed_weights(config["weight_decay"], config["decay_rules"] or [(".*", 1.0)])]
    if config["lr_rules"]:
        parts += [rules.scaled_by_rules(config["lr_rules"])]
    parts += [optax.scale_by_learning_rate(lr)]
    if free:
        parts = [schedule_free(optax.chain(*parts), lr, b1=config["b1"], power=power)]
    whole = optax.chain(*clip, *parts)
    freeze = [*config["freeze"], *(f"^{re.escape(name)}$" for name in fixed)]
    return rules.frozen(whole, freeze) if freeze else whole
