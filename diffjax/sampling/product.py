"""Denoisers that see more than one state: several kinds sampled together, or x beside the last estimate of x0."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffjax.core.types import Level, Prediction, Solver, Step, namespace


def product(solvers: Mapping[str, Solver]) -> Solver:
    """One solver for a state of several named arrays, such as `{"image": ..., "text": ...}`.

    The denoiser is joint: `(x, level) -> predictions`, all three dicts with the names of `solvers`. It is called once a
    step, on the states and levels of all components, and each solver makes its own step of its own part. Grids may
    differ: a component whose two levels are equal waits, so one part can be sampled before another, or not at all.

        solver = product({"image": dpmpp_2m(), "pose": ddim(1.0)})
        sample(solver, denoise, {"image": x, "pose": p}, {"image": levels, "pose": other_levels}, key)

    Args:
      solvers: by name; each must call its denoiser once a step, at the level where the step begins.

    Returns:
      A solver whose state, levels, noise, memory and predictions are dicts. Its order is the lowest of its parts'.

    Raises:
      ValueError: if there are none, or one of them calls the network more than once a step: the other parts have no
        state at its intermediate levels.
    """
    solvers = dict(solvers)
    if not solvers:
        raise ValueError("product: expected at least one solver, got none")
    many = {name: solver.nfe(100) for name, solver in solvers.items() if solver.nfe(100) > 100}
    if many:
        raise ValueError(
            f"product: every solver must call the network once a step; for 100 steps got {many} calls. Use multistep "
            "solvers (ddim, dpmpp_2m, unipc, adams)"
        )

    def named(what, given):
        if not isinstance(given, Mapping) or set(given) != set(solvers):
            names = sorted(given) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(f"product: {what} must be a dict of {sorted(solvers)}, got {names}")
        return given

    def init(x, levels):
        named("x", x)
        parts = {name: solver.init(x[name], levels[name]) for name, solver in solvers.items()}
        coef = {name: {"inner": part[1], "level": _noisy(levels[name])} for name, part in parts.items()}
        return {name: part[0] for name, part in parts.items()}, coef

    def step(denoise, x, memory, at: Step):
        levels = {name: at.coef[name]["level"] for name in solvers}
        joint = named("the denoiser's result", denoise(x, levels))
        out = {name: _one(solvers[name], name, joint[name], x, memory, at) for name in solvers}
        return tuple({name: part[i] for name, part in out.items()} for i in range(3))

    nfe = lambda n: max(solver.nfe(n) for solver in solvers.values())
    ascending = all(solver.ascending for solver in solvers.values())
    return Solver(init, step, order=min(s.order for s in solvers.values()), nfe=nfe, ascending=ascending)


def self_conditioned(solver: Solver) -> Solver:
    """The solver with a denoiser that is also given the x0 of the step before; zeros in the first step.

    Chen et al. 2022, arXiv:2208.04202, Algorithm 2. The denoiser is `(x, level, estimate [B, ...]) -> Prediction`. All
    calls of one step are given the same estimate; that of the next is the x0 of the prediction that this step returned,
    with whatever guidance or clipping it has.

        sample(self_conditioned(ddim()), lambda x, level, estimate: ..., x, levels, key)

    Args:
      solver: any; its order and number of calls stay.
    """

    def init(x, levels):
        memory, coef = solver.init(x, levels)
        return (memory, jnp.zeros_like(x)), coef

    def step(denoise, x, memory, at: Step):
        inner, estimate = memory
        x, inner, prediction = solver.step(lambda x, level: denoise(x, level, estimate), x, inner, at)
        return x, (inner, prediction.x0.astype(estimate.dtype)), prediction

    return solver._replace(init=init, step=step)


def _noisy(levels: Level) -> Level:
    """Where each step calls the denoiser, fields [n]: the last noisy level for a part that is done and waits at 0."""
    xp = namespace(*levels)
    last = xp.maximum(xp.sum(levels.sigma > 0) - 1, 0)
    return Level(*(xp.where(levels.sigma[:-1] > 0, field[:-1], field[last]) for field in levels))


def _one(solver: Solver, name: str, prediction: Prediction, x, memory, at: Step):
    """The step of one component, or nothing where its level stays."""
    level, following = at.level[name], at.next[name]
    part = Step(at.index, level, following, at.coef[name]["inner"], lambda j: at.draw(j)[name])

    def known(state, where):
        if state is not x[name] or where is not level:
            raise ValueError(
                f"product: the solver of {name!r} calls its denoiser elsewhere than at the state and level where the "
                "step begins, where the other parts have no state; use a multistep solver (ddim, dpmpp_2m, adams)"
            )
        return prediction

    moved = solver.step(known, x[name], memory[name], part)
    still = (level.alpha == following.alpha) & (level.sigma == following.sigma)
    stay = (x[name], memory[name])
    kept = jax.tree.map(lambda a, b: jnp.where(still, a, b), stay, tuple(moved[:2]))
    return *kept, moved[2]
