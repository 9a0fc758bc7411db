"""Networks in folders: `config.json`, and safetensors files beside it, one or many with an index; read here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diffjax.convert.weights.errors import WeightsError, some
from diffjax.convert.weights.folders.survey import Survey, check_fits, of_8_bits, opened
from diffjax.convert.weights.places.layout import read, type_of
from diffjax.convert.weights.tensors.dtypes import check_dtype
from diffjax.core.types import Model
from diffjax.nn.functional import names_of, nested


def load(
    path: str | os.PathLike, *, config: Mapping[str, Any] | None = None, variant: str | None = None,
    param_dtype: str | None = None, sharding: Callable[[Model, dict], Any] | None = None, **how,
) -> tuple[Model, dict]:  # fmt: skip
    """The network of a folder, and its parameters.

    The values are taken as they are, NaN as well. Besides the parameters, host memory holds one of them, or its parts,
    while it is on its way to a device.

    Args:
      path: a folder with `config.json` and safetensors files, such as `stable-diffusion/unet`; or one such file.
      config: settings instead of those of `config.json`.
      variant: of the files, such as "fp16" for `model.fp16.safetensors`; None for those without one.
      param_dtype: of the parameters of floating point; None for those of the file, the widest of its layers for a
        stack. Without x64 mode float64 becomes float32, as everywhere in JAX. Types of 8 bits need it: "bfloat16".
      sharding: `(model, shapes) -> tree of jax.sharding.Sharding`, where the parameters are to lie; each device's part
        is read from the disk for it. None for the default device.
      how: how the network is computed, see `diffjax.models.settings.how`.

    Raises:
      WeightsError: for files that are damaged, pickled, or do not hold the network's parameters, each exactly once;
        for parameters of 8 bits without a `param_dtype`.
      ValueError: for a config that describes no network that is known here; for a file and a variant; for a `sharding`
        that does not tell of each parameter.
      OSError: if something cannot be read.
    """
    check_dtype("param_dtype", param_dtype)
    found = opened(path, config=config, variant=variant, **how)
    check_fits(found)
    return found.model, parameters(found, param_dtype, sharding)


def parameters(
    found: Survey, param_dtype: str | None = None, sharding: Callable[[Model, dict], Any] | None = None
) -> dict:  # fmt: skip
    """The parameters of a network whose weights fit; the rest as for `load`."""
    if param_dtype is None and (told := of_8_bits(found)):
        raise WeightsError(f"{found.path}: {told}")
    where = dict.fromkeys(found.places) if sharding is None else _placed(found, sharding)
    return nested({
        name: _leaf(place, found.tensors, tuple(found.shapes[name].shape), param_dtype, where[name])
        for name, place in found.places.items()
    })  # fmt: skip


def _placed(found: Survey, sharding: Callable[[Model, dict], Any]) -> dict[str, jax.sharding.Sharding]:
    """Where each parameter is to lie; raises `ValueError` for what tells that of others, or not at all."""
    if not callable(sharding):
        told = "expected a function, such as lambda model, shapes: param_sharding(mesh, shapes, model.rules, 'fsdp')"
        raise ValueError(f"sharding={sharding!r}: {told}")
    where = names_of(sharding(found.model, nested(found.shapes)))
    if wrong := sorted(where.keys() ^ found.places.keys()):
        raise ValueError(f"sharding gave no tree like that of the parameters; they differ at {some(wrong)}")
    return where


def _leaf(place, tensors, shape, dtype, sharding):
    dtype = jax.dtypes.canonicalize_dtype(type_of(place, tensors, dtype))
    parts: dict[str, np.ndarray] = {}

    def part(index):
        # Devices that hold the same part share what is read.
        if str(index) not in parts:
            parts[str(index)] = read(place, tensors, index, dtype)
        return parts[str(index)]

    leaf = jax.device_put(part(())) if sharding is None else jax.make_array_from_callback(shape, sharding, part)
    # Else the next one is read while this one is still in the host's memory.
    return jax.block_until_ready(leaf)
