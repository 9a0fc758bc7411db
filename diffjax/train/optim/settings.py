"""The settings of an optimiser: their names, defaults and ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from diffjax.registry import nearest, parse

DEFAULTS = {
    "name": "adam",
    "lr": 1e-3,
    "schedule": "constant()",
    "warmup": 0,
    "clip": 0.0,
    "weight_decay": 0.0,
    "decay_rules": (),
    "lr_rules": (),
    "freeze": (),
    "mup": "",
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
}

_RANGES = {
    "lr": ("0 < lr < inf", lambda v: 0 < v < math.inf),
    "clip": ("0 <= clip < inf, 0 for none", lambda v: 0 <= v < math.inf),
    "weight_decay": ("0 <= weight_decay < inf", lambda v: 0 <= v < math.inf),
    "warmup": ("an integer number of steps, >= 0", lambda v: v >= 0 and v == int(v)),
    "b1": ("0 <= b1 < 1", lambda v: 0 <= v < 1),
    "b2": ("0 <= b2 < 1", lambda v: 0 <= v < 1),
    "eps": ("0 < eps < inf", lambda v: 0 < v < math.inf),
}


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in `config` with those of `DEFAULTS` that it leaves out, each in its range.

    Raises:
      ValueError: for an unknown key (with the nearest), a value out of range, or settings that exclude each other.
    """
    for key in config:
        if key not in DEFAULTS:
            raise ValueError(f"unknown optim key {key!r}; known: {', '.join(DEFAULTS)}{nearest(key, DEFAULTS)}")
    full = DEFAULTS | {key: config[key] for key in config}
    for key, (allowed, holds) in _RANGES.items():
        if not (isinstance(full[key], (int, float)) and holds(full[key])):
            raise ValueError(f"optim {key} {full[key]!r}: expected {allowed}")
    _check_factors("decay_rules", full["decay_rules"], "0 <= factor < inf", lambda v: 0 <= v < math.inf)
    _check_factors("lr_rules", full["lr_rules"], "0 < factor < inf (freeze stops)", lambda v: 0 < v < math.inf)
    for pattern in full["freeze"]:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"optim freeze {pattern!r}: {error}; expected regexes over names, as '^cond/'") from None
    if parse(full["name"])[0] == "adam" and (full["weight_decay"] or full["decay_rules"]):
        raise ValueError("optim name 'adam' with weight decay is ambiguous; use 'adamw' for decoupled decay")
    return full


def _check_factors(key, rules, allowed, holds):
    for rule in rules:
        pair = isinstance(rule, tuple | list) and len(rule) == 2
        if not (pair and isinstance(rule[1], (int, float)) and holds(rule[1])):
            raise ValueError(f"optim {key} {rule!r}: expected (regex, factor) with {allowed}")
