"""Embeddings of time, labels and positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.nn.linear import Linear
from diffjax.nn.taps import tap

TIME_EMBEDS = ("sinusoidal", "fourier")
LONGEST = 10_000.0  # the longest wave over the shortest (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)


def sinusoidal(t: jax.Array, dim: int, *, time_scale: float = 1.0) -> jax.Array:
    """`[cos(w_i t), sin(w_i t)]`, `w_i = time_scale * LONGEST ** (-2 i / dim)`, of `t [B]`: `[B, dim] float32`.

    Ho et al. 2020, arXiv:2006.11239, with cosines first as in ADM and DiT. `dim` must be even. Times in [0, 1] want
    `time_scale=1000`, the range that the frequencies were chosen for.
    """
    half = dim // 2
    frequencies = np.exp(-np.log(LONGEST) * np.arange(half) / half)
    return _waves(t, frequencies * time_scale)


def timestep_waves(t: jax.Array, dim: int, *, cosines_first: bool = True, shift: float = 0.0) -> jax.Array:
    """`sinusoidal` with the choices that checkpoints have made: `[B, dim] float32` of `t [B]`.

    Args:
      cosines_first: or the sines, as in Ho et al. 2020.
      shift: the frequencies are `LONGEST ** (-i / (dim / 2 - shift))`; 1 makes `1 / LONGEST` the lowest.

    The exponents are rounded to float32 before the exponential, as PyTorch's are: at t = 1000 that is 3e-5 of the
    result. An odd `dim` ends in a zero.
    """
    half = dim // 2
    exponents = np.float32(-np.log(LONGEST)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    phase = jnp.asarray(t, jnp.float32)[:, None] * frequencies
    waves = (jnp.cos(phase), jnp.sin(phase)) if cosines_first else (jnp.sin(phase), jnp.cos(phase))
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, dim % 2)))


def fourier(t: jax.Array, dim: int, *, time_scale: float = 1.0) -> jax.Array:
    """`[cos(2 pi f_i t), sin(2 pi f_i t)]` of `t [B]`, `f_i ~ N(0, time_scale^2)`: `[B, dim] float32`.

    Song et al. 2021, arXiv:2011.13456, appendix C.1 (there with `time_scale=16` and `t = log sigma`). The frequencies
    are fixed draws, the same for every network, so they are no parameters. `dim` must be even.
    """
    frequencies = np.random.default_rng(0).standard_normal(dim // 2)
    return _waves(t, 2 * np.pi * frequencies * time_scale)


def _waves(t: jax.Array, frequencies: np.ndarray) -> jax.Array:
    phase = jnp.asarray(t, jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def sincos_2d(height: int, width: int, dim: int) -> np.ndarray:
    """Fixed position embeddings `[height * width, dim] float32` of a grid, row major.

    Half of the channels hold `sin` and `cos` of the column, the other half of the row, with frequencies
    `10000 ** (-4 i / dim)` (He et al. 2022, arXiv:2111.06377, as DiT takes them). `dim` must be a multiple of 4.
    """
    frequencies = 10_000.0 ** (-np.arange(dim // 4) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    phases = [position.reshape(-1, 1) * frequencies for position in (columns, rows)]
    return np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=1).astype(np.float32)


class Condition(nnx.Module):
    """One vector per sample from its time and label: `[B, width]` in the compute dtype.

    A two-layer perceptron of the time's waves, plus a row of a table for the label. The table has a row more than there
    are classes: label `num_classes`, or no labels at all, is the null class of classifier-free guidance
    (Ho & Salimans 2022, arXiv:2207.12598). Without classes the labels are ignored. Activations: the table, `labels`.
    """

    def __init__(self, width: int, num_classes: int, *, waves: int, time_embed: str, time_scale: float, dtype, rngs):
        self.hidden = Linear(waves, width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)
        self.label = (
            nnx.Embed(num_classes + 1, width, dtype=dtype, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
            if num_classes
            else None
        )
        self.num_classes, self.waves = num_classes, waves
        self.time_embed, self.time_scale = time_embed, time_scale

    def __call__(self, t: jax.Array, y: jax.Array | None) -> jax.Array:
        waves = {"sinusoidal": sinusoidal, "fourier": fourier}[self.time_embed]
        h = self.out(nnx.silu(self.hidden(waves(t, self.waves, time_scale=self.time_scale))))
        if self.label is None:
            return h
        y = jnp.full(t.shape, self.num_classes, jnp.int32) if y is None else y
        table = tap("labels", self.label.embedding[...])
        # Rows in the table's own type: the gradient of one is a sum over all samples that took it.
        return h + jnp.take(table, y, axis=0).astype(h.dtype)
