"""Checks of settings that are each possible and together are not; every one raises a `ConfigError` that names both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax.core import EDM, Table
from diffjax.registry import nearest
from diffjax.train.errors import ConfigError
from diffjax.train.parallel import sharding
from diffjax.train.parallel.activations import constrained, named_axes
from diffjax.train.parallel.mesh import AXES, batch_groups

DRAWS = 4096


def check_guidance(config: ConfigDict, num_classes: int) -> None:
    """Guidance needs classes, and a null class that was trained.

    Raises:
      ConfigError: if `sample.guidance` is not 1 and one of them is missing.
    """
    if config.sample.guidance == 1.0:
        return
    given = f"config.sample.guidance is {config.sample.guidance!r} and "
    if not num_classes:
        raise ConfigError(f"{given}config.data is {config.data!r}, without classes; set config.sample.guidance=1.0")
    if config.label_dropout == 0.0:
        raise ConfigError(
            f"{given}config.label_dropout is 0.0, so the null class that guidance compares with is never trained; "
            "set config.label_dropout=0.1, or config.sample.guidance=1.0"
        )


def check_times(config: ConfigDict, schedule: Any, time: Any) -> None:
    """Draws training times and looks where they lie on the schedule.

    99 % must lie between its ends; half on `EDM`, whose ends are those of sampling grids and not of the schedule, or on
    a schedule of another range. On a table they must reach its last tenth as well.

    Raises:
      ConfigError: if they do not, or a level there is not finite or negative.
    """
    drawn = np.asarray(jax.jit(lambda key: time(key, DRAWS))(jax.random.key(0)), np.float64)
    lo, hi = float(schedule.t_min), float(schedule.t_max)
    # Times are float32: the noisiest may be above t_max by a rounding.
    slack = 1e-6 * max(abs(lo), abs(hi))
    inside = np.mean((drawn >= lo - slack) & (drawn <= hi + slack))
    bounded = isinstance(schedule, Table) or hi == 1.0
    if drawn.shape != (DRAWS,):
        wrong = f"asked for {DRAWS} times, it gives an array of shape {drawn.shape}"
    elif inside < (0.99 if bounded else 0.5):
        wrong = f"{100 * inside:.3g} % of the times lie within the schedule's [{lo:g}, {hi:g}]"
    elif isinstance(schedule, Table) and drawn.max() < 0.9 * hi:
        wrong = f"the times end at {drawn.max():.4g} and the schedule at {hi:g}"
    else:
        level = jax.jit(lambda t: schedule(t))(np.float32(drawn))
        ok = all(np.all(np.isfinite(a)) for a in level[1:]) and min(np.min(level.alpha), np.min(level.sigma)) >= 0
        wrong = "" if ok else "alpha or sigma is negative or not finite at some of the times"
    if wrong:
        raise ConfigError(
            f"config.time is {config.time!r} and config.schedule is {config.schedule!r}: {wrong}; "
            f"use {_fitting(schedule)} with this schedule"
        )


def check_time_scale(config: ConfigDict, schedule: Any, model: Any) -> None:
    """Networks are made for times of at most about 1000: embeddings tell larger ones apart by rounding alone.

    Raises:
      ConfigError: if the schedule's times, multiplied by the network's `time_scale`, are ten times that or more.
    """
    scale = model.config.get("time_scale")
    last = 0.0 if scale is None else float(jax.jit(lambda t: schedule(t).t)(np.float32(schedule.t_max)))
    if scale and scale * last >= 10_000:
        raise ConfigError(
            f"config.model.time_scale is {scale:g} and the times of {config.schedule!r} end at {last:g}: the network "
            f"would be told {scale * last:g}; set config.model.time_scale=1.0 with this schedule"
        )


def fitting_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of a filled config over the devices that are here, which its batch divides over.

    Raises:
      ConfigError: for text that is no mesh, axes that no network knows, sizes that do not fit the devices, or as
        `check_batch`.
    """
    given = f"config.mesh is {config.mesh!r}: "
    try:
        axes = sharding.parse_mesh(config.mesh)
    except ValueError as error:
        raise ConfigError(f"{given}{error}") from error
    check_axis_names(axes or {}, given)
    try:
        mesh = sharding.make_mesh(axes)
    except ValueError as error:
        possible = axes and min(axes.values()) > 0
        more = "; `diffjax inspect --mesh=...` plans a run for devices that are not here" if possible else ""
        raise ConfigError(f"{given}{error}{more}") from error
    check_batch(config, mesh.shape)
    return mesh


def check_batch(config: ConfigDict, axes: Mapping[str, int]) -> None:
    """The batch and the microbatch against the sizes of a mesh's axes.

    Raises:
      ConfigError: if one of them does not divide.
    """
    groups = batch_groups(axes)
    rows = config.batch_size // groups
    if config.batch_size % groups:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}; it must be a multiple of the {groups} devices or groups of "
            f"devices that the mesh {dict(axes)} splits it over; "
            "edit the config file or pass --config.batch_size=VALUE"
        )
    if config.microbatch and rows % config.microbatch:
        raise ConfigError(
            f"config.microbatch is {config.microbatch}; it must divide the {rows} rows that each of {groups} groups of "
            f"devices has of the {config.batch_size} of a batch; edit the config file or pass --config.microbatch=VALUE"
        )


def check_axis_names(axes: Mapping[str, int], given: str) -> None:
    """Refuses axes that nothing is split over; `given` begins the message.

    Raises:
      ConfigError: for the first of them.
    """
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        known = f"known: {', '.join(AXES)}{nearest(unknown[0], AXES)}"
        raise ConfigError(f"{given}unknown mesh axis {unknown[0]!r}; {known}")


def check_mesh(config: ConfigDict, parts: Any, mesh: jax.sharding.Mesh) -> None:
    """The mesh and the sharding against the network.

    Raises:
      ConfigError: if axes of the mesh have no use, or the network's rules do not fit it.
    """
    given = f"config.sharding is {config.sharding!r} and config.mesh is {config.mesh!r}: "
    _check_axes(config, parts.model, mesh, given)
    sequence = mesh.shape.get("sequence", 1) > 1
    if config.sharding != "rules" and not sequence:
        return
    try:
        params = jax.eval_shape(parts.model.init, jax.eval_shape(lambda: jax.random.key(0)))
        sharding.param_sharding(mesh, params, parts.model.rules, config.sharding)
        for shape in parts.dataset.shapes if sequence else ():
            _trace(config, parts, mesh, params, shape)
    except ValueError as error:
        raise ConfigError(given + str(error)) from error


def _check_axes(config, model, mesh, given) -> None:
    """Every axis of the mesh must be one that something is split over: devices along another would only repeat work."""
    name = dict(model.config).get("name", "this network")
    used = {
        "tensor": config.sharding == "rules" and "tensor" in named_axes(model.rules),
        "sequence": config.sharding != "pmap" and "sequence" in named_axes(model.activations),
    }
    for axis, use in used.items():
        if mesh.shape.get(axis, 1) > 1 and not use:
            why = "only transformers, such as 'dit', have tokens to split" if axis == "sequence" else "take 'rules'"
            raise ConfigError(
                f"{given}nothing of the network {name!r} is split over {axis!r} in this mode; {why}, or give these "
                "devices to 'data' or 'fsdp'"
            )
    kernel = dict(model.config).get("attention_impl")
    if mesh.shape.get("sequence", 1) > 1 and kernel in ("cudnn", "tokamax", "splash"):
        name = "cuDNN" if kernel == "cudnn" else kernel
        raise ConfigError(
            f"{given}{name}'s attention takes the whole sequence on one device; give the devices of 'sequence' to "
            "another axis, or take attention_impl='xla'"
        )
    if kernel == "splash" and mesh.size > 1 and config.sharding != "pmap":
        raise ConfigError(
            f"{given}splash attention is a kernel of one device, which the compiler does not divide; take "
            "attention_impl='chunked', or sharding='pmap'"
        )
    if config.sharding == "pmap" and (jax.process_count() > 1 or mesh.shape.get("data", 1) != mesh.size):
        raise ConfigError(f"{given}pmap is data parallel in one process; take the mesh 'data=-1', or sharding='data'")
    named = named_axes(model.rules) | named_axes(model.activations)
    if config.sharding == "rules" and not named & set(mesh.axis_names):
        raise ConfigError(
            f"{given}the rules of the network {name!r} name none of the axes {', '.join(mesh.axis_names)}; those of "
            "this library's networks need 'fsdp', 'tensor' or both, as in config.mesh='data=2,fsdp=2,tensor=2'"
        )


def _trace(config, parts, mesh, params, shape) -> None:
    """Traces the network on images of `shape` with its activations on the mesh; raises where they do not divide."""
    x = jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32)
    t = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    jax.eval_shape(constrained(parts.model.apply, mesh, parts.model.activations), params, x, t)


def _fitting(schedule) -> str:
    if isinstance(schedule, EDM):
        return "time='lognormal(mean=-1.2, std=1.2)'"
    if isinstance(schedule, Table):
        return f"time='discrete(num_steps={len(schedule.alphas_cumprod)})'"
    return "time='uniform()', 'stratified()' or 'logit_normal()'"
