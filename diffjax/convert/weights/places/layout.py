"""Where each parameter of a network lies in a checkpoint.

Networks that a checkpoint describes name their parameters as it does, `a/b/kernel` for `a.b.weight`, and this is all
there is to say: the last part of the name tells the order of the axes, and a part such as `0:12` stands for twelve
layers, one tensor each.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.tensors import Tensor, bounds
from diffjax.convert.weights.tensors.dtypes import TooLarge
from diffjax.convert.weights.tensors.strict import shown

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# From the axes of PyTorch's weights (outputs first, then inputs, then space) to ours (space, inputs, outputs).
AXES = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
ALIGNMENT = 64
# More are a mistake in a config, and their names alone would fill the memory.
MOST_LAYERS = 10_000
RANGE = re.compile(r"(\d+):(\d+)")


class Place(NamedTuple):
    """A parameter in a checkpoint.

    Attributes:
      keys: the names of its tensors: one, or those of the layers that it stacks.
      axes: the tensor's axes in the order of the parameter's, without the axis of the stack.
      stacked: whether the parameter has an axis of layers in front.
      shape: of each tensor.
    """

    keys: tuple[str, ...]
    axes: tuple[int, ...]
    stacked: bool
    shape: tuple[int, ...]


def place(name: str, shape: tuple[int, ...]) -> Place:
    """Where the parameter `name` ("a/b/kernel") of `shape` lies; raises `WeightsError` for more than 10,000 layers."""
    *parts, leaf = name.split("/")
    layers = [i for i, part in enumerate(parts) if RANGE.fullmatch(part)]
    if layers and shape[0] > MOST_LAYERS:
        raise WeightsError(f"{name}: {shape[0]} layers; at most {MOST_LAYERS} are read")
    inner = shape[1:] if layers else shape
    axes = AXES[len(inner)] if leaf == "kernel" else tuple(range(len(inner)))
    tensor = tuple(inner[axes.index(i)] for i in range(len(inner)))
    names = [parts]
    for i in layers:
        first, last = map(int, RANGE.fullmatch(parts[i]).groups())
        names = [[*some[:i], str(n), *some[i + 1 :]] for some in names for n in range(first, last)]
    keys = tuple(".".join([*some, LEAVES.get(leaf, leaf)]) for some in names)
    return Place(keys, axes, bool(layers), tensor)


def layout(shapes: Mapping[str, Any]) -> dict[str, Place]:
    """The places of all parameters, given as `{"a/b/kernel": anything with a shape}`."""
    return {name: place(name, tuple(leaf.shape)) for name, leaf in shapes.items()}


def places_of(shapes: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Place]:
    """The places of all parameters in a file with tensors of these names.

    Names with a slash are those of the parameters themselves, as `params.safetensors` has them: nothing is split or
    turned there.
    """
    if any("/" in name for name in tensors):
        return {
            name: Place((name,), tuple(range(len(leaf.shape))), False, tuple(leaf.shape))
            for name, leaf in shapes.items()
        }
    return layout(shapes)


def read(place: Place, tensors: Mapping[str, Tensor], index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The part `index` (slices without steps) of a parameter, as an array of `dtype` of its own.

    Each layer is read straight into its slot: besides the result a chunk is in memory.

    Raises:
      WeightsError: for a tensor of another shape than its place has, or with numbers that `dtype` lacks.
      OSError: if a file cannot be read.
    """
    lengths = (len(place.keys),) * place.stacked + tuple(place.shape[axis] for axis in place.axes)
    index = bounds(index, lengths)
    out = _aligned(tuple(part.stop - part.start for part in index), dtype)
    keys, inner = (place.keys[index[0]], index[1:]) if place.stacked else (place.keys, index)
    back = np.argsort(place.axes)
    slots = out if place.stacked else out[None]
    for i, key in enumerate(keys):
        if tensors[key].shape != place.shape:
            told = f"{list(tensors[key].shape)} instead of {list(place.shape)}"
            raise WeightsError(f"{tensors[key].path}: tensor {shown(key)} has the shape {told}")
        try:
            tensors[key].fill(slots[i, ...].transpose(back), tuple(inner[axis] for axis in back))
        except TooLarge as error:
            raise WeightsError(f"{tensors[key].path}: tensor {shown(key)}: {error}") from None
    return out


def _aligned(shape, dtype):
    """An empty array at an address that lets JAX take it over on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def split(place: Place, array: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a parameter, the inverse of `read`."""
    parts = array if place.stacked else array[None]
    back = np.argsort(place.axes)
    return {key: part.transpose(back) for key, part in zip(place.keys, parts, strict=True)}


def type_of(place: Place, tensors: Mapping[str, Tensor], dtype: str | None) -> np.dtype:
    """The type of a parameter that is read: `dtype` if it is given and both are of floating point."""
    found = sorted({tensors[key].dtype for key in place.keys}, key=str)
    if len(found) > 1:
        # Of the types of floating point with 8 bits none holds the values of the other.
        wide = [jnp.dtype("bfloat16") if jnp.issubdtype(d, jnp.floating) and d.itemsize == 1 else d for d in found]
        found = [functools.reduce(jnp.promote_types, wide)]
    given = np.dtype(found[0])
    floating = dtype is not None and jnp.issubdtype(given, jnp.floating)
    return jnp.dtype(dtype) if floating else given
