"""Snapshots of the power-function averages over the course of training, and averages rebuilt from them afterwards."""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

import jax

from diffjax.registry import parse
from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.optim.posthoc import reconstruct

FOLDER = "ema_snapshots"
ALL = 10**9


def tracked(specs) -> dict[str, float]:
    """`{spec: std}` of the power-function averages among the specs of `config.ema`."""
    found = {}
    for spec in specs:
        name, args, kwargs = parse(spec)
        if name == "power":
            found[spec] = float(kwargs["std"] if "std" in kwargs else args[0])
    return found


def check(every: int, specs) -> None:
    """Raises `ValueError` if snapshots are asked for and there is no power-function average to take them of."""
    if every and not tracked(specs):
        raise ValueError(
            f"ema_snapshots={every} stores power-function averages, and config.ema is {tuple(specs)!r}; track two, "
            "as in ema=('power(std=0.05)', 'power(std=0.1)'), or set ema_snapshots=0"
        )


def due(every: int, step: int, last: int) -> bool:
    """Whether a snapshot is taken after `step` steps: every `every` and after the last; never for 0."""
    return bool(every) and (step % every == 0 or step == last)


def open_snapshots(workdir: str, *, step: int | None = None) -> Any:
    """The snapshots of a run, as checkpoints that are never pruned.

    Args:
      workdir: of the run.
      step: for a writer, the step that it goes on from: later snapshots, which it will take anew, are removed.
    """
    folder = os.path.join(workdir, FOLDER)
    snapshots = open_checkpoints(folder, keep=ALL)
    if step is not None and jax.process_index() == 0:
        for later in [s for s in snapshots.steps() if s > step]:
            shutil.rmtree(os.path.join(folder, str(later)))
    return snapshots


def save(snapshots: Any, step: int, averages: dict[str, Any]) -> None:
    """Writes the power-function averages among `averages`, `{spec: params}`, in the background."""
    snapshots.save(step, {"ema": {spec: averages[spec] for spec in tracked(averages)}})


def cost(every: int, num_steps: int, averages: dict[str, Any]) -> str:
    """What the snapshots of a whole run take on disk, for the log."""
    count = math.ceil(num_steps / every)
    leaves = jax.tree.leaves({spec: averages[spec] for spec in tracked(averages)})
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 1e6
    return f"ema snapshots every {every} steps: {count} of {size:.3g} MB, {count * size / 1e3:.3g} GB at the end"


def is_posthoc(spec: str | None) -> bool:
    """Whether an average's spec is `"posthoc(std=...)"`."""
    return bool(spec) and spec.partition("(")[0].strip() == "posthoc"


def rebuild(workdir: str, specs, spec: str, step: int | None = None) -> tuple[int, dict]:
    """`(step, params)` of `"posthoc(std=0.07)"` from the snapshots in `workdir`.

    Args:
      workdir: of the run.
      specs: its `config.ema`.
      spec: the average wanted.
      step: None for the last snapshot's.

    Raises:
      ValueError: for another form of the spec, or as `reconstruct`.
    """
    _, args, settings = parse(spec)
    if args or set(settings) != {"std"} or not isinstance(settings["std"], (int, float)):
        raise ValueError(f"ema {spec!r}: expected its width relative to the training, as in 'posthoc(std=0.07)'")
    if isinstance(step, str):
        raise ValueError(f"ema {spec!r} at step {step!r}: give the number of a snapshot's step")
    return reconstruct(open_snapshots(workdir), tracked(specs), float(settings["std"]), step)
