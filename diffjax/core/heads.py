"""Heads: what the raw output of a network means.

Every target here is linear in the two halves of `x`, so a head is a pair of coefficients read in both directions: from
`(x0, eps)` to the target in training, and from `(out, x)` back to `(x0, eps)` in sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Denoiser, Head, Level, Prediction, expand, namespace


def _unit(level: Level) -> Array:
    return namespace(level.alpha).ones_like(level.alpha)


def _anywhere(levels: Level) -> None:
    """Nothing to check: defined wherever a network is called (`sigma > 0`)."""


def _needs_signal(name: str) -> Callable[[Level], None]:
    def check(levels: Level) -> None:
        if np.any(np.asarray(levels.alpha) == 0):
            raise ValueError(
                f"the {name} head is undefined at alpha = 0, where x holds no signal to read x0 from; the grid has "
                f"alpha = 0 at index {int(np.argmax(np.asarray(levels.alpha) == 0))}. Start the grid at a finite "
                "log-SNR (karras, logsnr), or train with the v, flow, x0 or edm head."
            )

    return check


def _bcast(level: Level, x: Array) -> tuple[Array, Array]:
    return expand(level.alpha, x), expand(level.sigma, x)


def _eps_split(out, x, level):
    alpha, sigma = _bcast(level, x)
    return Prediction((x - sigma * out) / alpha, out)


def _x0_split(out, x, level):
    alpha, sigma = _bcast(level, x)
    return Prediction(out, (x - alpha * out) / sigma)


def _v_split(out, x, level):
    alpha, sigma = _bcast(level, x)
    norm = alpha**2 + sigma**2  # 1 for variance-preserving schedules; the general form serves the others
    return Prediction((alpha * x - sigma * out) / norm, (sigma * x + alpha * out) / norm)


def _score_split(out, x, level):
    alpha, sigma = _bcast(level, x)
    return Prediction((x + sigma**2 * out) / alpha, -sigma * out)


def _flow_split(out, x, level):
    alpha, sigma = _bcast(level, x)
    norm = alpha + sigma
    return Prediction((x - sigma * out) / norm, (x + alpha * out) / norm)


def _v_target(x0, eps, level):
    alpha, sigma = _bcast(level, x0)
    return alpha * eps - sigma * x0


EPS = Head(lambda x0, eps, level: eps, _eps_split, _unit, _needs_signal("eps"))
"""The noise (Ho et al. 2020, arXiv:2006.11239, Eq. 14)."""

X0 = Head(lambda x0, eps, level: x0, _x0_split, _unit, _anywhere)
"""The clean data."""

V = Head(_v_target, _v_split, _unit, _anywhere)
"""`v = alpha eps - sigma x0` (Salimans and Ho 2022, arXiv:2202.00512, section 4 and appendix D)."""

SCORE = Head(lambda x0, eps, level: -eps / expand(level.sigma, x0), _score_split, _unit, _needs_signal("score"))
"""The score of `p(x | x0)`, `-eps / sigma` (Song et al. 2021, arXiv:2011.13456, Eq. 7)."""

FLOW = Head(lambda x0, eps, level: eps - x0, _flow_split, _unit, _anywhere)
"""The velocity from data to noise, `eps - x0` (Lipman et al. 2023, arXiv:2210.02747, Eq. 23 with time reversed)."""


def edm(sigma_data: float = 0.5) -> Head:
    """EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, Eq. 7 and Table 1) for any `alpha` and `sigma`.

    With `d = sigma_data` and `q = sqrt(alpha^2 d^2 + sigma^2)` (the std of x) the network sees `x / q` and is trained
    on `F = (sigma x0 / d - alpha d eps) / q`, which has unit variance: the paper's `(x0 - c_skip y) / c_out` with
    `y = x / alpha`, multiplied out. In this form it is finite at alpha = 0 and at sigma = 0. The paper's loss weight
    is 1 in this head's own space.

    Args:
      sigma_data: standard deviation of the clean data.

    Raises:
      ValueError: if `sigma_data` is not positive.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data: expected a positive number, got {sigma_data}")
    d = sigma_data

    def scale(level):
        return namespace(level.alpha).sqrt((level.alpha * d) ** 2 + level.sigma**2)

    def target(x0, eps, level):
        alpha, sigma = _bcast(level, x0)
        return (sigma * x0 / d - alpha * d * eps) / expand(scale(level), x0)

    def split(out, x, level):
        alpha, sigma = _bcast(level, x)
        q = expand(scale(level), x)
        x0 = alpha * (d / q) ** 2 * x + sigma * (d / q) * out
        eps = sigma / q**2 * x - alpha * (d / q) * out
        return Prediction(x0, eps)

    return Head(target, split, lambda level: 1 / scale(level), _anywhere)


def denoiser(f: Callable[[Array, Array], Array], head: Head, *, dtype=None) -> Denoiser:
    """The `Denoiser` of a network: scales its input, gives it its time, reads its output as `head` says.

    Args:
      f: `(x [B, ...], t [B] float32) -> out [B, ...]`, parameters and conditions closed over; or `-> (out, aux)`.
      head: what `out` means.
      dtype: dtype of the network's input; default that of `x`. Everything outside `f` stays in x's dtype.
    """
    if not isinstance(head, Head):
        raise TypeError(f"head: expected a Head such as EPS, V, FLOW or edm(0.5), got {head!r}")

    def denoise(x, level):
        x_in = (x * expand(head.scale_in(level), x)).astype(dtype or x.dtype)
        out = f(x_in, jnp.broadcast_to(jnp.asarray(level.t, jnp.float32), x.shape[:1]))
        out, aux = out if isinstance(out, tuple) else (out, ())
        if out.shape != x.shape:
            raise ValueError(f"the network returned shape {out.shape} for x of shape {x.shape}; they must be equal")
        return head.split(out.astype(x.dtype), x, level)._replace(aux=aux)

    denoise.check = head.check
    return denoise


def from_karras(denoise_fn: Callable[[Array, Array], Array]) -> Denoiser:
    """The `Denoiser` of a function in Karras' coordinates, `D(y [B, ...], sigma [B]) -> x0`, as in k-diffusion.

    `y = x / alpha` and `sigma` is `Level.s`, so it is undefined at alpha = 0.
    """

    def denoise(x, level):
        alpha, sigma = _bcast(level, x)
        s = jnp.broadcast_to(jnp.asarray(level.s, x.dtype), x.shape[:1])
        x0 = denoise_fn(x / alpha, s).astype(x.dtype)
        return Prediction(x0, (x - alpha * x0) / sigma)

    denoise.check = _needs_signal("from_karras")
    return denoise


HEADS = {
    "eps": lambda: EPS,
    "x0": lambda: X0,
    "v": lambda: V,
    "score": lambda: SCORE,
    "flow": lambda: FLOW,
    "edm": edm,
}
