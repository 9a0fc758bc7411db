"""How far the samplers for inverse problems are from the exact posterior, on data where that is known.

    python benchmarks/inverse_problems.py     # writes benchmarks/results/inverse_problems.json, docs/images/inverse.png

Two priors with exact denoisers (a Gaussian in 4 dimensions, a ring of six modes in the plane), two measurements of
each: coordinates known exactly, and a linear map with noise. All methods: 100 steps of ancestral sampling (`ddim(1.0)`;
`ddrm` is its own solver) on one grid, 4096 samples; of `smc`, 128 groups. Scales of DPS are the best of a list in
hindsight.

Columns: `sw`, sliced 2-Wasserstein distance to the exact posterior over the same of the posterior to its mean (0 is
exact, 1 is as wrong as its spread; 32 directions); `kl`, nats from the Gaussian with the samples' moments to the exact
Gaussian; `tv`, total variation of the mass of the modes.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

# Compilation would be most of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true")

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from diffjax.viz.figure import COLOURS, FAINT, INK, TEXT, TITLE, new_figure, save

ROOT = Path(__file__).parent
N, STEPS, JUMP = 4096, 100, 10
GROUPS = 128
RESAMPLINGS = (1, 2, 5, 10)
SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
LEVELS = dj.karras(dj.VP(), STEPS)


class Problem(NamedTuple):
    """A prior, its measurement `y = A x0 + noise_std eps`, and the mask where that is a part of x0."""

    name: str
    prior: dj.Gaussian | dj.Mixture
    A: np.ndarray
    y: np.ndarray
    noise_std: float
    mask: np.ndarray | None


def problems() -> list[Problem]:
    rng = np.random.default_rng(4)
    frame = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    gaussian = dj.Gaussian(np.array([0.3, -0.2, 0.1, 0.0]), (frame * [1.0, 0.3, 0.1, 0.03]) @ frame.T)
    angle = 2 * np.pi * np.arange(6) / 6 + 0.2
    means = np.stack([np.cos(angle), np.sin(angle)], 1)
    along = np.stack([-np.sin(angle), np.cos(angle)], 1)
    covs = 0.1**2 * np.eye(2) + (0.25**2 - 0.1**2) * along[:, :, None] * along[:, None, :]
    ring = dj.Mixture([3.0, 1.0, 2.0, 1.0, 3.0, 2.0], means, covs)
    rows = rng.normal(size=(2, 4))
    first = np.array([True, True, False, False])
    return [
        Problem("gaussian_part", gaussian, np.eye(4)[:2], np.array([1.0, -0.6]), 0.0, first),
        Problem("gaussian_noisy", gaussian, rows, rows @ np.array([0.9, -0.6, 0.2, 0.1]), 0.2, None),
        Problem("ring_part", ring, np.array([[1.0, 0.0]]), np.array([0.45]), 0.0, first[1:3]),
        Problem("ring_noisy", ring, np.array([[1.0, 0.4]]), np.array([0.3]), 0.15, None),
    ]


def clean(distribution, key, n):
    out = distribution.sample(key, n)
    return np.asarray(out[0] if isinstance(out, tuple) else out, np.float64)


def projected(points):
    """Quantiles [1024, 32] of samples along random directions."""
    directions = np.random.default_rng(0).normal(size=(points.shape[1], 32))
    sorted_ = np.sort(points @ (directions / np.linalg.norm(directions, axis=0)), axis=0)
    return sorted_[((np.arange(1024) + 0.5) / 1024 * len(points)).astype(int)]


def sliced(x, exact):
    """Sliced 2-Wasserstein distance between samples, over the spread of `exact` in the same directions."""
    a, b = projected(x), exact
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean((b - b.mean(0)) ** 2)))


def measures(problem, posterior, truth, x):
    """The row of samples `x`; `truth` holds the exact quantiles and masses of modes."""
    x = np.asarray(x, np.float64)
    if not np.all(np.isfinite(x)):
        return {"sw": None}
    row = {"sw": round(sliced(x, truth[0]), 4)}
    if isinstance(problem.prior, dj.Mixture):
        row["tv"] = round(float(np.abs(masses(problem, x) - truth[1]).sum() / 2), 4)
    elif problem.noise_std:
        gap, cov = x.mean(0) - posterior.mean, np.cov(x.T)
        ratio = np.linalg.solve(posterior.cov, cov)
        quadratic = gap @ np.linalg.solve(posterior.cov, gap)
        row["kl"] = round(float((np.trace(ratio) - len(gap) - np.linalg.slogdet(ratio)[1] + quadratic) / 2), 4)
    return row


def masses(problem, x):
    """Share of the samples in each mode of the prior."""
    return np.asarray(problem.prior.responsibilities(x, dj.EDM()(np.array(1e-3)))).mean(0)


def methods(problem, posterior):
    """`{label: (solver, denoiser, grid, network calls)}`; DPS's are functions of the scale."""
    denoise, y, noise = problem.prior.denoise, problem.y[None], problem.noise_std
    operator, ancestral = dj.matrix_operator(problem.A), dj.ddim(1.0)
    cov = (
        problem.prior.cov
        if isinstance(problem.prior, dj.Gaussian)
        else np.cov(clean(problem.prior, jax.random.key(9), 20_000).T)
    )
    variance = float(np.trace(cov) / len(cov))
    pigdm = dj.pigdm(denoise, operator, y, noise, variance=variance)
    out = {
        "exact denoiser": (ancestral, posterior.denoise, LEVELS),
        "dps": (ancestral, lambda scale: dj.dps(denoise, operator.apply, y, scale), LEVELS),
        "dps_update": (lambda scale: dj.dps_update(ancestral, operator.apply, y, scale), denoise, LEVELS),
        "pigdm": (ancestral, pigdm, LEVELS),
        "ddnm": (ancestral, dj.ddnm(denoise, operator, y, noise), LEVELS),
        "ddrm": (dj.ddrm(operator, y, noise), denoise, LEVELS),
    }
    if problem.mask is not None:
        known = np.where(problem.mask, np.resize(problem.y, problem.mask.shape), 0.0)
        out["inpaint"] = (dj.inpaint(ancestral, known, problem.mask), denoise, LEVELS)
        longest = dj.repaint_levels(LEVELS, JUMP, max(RESAMPLINGS))
        for r in RESAMPLINGS[1:]:
            grid = dj.repaint_levels(LEVELS, JUMP, r)
            solver = dj.repaint(ancestral, known, problem.mask, jump_length=JUMP, resamplings=r)
            padded = dj.Level(*(np.pad(a, (0, len(longest.t) - len(grid.t)), mode="edge") for a in grid))
            out[f"repaint r={r}"] = (solver, denoise, (padded, len(grid.t) - 1))
    else:

        def reward(x0):
            return -jnp.sum((problem.y - x0 @ jnp.asarray(problem.A.T, x0.dtype)) ** 2, -1) / (2 * noise**2)

        def likelihood(x0, level):
            """log p(y | x) with x0's uncertainty, as in `pigdm`: a potential that is not too sure too early."""
            spread = variance * level.sigma**2 / (variance * level.alpha**2 + level.sigma**2)
            cov = spread * problem.A @ problem.A.T + noise**2 * np.eye(len(problem.A))
            gap = problem.y - x0 @ jnp.asarray(problem.A.T, x0.dtype)
            return -jnp.sum(gap * jnp.linalg.solve(cov, gap.T).T, -1) / 2 - jnp.linalg.slogdet(cov)[1] / 2

        for p in (16, 64, 256):
            out[f"smc P={p}"] = (dj.smc(ancestral, reward, p), denoise, LEVELS)
        for p in (16, 64):
            twisted = dj.smc(ancestral, reward, p, potential=likelihood, proposal=pigdm)
            out[f"smc P={p}, twisted"] = (twisted, denoise, LEVELS)
    return out


def run(problem):
    """The rows of one problem, its samples by method, and samples of the exact posterior."""
    posterior = problem.prior.condition(problem.A, problem.y, problem.noise_std)
    exact = clean(posterior, jax.random.key(7), 100_000)
    truth = projected(exact), masses(problem, exact) if isinstance(problem.prior, dj.Mixture) else None
    x = dj.prior(jax.random.key(0), (N, exact.shape[1]), LEVELS)
    rows = {"floor": measures(problem, posterior, truth, clean(posterior, jax.random.key(8), N))}
    samples, repaint = {}, None
    for name, (solver, denoise, grid) in methods(problem, posterior).items():
        if name.startswith("dps"):
            make = lambda scale, s=solver, d=denoise: (s(scale), d) if callable(s) else (s, d(scale))
            go = jax.jit(lambda x, scale, m=make: dj.sample(m(scale)[0], m(scale)[1], x, LEVELS, jax.random.key(1)))
            tried = {scale: np.asarray(go(x, jnp.float32(scale))) for scale in SCALES}
            scored = {scale: measures(problem, posterior, truth, out) for scale, out in tried.items()}
            best = min(SCALES, key=lambda scale: scored[scale]["sw"] if scored[scale]["sw"] is not None else np.inf)
            samples[name], rows[name] = tried[best], scored[best] | {"scale": best, "nfe": STEPS}
            rows[name]["sw_by_scale"] = {str(scale): row["sw"] for scale, row in scored.items()}
            continue
        steps = len(grid.t) - 1 if isinstance(grid, dj.Level) else grid[1]
        if name.startswith("repaint"):
            # One program for all of them: the grids are padded to one length.
            repaint = repaint or jax.jit(
                lambda x, levels, s=solver, d=denoise: dj.sample(s, d, x, levels, jax.random.key(1))
            )
            samples[name] = np.asarray(repaint(x, dj.Level(*(jnp.asarray(a, jnp.float32) for a in grid[0]))))
        else:
            go = jax.jit(lambda x, s=solver, d=denoise, g=grid: dj.sample(s, d, x, g, jax.random.key(1)))
            # Of particles always as many groups: a sample's law is that of its group.
            n = GROUPS * int(name.split("P=")[1].split(",")[0]) if name.startswith("smc") else N
            samples[name] = np.asarray(go(x if n == N else dj.prior(jax.random.key(0), (n, x.shape[1]), LEVELS)))
        rows[name] = measures(problem, posterior, truth, samples[name]) | {"nfe": solver.nfe(steps)}
    return rows, samples, posterior, exact


def draw(results, path):
    """Scatter of each method over the exact density (above), and the free coordinate given the other (below)."""
    figure = new_figure(1400, 520)
    _, samples, posterior, exact = results["ring_noisy"]
    above = {"exact": exact[:N]} | {
        k: samples[k] for k in ("dps", "pigdm", "ddnm", "ddrm", "smc P=16", "smc P=64, twisted")
    }
    axis = np.linspace(-1.7, 1.7, 161)
    plane = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    density = np.exp(np.asarray(posterior.logpdf(plane, dj.Level(np.array(0.0), np.array(1.0), np.array(0.0)))))
    for i, (name, points) in enumerate(above.items()):
        at = figure.add_subplot(2, 7, i + 1)
        levels = density.max() * np.array([0.02, 0.1, 0.3, 0.7])
        at.scatter(*points[:: len(points) // 1024].T, s=2, color=COLOURS[0], alpha=0.35, linewidths=0)
        at.contour(axis, axis, density.reshape(161, 161), levels=levels, colors=COLOURS[1], linewidths=0.7)
        at.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xticks=[], yticks=[], aspect="equal")
        at.set_title(name, fontsize=TEXT + 1, color=INK)
    _, samples, _, exact = results["ring_part"]
    bins = np.linspace(-1.6, 1.6, 81)
    for i, name in enumerate(["dps", "pigdm", "ddnm", "ddrm", "inpaint", "repaint r=2", "repaint r=10"]):
        at = figure.add_subplot(2, 7, 8 + i)
        at.hist(samples[name][:, 1], bins, density=True, color=COLOURS[0], alpha=0.45)
        at.hist(exact[:, 1], bins, density=True, histtype="step", color=COLOURS[1], linewidth=1.0)
        at.set(xticks=[-1, 0, 1], yticks=[], ylim=(0, 2.4))
        at.tick_params(labelsize=TEXT - 1, colors=FAINT)
        at.set_title(name, fontsize=TEXT + 1, color=INK)
    title = "Above: one noisy measurement of the ring, samples over the exact posterior density. "
    title += "Below: the first coordinate is known, histograms of the second over the exact one."
    figure.suptitle(title, fontsize=TITLE - 1, color=INK)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.87, bottom=0.06, wspace=0.06, hspace=0.18)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "inverse_problems.json")
    parser.add_argument("--image", type=Path, default=ROOT.parent / "docs" / "images" / "inverse.png")
    arguments = parser.parse_args()
    start, results = time.perf_counter(), {}
    for problem in problems():
        results[problem.name] = run(problem)
        print(problem.name, json.dumps(results[problem.name][0], indent=1), f"{time.perf_counter() - start:.0f} s")
    draw(results, arguments.image)
    report = {
        "command": "python benchmarks/inverse_problems.py",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "diffjax": dj.__version__},
        "problems": {name: result[0] for name, result in results.items()},
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
