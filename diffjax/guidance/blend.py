"""What the guidances share: one call for several predictions, extrapolation between them, and changes that keep `x`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.heads import X0
from diffjax.core.types import Array, Denoiser, Head, Level, Prediction, expand

Scale = float | Array | Callable[[Level], Array]


def like(denoise: Denoiser, *sources) -> Denoiser:
    """`denoise` with a `check` that runs the checks of all its sources: denoisers, heads, anything with `check`."""
    checks = [source.check for source in sources if hasattr(source, "check")]

    def check(levels):
        for each in checks:
            each(levels)

    denoise.check = check
    return denoise


def scale_at(name: str, scale: Scale, x: Array, level: Level) -> Array:
    """The scale at a level in x's dtype, broadcast against `x [B, ...]`.

    Raises:
      ValueError: if it, or what the function returned, is neither a number nor one number per sample.
    """
    w = scale(level) if callable(scale) else scale
    if jnp.shape(w) not in ((), x.shape[:1]):
        raise ValueError(
            f"{name}: expected a scale that is a number, an array of shape {x.shape[:1]} (one per sample) or a "
            f"function of the level that returns one of these; got shape {jnp.shape(w)}"
        )
    return expand(jnp.asarray(w, x.dtype), x)


def call(denoise: Denoiser, x: Array, level: Level, n: int) -> Prediction:
    """One call with the batch `n` times over, [n B, ...].

    Raises:
      ValueError: if the answer does not have that shape.
    """
    many = Level(*(jnp.concatenate([a] * n) if jnp.ndim(a) else a for a in level))
    out = denoise(jnp.concatenate([x] * n), many)
    expected = (n * x.shape[0], *x.shape[1:])
    if out.x0.shape != expected or out.eps.shape != expected:
        raise ValueError(
            f"guidance calls its denoiser with the batch {n} times over and expects predictions of shape {expected}; "
            f"got x0 {out.x0.shape} and eps {out.eps.shape}"
        )
    return out


def split(many: Prediction, n: int) -> list[Prediction]:
    """The `n` predictions of one call; `aux` is cut where its first axis is that of the batch."""
    total = many.x0.shape[0]
    size = total // n

    def part(i):
        cut = lambda a: a[i * size : (i + 1) * size]
        aux = jax.tree.map(lambda a: cut(a) if jnp.shape(a)[:1] == (total,) else a, many.aux)
        return Prediction(cut(many.x0), cut(many.eps), aux)

    return [part(i) for i in range(n)]


def extrapolate(base: Prediction, *away: tuple[Array, Prediction]) -> Prediction:
    """`base + sum of w (base - other)` over the pairs `(w, other)`, both halves; exactly `base` where all w are 0."""

    def half(name):
        start = getattr(base, name)
        out = start
        for w, other in away:
            out = out + w * (start - getattr(other, name))
        return out

    return base._replace(x0=half("x0"), eps=half("eps"))


def move(prediction: Prediction, delta: Array, level: Level, head: Head = X0) -> Prediction:
    """The prediction with `delta` added in the space of `head`; `alpha x0 + sigma eps` stays what it was.

    Heads are linear, so the change of both halves is what the head makes of `delta` at x = 0: nothing is cancelled, and
    a zero `delta` changes no bit. At sigma = 0 a change of x0 leaves eps alone.
    """
    level = Level(*(jnp.asarray(a, delta.dtype) for a in level))
    if head is X0:
        sigma = expand(level.sigma, delta)
        ratio = expand(level.alpha, delta) / jnp.where(sigma == 0, 1, sigma)
        change = Prediction(delta, -jnp.where(sigma == 0, 0, ratio) * delta)
    else:
        change = head.split(delta, jnp.zeros_like(delta), level)
    return prediction._replace(x0=prediction.x0 + change.x0, eps=prediction.eps + change.eps)


def dot(a: Array, b: Array) -> Array:
    """Inner product per sample, [B, 1, ..., 1], in float32 or better."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.sum(a.astype(wide) * b.astype(wide), axis=tuple(range(1, a.ndim)), keepdims=True)


def join(*denoisers: Denoiser) -> Denoiser:
    """The denoiser on [n B, ...] that gives each of the `n` denoisers its own share of the batch, in order.

    Makes the pair that `cfg` and its kin expect from two functions: `cfg(join(cond, uncond), 3.0)`. Where one network
    serves both, close over `concatenate([labels, null])` instead and it runs once.

    Raises:
      ValueError: without a denoiser, or when called with a batch that `n` does not divide.
    """
    n = len(denoisers)
    if not n:
        raise ValueError("join: expected at least one denoiser, got none")

    def denoise(x, level):
        if x.shape[0] % n:
            raise ValueError(f"join: a batch for {n} denoisers must divide by {n}, got {x.shape[0]}")
        size = x.shape[0] // n
        cut = lambda a, i: a[i * size : (i + 1) * size] if jnp.ndim(a) else a
        parts = [f(cut(x, i), Level(*(cut(a, i) for a in level))) for i, f in enumerate(denoisers)]
        return Prediction(*(jnp.concatenate([p[half] for p in parts]) for half in (0, 1)), parts[0].aux)

    return like(denoise, *denoisers)
