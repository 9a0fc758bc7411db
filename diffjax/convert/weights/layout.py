"""Where each parameter of a network lies in a checkpoint.

Networks that a checkpoint describes name their parameters as it does, `a/b/kernel` for `a.b.weight`, and this is all
there is to say: the last part of the name tells the order of the axes, and a part such as `0:12` stands for twelve
layers, one tensor each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffjax.convert.weights.tensors import Tensor

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# From the axes of PyTorch's weights (outputs first, then inputs, then space) to ours (space, inputs, outputs).
AXES = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
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
    """Where the parameter `name` ("a/b/kernel") of `shape` lies."""
    *parts, leaf = name.split("/")
    layers = [i for i, part in enumerate(parts) if RANGE.fullmatch(part)]
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


def read(place: Place, tensors: Mapping[str, Tensor], index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The part `index` of a parameter, as a copy of `dtype`; no more than the part is read."""
    if not place.stacked:
        return _part(tensors[place.keys[0]], place.axes, index, dtype)
    keys = place.keys[index[0]] if index else place.keys
    return np.stack([_part(tensors[key], place.axes, index[1:], dtype) for key in keys])


def _part(tensor, axes, index, dtype):
    index = tuple(index) + (slice(None),) * (len(axes) - len(index))
    of_tensor = tuple(index[axes.index(i)] for i in range(len(axes)))
    return np.array(tensor.open()[of_tensor].transpose(axes), dtype, order="C")


def split(place: Place, array: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a parameter, the inverse of `read`."""
    parts = array if place.stacked else array[None]
    back = np.argsort(place.axes)
    return {key: part.transpose(back) for key, part in zip(place.keys, parts, strict=True)}
