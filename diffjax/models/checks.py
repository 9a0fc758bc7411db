"""Checks of a network's settings and inputs on static facts, with messages that name the nearest valid choice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.nn import IMPLEMENTATIONS, POLICIES, TIME_EMBEDS, Functional, kernels, policy_name
from diffjax.nn.attention import cudnn_takes
from diffjax.registry import nearest

DTYPES = ("float32", "bfloat16", "float16", "float64")
MOST_TRIED = 10_000


def check_common(
    kind: str, shape, num_classes: int, *, dropout: float, dtype: str, time_embed: str, waves: int
) -> None:  # fmt: skip
    """Raises `ValueError` for what no network can be built from: these settings are common to all of them."""
    check_data(kind, shape, num_classes)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{kind}: dropout={dropout}: expected a rate in [0, 1)")
    check_name(kind, "dtype", dtype, DTYPES)
    if dtype == "float64" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{kind}: dtype='float64' needs jax.config.update('jax_enable_x64', True); or take 'float32'")
    check_name(kind, "time_embed", time_embed, TIME_EMBEDS)
    if waves < 2 or waves % 2:
        raise ValueError(f"{kind}: {waves} channels for the time embedding: expected a positive even number")


def check_data(kind: str, shape, num_classes: int) -> None:
    """Raises `ValueError` for what are no images, or no number of classes."""
    if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"{kind}: shape={tuple(shape)}: expected (height, width, channels), three positive integers")
    check_least(kind, 0, num_classes=num_classes)


def check_least(kind: str, least: int, **settings: int) -> None:
    """Raises `ValueError` for a setting that is not an integer of at least `least`."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{kind}: {name}={value!r}: expected an integer >= {least}")


def check_name(kind: str, setting: str, value: str, known: Iterable[str]) -> None:
    """Raises `ValueError` for an unknown name, with the nearest known one."""
    if value not in known:
        hint = nearest(str(value), known)
        raise ValueError(f"{kind}: {setting}={value!r}: known: {', '.join(known)}{hint}")


def check_remat(kind: str, remat: str | bool) -> str:
    """The name of a remat policy (`diffjax.nn.POLICIES`); raises `ValueError` for an unknown one."""
    check_name(kind, "remat", policy_name(remat), POLICIES)
    return policy_name(remat)


def check_attention(kind: str, setting: str, value: str, dtype: str) -> None:
    """Raises `ValueError` for an attention (`diffjax.nn.IMPLEMENTATIONS`) that is not known, or not for this dtype.

    Raises:
      ImportError: for "tokamax" without the package.
    """
    check_name(kind, setting, value, IMPLEMENTATIONS)
    if value == "cudnn" and str(dtype) not in ("bfloat16", "float16"):
        raise ValueError(f"{kind}: {setting}='cudnn' needs dtype='bfloat16' or 'float16', not {dtype!r}")
    if value in ("tokamax", "splash") and str(dtype) == "float64":
        raise ValueError(f"{kind}: {setting}={value!r} is of float32 at most, not dtype='float64'; take 'xla'")
    if value == "tokamax":
        kernels.tokamax()


def check_cudnn_heads(kind: str, setting: str, head_width: int, given: str) -> None:
    """Raises `ValueError` for heads that cuDNN's attention does not take."""
    if not cudnn_takes(head_width):
        raise ValueError(
            f"{kind}: {setting}='cudnn' needs heads of a multiple of 8 channels, at most 256 (128 before Hopper); "
            f"{given}; change one of them, or take 'xla'"
        )


def check_divides(kind: str, part: str, value: int, whole: str, *totals: int) -> None:
    """Raises `ValueError` unless `value` divides every one of `totals`; the message names the nearest that does."""
    if value > 0 and all(total % value == 0 for total in totals):
        return
    # Of lengths that no network has, not all divisors are looked for: a config may come from anywhere.
    common = math.gcd(*totals)
    small = [n for n in range(1, min(math.isqrt(common), MOST_TRIED) + 1) if common % n == 0] or [1]
    valid = [*small, *(common // n for n in small if common)]
    best = min(valid, key=lambda n: (abs(n - value), n))
    given = ", ".join(map(str, dict.fromkeys(totals)))
    raise ValueError(f"{kind}: {part}={value} does not divide {whole} {given}; the nearest that does is {part}={best}")


def check_inputs(kind: str, shapes: Sequence[tuple[int, ...]], x, t, y) -> None:
    """Raises `ValueError` unless `x [B, *shape]` for one of the shapes, `t [B]` and `y [B]` or None."""
    if x.ndim != 4 or tuple(x.shape[1:]) not in shapes:
        built = " or ".join(f"[B, {_csv(shape)}]" for shape in shapes)
        raise ValueError(f"{kind}: x has shape {tuple(x.shape)}; this network was built for {built}")
    for name, value in (("t", t), ("y", y)):
        if value is not None and tuple(jnp.shape(value)) != (x.shape[0],):
            raise ValueError(f"{kind}: {name} has shape {tuple(jnp.shape(value))}; expected one per sample, [{len(x)}]")
    if y is not None and not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"{kind}: y has dtype {y.dtype}; expected integer class labels")


def ends_of(kind: str, shape, extra_in: int, extra_out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a network's input and output, `(H, W, C + extra)`; raises `ValueError` for a negative number."""
    check_least(kind, 0, extra_in=extra_in, extra_out=extra_out)
    *sides, channels = shape
    return (*sides, channels + extra_in), (*sides, channels + extra_out)


def network(kind: str, shape: tuple[int, ...], module: Functional, others: Iterable[tuple[int, ...]] = ()) -> tuple:
    """`(init, apply)` of a network: `apply(params, x, t, y=None, *, key=None)` with its inputs checked.

    `others` are shapes `(H, W, ...)` that it takes besides `shape`, with the channels of `shape`.
    """
    shapes = tuple(dict.fromkeys([tuple(shape), *((*other[:2], shape[-1]) for other in others)]))

    def apply(params: dict, x, t, y=None, *, key=None, method: str | None = None) -> Any:
        check_inputs(kind, shapes, x, t, y)
        return module.apply(params, x, t, y, key=key, method=method)

    return module.init, apply


def _csv(values) -> str:
    return ", ".join(map(str, values))
