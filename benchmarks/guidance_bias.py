"""What each guidance samples, against what it is meant to: a labelled mixture in 2-D, exact denoisers, float64.

    python benchmarks/guidance_bias.py            # writes results/guidance_bias.json and docs/images/guidance.png

The wanted label A has two of four components. Two targets are known on a grid: the conditional `p(x | A)` and, for a
method of scale w, the tilted density `p(x | A)^w r(x)^(1 - w)`, with r = p(x) or the weak model. Reported per method:

  sw2            sliced 2-Wasserstein distance to the conditional (RMS over 64 directions, exact quantiles of the grid)
  sw2_tilted     the same to the tilted density
  mean, cov      distance of the mean, Frobenius distance of the covariance, to the conditional's
  fidelity       mean of p(A | x) over the samples
  rows           network rows per sample

Projections, norms and standard deviations over two numbers would say nothing, so a sample is 16 independent planes side
by side, 32 elements; what is compared is the distribution in the plane.

Solver and grid are fine enough that their own error is below the distance that the same number of exact samples has,
which is the row `floor`; methods that depend on the number of steps say it.
"""

import argparse
import json
import math
import platform
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj

HERE = Path(__file__).parent
PLANES, SAMPLES, STEPS, SCALE, SIDE, REACH = 16, 8192, 96, 3.0, 480, 2.4


def component(angle, long, short):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ np.diag([long**2, short**2]) @ turn.T


MEANS = np.array([[-0.65, 0.45], [0.6, 0.5], [0.55, -0.15], [-0.45, -0.55]])
COVS = np.array([component(*c) for c in [(0.6, 0.25, 0.12), (-0.4, 0.3, 0.15), (0.3, 0.28, 0.2), (-0.7, 0.3, 0.18)]])
ALL = dj.Mixture(np.ones(4), MEANS, COVS)
WANTED = dj.Mixture(np.ones(2), MEANS[:2], COVS[:2])
OTHER = dj.Mixture(np.ones(2), MEANS[2:], COVS[2:])
WEAK = dj.Mixture(np.ones(2), MEANS[:2], 2.5 * COVS[:2])
CLEAN = dj.Level(np.array(0.0), np.array(1.0), np.array(0.0))


def log_prob(x, level):
    return jnp.log(jnp.sum(ALL.responsibilities(x, level)[:, :2], axis=-1))


def planes(target):
    """The denoiser of PLANES independent copies of the target, [B, 2 PLANES]."""

    def denoise(x, level):
        out = target.denoise(x.reshape(-1, 2), level)
        return dj.Prediction(out.x0.reshape(x.shape), out.eps.reshape(x.shape))

    return denoise


def log_probs(x, level):
    """`log p(A | x)` of all planes of a sample together, [B]."""
    return jnp.sum(log_prob(x.reshape(-1, 2), level).reshape(len(x), -1), axis=1)


def methods():
    """`{name: (solver, denoiser, reference of the tilt, rows a call; None where they vary)}`."""
    cond, uncond, other, weak = (planes(target) for target in (WANTED, ALL, OTHER, WEAK))
    w, pair, three = SCALE, dj.join(cond, uncond), dj.join(cond, other, uncond)
    guide = lambda pair: dj.cfg(pair, w)
    lift = lambda x0, level: -log_probs(x0, CLEAN)
    variance = lambda level: 0.3 * level.sigma**2 / (0.3 * level.alpha**2 + level.sigma**2)
    main = dj.dpmpp_2m()
    return {
        "unconditional": (main, uncond, None, 1),
        "conditional": (main, cond, None, 1),
        "cfg, scale 1": (main, dj.cfg(pair, 1.0), None, 2),
        "classifier, scale 1": (main, dj.classifier(uncond, log_probs, 1.0), None, 1),
        "energy of x0, scale 1": (main, dj.energy(uncond, lift), None, 1),
        "energy around x0": (main, dj.energy(uncond, lift, variance, through=False), None, 1),
        "cfg": (main, dj.cfg(pair, w), ALL, 2),
        "classifier": (main, dj.classifier(uncond, log_probs, w), ALL, 1),
        "cfg, rising cosine": (main, dj.cfg(pair, dj.rising(w)), ALL, 2),
        "interval 0.3 to 3": (main, dj.interval(dj.cfg(pair, w), cond, 0.3, 3.0), ALL, None),
        "rescale, phi 0.7": (main, dj.rescale(pair, guide, 0.7, head=dj.FLOW), ALL, 2),
        "cfg + clip_x0": (main, dj.clip_x0(guide(pair)), ALL, 2),
        "cfg + dynamic_threshold": (main, dj.dynamic_threshold(guide(pair)), ALL, 2),
        "apg, eta 0": (main, dj.apg(pair, w), ALL, 2),
        "apg, norm 1": (main, dj.apg(pair, w, norm=1.0), ALL, 2),
        "apg, momentum -0.5": (dj.momentum(main, lambda pair: dj.apg(pair, w)), pair, ALL, 2),
        "cfg_zero": (main, dj.cfg_zero(pair, w), ALL, 2),
        "cfg_zero + zero_init": (dj.zero_init(main, 4), dj.cfg_zero(pair, w), ALL, 2),
        "cfg_pp 0.6, 16 euler steps": (dj.euler(), dj.cfg_pp(pair, 0.6), ALL, 2),
        "cfg_pp 0.6, 96 euler steps": (dj.euler(), dj.cfg_pp(pair, 0.6), ALL, 2),
        "autoguidance": (main, dj.autoguidance(cond, weak, w), WEAK, 2),
        "perturbed, cfg 1, scale 2": (main, dj.perturbed(pair, weak, 1.0, w - 1), WEAK, 3),
        "negative, scale 2, away 0.5": (main, dj.negative(three, 2.0, 0.5), None, 3),
    }


def plane():
    """Centres of the cells [SIDE ** 2, 2]."""
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2 * REACH - REACH
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


def density(points, reference=None):
    """The conditional's mass in each cell or, with a reference, that of `p(x | A)^SCALE reference^(1 - SCALE)`."""
    log = lambda target: np.asarray(jax.jit(target.logpdf)(points, CLEAN))
    value = log(WANTED) if reference is None else SCALE * log(WANTED) + (1 - SCALE) * log(reference)
    mass = np.exp(value - value.max())
    return mass / mass.sum()


def sliced_w2(samples, points, mass, directions=64):
    angles = np.pi * (np.arange(directions) + 0.5) / directions
    u = (np.arange(len(samples)) + 0.5) / len(samples)
    total = 0.0
    for direction in np.stack([np.cos(angles), np.sin(angles)], axis=1):
        position = points @ direction
        weight, edges = np.histogram(position, bins=4000, weights=mass)
        quantile = np.interp(u, np.concatenate([[0], np.cumsum(weight)]), edges)
        total += np.mean((np.sort(samples @ direction) - quantile) ** 2)
    return math.sqrt(total / directions)


def describe(samples, points, masses):
    mean, cov = (lambda m: (m, (points - m).T @ ((points - m) * masses[None][:, None])))(masses[None] @ points)
    return {
        "sw2": sliced_w2(samples, points, masses[None]),
        "mean": float(np.linalg.norm(samples.mean(0) - mean)),
        "cov": float(np.linalg.norm(np.cov(samples.T) - cov)),
        "fidelity": float(jnp.mean(jnp.exp(log_prob(jnp.asarray(samples), CLEAN)))),
    }


def draw(points, mass, rng):
    cell = 2 * REACH / SIDE
    picked = points[rng.choice(len(points), SAMPLES, p=mass)]
    return picked + rng.uniform(-cell / 2, cell / 2, picked.shape)


def run():
    rng = np.random.default_rng(0)
    points = plane()
    masses = {reference: density(points, reference) for reference in (None, ALL, WEAK)}
    exact = {None: draw(points, masses[None], rng), ALL: draw(points, masses[ALL], rng)}
    rows = {
        "floor": describe(exact[None], points, masses)
        | {"sw2_tilted": sliced_w2(exact[ALL], points, masses[ALL]), "rows": 0},
        "exact tilted density": describe(exact[ALL], points, masses) | {"rows": 0},
    }
    pictures = {"conditional p(x | A)": exact[None], "tilted p(x | A)^3 / p(x)^2": exact[ALL]}
    noise = jnp.asarray(rng.normal(size=(SAMPLES // PLANES, 2 * PLANES)))
    for name, (solver, denoise, reference, per_step) in methods().items():
        steps = 16 if "16 euler" in name else STEPS
        grid = dj.karras(dj.Flow(), steps, s_min=0.002, s_max=80.0)
        samples = np.asarray(jax.jit(partial(dj.sample, solver, denoise))(noise * grid.sigma[0], grid)).reshape(-1, 2)
        rows[name] = describe(samples, points, masses)
        if reference is not None:
            rows[name]["sw2_tilted"] = sliced_w2(samples, points, masses[reference])
        if per_step is None:
            inside = sum(len(part.t) - 1 for inside, part in dj.split_interval(grid, 0.3, 3.0) if inside)
            rows[name]["rows"] = steps + inside
        else:
            rows[name]["rows"] = per_step * solver.nfe(steps)
        pictures[name] = samples
    return rows, pictures


def picture(pictures, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(pictures)
    columns = 5
    figure, axes = plt.subplots(math.ceil(len(names) / columns), columns, figsize=(11, 11.5))
    points = plane()
    everything = np.exp(np.asarray(jax.jit(ALL.logpdf)(points, CLEAN))).reshape(SIDE, SIDE)
    axis = points.reshape(SIDE, SIDE, 2)[:, 0, 0]
    for ax in axes.flat:
        ax.axis("off")
    for ax, name in zip(axes.flat, names, strict=False):
        count, _, _ = np.histogram2d(*pictures[name].T, bins=56, range=[[-1.6, 1.6]] * 2)
        ax.imshow(np.sqrt(count.T), origin="lower", extent=[-1.6, 1.6, -1.6, 1.6], cmap="Blues")
        ax.contour(axis, axis, everything.T, levels=4, colors="0.6", linewidths=0.5)
        ax.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
        ax.set_title(name, fontsize=8)
    figure.tight_layout(pad=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "guidance_bias.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "images" / "guidance.png")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows, pictures = run()
    settings = {"samples": SAMPLES, "steps": STEPS, "scale": SCALE, "grid": "karras(Flow(), s 80 to 0.002)"}
    rounded = {name: {k: v if k == "rows" else round(v, 4) for k, v in row.items()} for name, row in rows.items()}
    versions = {"python": platform.python_version(), "jax": jax.__version__, "diffjax": dj.__version__}
    result = {"command": "python benchmarks/guidance_bias.py", "versions": versions, "settings": settings}
    args.out.write_text(json.dumps(result | {"methods": rounded}, indent=1) + "\n")
    picture(pictures, args.picture)
    for name, row in rounded.items():
        print(f"{name:30s}", "  ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
