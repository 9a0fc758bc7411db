"""Steering by particles: sequential Monte Carlo on top of any stochastic sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Denoiser, Level, Prediction, Solver, Step, namespace
from diffjax.sampling.solvers.basic import moving

POTENTIALS = ("difference", "max", "sum")


class Particles(NamedTuple):
    """What steering carries from step to step, next to the inner solver's memory.

    Attributes:
      inner: memory of the inner solver.
      log_weight: [B] since the last resampling.
      total: log of the product of each particle's potentials so far, [B].
      record: the largest reward of its ancestors ("max") or the sum of these ("sum"), [B].
    """

    inner: object
    log_weight: Array
    total: Array
    record: Array


def smc(
    solver: Solver,
    reward: Callable[[Array], Array],
    particles: int,
    scale: float = 1.0,
    *,
    potential: str | Callable[[Array, Level], Array] = "difference",
    threshold: float = 0.5,
    every: int = 1,
    proposal: Denoiser | None = None,
) -> Solver:
    """Samples of `p(x0) exp(scale reward(x0))`: Feynman-Kac steering (Singhal et al. 2025, arXiv:2501.06848).

    p is what the solver samples without steering. The batch is `G` groups of `particles` neighbours; within each
    group, before a step, particles are weighted by the reward of their prediction of x0 and, where the effective sample
    size falls below `threshold * particles`, resampled (systematic). After the last step the weights are made up to the
    reward of the samples themselves, whatever the potentials before, and the group is resampled: what comes back has
    equal weights and as many duplicates as the weights ask for. Exact as `particles` grows, with an error of about
    `1 / particles`; groups are independent.

    **This reduces across the batch, on purpose**: a sample depends on its group. Everything else here does not.

    With a `proposal` this is the twisted sampler (Wu et al. 2023, arXiv:2306.17775, Algorithm 1): particles move by the
    guided denoiser, and the ratio of the two transition densities enters the weights, so that the guidance costs no
    exactness and its quality decides the variance. The solver must then be one whose step is `mean + std * draw(0)`:
    `ddim(eta)`, `ancestral_ddpm()`, `euler_ancestral()`. Steps without noise, such as that to sigma = 0, have no
    density and use the unguided denoiser.

    Departs from the sources: weights below the threshold are kept, not flattened by resampling at fixed times (set
    `threshold=1` for that); the potential reads the prediction at the start of the step. On a deterministic solver
    duplicates stay duplicates.

    Args:
      solver: stochastic, such as `ddim(1.0)`, whose first call of a step is at its start.
      reward: `x0 [B, ...] -> [B]`, higher is better; need not be differentiable.
      particles: in a group; must divide the batch.
      scale: of the reward in the exponent; the paper's lambda.
      potential: "difference", the reward's gain over the last look; "max", `exp(scale)` of the best reward so far;
        "sum", of their sum. The last two favour early and grow with the number of looks. Or a function `(x0, level) ->
        [B]`, the log of the product of potentials so far: for a likelihood, that of y with the uncertainty of x0 at
        that level in its variance, which is what keeps early weights from collapsing. All have the same target.
      threshold: share of the particles below which the effective sample size triggers resampling; 0 only at the end,
        1 at every look.
      every: steps from look to look.
      proposal: a guided denoiser to move with; the denoiser given to `sample` stays the one whose p is steered.

    Raises:
      ValueError: for settings out of range; in sampling, for a batch that is not made of whole groups, a reward of
        another shape, or a solver that never calls its denoiser at the step's start.
    """
    _check(particles, potential, threshold, every)

    def init(x, levels):
        if len(x) % particles:
            raise ValueError(f"smc: expected a batch of whole groups of {particles} particles, got {len(x)} samples")
        memory, coef = solver.init(x, levels)
        xp = namespace(*levels)
        moves = moving(levels)
        last = moves & (xp.cumsum(moves[::-1])[::-1] == 1)  # steps that do not move are skipped
        look = moves & ((xp.cumsum(moves) - 1) % every == 0)
        zero = jnp.zeros(len(x), x.dtype)
        record = jnp.full_like(zero, -jnp.inf) if potential == "max" else zero
        return Particles(memory, zero, zero, record), {"inner": coef, "last": last, "look": look}

    def step(denoise, x, memory: Particles, at: Step):
        inner_at = at._replace(coef=at.coef["inner"], draw=lambda j: at.draw(j + 2))
        prediction = denoise(x, at.level)
        if callable(potential):
            total, record = _rewards(lambda x0: potential(x0, at.level), prediction.x0), memory.record
        else:
            total, record = _potential(potential, scale * _rewards(reward, prediction.x0), memory)
        looked = memory._replace(log_weight=memory.log_weight + total - memory.total, total=total, record=record)
        memory = jax.tree.map(lambda a, b: jnp.where(at.coef["look"], a, b), looked, memory)

        poor = _effective(memory.log_weight, particles) < threshold * particles
        always = threshold == 1
        ancestors = _ancestors(memory.log_weight, at.draw(0), particles, at.coef["look"] & (poor | always))
        x, prediction, memory = _select(ancestors, x, (x, prediction, memory))
        memory = memory._replace(log_weight=_flatten(memory.log_weight, ancestors[1], particles))

        moved, shift = _move(solver, denoise, proposal, x, prediction, memory.inner, inner_at)
        x_next, inner, prediction = moved
        memory = memory._replace(inner=inner, log_weight=memory.log_weight + shift)

        def finish(carry):
            x, memory = carry
            weight = memory.log_weight + scale * _rewards(reward, x) - memory.total
            chosen = _ancestors(weight, at.draw(1), particles, True)
            return _select(chosen, x, (x, memory))

        x_next, memory = jax.lax.cond(at.coef["last"], finish, lambda carry: carry, (x_next, memory))
        return x_next, memory, prediction

    calls = 1 if proposal is None else 2
    return solver._replace(init=init, step=step, nfe=lambda n: calls * solver.nfe(n))


def _check(particles, potential, threshold, every):
    if not isinstance(particles, (int, np.integer)) or particles < 2:
        raise ValueError(f"smc: expected a whole number of particles >= 2, got {particles!r}")
    if not callable(potential) and potential not in POTENTIALS:
        raise ValueError(
            f"smc: unknown potential {potential!r}; known: {', '.join(POTENTIALS)}, or a function (x0, level)"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"smc: threshold, a share of the particles, must be from 0 to 1, got {threshold}")
    if not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"smc: every, the steps from look to look, must be a whole number >= 1, got {every!r}")


def _rewards(reward, x0):
    values = reward(x0)
    if jnp.shape(values) != x0.shape[:1]:
        raise ValueError(f"smc: expected one reward per sample, {x0.shape[:1]}, got shape {jnp.shape(values)}")
    return values.astype(x0.dtype)


def _potential(kind: str, value: Array, memory: Particles) -> tuple[Array, Array]:
    """The log of the product of potentials after this look, and what must be remembered for the next."""
    if kind == "difference":
        return value, memory.record
    record = jnp.maximum(memory.record, value) if kind == "max" else memory.record + value
    return memory.total + record, record


def _effective(log_weight: Array, particles: int) -> Array:
    """Effective sample size of each group, [G]."""
    weight = jax.nn.softmax(log_weight.reshape(-1, particles), axis=1)
    return 1 / jnp.sum(weight**2, axis=1)


def _ancestors(log_weight: Array, noise: Array, particles: int, where: Array) -> tuple[Array, Array]:
    """Systematic resampling (Kitagawa 1996) of the groups with `where` [G]: indices into the batch [B], and `where`.

    One uniform number a group, from the first entry of its first particle's noise.
    """
    groups = len(log_weight) // particles
    where = jnp.broadcast_to(where, (groups,))
    uniform = jax.scipy.stats.norm.cdf(noise.reshape(groups, -1)[:, :1])
    cumulative = jnp.cumsum(jax.nn.softmax(log_weight.reshape(groups, particles), axis=1), axis=1)
    points = (uniform + jnp.arange(particles)) / particles * cumulative[:, -1:]
    search = lambda c, p: jnp.searchsorted(c, p, side="right")
    own = jnp.arange(particles)
    chosen = jnp.where(where[:, None], jnp.minimum(jax.vmap(search)(cumulative, points), particles - 1), own)
    return (chosen + particles * jnp.arange(groups)[:, None]).reshape(-1), where


def _flatten(log_weight: Array, where: Array, particles: int) -> Array:
    """Weights reset to zero in the groups that were resampled."""
    return jnp.where(jnp.repeat(where, particles), 0.0, log_weight)


def _select(ancestors: tuple[Array, Array], x: Array, tree):
    """The tree with the batch axis of its leaves (those that end in x's shape, or start with [B]) at the ancestors."""
    index, _ = ancestors

    def take(a):
        if a.ndim >= x.ndim and a.shape[a.ndim - x.ndim :] == x.shape:
            return jnp.take(a, index, axis=a.ndim - x.ndim)
        return a[index] if a.ndim and a.shape[0] == len(x) else a

    return jax.tree.map(take, tree)


def _move(solver, denoise, proposal, x, prediction: Prediction, memory, at: Step):
    """One step of the solver from a prediction that was made, and the log weight [B] of the transition."""

    def told(first: Prediction) -> Denoiser:
        def answer(y, level):
            if y is x and level is at.level:
                used.append(True)
                return first
            return denoise(y, level)

        return answer

    used = []
    zero = jnp.zeros(len(x), x.dtype)
    if proposal is None:
        moved = solver.step(told(prediction), x, memory, at)
        _called(used)
        return moved, zero
    # mean + std * draw(0): the three parts by running the step with draws of zero, one and the real one.
    quiet, unit = (at._replace(draw=lambda j, v=v: jnp.full_like(x, v)) for v in (0.0, 1.0))
    mean, _, _ = solver.step(told(prediction), x, memory, quiet)
    std = solver.step(told(prediction), x, memory, unit)[0] - mean
    loud = std > 1e-6 * jnp.abs(at.level.sigma)
    guided = proposal(x, at.level)
    mixed = Prediction(
        *(jnp.where(loud, a, b) for a, b in zip(guided[:2], prediction[:2], strict=True)), prediction.aux
    )
    guided_mean, _, _ = solver.step(told(mixed), x, memory, quiet)
    moved = solver.step(told(mixed), x, memory, at)
    _called(used)
    shift = jnp.where(loud, (guided_mean - mean) / jnp.where(loud, std, 1.0), 0.0)
    drawn = at.draw(0)
    # log N(x'; mean, std) - log N(x'; guided mean, std).
    log_ratio = -shift * drawn - shift**2 / 2
    return moved, jnp.sum(log_ratio.reshape(len(x), -1), axis=1)


def _called(used):
    if not used:
        raise ValueError(
            "smc: the solver never calls its denoiser at the step's start, where particles are weighted (churn does "
            "so at a raised level); use ddim(1.0), ancestral_ddpm() or the like"
        )
