"""Which tensor of an original checkpoint holds a tensor of a network, and how.

A `Naming` answers that for each name that the network's own checkpoint has. As it is asked for what is wanted, all that
a file must hold follows from a config, shapes included, and so does what is left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.places.match import Report
from diffjax.convert.weights.tensors import Tensor
from diffjax.convert.weights.tensors.views import Joined, rows

TOKENS = {"#": r"(\d+)", "*": "(weight|bias)", "~": "(.+)"}


class Cut(NamedTuple):
    """Where a tensor lies in an original checkpoint.

    Attributes:
      name: of the tensor there, without the prefix of its component.
      part: its number among the tensors that lie there below one another.
      way: how it lies there: "" as it is; "swap" with the upper and the lower half of its rows exchanged; "turn"
        transposed; "pixels" a matrix as a convolution of one pixel.
    """

    name: str
    part: int = 0
    way: str = ""


Naming = Callable[[str], Cut | None]


class Slot(NamedTuple):
    """A tensor of an original checkpoint.

    Attributes:
      shape: that it must have.
      names: of the network's tensors in it, from above.
      sizes: the rows of each.
      way: as of `Cut`.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    way: str


def table(lines: Iterable[tuple]) -> Naming:
    """The naming of lines `(theirs, ours)` or `(theirs, ours, way)`, of which the first that fits counts.

    "#" in a name stands for a number, "*" for weight or bias, "~" for anything; they are the same on both sides. `ours`
    may be several names, separated by blanks, of tensors that lie below one another in theirs.
    """
    known = []
    for theirs, ours, *way in lines:
        for part, name in enumerate(ours.split()):
            pattern = "".join(TOKENS.get(piece, re.escape(piece)) for piece in re.split(r"([#*~])", name))
            known.append((re.compile(pattern), re.sub(r"[#*~]", "{}", theirs), part, *(way or [""])))

    def naming(name: str) -> Cut | None:
        for pattern, theirs, part, way in known:
            if match := pattern.fullmatch(name):
                return Cut(theirs.format(*match.groups()), part, way)
        return None

    return naming


def arrange(naming: Naming, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """The original tensors that hold all of a network's, by their names.

    Args:
      shapes: of the network's tensors, in the order of PyTorch's axes.

    Raises:
      WeightsError: for a tensor that original checkpoints of this kind do not have.
    """
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for name in shapes:
        cut = naming(name)
        if cut is None or cut.part in found.get(cut.name, {}):
            raise WeightsError(f"{name}: checkpoints of this kind have no name for it")
        found.setdefault(cut.name, {})[cut.part] = name, cut.way
    return {theirs: _slot(theirs, held, shapes) for theirs, held in found.items()}


def _slot(theirs, held, shapes):
    if sorted(held) != list(range(len(held))):
        raise WeightsError(f"{theirs}: this network has {', '.join(n for n, _ in held.values())} of it, and no others")
    names, ways = zip(*(held[i] for i in range(len(held))), strict=True)
    sizes, rest, way = tuple(shapes[name][0] for name in names), shapes[names[0]][1:], ways[0]
    shape = (sum(sizes), *rest)
    return Slot(shape[::-1] if way == "turn" else (*shape, 1, 1) if way == "pixels" else shape, names, sizes, way)


def fit(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> Report:
    """How the tensors of a file differ from those that are wanted, by the file's names."""
    held = {
        name: t._replace(shape=_plain(t.shape, slots[name].way)) if name in slots else t for name, t in tensors.items()
    }
    return Report.of({name: (_plain(slot.shape, slot.way), None) for name, slot in slots.items()}, held)


def _plain(shape, way):
    """The shape without the axes of pixels, which not all files have."""
    return shape[:2] if way == "pixels" and set(shape[2:]) <= {1} else shape


def cut(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The network's tensors from those of a file that fits; nothing is read."""
    out: dict[str, Any] = {}
    for theirs, slot in slots.items():
        tensor, at = tensors[theirs], 0
        if slot.way == "turn":
            out[slot.names[0]] = Joined((tensor,), turned=True)
        elif slot.way == "swap":
            half = slot.sizes[0] // 2
            out[slot.names[0]] = Joined((rows(tensor, half, 2 * half), rows(tensor, 0, half)))
        else:
            tensor = tensor._replace(shape=_plain(tensor.shape, slot.way))
            for name, size in zip(slot.names, slot.sizes, strict=True):
                out[name] = rows(tensor, at, at + size)
                at += size
    return out
