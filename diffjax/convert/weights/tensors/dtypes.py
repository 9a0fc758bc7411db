"""The types of safetensors files, and those that are asked for."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError

DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": jnp.dtype("bfloat16"),
    "F8_E4M3": jnp.dtype("float8_e4m3fn"), "F8_E5M2": jnp.dtype("float8_e5m2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WIDER = ("bfloat16", "float32", "float64")


class TooLarge(WeightsError):
    """Values that the type that is asked for does not have."""


def check_dtype(setting: str, dtype: Any) -> None:
    """Raises `ValueError` for what is no type of floating point, nor None."""
    try:
        fits = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{setting}={dtype!r}: expected a type of floating point, such as 'bfloat16' or 'float16'")


def cast(given: Any, dtype: str | None) -> np.dtype:
    """`dtype` for a type of floating point, where it is given; else the type itself."""
    floating = dtype is not None and jnp.issubdtype(given, jnp.floating)
    return jnp.dtype(dtype) if floating else np.dtype(given)


def fitted(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array as `dtype`; what is infinite or NaN stays so. Raises `TooLarge` for numbers that would become so."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        out = array.astype(dtype)
    lost = ~np.isfinite(out)
    if lost.any() and (lost := lost & np.isfinite(array)).any():
        largest = np.abs(array[lost].astype(np.float64)).max()
        wider = " or ".join(name for name in WIDER if float(jnp.finfo(name).max) >= largest)
        told = f"{np.count_nonzero(lost):,} of its values are beyond {float(jnp.finfo(dtype).max):g}, the largest of"
        raise TooLarge(f"{told} {np.dtype(dtype).name}; take {wider}")
    return out
