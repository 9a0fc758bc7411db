"""The diffusion transformer: patches, adaLN-Zero blocks, a linear head.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models.checks import (
    check_attention,
    check_common,
    check_cudnn_heads,
    check_divides,
    check_least,
    check_name,
    check_remat,
    ends_of,
    network,
)
from diffjax.nn import (
    Compute,
    Condition,
    DiTBlock,
    Linear,
    fold_key,
    functional,
    layer_norm,
    modulate,
    modulation,
    rngs_of,
    run_stack,
    scope,
    sincos_2d,
    tap,
    widen,
)

WAVES = 256  # channels of the time's sinusoids, whatever the width (DiT's TimestepEmbedder)
# Columns, then rows (Shoeybi et al. 2019, arXiv:1909.08053, section 3): one sum over `tensor` for each branch and
# direction. Queries, keys and values are split by heads, which no split of their kernel's flat columns is: it lies
# split by rows, and an all-to-all turns these into heads.
RULES = (
    (r"^blocks/.*qkv/kernel$", (None, ("tensor", "fsdp"), None)),
    (r"^blocks/.*(modulation|up)/kernel$", (None, "fsdp", "tensor")),
    (r"^blocks/.*(out|down)/kernel$", (None, "tensor", "fsdp")),
    (r"^(modulation|cond/hidden)/kernel$", ("fsdp", "tensor")),
    (r"^cond/out/kernel$", ("tensor", "fsdp")),
    (r"^blocks/mlp/up/bias$", (None, "tensor")),
    (r"^out/kernel$", ("fsdp", None)),
    (r"^inp/kernel$|(^|/)embedding$", (None, "fsdp")),
    (r"(^|/)bias$", ()),
)
# Tokens are split over `sequence`; attention needs the keys and values of all of them.
ACTIVATIONS = (
    (r"/kernel/rows$", ("tensor",)),
    (r"/kernel/heads$", (None, None, "tensor")),
    (r"/(q|mixed)$", ("batch", "sequence", "tensor")),
    (r"/(k|v)$", ("batch", None, "tensor")),
    (r"/hidden$", ("batch", "sequence", "tensor")),
    (r"^tokens$|/(out|down)$", ("batch", "sequence")),
    (r"(^|/)(cond|modulation)$", ("batch",)),
    (r"^labels$", ()),
)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """`[B, H, W, C] -> [B, (H / patch) (W / patch), patch * patch * C]`; patches and the pixels in them row major."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(x: jax.Array, patch: int, shape: tuple[int, int, int]) -> jax.Array:
    """The inverse of `patchify` for images of `shape`."""
    h, w, c = shape
    x = x.reshape(len(x), h // patch, w // patch, patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), h, w, c)


class DiT(nnx.Module):
    """The module of `dit`; the parameters of all blocks are stacked along their first axis.

    Activations: `cond [B, C]`, `tokens [B, T, C]` (the first block's input), those of `DiTBlock` under `blocks/` (the
    residual stream behind each block is `blocks/mlp/out`), `modulation`.
    """

    def __init__(
        self, ends: tuple[tuple[int, ...], tuple[int, ...]], *, num_classes: int, patch: int, width: int, depth: int,
        heads: int, hidden: int, dropout: float, scale: str, time: dict, compute: Compute, rngs,
    ):  # fmt: skip
        xavier, zeros = nnx.initializers.xavier_uniform(), nnx.initializers.zeros_init()
        pixels_in, pixels_out = (patch * patch * shape[-1] for shape in ends)
        given = dict(dtype=compute.dtype, rngs=rngs)
        self.cond = Condition(width, num_classes, **time, **given)
        self.inp = Linear(pixels_in, width, kernel_init=xavier, **given)
        block = dict(dropout_rate=dropout, scale=scale, implementation=compute.attention, dtype=compute.dtype)
        keys = jax.random.split(rngs.params(), depth)
        self.blocks = jax.vmap(lambda k: DiTBlock(width, heads, hidden, **block, rngs=rngs_of(k)))(keys)
        self.modulation = modulation(width, width, 2, **given)
        self.out = Linear(width, pixels_out, kernel_init=zeros, **given)
        self.patch, self.channels, self.width, self.depth = patch, ends[1][-1], width, depth
        self.compute = compute

    def __call__(self, x, t, y, *, key=None):
        cond = tap("cond", nnx.silu(self.cond(t, y)))
        shape = (*x.shape[1:3], self.channels)
        height, breadth, _ = shape
        h = self.inp(patchify(x, self.patch))
        h = h + jnp.asarray(sincos_2d(height // self.patch, breadth // self.patch, self.width), h.dtype)

        def body(block, h, i):
            with scope("blocks"):
                return block(h, cond, fold_key(key, i)), None

        h, _ = run_stack({f"0:{self.depth}": self.blocks}, body, tap("tokens", h), self.compute)
        shift, scale = jnp.split(tap("modulation", self.modulation(cond)), 2, axis=-1)
        out = self.out(modulate(layer_norm(h), shift, scale))
        return widen(unpatchify(out, self.patch, shape))


def dit(
    *, shape: tuple[int, int, int], num_classes: int = 0, patch: int = 2, width: int = 384, depth: int = 12,
    heads: int = 6, mlp_ratio: float = 4.0, dropout: float = 0.0, dtype: str = "float32",
    time_embed: str = "sinusoidal", time_scale: float = 1000.0, attention_scale: str = "sqrt",
    attention_impl: str = "xla", scan: bool = True, remat: str | bool = "none", extra_in: int = 0, extra_out: int = 0,
    shapes: tuple = (),
) -> Model:  # fmt: skip
    """DiT (arXiv:2212.09748) with adaLN-Zero; its output starts at zero.

    Args:
      shape: `(H, W, C)` of the images or latents.
      shapes: others that it takes as well, `((H, W, C), ...)`; positions are those of each shape's own grid.
      num_classes: 0 for an unconditional network, whose `y` is ignored.
      patch: side of a patch; divides H and W.
      width, depth, heads: of the transformer; `heads` divides `width`, `width` is a multiple of 4.
      mlp_ratio: hidden width of a perceptron over `width`.
      dropout: rate on both branches of a block, in calls with a key (the paper has none).
      dtype: of the computation: "float32", "bfloat16", "float16" or (in x64 mode) "float64"; parameters are float32.
      time_embed, time_scale: "sinusoidal" or "fourier", and the factor of the time inside (1000 for times in [0, 1]).
      attention_scale: "sqrt" or, for widths at which the heads grow as well, "mup"; see `diffjax.nn.SelfAttention`.
      attention_impl: one of `diffjax.nn.IMPLEMENTATIONS`: "xla", "chunked", or a fused kernel, such as "cudnn", which
        needs a dtype of 16 bits and acts on NVIDIA GPUs alone; see `diffjax.nn.attend`.
      scan: run the blocks in a `lax.scan`, which compiles in a time that does not grow with the depth; False unrolls.
      remat: which activations of a block are computed again in the backward pass instead of kept, one of
        `diffjax.nn.POLICIES`: "none", "full", "dots", "dots_no_batch"; True is "full".
      extra_in, extra_out: channels of `x` and of the output beyond C, such as those of a second image beside it.

    Returns:
      A `Model`: `apply(params, x [B, H, W, C], t [B], y [B] int or None, *, key=None) -> [B, H, W, C] float32`. Without
      labels, or with `y == num_classes`, the network is unconditional; a key turns dropout on.

    Raises:
      ValueError: for settings that make no network.
      ImportError: for `attention_impl="tokamax"` without the package.
    """
    config = dict(locals(), name="dit", shape=tuple(shape))
    ends = ends_of("dit", shape, extra_in, extra_out)
    check_common("dit", shape, num_classes, dropout=dropout, dtype=dtype, time_embed=time_embed, waves=WAVES)
    check_name("dit", "attention_scale", attention_scale, ("sqrt", "mup"))
    check_attention("dit", "attention_impl", attention_impl, dtype)
    check_least("dit", 1, patch=patch, width=width, depth=depth, heads=heads)
    check_divides("dit", "patch", patch, "the image sides", *(side for s in (shape, *shapes) for side in s[:2]))
    check_divides("dit", "heads", heads, "the width", width)
    if attention_impl == "cudnn":
        size = width // heads
        check_cudnn_heads("dit", "attention_impl", size, f"width={width} over heads={heads} is {size}")
    if width % 4:
        best = max(4, 4 * round(width / 4))
        raise ValueError(f"dit: width={width}: 2-D positions need a multiple of 4; the nearest is width={best}")
    compute = Compute(jnp.dtype(dtype), attention_impl, scan, check_remat("dit", remat))
    hidden = math.floor(mlp_ratio * width)
    if hidden < 1:
        raise ValueError(f"dit: mlp_ratio={mlp_ratio}: expected a positive number such as 4.0")
    time = dict(waves=WAVES, time_embed=time_embed, time_scale=time_scale)
    sizes = dict(num_classes=num_classes, patch=patch, width=width, depth=depth, heads=heads, hidden=hidden)
    rest = dict(dropout=dropout, scale=attention_scale, time=time, compute=compute)
    module = functional(lambda rngs: DiT(ends, **sizes, **rest, rngs=rngs))
    return Model(*network("dit", ends[0], module, shapes), config=config, rules=RULES, activations=ACTIVATIONS)
