"""Fitted samplers: a linear multistep solver whose coefficients are a table, and the files that keep it."""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from diffjax import files
from diffjax.core.oracle import Gaussian
from diffjax.core.types import Level, Solver, Step, namespace
from diffjax.sampling.solvers.adams import jump as jump_first

FORMAT, VERSION = "diffjax-steps", 1


@dataclass(frozen=True, eq=False)
class Steps:
    """A fitted sampler: `sample(steps.solver, denoise, x, steps.levels)`.

    Attributes:
      levels: the grid, fields [m + 1] float64; m is the number of calls, and one more with a `jump`.
      table: the coefficients of every step, arrays [m, ...] float64.
      stats: the Gaussian whose flow is taken out.
      jump: whether the first step is that flow, in closed form and without a call.
      before: median distance to the teacher's ends over their std, on starts held out, before the fit.
      after: the same after it.
    """

    levels: Level
    table: dict[str, np.ndarray]
    stats: Gaussian
    jump: bool
    before: float = float("nan")
    after: float = float("nan")

    @cached_property
    def solver(self) -> Solver:
        """The solver for `levels`; the same object each time, so that jit compiles it once."""
        made = tabulated(self.table, self.stats, self.levels)
        return jump_first(made, self.stats) if self.jump else made

    @property
    def nfe(self) -> int:
        """Network calls."""
        return self.solver.nfe(len(self.levels.t) - 1)


def tabulated(table: dict, stats: Gaussian, levels: Level | None = None) -> Solver:
    """The solver whose coefficients are `table`, for the grid `levels` or that grid with its last level repeated."""
    m = len(table["first"])
    operate = stats.operate

    def init(x, given):
        n = len(given.t) - 1
        if n < m:
            raise ValueError(f"levels: this solver was fitted for a grid of {m} steps (steps.levels), got {n}")
        if levels is not None and isinstance(given.sigma, np.ndarray):
            ours, theirs = (np.arctan2(a.sigma[1:], a.alpha[1:])[:m] for a in (levels, given))
            if not np.allclose(ours, theirs, atol=1e-5):
                raise ValueError("levels: the coefficients belong to steps.levels; sample on that grid, or fit anew")
        repeat = lambda a: namespace(a).concatenate([a, namespace(a).zeros((n - m, *a.shape[1:]), a.dtype)])
        history = jnp.zeros((table["correct"].shape[1] - 1, *x.shape), x.dtype)
        return (x, history), {name: repeat(row) for name, row in table.items()}

    def step(denoise, x, memory, at: Step):
        before, history = memory
        prediction, row = denoise(x, at.level), at.coef
        mean = jnp.asarray(stats.mean, x.dtype)
        g = operate(row["x0"], prediction.x0 - mean) + operate(row["eps"], prediction.eps)
        points = jnp.concatenate([g[None], history])
        combine = lambda weights: sum(operate(weights[j], points[j]) for j in range(len(weights)))
        again = at.level.alpha * mean + operate(row["before"], before - row["alpha"] * mean) + combine(row["correct"])
        x = jnp.where(row["first"], x, again)
        following = at.next.alpha * mean + operate(row["x"], x - at.level.alpha * mean) + combine(row["predict"])
        return following, (x, points[:-1]), prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def save_steps(path: str | os.PathLike, steps: Steps) -> None:
    """Writes fitted steps to one file of a few kB (and the statistics) that `load_steps` reads; whole or not at all."""
    meta = {"format": FORMAT, "version": VERSION, "jump": steps.jump, "before": steps.before, "after": steps.after}
    arrays = {f"levels.{name}": field for name, field in steps.levels._asdict().items()}
    arrays |= {f"table.{name}": row for name, row in steps.table.items()}
    arrays |= {"stats.mean": steps.stats.mean, "stats.spectrum": steps.stats.spectrum}
    if steps.stats.basis is not None:
        arrays["stats.basis"] = steps.stats.basis
    with files.replacing(path, "wb") as file:
        np.savez(file, meta=np.asarray(json.dumps(meta)), **arrays)


def load_steps(path: str | os.PathLike) -> Steps:
    """The `Steps` of a file of `save_steps`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is truncated, damaged, of another kind or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no steps at {path}; save_steps writes them")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta", "null")))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not a file of save_steps ({error}); write it again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path} is a file of arrays, but not one of save_steps")
    if meta["version"] > VERSION:
        raise ValueError(f"{path} has format version {meta['version']}; this library reads up to {VERSION}")
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    try:
        stats = part("stats.")
        cov = (stats["spectrum"], stats["basis"]) if "basis" in stats else stats["spectrum"]
        levels, stats = Level(**part("levels.")), Gaussian(stats["mean"], cov)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it lacks an array ({error}); write it again") from error
    return Steps(levels, part("table."), stats, bool(meta["jump"]), meta["before"], meta["after"])
