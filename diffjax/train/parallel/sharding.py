"""Where every array of a training run lives: a mesh, regex rules over parameter names, and what follows from them.

Axis names appear here and nowhere else in the library. A jitted step whose inputs carry these shardings needs no other
change: XLA inserts the communication.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.registry import nearest
from diffjax.train import paths

log = logging.getLogger(__name__)

Rules = Sequence[tuple[str, Sequence]]
MODES = ("data", "fsdp", "rules")


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the named axes over the devices, all axes of type Auto.

    Args:
      axes: size of each axis, slowest first; one may be -1 for "the rest". None is `{"data": -1}`.
      devices: None for all devices of all processes.

    Raises:
      ValueError: if the product of the sizes is not the number of devices.
    """
    axes = dict(axes or {"data": -1})
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


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits the first axis of `[B, ...]` over all devices; B must be a multiple of their number."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def param_sharding(mesh: Mesh, params: Any, rules: Rules = (), mode: str = "data") -> Any:
    """A tree of `NamedSharding` like `params`.

    Args:
      mesh: as from `make_mesh`.
      params: arrays or `jax.ShapeDtypeStruct`.
      rules: for the mode `"rules"`: `[(regex over "a/b/c" names, axes), ...]` with a mesh axis name, a tuple of names
        or None per array axis (None for those left out). The first rule that matches wins and every parameter must be
        covered. Mesh axes that do not divide their array axis are dropped there, and that is logged.
      mode: `"data"` puts a copy on every device; `"fsdp"` splits the largest axis of each parameter that divides by the
        number of devices over all of them, and copies parameters that have none; `"rules"`.

    Raises:
      ValueError: for an unknown mode or mesh axis, an uncovered parameter, or more axes than the parameter has.
    """
    leaves = paths.named_leaves(params)
    if mode not in MODES:
        raise ValueError(f"unknown sharding {mode!r}; known: {', '.join(MODES)}{nearest(mode, MODES)}")
    if mode == "rules":
        axes = paths.match(rules, leaves, "sharding")
    else:
        axes = {n: _largest(leaf.shape, mesh) if mode == "fsdp" else () for n, leaf in leaves.items()}
    table = {n: NamedSharding(mesh, _spec(n, leaf.shape, axes[n], mesh)) for n, leaf in leaves.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: table[paths.name(path)], params)


def state_sharding(mesh: Mesh, state: Any, rules: Rules = (), mode: str = "data") -> Any:
    """A tree of `NamedSharding` like `state`, in which averages and optimiser moments lie where their parameter does.

    A leaf of `state` follows the parameter whose name ends the leaf's own (`ema/.../a/b` and `opt_state/0/mu/a/b`
    follow `a/b`) if the shapes agree, the longest such name first; every other leaf, such as a step count, is copied.

    Args:
      mesh: as from `make_mesh`.
      state: a pytree with a field `params`, whose names the rules speak of; arrays or `jax.ShapeDtypeStruct`.
      rules, mode: as `param_sharding`.

    Raises:
      ValueError: as `param_sharding`.
    """
    params = state.params
    tree = param_sharding(mesh, params, rules, mode)
    table = {
        paths.components(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True
        )
    }

    def follow(path, leaf):
        parts = paths.components(path)
        for start in range(len(parts)):
            shape, sharding = table.get(parts[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(follow, state)


def place(tree: Any, shardings: Any) -> Any:
    """The arrays of `tree`, global values known to every process, at their shardings.

    Args:
      tree: host or device arrays.
      shardings: a tree of shardings like `tree`, or one for all leaves.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put, tree, shardings)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """A global batch, `[B, ...]` over all devices, from the rows `[B / processes, ...]` that this process has read.

    Raises:
      ValueError: if B is not a multiple of the number of devices.
    """
    sharding = batch_sharding(mesh)
    local = max(1, mesh.size // jax.process_count())

    def put(rows):
        if len(rows) % local:
            raise ValueError(
                f"a batch of {len(rows)} rows does not divide over {local} devices; choose a multiple of {local}"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(rows))

    return jax.tree.map(put, batch)


def _put(leaf, sharding):
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _largest(shape: tuple[int, ...], mesh: Mesh) -> tuple:
    """All mesh axes on the largest array axis that their product divides, the last of equals; none if there is none."""
    fits = [i for i, size in enumerate(shape) if size and size % mesh.size == 0]
    if not fits:
        return ()
    best = max(fits, key=lambda i: (shape[i], i))
    return (None,) * best + (mesh.axis_names,)


def _spec(name: str, shape: tuple[int, ...], axes: Sequence, mesh: Mesh) -> PartitionSpec:
    if len(axes) > len(shape):
        raise ValueError(f"sharding rule for {name!r} has {len(axes)} axes {tuple(axes)}, its shape is {shape}")
    spec = []
    for size, entry in zip(shape, axes, strict=False):
        group = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for axis in group:
            if axis not in mesh.shape:
                hint = nearest(axis, mesh.axis_names)
                raise ValueError(f"{name!r}: unknown mesh axis {axis!r}; known: {', '.join(mesh.axis_names)}{hint}")
        ways = math.prod(mesh.shape[axis] for axis in group)
        if group and size % ways:
            log.info("%s %s: axis of size %d is not split %d ways over %s", name, shape, size, ways, group)
            group = ()
        spec.append(group or None)
    return PartitionSpec(*spec)
