"""Guidance by gradients: a classifier of noisy data, or any differentiable energy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Denoiser, Level, Prediction, expand
from diffjax.guidance.blend import Scale, like, move, scale_at


def _needs_signal(name: str) -> SimpleNamespace:
    """The check that a score is only turned into a change of x0 where alpha > 0."""

    def check(levels):
        if np.any(np.asarray(levels.alpha) == 0):
            raise ValueError(
                f"{name}: a gradient in x says nothing about x0 at alpha = 0, where x holds no signal; the grid has "
                f"alpha = 0 at index {int(np.argmax(np.asarray(levels.alpha) == 0))}. Start the grid at a finite "
                "log-SNR (karras, logsnr), or guide inside an interval that begins below it."
            )

    return SimpleNamespace(check=check)


def _slope(name: str, f: Callable[[Array, Level], Array], x: Array, level: Level) -> Array:
    """The gradient of `f(x, level) -> [B]`, sample by sample."""

    def total(x):
        values = f(x, level)
        if jnp.shape(values) != x.shape[:1]:
            raise ValueError(f"{name}: expected one value per sample, {x.shape[:1]}, got shape {jnp.shape(values)}")
        return jnp.sum(values)

    return jax.grad(total)(x)


def _tilt(prediction: Prediction, score: Array, level: Level) -> Prediction:
    """The prediction with `score` added to its score: `eps - sigma score`, `x0 + sigma^2 / alpha score`."""
    alpha, sigma = (expand(jnp.asarray(a, score.dtype), score) for a in (level.alpha, level.sigma))
    return prediction._replace(x0=prediction.x0 + sigma**2 / alpha * score, eps=prediction.eps - sigma * score)


def classifier(denoise: Denoiser, log_prob: Callable[[Array, Level], Array], scale: Scale = 1.0) -> Denoiser:
    """Classifier guidance: `eps - scale sigma grad log p(y | x)` (Dhariwal and Nichol 2021, arXiv:2105.05233, Alg. 2).

    With the exact classifier of noisy data, scale 1 is the exact conditional denoiser (Bayes' rule; Song et al. 2021,
    arXiv:2011.13456, Eq. 14). Algorithm 1 shifts the mean of an ancestral step instead; here any solver will do.

    Args:
      denoise: unconditional for exactness.
      log_prob: `(x [B, ...], level) -> [B]`, log-probability of the wanted label at that noise.
      scale: a number, an array [B], or a function of the level.

    Raises:
      ValueError: for values of another shape; from `check`, on a grid with alpha = 0.
    """

    def guided(x, level):
        score = _slope("classifier", log_prob, x, level)
        return _tilt(denoise(x, level), scale_at("classifier", scale, x, level) * score, level)

    return like(guided, denoise, _needs_signal("classifier"))


def energy(
    denoise: Denoiser,
    energy_fn: Callable[[Array, Level], Array],
    scale: Scale = 1.0,
    *,
    on: str = "x0",
    through: bool = True,
) -> Denoiser:
    """Guidance down any differentiable energy (Yu et al. 2023, arXiv:2303.09833; Bansal et al. 2023, arXiv:2302.07121).

    `on="x"`: adds `-scale grad_x energy(x)` to the score, as `classifier` with `energy = -log p(y | x)`.
    `on="x0"`: the same with `energy(x0_hat(x))`, differentiated through the denoiser. Since the denoiser's Jacobian is
    `alpha Cov[x0 | x] / sigma^2`, x0 moves by `-scale Cov[x0 | x] grad energy(x0)`: exact for energies linear in x0 on
    Gaussian data, else the energy of the mean in place of the mean over the posterior.
    `on="x0", through=False`: around the denoiser, x0 moves by `-scale grad energy(x0)` (He et al. 2023,
    arXiv:2311.16424): no second pass through the network, and `scale`, a function of the level, stands for the
    covariance. Defined at alpha = 0 as well.

    Args:
      denoise: any denoiser, guided or not.
      energy_fn: `(x or x0 [B, ...], level) -> [B]`, low where samples should go.
      scale: a number, an array [B], or a function of the level.
      on: "x0" or "x".
      through: whether the gradient passes through the denoiser; for "x0" only.

    Raises:
      ValueError: for another `on`, `through=False` with "x", or values of another shape; from `check`, on a grid with
        alpha = 0 unless `through=False`.
    """
    if on not in ("x", "x0"):
        raise ValueError(f'energy: on must be "x" (the noisy sample) or "x0" (the prediction), got {on!r}')
    if on == "x" and not through:
        raise ValueError('energy: an energy of x has no denoiser to go around; drop through=False or take on="x0"')

    def of_x(x, level):
        return denoise(x, level), _slope("energy", energy_fn, x, level)

    def through_x0(x, level):
        def predict(x):
            prediction = denoise(x, level)
            return prediction.x0, prediction

        x0, pull, prediction = jax.vjp(predict, x, has_aux=True)
        return prediction, pull(_slope("energy", energy_fn, x0, level))[0]

    def guided(x, level):
        w = scale_at("energy", scale, x, level)
        if not through:
            prediction = denoise(x, level)
            return move(prediction, -w * _slope("energy", energy_fn, prediction.x0, level), level)
        prediction, slope = (of_x if on == "x" else through_x0)(x, level)
        return _tilt(prediction, -w * slope, level)

    return like(guided, denoise, *([_needs_signal("energy")] if through else []))
