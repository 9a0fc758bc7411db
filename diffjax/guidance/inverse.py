"""Inverse problems: sampling from p(x0 | y) with a denoiser that was trained without y.

Three of these are denoisers again, for any solver: the exact posterior's denoiser is `x0 + sigma^2 / alpha grad log
p(y | x)`, and they differ in what stands for the last term. `ddrm` and `dps_update` change the sampler's step. How far
each is from the exact posterior is measured in docs/inverse.md.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Denoiser, Solver, Step, expand
from diffjax.guidance.blend import Scale, like, move, scale_at
from diffjax.guidance.classifier import _needs_signal
from diffjax.guidance.operators import LinearOperator, fits, measured


def _positive(name: str, **settings: float) -> None:
    for setting, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name}: expected {setting} > 0, got {value}")


def _noise(name: str, noise_std: float) -> None:
    if not noise_std >= 0:
        raise ValueError(f"{name}: noise_std, the standard deviation of y's noise, must be >= 0, got {noise_std}")


def _norm(residual: Array) -> Array:
    """Norm of each sample's residual [B]; its gradient is 0, not NaN, where nothing is left."""
    square = jnp.sum(residual.reshape(len(residual), -1) ** 2, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def dps(denoise: Denoiser, forward: Callable[[Array], Array], y: Array, scale: Scale = 1.0) -> Denoiser:
    """Diffusion posterior sampling with any differentiable measurement, as a denoiser.

    `x0 - scale grad_x |y - forward(x0)|^2 / |y - forward(x0)|`, the gradient through the denoiser: the correction of
    Chung et al. 2023 (arXiv:2209.14687, Algorithm 1, line 7, with `zeta_i = scale / |y - forward(x0)|`), which there is
    subtracted from each step's result x'. Here it moves x0 (and eps with it), as the score
    `-scale (alpha / sigma^2) grad |y - forward(x0)|^2 / |y - forward(x0)|` would, so that any solver can follow it.
    On the last step, to sigma = 0, the two are the same; on the others an ancestral step scales the correction by
    `alpha' (1 - (s' / s)^2)`, s = sigma / alpha. So this one converges as the grid is refined, while the sum of the
    paper's corrections grows with the number of steps. `dps_update` is the algorithm as printed.

    No choice of scale makes it exact: the normalisation forgets both the noise of y and the uncertainty of x0.

    Args:
      denoise: of the prior.
      forward: `x0 [B, ...] -> y [B, ...]`, sample by sample.
      y: the measurement, [B, ...], or [1, ...] for all samples.
      scale: a number, an array [B], or a function of the level. In units of x0^2 / y.

    Raises:
      ValueError: when called, if y does not have the shape of `forward(x0)`.
    """

    def guided(x, level):
        target = fits(forward, y, x, "dps")

        def miss(x):
            prediction = denoise(x, level)
            return jnp.sum(_norm(target - forward(prediction.x0))), prediction

        # grad |r|^2 / |r| = 2 grad |r|.
        slope, prediction = jax.grad(miss, has_aux=True)(x)
        return move(prediction, -2 * scale_at("dps", scale, x, level) * slope, level)

    return like(guided, denoise)


def dps_update(solver: Solver, forward: Callable[[Array], Array], y: Array, scale: float = 1.0) -> Solver:
    """Diffusion posterior sampling as printed: a correction of each step's result (Chung et al. 2023, Algorithm 1).

    `x' - scale grad_x |y - forward(x0)|^2 / |y - forward(x0)|`, with x0 the solver's prediction at the step's start and
    the gradient through the denoiser. The paper's solver is `ancestral_ddpm` (or `ddim(1.0)`) with 1000 steps; since
    the correction does not shrink with the step, a scale is only meant for one number of steps.

    Args:
      solver: whose prediction is the denoiser's at the step's start; first-order ones are.
      forward: `x0 [B, ...] -> y [B, ...]`, sample by sample.
      y: the measurement, [B, ...], or [1, ...] for all samples.
      scale: the paper's zeta', 0.1 to 1 there. In units of x0^2 / y.

    Raises:
      ValueError: in sampling, if y does not have the shape of `forward(x0)`.
    """

    def step(denoise, x, memory, at: Step):
        target = fits(forward, y, x, "dps_update")

        def miss(x):
            moved = solver.step(denoise, x, memory, at)
            return jnp.sum(_norm(target - forward(moved[2].x0))), moved

        slope, (x, memory, prediction) = jax.grad(miss, has_aux=True)(x)
        return x - 2 * scale * slope, memory, prediction

    return solver._replace(step=step)


def pigdm(
    denoise: Denoiser, operator: LinearOperator, y: Array, noise_std: float = 0.0, *, variance: float = 1.0
) -> Denoiser:
    """Pseudo-inverse guidance (Song et al. 2023, "Pseudoinverse-guided diffusion models", openreview 9_gsMA8MRKQ).

    Takes `x0 | x` to be Gaussian around the prediction with variance `r^2 = variance sigma^2 / (variance alpha^2 +
    sigma^2)`, so that `p(y | x) = N(A x0, r^2 A A^T + noise_std^2)`, and adds its score, through the denoiser. Exact if
    the data are Gaussian with covariance `variance * I`; the paper's r is that of unit variance. No number to tune.

    Departs from the paper in its weight: the score is added whole, as Bayes' rule has it, where Algorithm 1 adds
    `sqrt(alpha_t) g` to the sample.

    Args:
      denoise: of the prior.
      operator: of the measurement.
      y: the measurement, [B, ...], or [1, ...] for all samples.
      noise_std: standard deviation of its noise.
      variance: of the data.

    Raises:
      ValueError: for a negative noise_std or a variance that is not positive; when called, for a y of another shape;
        from `check`, on a grid with alpha = 0.
    """
    _noise("pigdm", noise_std)
    _positive("pigdm", variance=variance)

    def guided(x, level):
        def predict(x):
            prediction = denoise(x, level)
            return prediction.x0, prediction

        x0, pull, prediction = jax.vjp(predict, x, has_aux=True)
        coordinates, singular = measured(operator, y, x, "pigdm")
        alpha, sigma = (expand(jnp.asarray(a, x.dtype), coordinates) for a in (level.alpha, level.sigma))
        # sigma^2 A^T (r^2 A A^T + noise^2)^-1 (y - A x0), in coordinates.
        shrunk = variance / (variance * alpha**2 + sigma**2) * singular**2 + (noise_std / sigma) ** 2
        gain = jnp.where(singular > 0, singular**2 / jnp.where(singular > 0, shrunk, 1.0), 0.0)
        pulled = pull(operator.synthesise(gain * (coordinates - operator.analyse(x0))))[0]
        return move(prediction, pulled / expand(jnp.asarray(level.alpha, x.dtype), x), level)

    return like(guided, denoise, _needs_signal("pigdm"))


def ddnm(denoise: Denoiser, operator: LinearOperator, y: Array, noise_std: float = 0.0) -> Denoiser:
    """Null-space projection: what y determines of x0 is taken from y (Wang et al. 2023, arXiv:2212.00490).

    DDNM (Eq. 13): `x0 + A^+ (y - A x0)`, without a gradient and without the singular values. DDNM+ where y has noise
    (Eq. 17 to 19): the same, each measured coordinate by a factor of at most 1, so that the noise that it takes over
    from y, `noise_std / singular`, is not more than x / alpha has at this level, `s = sigma / alpha`.

    A denoiser does not know the step that follows. So the factor is `min(1, s singular / noise_std)` at the level of
    the prediction, where the paper compares with the noise that its DDPM step draws, and the noise that the step draws
    is not reduced by what y brought (Eq. 19); `ddrm` does account for it.

    Args:
      denoise: of the prior.
      operator: of the measurement.
      y: the measurement, [B, ...], or [1, ...] for all samples.
      noise_std: standard deviation of its noise.

    Raises:
      ValueError: for a negative noise_std; when called, for a y of another shape.
    """
    _noise("ddnm", noise_std)

    def guided(x, level):
        prediction = denoise(x, level)
        if noise_std == 0:
            target = fits(operator.apply, y, x, "ddnm")
            return move(prediction, operator.pinv(target - operator.apply(prediction.x0)), level)
        coordinates, singular = measured(operator, y, x, "ddnm")
        alpha, sigma = (expand(jnp.asarray(a, x.dtype), coordinates) for a in (level.alpha, level.sigma))
        own, brought = sigma * singular, alpha * noise_std
        trust = jnp.where(own < brought, own / jnp.where(brought > 0, brought, 1.0), 1.0)
        change = jnp.where(singular > 0, trust * (coordinates - operator.analyse(prediction.x0)), 0.0)
        return move(prediction, operator.synthesise(change), level)

    return like(guided, denoise)


def ddrm(
    operator: LinearOperator, y: Array, noise_std: float = 0.0, *, eta: float = 0.85, eta_b: float = 1.0
) -> Solver:
    """Denoising diffusion restoration (Kawar et al. 2022, arXiv:2201.11793, Eq. 7 and 8), a stochastic solver, order 1.

    In the coordinates of the operator's decomposition, with `s' = sigma' / alpha'` of the next level and `u =
    noise_std / singular` the noise of a measured coordinate, the next x / alpha is

        not measured:  x0 + s' (sqrt(1 - eta^2) eps + eta noise)
        u > s':        x0 + s' (sqrt(1 - eta^2) (y - x0) / u + eta noise)
        u <= s':       (1 - eta_b) x0 + eta_b y + sqrt(s'^2 - eta_b^2 u^2) noise.

    One call a step. Defaults are the paper's. For other alpha than 1 it is the same in x / alpha; the paper's special
    first state (Eq. 6) is left to `x`: where `s` starts large against the data it does not matter.

    Args:
      operator: of the measurement.
      y: the measurement, [B, ...], or [1, ...] for all samples.
      noise_std: standard deviation of its noise.
      eta: share of the noise that is drawn anew, 0 to 1, where y says little.
      eta_b: how much of y is taken over where it is the better of the two, 0 to 1.

    Raises:
      ValueError: for a negative noise_std, or an eta outside [0, 1]; in sampling, for a y of another shape.
    """
    _noise("ddrm", noise_std)
    for name, value in (("eta", eta), ("eta_b", eta_b)):
        if not 0 <= value <= 1:
            raise ValueError(f"ddrm: expected {name} from 0 to 1, got {value}")

    def init(x, levels):
        measured(operator, y, x, "ddrm")
        return (), ()

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        target, singular = measured(operator, y, x, "ddrm")
        x0, eps, fresh = (operator.analyse(a) for a in (prediction.x0, prediction.eps, at.draw(0)))
        # Times alpha' throughout. These depend on step and coordinate: a table of them would be n images large.
        brought, own = at.next.alpha * noise_std, at.next.sigma * singular
        better = own >= brought
        keep = (1 - eta**2) ** 0.5
        towards = jnp.where(better, 0.0, singular / jnp.where(better, 1.0, noise_std)) * (target - x0)
        drawn = at.next.sigma * (keep * jnp.where(singular > 0, towards, eps) + eta * fresh)
        ratio = jnp.where(better & (own > 0), eta_b * brought / jnp.where(own > 0, own, 1.0), 0.0)
        mixed = at.next.alpha * eta_b * (target - x0) + at.next.sigma * jnp.sqrt(1 - ratio**2) * fresh
        moved = at.next.alpha * x0 + jnp.where((singular > 0) & better, mixed, drawn)
        return operator.synthesise(moved), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)
