"""Training runs: configs, the step and the loop, checkpoints, averages of parameters, shardings.

The names below load their modules, and with them Flax and Orbax, when they are first used.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Parts": "parts",
    "Result": "loop",
    "Run": "state",
    "TrainState": "state",
    "defaults": "config",
    "load_run": "state",
    "make_train_step": "step",
    "open_checkpoints": "checkpoint",
    "resolve": "parts",
    "train": "loop",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
