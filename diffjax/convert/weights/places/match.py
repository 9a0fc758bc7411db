"""The tensors of files as the parameters of a network, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffjax.convert.weights.errors import WeightsError, some
from diffjax.convert.weights.places.aliases import TIED, modern, without_pixels
from diffjax.convert.weights.places.layout import Place, places_of
from diffjax.convert.weights.tensors.read import Tensor
from diffjax.convert.weights.tensors.strict import shown

PIECE = 1 << 24  # bytes that are compared at a time


class Report(NamedTuple):
    """How the tensors of a file and the parameters of a network differ; names are those of the file.

    Attributes:
      missing: tensors of parameters that the file lacks.
      unexpected: tensors that are of no parameter.
      misshapen: `(name, shape in the file, shape of the network)`.
      mistyped: `(name, type in the file, type of the network)`, where one is of floating point and the other is not.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    mistyped: tuple[tuple[str, str, str], ...] = ()

    @classmethod
    def of(cls, wanted: Mapping[str, tuple[tuple[int, ...], Any]], tensors: Mapping[str, Tensor]) -> Report:
        """How `tensors` differ from the `(shape, type)` that are wanted; no type is compared where None is."""
        both = [(name, tensors[name], *wanted[name]) for name in sorted(wanted.keys() & tensors.keys())]
        floating = lambda dtype: jnp.issubdtype(dtype, jnp.floating)
        return cls(
            tuple(sorted(wanted.keys() - tensors.keys())),
            tuple(sorted(tensors.keys() - wanted.keys())),
            tuple((name, held.shape, shape) for name, held, shape, _ in both if held.shape != shape),
            tuple(
                (name, str(held.dtype), str(dtype)) for name, held, _, dtype in both
                if dtype is not None and floating(held.dtype) != floating(dtype)
            ),
        )  # fmt: skip

    def __str__(self) -> str:
        shapes = [f"{name} {list(given)} instead of {list(wanted)}" for name, given, wanted in self.misshapen]
        types = [f"{name} {given} instead of {wanted}" for name, given, wanted in self.mistyped]
        rows = {
            "missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes, "of another type": types
        }  # fmt: skip
        told = [f"{len(names)} {what}: {some(names)}" for what, names in rows.items() if names]
        return "; ".join(told) or "no difference"


def rename(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network of class `kind` under today's names, without those that are no parameters."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        today = modern(kind, name)
        if today in out:
            raise WeightsError(f"{tensor.path}: two tensors are {shown(today)}, one of them {shown(name)}")
        if today is not None:
            shape = without_pixels(kind, today, tensor.shape)
            out[today] = tensor if shape == tensor.shape else tensor._replace(shape=shape)
    return out


def match(
    kind: str, files: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> tuple[dict[str, Place], dict[str, Tensor]]:
    """The places of a network's parameters, and the tensors of its files under today's names, each once."""
    tensors = rename(kind, files)
    places = places_of(shapes, tensors)
    return places, untie(kind, tensors, {key for place in places.values() for key in place.keys})


def untie(kind: str, tensors: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The tensors without second names of those that a network of class `kind` has once; `wanted` are its own names.

    Raises:
      WeightsError: if both names are there and their bytes differ.
    """
    out = dict(tensors)
    for other, name in TIED.get(kind, ()):
        if other in out and other not in wanted:
            tensor = out.pop(other)
            if name in out and not _same(tensor, out[name]):
                raise WeightsError(f"{tensor.path}: {other!r} and {name!r} differ, and are one parameter of a {kind}")
            out.setdefault(name, tensor)
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bytes, of which some rows are in memory at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows = a.shape[0] if a.shape else 1
    many = max(1, PIECE // max(1, math.prod(a.shape[1:]) * a.dtype.itemsize))
    pieces = ((slice(i, i + many),) if a.shape else () for i in range(0, rows, many))
    return all(a.part(piece).tobytes() == b.part(piece).tobytes() for piece in pieces)


def compare(places: Mapping[str, Place], tensors: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> Report:
    """What is missing, unexpected, misshapen or mistyped among the tensors of a file.

    Args:
      places: of the network's parameters.
      tensors: of the file, under today's names.
      shapes: of the network's parameters, by name; their types.
    """
    wanted = {key: (place.shape, shapes[name].dtype) for name, place in places.items() for key in place.keys}
    return Report.of(wanted, tensors)
