"""diffjax's samplers on the benchmark's exact denoisers: what is run, and how."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import targets

import diffjax as dj
from diffjax import sampling

BUDGETS = (5, 8, 10, 15, 20, 30, 50)
SCHEDULES = {"vp": dj.ddpm, "cosine": dj.squared_cosine, "edm": dj.EDM, "flow": dj.Flow}
FLOW_S_MAX = 999.0  # t = 0.999, for spacings that need a finite end
LAW_SAMPLES, LAW_TARGETS, LAW_BUDGETS = 4096, ("ring8",), (10, 20, 50)
HEADLINES = ("recommend", "recommend, variance", "recommend, covariance")


class Method(NamedTuple):
    """One configuration.

    Attributes:
      name: as in the tables.
      plan: `(schedule, target, nfe) -> (solver, levels)` with at most nfe calls; solvers of one kind are one object.
      knows: what it is told of the data: "nothing", "scalar" (mean and one variance), "covariance", or "trajectories".
    """

    name: str
    plan: Callable
    knows: str = "nothing"


@functools.cache
def denoiser(name: str):
    target = targets.TARGETS[name]()
    return dj.Mixture(target.weights, target.means, target.covs).denoise


@functools.cache
def solver(name: str, *args, **keywords):
    """One object for a name and its arguments, so that jit compiles it once."""
    return getattr(sampling, name)(*args, **dict(keywords))


def grid(spacing: str, schedule, n: int):
    """A spacing with its own ends; flow starts at t = 0.999 where it needs a finite one."""
    ends = {"s_max": FLOW_S_MAX} if isinstance(schedule, dj.Flow) and spacing != "uniform" else {}
    return getattr(dj, spacing)(schedule, n, **ends)


def fixed(name: str, spacing: str, *args, label: str = "", scheduled: bool = False, **keywords) -> Method:
    """A solver on a spacing: as many steps as the budget allows."""

    def plan(schedule, target, nfe):
        made = solver(name, *((schedule,) if scheduled else ()), *args, **keywords)
        n = max(n for n in range(1, nfe + 1) if n == 1 or made.nfe(n) <= nfe)
        return made, grid(spacing, schedule, n)

    return Method(f"{label or name} {spacing}", plan)


@functools.cache
def statistics(name: str, knows: str):
    """What a method is told of a target: a Gaussian of its mean and one variance, or of its covariance."""
    target = targets.TARGETS[name]()
    return dj.Gaussian(target.mean, {"scalar": target.sigma_data**2, "covariance": target.cov}[knows])


def recommended(name: str, knows: str) -> Method:
    """What `recommend` says for a budget, told nothing, the mean and one variance, or the covariance of the data."""
    made = {}

    def plan(schedule, target, nfe):
        stats = None if knows == "nothing" else statistics(target.name, knows)
        solver, levels = sampling.recommend(schedule, nfe, stats=stats)
        # For one target they differ in order, corrector (none below 7 calls) and jump: the first of each is compiled.
        return made.setdefault((target.name, solver.order, solver.nfe(5), nfe < 7), solver), levels

    return Method(name, plan, knows)


def deterministic() -> list[Method]:
    """What is run where the library has it."""
    out = [fixed("ddim", "uniform"), fixed("ddim", "karras"), fixed("heun", "karras"), fixed("lms", "karras")]
    for spacing in ("karras", "exponential"):
        out += [
            fixed("dpmpp_2m", spacing),
            fixed("dpmpp_3m", spacing),
            fixed("deis", spacing),
            fixed("unipc", spacing, 3, label="unipc(3)"),
        ]
        out.append(fixed("adams", spacing, 3, label="adams(3)"))
    told = ("nothing", "scalar", "covariance")
    return out + [recommended(name, knows) for name, knows in zip(HEADLINES, told, strict=True)]


def stochastic() -> list[Method]:
    """The samplers that draw noise."""
    out = []
    for spacing in ("karras", "exponential", "asinh"):
        out += [
            fixed("ancestral_ddpm", spacing),
            fixed("euler_ancestral", spacing),
            fixed("sde_dpmpp", spacing, scheduled=True),
            fixed("sde_dpmpp_2m", spacing),
            fixed("sde_dpmpp_3m", spacing),
            fixed("sde_dpmpp_3m", spacing, label="sde_dpmpp_3m(exact)", curvature="exact"),
            fixed("sa_solver", spacing),
            fixed("sde_adams", spacing, 2, label="sde_adams(2)"),
            fixed("sde_adams", spacing, 3, label="sde_adams(3)"),
        ]
    # The grid of its documentation: full noise forgets the start, so it begins low.
    low = lambda schedule, target, nfe: (solver("sde_adams"), dj.asinh(schedule, nfe, 0.02, s_max=4.0))
    return [*out, Method("sde_adams asinh from 4", low)]


class Runner:
    """Runs methods on one target; a solver is compiled once, for grids padded to the longest."""

    def __init__(self, name: str):
        self.target, self.denoise = targets.TARGETS[name](), denoiser(name)
        self.calls, self.programs = 0, {}

    def _count(self):
        self.calls += 1

    def _program(self, made, with_noise):
        def counted(x, level):
            jax.debug.callback(self._count)
            return self.denoise(x, level)

        def run(x, levels, key):
            noise = (lambda i, j: impulse(x, 2 * i + j)) if with_noise else None
            return sampling.sample(made, counted, x, levels, None if with_noise else key, noise=noise)

        return jax.jit(run)

    def __call__(self, made, levels, unit, *, with_noise=False):
        """The end [n, D] of a run from `sigma * unit`, and how often the denoiser was called."""
        length = max(BUDGETS)
        if (made, with_noise) not in self.programs:
            self.programs[made, with_noise] = self._program(made, with_noise)
        padded = dj.Level(*(jnp.asarray(np.pad(a, (0, max(0, length + 2 - len(a))), mode="edge")) for a in levels))
        self.calls = 0
        x = self.programs[made, with_noise](jnp.asarray(unit) * levels.sigma[0], padded, jax.random.key(1))
        x = np.asarray(jax.block_until_ready(x))
        jax.effects_barrier()
        return x, self.calls


def impulse(x, index):
    """Draw `index` of a run whose row 2 + index shall be its response; zero in all other rows."""
    return jnp.zeros_like(x).at[2 + index].set(1.0, mode="drop")


def gaussian_kl(run: Runner, method: Method, schedule, nfe: int) -> tuple[float, int]:
    """Nats per dimension from the sampler's law to a diagonal Gaussian's, by impulse responses; and the calls.

    The run is affine in the start (row 1) and in every draw (row 2 + index), and acts on each coordinate by itself.
    """
    made, levels = method.plan(schedule, run.target, nfe)
    unit = np.zeros((2 + 2 * max(BUDGETS), run.target.dim))
    unit[1] = 1.0
    x, calls = run(made, levels, unit, with_noise=True)
    variance = np.diag(run.target.covs[0])
    ratio = np.sum((x[1:] - x[0]) ** 2, 0) / variance
    return float(np.mean(0.5 * (ratio - 1 - np.log(ratio) + (x[0] - run.target.means[0]) ** 2 / variance))), calls
