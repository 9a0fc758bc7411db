"""Self-attention over tokens and over the pixels of a feature map."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn import kernels
from diffjax.nn.linear import Linear
from diffjax.nn.norm import GroupNorm, plus, widen
from diffjax.nn.taps import scope, tap

IMPLEMENTATIONS = ("xla", "chunked", "cudnn", "tokamax", "splash")
HALVES = (jnp.bfloat16, jnp.float16)
CHUNK = 128  # queries at a time, of "chunked"


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None = None, *, bias: jax.Array | None = None,
    causal: bool = False, implementation: str = "xla",
) -> jax.Array:  # fmt: skip
    """`softmax(scale q k + bias) v` of `q [B, T, N, d]`, `k, v [B, S, N, d]`: `[B, T, N, d]`, softmax at least float32.

    Args:
      scale: None for `1 / sqrt(d)`.
      bias: added to the scores, `[B or 1, N or 1, T or 1, S]`; what is masked out has a large negative number there,
        finite, so that a row without keys has a mean and no NaN.
      causal: whether query i sees the keys up to i alone.
      implementation: "xla"; "chunked", the same for some of the queries at a time, so that their weights are never
        there as a whole, forward or backward; or a fused kernel, which keeps no weights: "cudnn" of NVIDIA GPUs, for
        bfloat16 and float16 and heads that `cudnn_takes`, on other devices "xla" takes its place; "tokamax", the
        fastest that the package of this name has for the device; "splash" of TPUs, one device each, "chunked" takes its
        place on other devices and where there is a bias, which splash has not.

    Raises:
      ValueError: for a name that is not known, "cudnn" in another type or width, "tokamax" and "splash" in float64.
      ImportError: for "tokamax" without the package.
    """
    implementation = _resolved(q, bias, implementation)
    if implementation == "tokamax":
        return kernels.by_tokamax(q, k, v, scale, bias, causal)
    if implementation == "splash":
        return kernels.splash(q, k, v, scale, causal)
    if implementation == "chunked":
        return _chunked(q, k, v, scale, bias, causal)
    if q.dtype not in HALVES:
        return _plain(q, k, v, scale, bias, causal)
    single = q.shape[:3] + k.shape[1:2] == (1, 1, 1, 1)
    if (q.dtype == jnp.float16 or single) and jax.default_backend() == "cpu":
        # XLA's CPU back end has no products of float16 that add up in float32, which JAX's own asks for, and with
        # jaxlib 0.10 none of bfloat16 whose result is a single number.
        return _plain(*map(widen, (q, k, v)), scale, bias, causal).astype(q.dtype)
    bias = None if bias is None else widen(bias)
    return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, is_causal=causal, implementation=implementation)


def cudnn_takes(width: int) -> bool:
    """Whether cuDNN has a kernel for heads of so many channels: a multiple of 8, at most 256 (128 before Hopper)."""
    return width % 8 == 0 and width <= 256


def _resolved(q, bias, implementation):
    """The name of what computes attention here; raises for what can nowhere be computed (see `attend`)."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {implementation!r}; known: {', '.join(IMPLEMENTATIONS)}")
    if implementation in ("tokamax", "splash") and q.dtype == jnp.float64:
        raise ValueError(f"attention by {implementation} is of float32 at most, here it is float64; take 'xla'")
    if implementation == "splash":
        there = bias is None and jax.devices()[0].platform == "tpu"
        return "splash" if there else "chunked"
    if implementation == "cudnn":
        if q.dtype not in HALVES:
            raise ValueError(f"attention by cudnn needs bfloat16 or float16, here it is {q.dtype}; take 'xla'")
        if not cudnn_takes(q.shape[-1]):
            raise ValueError(
                "attention by cudnn needs heads of a multiple of 8 channels, at most 256 (128 before Hopper), here "
                f"they have {q.shape[-1]}; take 'xla' or 'chunked'"
            )
        # The name of a device, since that of the platform is "gpu" for other makers' as well.
        return "cudnn" if "nvidia" in jax.devices()[0].device_kind.lower() else "xla"
    return implementation


def _plain(q, k, v, scale, bias, causal):
    """The definition, in the type of q.

    JAX's own takes the softmax of wider types in float32 as well, and is slower on CPU. Heads lie in front here, or XLA
    would transpose the weights. The maximum only keeps the exponential finite, and the weights are normalised after
    their use, so that every pass over them, forward and backward, is one fused loop.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (scale * q, k, v))
    scores = jnp.einsum("bntd,bnsd->bnts", q, k)
    scores = scores if bias is None else scores + bias.astype(scores.dtype)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[2:], dtype=bool), scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = jnp.einsum("bnts,bnsd->bntd", weights, v) / weights.sum(-1, keepdims=True)
    return jnp.swapaxes(mixed, 1, 2)


def _chunked(q, k, v, scale, bias, causal):
    """Queries by chunks, in a loop that keeps nothing but its results (Rabe & Staats 2021, arXiv:2112.05682)."""
    length, keys = q.shape[1], k.shape[1]
    # As few chunks as there must be, and those as even as they can be.
    count = -(-length // CHUNK)
    size = -(-length // count)
    spare = count * size - length
    rows = None
    if bias is not None and bias.shape[2] != 1:
        rows = jnp.pad(bias, ((0, 0), (0, 0), (0, spare), (0, 0)))
        rows = jnp.moveaxis(rows.reshape(*bias.shape[:2], count, size, keys), 2, 0)
    parts = jnp.pad(q, ((0, 0), (0, spare), (0, 0), (0, 0))).reshape(q.shape[0], count, size, *q.shape[2:])

    @jax.checkpoint
    def part(_, given):
        q, rows, index = given
        added = bias if rows is None else rows
        if causal:
            seen = jnp.arange(keys) <= index * size + jnp.arange(size)[:, None]
            mask = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min / 2)[None, None]
            added = mask if added is None else added + mask
        return None, attend(q, k, v, scale, bias=added)

    _, out = jax.lax.scan(part, None, (jnp.moveaxis(parts, 1, 0), rows, jnp.arange(count)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], count * size, *q.shape[2:])[:, :length]


class SelfAttention(nnx.Module):
    """Multi-head self-attention of `x [B, T, C]` (Vaswani et al. 2017, arXiv:1706.03762), softmax in float32.

    Args:
      heads: must divide `width`.
      zero: start with a zero output projection, so that a residual branch starts as nothing.
      scale: what the products of queries and keys of d channels are multiplied by: "sqrt" for `1 / sqrt(d)`, "mup" for
        `8 / d`, which keeps its size when heads grow (Yang et al. 2022, arXiv:2203.03466, Definition 4.1; the 8 makes
        both equal at the usual d = 64).
      implementation: see `attend`.

    Activations: `q`, `k`, `v` and `mixed`, `[B, T, heads, C / heads]`; `out`, `[B, T, C]`; and, as they must be split
    with these, the weights of the first three: `kernel/rows [C, 3 C]`, `kernel/heads [C, 3, heads, C / heads]`.
    """

    def __init__(
        self, width: int, heads: int, *, zero: bool = False, scale: str = "sqrt", implementation: str = "xla", dtype,
        rngs,
    ):  # fmt: skip
        init = nnx.initializers.zeros_init() if zero else nnx.initializers.xavier_uniform()
        self.qkv = Linear(width, 3 * width, kernel_init=nnx.initializers.xavier_uniform(), dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, kernel_init=init, dtype=dtype, rngs=rngs)
        self.heads, self.scale = heads, {"sqrt": None, "mup": 8 * heads / width}[scale]
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self._project(x)
        q, k, v = (tap(name, qkv[:, :, i]) for i, name in enumerate("qkv"))
        mixed = tap("mixed", attend(q, k, v, self.scale, implementation=self.implementation))
        return tap("out", self.out(mixed.reshape(x.shape)))

    def _project(self, x):
        """`self.qkv(x)` as `[B, T, 3, heads, C / heads]`.

        The product itself has the axis of the heads, so that devices can share them: halves of a flat `3 C` would cut
        through the keys.
        """
        heads = (3, self.heads, x.shape[-1] // self.heads)
        x, kernel = x.astype(self.qkv.dtype), self.qkv.kernel[...].astype(self.qkv.dtype)
        kernel = tap("kernel/heads", tap("kernel/rows", kernel).reshape(-1, *heads))
        return plus(jnp.einsum("btc,cshd->btshd", x, kernel), self.qkv.bias[...].reshape(heads))


class PixelAttention(nnx.Module):
    """`x + attention(group_norm(x))` over the pixels of `x [B, H, W, C]`, as in ADM; the identity at first."""

    def __init__(self, channels: int, heads: int, *, groups: int, implementation: str = "xla", dtype, rngs):
        self.norm = GroupNorm(channels, groups)
        settings = dict(zero=True, implementation=implementation, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(channels, heads, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        with scope("attention"):
            mixed = self.attention(tokens)
        return tap("out", x + mixed.reshape(x.shape))
