"""Fused kernels of attention that others wrote, under the calling convention of `diffjax.nn.attend`."""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128  # of a TPU: lengths and widths of the blocks of splash attention are multiples of it
BLOCK = 512


def tokamax():
    """The package.

    Raises:
      ImportError: without it.
    """
    try:
        import tokamax
        from absl import flags
    except ImportError as error:
        raise ImportError(f"attention by tokamax needs the package: pip install 'diffjax[kernels]'; {error}") from error
    if not flags.FLAGS.is_parsed():
        # It would parse the command line of a program that may have other arguments than absl's, and end it for those.
        flags.FLAGS(sys.argv[:1])
    return tokamax


def by_tokamax(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None, bias: jax.Array | None, causal: bool
) -> jax.Array:
    """Attention by the kernel that `tokamax.dot_product_attention` chooses for the device; shapes as in `attend`."""
    if bias is not None:
        # Kernels that take powers of two multiply the scores by log2(e): twice the least float32 would be infinite, and
        # a row without keys NaN.
        bias = jnp.maximum(bias.astype(jnp.float32), float(np.finfo(np.float32).min) / 4)
    return tokamax().dot_product_attention(q, k, v, bias=bias, scale=scale, is_causal=causal)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None, causal: bool, *, interpret: bool = False
) -> jax.Array:
    """Splash attention, JAX's kernel for TPUs; shapes as in `attend`.

    Lengths are padded to whole blocks and channels to whole lanes, as they lie in a TPU's memory in any case; padded
    keys are of a segment that no query sees. The queries are scaled beforehand, in their own type.

    Args:
      interpret: run the kernel's program as operations of XLA, on any device, slowly: for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, keys, heads, width = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    scale = width**-0.5 if scale is None else scale
    parts = [_padded(a) for a in ((q * scale).astype(q.dtype), k, v)]
    rows, columns = parts[0].shape[2], parts[1].shape[2]
    mask = (masks.CausalMask if causal else masks.FullMask)((rows, columns))
    kv, q_ = _block(columns), _block(rows)
    blocks = kernel.BlockSizes(
        block_q=q_, block_kv=kv, block_kv_compute=kv, block_q_dkv=q_, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q_, block_kv_dq=kv,
    )  # fmt: skip
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    segments = None
    if columns > keys:
        segments = kernel.SegmentIds(jnp.zeros(rows, jnp.int32), (jnp.arange(columns) >= keys).astype(jnp.int32))
    out = jax.vmap(partial(attention, segment_ids=segments))(*parts)
    return jnp.swapaxes(out[:, :, :length, :width], 1, 2)


def _padded(x):
    """`[B, T, N, d]` as `[B, N, T', d']`, T' and d' the next multiples of the lanes."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), *((0, -n % LANES) for n in x.shape[2:])))


def _block(length):
    """The most of a padded length, up to `BLOCK`, that divides it."""
    return max(n for n in range(LANES, BLOCK + 1, LANES) if length % n == 0)
