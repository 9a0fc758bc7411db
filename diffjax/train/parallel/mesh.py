"""The devices of a run as a mesh of named axes, and how a batch lies on it.

`data` and `fsdp` split the batch; `tensor` splits the features of a layer and `sequence` its tokens, so that the
devices along these two work on the same rows. Axis names appear in this folder, and in the rules that a network brings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.registry import nearest

BATCH_AXES = ("data", "fsdp")
AXES = (*BATCH_AXES, "tensor", "sequence")


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the named axes over the devices, all axes of type Auto.

    Args:
      axes: size of each axis of `AXES`, slowest first; one may be -1 for "the rest". None is `{"data": -1}`.
      devices: None for all devices of all processes.

    Raises:
      ValueError: for an axis of another name, or if the product of the sizes is not the number of devices.
    """
    if isinstance(axes, str):
        raise ValueError(f"mesh axes {axes!r}: expected sizes by name, as `parse_mesh` makes them of such a text")
    axes = dict(axes or {"data": -1})
    for axis in axes:
        if axis not in AXES:
            known = f"known: {', '.join(AXES)}{nearest(str(axis), AXES)}"
            raise ValueError(f"unknown mesh axis {axis!r}; {known}; `jax.make_mesh` makes meshes of other names")
    devices = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in axes.values() if size != -1)
    open_axes = [name for name, size in axes.items() if size == -1]
    if len(open_axes) == 1 and known > 0 and len(devices) % known == 0:
        axes[open_axes[0]] = len(devices) // known
    if math.prod(axes.values()) != len(devices) or min(axes.values()) < 1:
        raise ValueError(
            f"mesh axes {axes} do not fit {len(devices)} devices; the sizes must multiply to {len(devices)}, "
            "at most one may be -1"
        )
    # Explicit axes, the default of jax.make_mesh, reject the reshapes of a group norm over a sharded batch.
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def parse_mesh(text: str) -> dict[str, int] | None:
    """`{"data": 2, "fsdp": 4}` from `"data=2,fsdp=4"`, for `make_mesh`; None from `""`.

    Raises:
      ValueError: for text of another form, or an axis named twice.
    """
    axes: dict[str, int] = {}
    for item in text.split(",") if text.strip() else ():
        name, _, size = (part.strip() for part in item.partition("="))
        if not name.isidentifier() or not size.removeprefix("-").isdecimal() or name in axes:
            raise ValueError(f"cannot read mesh axis {item!r}; expected distinct axes, as in 'data=2,fsdp=2,tensor=2'")
        axes[name] = int(size)
    return axes or None


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that split the batch: those of `data` and `fsdp` that it has."""
    return tuple(axis for axis in mesh.axis_names if axis in BATCH_AXES)


def batch_groups(axes: Mapping[str, int]) -> int:
    """Into how many parts the batch is split on a mesh of these sizes, its `shape`; the devices of one group work on
    the same rows."""
    return math.prod(size for axis, size in axes.items() if axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the first axis of `[B, ...]` over `batch_axes`, B a multiple of `batch_groups`."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh) or None))


def place(tree: Any, shardings: Any) -> Any:
    """The arrays of `tree`, global values known to every process, at their shardings.

    Nothing crosses between processes, as it does in `jax.device_put`, which compares the values of all.

    Args:
      tree: host or device arrays.
      shardings: a tree of shardings like `tree`, or one for all leaves.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        if shardings.is_fully_addressable:
            return jax.device_put(tree, shardings)
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put, tree, shardings)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A global batch, `[B, ...]` over the groups of devices, from the rows that this process has read.

    A process reads the rows of the groups that it has devices in; without axes that cross processes that is its share
    of the batch, `[B / processes, ...]`.

    Raises:
      ValueError: if the rows do not divide over this process's groups.
    """
    sharding = batch_sharding(mesh)
    places = sharding.addressable_devices_indices_map((batch_groups(mesh.shape),)).values()
    local = len({str(index) for index in places})

    def put(rows):
        if len(rows) % local:
            raise ValueError(
                f"a batch of {len(rows)} rows does not divide over {local} devices; choose a multiple of {local}"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(rows))

    return jax.tree.map(put, batch)


def gather(array: Any) -> np.ndarray:
    """The whole of an array in host memory; of one that spans processes, on all of them, which must all call this."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _put(leaf, sharding):
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
