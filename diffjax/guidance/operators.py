"""Linear measurements `y = A x0 + noise_std eps` by their singular value decomposition."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array


class LinearOperator(NamedTuple):
    """A linear map A of each sample and what inverse problems need of it; `A = U S V^T`.

    U is never needed: `V^T pinv(y)` are the measured coordinates of `y`, with noise `noise_std / singular` each.

    Attributes:
      apply: `x [B, ...] -> y [B, ...]`, A.
      adjoint: `y -> x`, A^T.
      pinv: `y -> x`, the pseudo-inverse A^+.
      analyse: `x -> c [B, ...]`, V^T: an orthogonal change of basis, so unit noise stays unit noise.
      synthesise: `c -> x`, V, its inverse.
      singular: the singular value of each coordinate of c, broadcast against one sample of it; 0 for what is not
        measured.
    """

    apply: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]
    pinv: Callable[[Array], Array]
    analyse: Callable[[Array], Array]
    synthesise: Callable[[Array], Array]
    singular: Array


def mask_operator(mask: Array) -> LinearOperator:
    """Inpainting: `y = mask * x0`, of the shape of x0, zero where nothing was seen.

    Args:
      mask: boolean, True where x0 is known; the shape of one sample, or one that broadcasts against it.

    Raises:
      ValueError: for a mask that is not boolean.
    """
    mask = known(mask, "mask_operator")
    keep = lambda x: jnp.where(mask, x, 0)
    same = lambda x: x
    return LinearOperator(keep, keep, keep, same, same, mask.astype(np.float32))


def matrix_operator(A: Array, shape: tuple[int, ...] | None = None) -> LinearOperator:
    """A dense matrix: `y [B, M] = A x0`, its decomposition computed here, once, in float64.

    Args:
      A: [M, D], concrete; a few thousand columns at most.
      shape: of one sample, with D numbers; default (D,).

    Raises:
      ValueError: if A is not a matrix of numbers, is zero, or does not fit the shape.
    """
    A = np.asarray(A, np.float64)
    shape = A.shape[-1:] if shape is None else tuple(shape)
    if A.ndim != 2 or not np.all(np.isfinite(A)) or not np.any(A):
        raise ValueError(f"matrix_operator: expected a finite matrix [M, D] that is not zero, got shape {A.shape}")
    if int(np.prod(shape)) != A.shape[1]:
        raise ValueError(
            f"matrix_operator: a sample of shape {shape} does not have the {A.shape[1]} numbers of A's rows"
        )
    u, s, vt = np.linalg.svd(A)
    s = np.where(s > max(A.shape) * np.finfo(float).eps * s[0], s, 0.0)
    singular = np.zeros(A.shape[1])
    singular[: len(s)] = s
    rank = np.count_nonzero(s)
    inverse = (vt[:rank].T / s[:rank]) @ u[:, :rank].T

    def by(matrix, out_shape):
        return lambda x: (x.reshape(len(x), -1) @ jnp.asarray(matrix.T, x.dtype)).reshape(len(x), *out_shape)

    flat = A.shape[1:]
    return LinearOperator(
        by(A, A.shape[:1]), by(A.T, shape), by(inverse, shape), by(vt, flat), by(vt.T, shape), singular
    )


def average_pool(factor: int) -> LinearOperator:
    """Super-resolution: `y [B, H / f, W / f, C]` is the mean over blocks of `f x f` pixels of `x0 [B, H, W, C]`.

    Its coordinates are [B, f * f, H / f, W / f, C]: the block's sum over f, and an orthonormal complement of it by a
    Householder reflection.

    Raises:
      ValueError: for a factor that is no whole number >= 2; when applied, for other shapes.
    """
    if not isinstance(factor, (int, np.integer)) or factor < 2:
        raise ValueError(f"average_pool: expected a whole factor >= 2, got {factor!r}")
    n = factor * factor
    # I - 2 w w^T maps the first axis to the constant vector 1 / f: symmetric, orthogonal.
    w = np.full(n, -1.0 / factor)
    w[0] += 1
    reflect = np.eye(n) - 2 * np.outer(w, w) / (w @ w)

    def blocks(x):
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"average_pool({factor}): expected x [B, H, W, C], H and W multiples of it; got {x.shape}")
        b, h, wide, c = x.shape
        split = x.reshape(b, h // factor, factor, wide // factor, factor, c)
        return split.transpose(0, 2, 4, 1, 3, 5).reshape(b, n, h // factor, wide // factor, c)

    def pixels(z):
        b, _, h, wide, c = z.shape
        split = z.reshape(b, factor, factor, h, wide, c).transpose(0, 3, 1, 4, 2, 5)
        return split.reshape(b, h * factor, wide * factor, c)

    def mirror(z):
        return jnp.einsum("ij,bjhwc->bihwc", jnp.asarray(reflect, z.dtype), z)

    def repeat(y):
        return jnp.repeat(jnp.repeat(y, factor, axis=1), factor, axis=2)

    singular = np.zeros((n, 1, 1, 1))
    singular[0] = 1 / factor
    return LinearOperator(
        lambda x: blocks(x).mean(axis=1),
        lambda y: repeat(y) / n,
        repeat,
        lambda x: mirror(blocks(x)),
        lambda z: pixels(mirror(z)),
        singular,
    )


def known(mask: Array, name: str) -> Array:
    """The mask, if it is boolean.

    Raises:
      ValueError: if not.
    """
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(
            f"{name}: the mask must be boolean, True where x0 is known; got {mask.dtype}; write mask > 0.5"
        )
    return mask


def measured(operator: LinearOperator, y: Array, x: Array, name: str) -> tuple[Array, Array]:
    """The measured coordinates of `y` (V^T A^+ y) and the singular values, in x's dtype.

    Raises:
      ValueError: if y is not what the operator makes of samples of x's shape, or a batch of one of these.
    """
    y = fits(operator.apply, y, x, name)
    return operator.analyse(operator.pinv(y)), jnp.asarray(operator.singular, x.dtype)


def fits(forward: Callable[[Array], Array], y: Array, x: Array, name: str) -> Array:
    """`y` in x's dtype.

    Raises:
      ValueError: if its shape is not that of `forward(x)`, or the same with a batch of one.
    """
    expected = jax.eval_shape(forward, jax.ShapeDtypeStruct(x.shape, x.dtype)).shape
    if jnp.shape(y) not in (expected, (1, *expected[1:])):
        raise ValueError(
            f"{name}: of x {x.shape} the operator makes measurements of shape {expected}; expected y of that shape, or "
            f"{(1, *expected[1:])} for one measurement of all samples, got {jnp.shape(y)}"
        )
    return jnp.asarray(y, x.dtype)
