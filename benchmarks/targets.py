"""Where the samplers start and where they should arrive: targets, processes, exact end points, errors. numpy and scipy.

A target is a mixture of Gaussians, so its denoiser is known in closed form and a sampler's error is the solver's alone.
Neither jax nor torch is imported: `nfe_vs_error.py` and `peers.py`, which run in two environments, share this file.

What does not depend on a solver is computed once and kept in `CACHE` (`runs/benchmarks` unless the environment variable
`DIFFJAX_BENCHMARK_CACHE` names another folder): the mixture of `digits64`, a fit of scikit-learn, and the end points.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

CACHE = Path(os.environ.get("DIFFJAX_BENCHMARK_CACHE", Path(__file__).parent.parent / "runs" / "benchmarks"))
STARTS = 256


@dataclass(frozen=True, eq=False)
class Target:
    """A mixture of Gaussians of full rank.

    Attributes:
      name: a key of `TARGETS`.
      weights: [K], sum to one.
      means: [K, D].
      covs: [K, D, D].
    """

    name: str
    weights: np.ndarray
    means: np.ndarray
    covs: np.ndarray

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @cached_property
    def eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Variances [K, D] and bases [K, D, D] (columns) of the components."""
        return np.linalg.eigh(self.covs)

    @cached_property
    def mean(self) -> np.ndarray:
        """Of the data, [D]."""
        return self.weights @ self.means

    @cached_property
    def cov(self) -> np.ndarray:
        """Of the data, [D, D]."""
        offset = self.means - self.mean
        return np.einsum("k,kde->de", self.weights, self.covs) + (offset.T * self.weights) @ offset

    @property
    def sigma_data(self) -> float:
        """Root of the mean variance of the data's coordinates."""
        return float(np.sqrt(np.trace(self.cov) / self.dim))

    @cached_property
    def digest(self) -> str:
        """Of the parameters to 6 digits: says whether numbers kept in a file are for this mixture."""
        parts = [np.round(part, 6) + 0.0 for part in (self.weights, self.means, self.covs)]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:12]

    def _whiten(self, x, alpha, sigma):
        """Per component: `x - alpha mean` on the eigenvectors [B, K, D], variances [K, D], responsibilities [B, K]."""
        variances, bases = self.eigen
        k, d = self.means.shape
        flat = bases.transpose(1, 0, 2).reshape(d, k * d)
        z = (x @ flat).reshape(-1, k, d) - alpha * np.einsum("kd,kde->ke", self.means, bases)
        variance = alpha**2 * variances + sigma**2
        log = np.log(self.weights) - 0.5 * (np.sum(z**2 / variance, -1) + np.sum(np.log(variance), -1))
        weight = np.exp(log - log.max(-1, keepdims=True))
        return z, variance, weight / weight.sum(-1, keepdims=True)

    def halves(self, x, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """`E[x0 | x]` and `E[eps | x]` [B, D] of `x = alpha x0 + sigma eps`: finite at alpha = 0 and at sigma = 0."""
        variances, bases = self.eigen
        z, variance, weight = self._whiten(x, alpha, sigma)
        scaled = weight[..., None] * z / variance
        back = bases.transpose(0, 2, 1).reshape(-1, self.dim)
        x0 = weight @ self.means + (alpha * variances * scaled).reshape(len(x), -1) @ back
        return x0, sigma * scaled.reshape(len(x), -1) @ back

    def denoise(self, y, s: float) -> np.ndarray:
        """`E[x0 | y]` [B, D] of `y = x0 + s eps`."""
        return self.halves(y, 1.0, s)[0]

    def responsibilities(self, y, s: float = 0.0) -> np.ndarray:
        """`p(component | y)` [B, K] of `y = x0 + s eps`."""
        return self._whiten(y, 1.0, s)[2]

    def sample(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Clean data [n, D] and the component of each [n]."""
        variances, bases = self.eigen
        component = rng.choice(len(self.weights), size=n, p=self.weights)
        z = rng.standard_normal((n, self.dim)) * np.sqrt(variances)[component]
        return self.means[component] + np.einsum("bde,be->bd", bases[component], z), component


def gauss16() -> Target:
    """One Gaussian with standard deviations from 0.02 to 1: everything is linear and known in closed form."""
    cov = np.diag(np.geomspace(0.02, 1, 16) ** 2)
    return Target("gauss16", np.ones(1), np.linspace(-0.5, 0.5, 16)[None], cov[None])


def ring8() -> Target:
    """Eight small modes of unequal weight on the unit circle."""
    angle = 2 * np.pi * np.arange(8) / 8
    weights = np.array([3, 1, 2, 1, 3, 1, 2, 1]) / 14
    return Target(
        "ring8", weights, np.stack([np.cos(angle), np.sin(angle)], 1), np.tile(0.05**2 * np.eye(2), (8, 1, 1))
    )


def digits64() -> Target:
    """Twenty full covariances fitted to scikit-learn's digits; kept in `CACHE`, scikit-learn is needed once."""
    path = CACHE / "digits64.npz"
    if not path.exists():
        from sklearn.datasets import load_digits
        from sklearn.mixture import GaussianMixture

        fit = GaussianMixture(20, covariance_type="full", reg_covar=0.04**2, random_state=0, max_iter=200)
        fit.fit(load_digits().data / 8 - 1)
        _save(path, weights=fit.weights_, means=fit.means_, covs=fit.covariances_)
    with np.load(path) as kept:
        return Target("digits64", kept["weights"], kept["means"], kept["covs"])


def scales16() -> Target:
    """Six overlapping components of two scales, each correlated along three directions of its own.

    Half of them have standard deviations of 0.8 along these and 0.1 across, the others 0.08 and 0.01: the noise levels
    that decide about the fine ones lie a decade below those of the wide ones. Condition number 64 in each.
    """
    rng = np.random.default_rng(16)
    means = rng.normal(size=(6, 16)) * np.array([0.2, 0.2, 0.2, 0.6, 0.6, 0.6])[:, None]
    covs = []
    for along, across in [(0.8, 0.1)] * 3 + [(0.08, 0.01)] * 3:
        frame = np.linalg.qr(rng.normal(size=(16, 3)))[0]
        covs.append((along**2 - across**2) * frame @ frame.T + across**2 * np.eye(16))
    return Target("scales16", np.array([5, 3, 2, 4, 3, 3]) / 20, means, np.stack(covs))


def spiral32() -> Target:
    """A thickened spiral in a random 3-D subspace of 32 dimensions: 24 components along it, nearly singular.

    Standard deviations are 0.2 along the curve, 0.05 across it within the subspace and 0.005 in the other 29
    directions: condition number 1600, intrinsic dimension 1, and neighbours overlap, so that modes are not separate.
    """
    rng = np.random.default_rng(32)
    frame = np.linalg.qr(rng.normal(size=(32, 3)))[0]
    angle = np.linspace(0.0, 4 * np.pi, 24)
    radius = 0.5 + 2.0 * angle / angle[-1]
    curve = np.stack([radius * np.cos(angle), radius * np.sin(angle), 2.0 * angle / angle[-1] - 1.0], 1)
    tangent = np.gradient(curve, angle, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    inner = 0.05**2 * np.eye(3) + (0.2**2 - 0.05**2) * tangent[:, :, None] * tangent[:, None, :]
    covs = 0.005**2 * (np.eye(32) - frame @ frame.T) + frame @ inner @ frame.T
    return Target("spiral32", np.full(24, 1 / 24), curve @ frame.T, covs)


def clusters48() -> Target:
    """Ten components of unequal weight in 48 dimensions, each with random axes and variances that fall as a power law.

    The held-out target: it was written down after every choice in `recommend` and measured afterwards.
    """
    rng = np.random.default_rng(48)
    weights = rng.dirichlet(np.full(10, 2.0))
    means = rng.normal(size=(10, 48)) * np.arange(1, 49) ** -0.5
    covs = []
    for scale in rng.uniform(0.2, 0.6, 10):
        axes = np.linalg.qr(rng.normal(size=(48, 48)))[0]
        covs.append((axes * (scale**2 * np.arange(1, 49) ** -1.5)) @ axes.T)
    covs = np.stack(covs)
    return Target("clusters48", weights, means, (covs + covs.transpose(0, 2, 1)) / 2)


HELD_OUT = ("clusters48",)
TARGETS: dict[str, Callable[[], Target]] = {
    make.__name__: make for make in (gauss16, ring8, digits64, scales16, spiral32, clusters48)
}


@dataclass(frozen=True, eq=False)
class Process:
    """Where sampling starts.

    Attributes:
      name: a key of `PROCESSES`.
      s_max: `sigma / alpha` of the first level; inf for pure noise. Every run ends at sigma = 0.
      alphas_cumprod: the table [T] of a discrete process, or None.
    """

    name: str
    s_max: float
    alphas_cumprod: np.ndarray | None = None

    @property
    def first(self) -> tuple[float, float]:
        """`(alpha, sigma)` of the first level in the process's own coordinates."""
        if self.name == "flow":
            return 0.0, 1.0
        alpha = 1.0 if self.name == "edm" else float(np.sqrt(self.alphas_cumprod[-1]))
        return alpha, alpha * self.s_max


def _table(name: str, betas: np.ndarray) -> Process:
    alphas_cumprod = np.cumprod(1 - betas)
    return Process(name, float(np.sqrt(1 / alphas_cumprod[-1] - 1)), alphas_cumprod)


def vp() -> Process:
    """DDPM's table: beta from 1e-4 to 0.02 in 1000 steps; s_max = 157."""
    return _table("vp", np.linspace(1e-4, 0.02, 1000))


def cosine() -> Process:
    """iDDPM's table (`squaredcos_cap_v2`), betas capped at 0.999; s_max = 20291."""
    bar = np.cos((np.linspace(0, 1, 1001) + 0.008) / 1.008 * np.pi / 2) ** 2
    return _table("cosine", np.minimum(1 - bar[1:] / bar[:-1], 0.999))


PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": vp,
    "cosine": cosine,
    "edm": lambda: Process("edm", 80.0),
    "flow": lambda: Process("flow", np.inf),
}


def unit_noise(target: Target, n: int = STARTS) -> np.ndarray:
    """Unit noise [n, D], the same for every process and method.

    A run starts at `sigma * noise`, with sigma of its first level: `N(0, sigma^2)` around zero, as pipelines do.
    """
    return np.random.default_rng(0).standard_normal((n, target.dim))


def solve(target: Target, noise, s_max: float, *, rtol: float = 1e-10) -> np.ndarray:
    """Where the probability flow carries `y = s_max noise` [n, D] at sigma = 0, by DOP853.

    In flow's coordinates, `alpha = 1 - r`, `sigma = r`, `dx / dr = eps - x0`, which is finite at both ends; the path
    of `x / alpha` over `sigma / alpha` is the same for every process.
    """
    from scipy.integrate import solve_ivp

    r = 1.0 if np.isinf(s_max) else s_max / (1 + s_max)

    def velocity(r, x):
        x0, eps = target.halves(x.reshape(noise.shape), 1 - r, r)
        return (eps - x0).ravel()

    out = solve_ivp(velocity, (r, 0.0), r * np.ravel(noise), "DOP853", (0.0,), rtol=rtol, atol=1e-2 * rtol)
    if not out.success:
        raise RuntimeError(f"{target.name} from s = {s_max}: {out.message}")
    return out.y[:, -1].reshape(noise.shape)


def ends(target: Target, process: Process) -> np.ndarray:
    """The exact end points [STARTS, D] of `unit_noise`, from `CACHE` or computed once (seconds to two minutes)."""
    path = CACHE / f"ends_{target.name}_{process.name}_{target.digest}.npz"
    if not path.exists():
        _save(path, ends=solve(target, unit_noise(target), process.s_max))
    with np.load(path) as kept:
        return kept["ends"]


def errors(target: Target, x, exact) -> dict[str, float]:
    """`rmse` and `median` over starts of the distance per coordinate over sigma_data; `flips`: share in other modes.

    A run that left the numbers counts as an infinite error.
    """
    x = np.asarray(x, np.float64)
    finite = np.isfinite(x).all(-1)
    x = np.where(finite[:, None], x, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.where(finite, np.mean((x - exact) ** 2, -1), np.inf) / target.sigma_data**2
        modes = [target.responsibilities(np.clip(points, -1e6, 1e6)).argmax(-1) for points in (x, exact)]
    return {
        "rmse": float(np.sqrt(np.mean(square))),
        "median": float(np.sqrt(np.median(square))),
        "flips": float(np.mean((modes[0] != modes[1]) | ~finite)),
    }


def law(target: Target, x) -> dict[str, float]:
    """What samples [n, D] say of a sampler's distribution on modes that hardly overlap.

    `spread` is the mean squared Mahalanobis distance to the nearest mode's mean over D: 1 for exact samples with a
    standard error of `sqrt(2 / (n D))`, less where the modes shrank. `weights` is Pearson's chi-square of the modes'
    counts over its K - 1 degrees of freedom: 1 for exact samples with a standard error of `sqrt(2 / (K - 1))`.
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        return {"spread": float("inf"), "weights": float("inf")}
    variances, bases = target.eigen
    mode = target.responsibilities(np.clip(x, -1e6, 1e6)).argmax(-1)
    z = np.einsum("bd,bde->be", x - target.means[mode], bases[mode])
    counts = np.bincount(mode, minlength=len(target.weights))
    expected = len(x) * target.weights
    return {
        "spread": float(np.mean(z**2 / variances[mode])),
        "weights": float(np.sum((counts - expected) ** 2 / expected) / (len(expected) - 1)),
    }


def dump(report, path: Path):
    """Writes JSON with one line a configuration."""

    def text(value, depth):
        if not isinstance(value, dict) or depth == 0:
            return json.dumps(value)
        inner = (f"{' ' * (5 - depth)}{json.dumps(str(key))}: {text(item, depth - 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(inner) + "\n" + " " * (4 - depth) + "}"

    path.parent.mkdir(exist_ok=True)
    path.write_text(text(report, 4) + "\n")


def write_between(path: Path, marker: str, lines: list[str]) -> None:
    """Replaces what stands between `<!-- marker -->` and `<!-- end of marker -->` in a page."""
    head, rest = path.read_text().split(f"<!-- {marker} -->\n")
    _, tail = rest.split(f"<!-- end of {marker} -->")
    path.write_text("\n".join([head + f"<!-- {marker} -->", *lines, f"<!-- end of {marker} -->"]) + tail)


def _save(path: Path, **arrays):
    """Writes an npz in one piece, so that another process never reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}_{path.name}")
    np.savez(partial, **arrays)
    partial.replace(path)


def main():
    """Fills the cache; prints each target's figures and how far the end points move at a looser tolerance."""
    for make in TARGETS.values():
        target = make()
        print(
            f"{target.name}: D={target.dim} K={len(target.weights)} sigma_data={target.sigma_data:.4f} {target.digest}"
        )
        for start in PROCESSES.values():
            process = start()
            exact = ends(target, process)
            loose = solve(target, unit_noise(target), process.s_max, rtol=1e-7)
            moved = np.sqrt(np.mean((exact - loose) ** 2, -1)).max() / target.sigma_data
            modes = len(np.unique(target.responsibilities(exact).argmax(-1)))
            print(f"  {process.name}: s_max={process.s_max:.5g}, {modes} modes; rtol 1e-7 moves an end by {moved:.1e}")


if __name__ == "__main__":
    main()
