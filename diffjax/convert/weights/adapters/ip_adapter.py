"""IP-Adapters in safetensors files: the projection of pictures under `image_proj`, attention under `ip_adapter`.

Attention is counted over all of the U-Net's, in the order down, up, middle; that of pixels to themselves has the even
numbers and nothing in the file, that to the text the odd ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.adapters.ip_adapter import Adapter, Keys, attentions, projection
from diffjax.convert.weights.errors import WeightsError, some
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.places.layout import Place, layout, place, read, split, type_of
from diffjax.convert.weights.places.match import compare
from diffjax.convert.weights.tensors import Source, Tensor, write
from diffjax.convert.weights.tensors.dtypes import check_dtype
from diffjax.core.types import Model
from diffjax.nn.functional import names_of, nested

PROJECTION = "image_proj."
FACES = re.compile(r"^ip_adapter\.\d+\.to_\w+_lora\.")


def load_ip_adapter(path: str | os.PathLike, model: Model, *, param_dtype: str | None = None) -> Adapter:
    """The adapter in a file, for the U-Net that it is meant for.

    Args:
      path: a safetensors file, such as `ip-adapter_sd15.safetensors`, plain, "plus" or "full face".
      model: the U-Net, as `load` returns it.
      param_dtype: of the parameters; None for that of the file.

    Raises:
      WeightsError: for tensors that are missing, left over or of another shape (all are listed); for an adapter of
        FaceID.
      ValueError: for a network without attention to a text.
      OSError: if the file cannot be read.
    """
    path = Path(path)
    check_dtype("param_dtype", param_dtype)
    tensors = find(path)
    if any(FACES.match(key) for key in tensors):
        raise WeightsError(f"{path}: its attention has LoRA factors: FaceID is not supported")
    try:
        net = projection(_shapes(tensors))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    shapes, places = _places(net.shapes, attentions(jax.eval_shape(model.init, jax.random.key(0))))
    difference = compare(places, tensors, shapes)
    if any(difference):
        raise WeightsError(f"{path}: not the parameters of an IP-Adapter for this network: {difference}")
    leaves = {}
    for name, where in places.items():
        dtype = jax.dtypes.canonicalize_dtype(type_of(where, tensors, param_dtype))
        leaves[name] = jax.device_put(read(where, tensors, (), dtype))
    return _adapter(leaves)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the projection's parameters, for all that a file may hold; the layers of a resampler stacked."""
    keys = {key.removeprefix(PROJECTION): tensor.shape for key, tensor in tensors.items() if key.startswith(PROJECTION)}
    depth = len({key.split(".")[1] for key in keys if re.match(r"layers\.\d+\.", key)})
    out = {}
    for key, shape in keys.items():
        name = key.replace(".", "/")
        if name.endswith("/weight"):
            name, shape = name.removesuffix("weight") + ("kernel" if len(shape) > 1 else "scale"), shape[::-1]
        if name.startswith("layers/0/"):
            name, shape = name.replace("/0/", f"/0:{depth}/", 1), (depth, *shape)
        out[name] = shape
    return out


def _places(made: dict, kernels: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Place]]:
    """The shapes and places of all parameters, under `image_proj/...` and `k/...`, `v/...`."""
    shapes = {f"image_proj/{name}": leaf for name, leaf in names_of(made).items()}
    places = dict(layout(shapes))
    count = 1
    for name, kernel in kernels.items():
        numbers = range(count, count + 2 * kernel.shape[0], 2)
        count = numbers.stop
        for part in "kv":
            keys = tuple(f"ip_adapter.{number}.to_{part}_ip.weight" for number in numbers)
            shapes[f"{part}/{name}"] = kernel
            places[f"{part}/{name}"] = place(f"{name}/kernel", kernel.shape)._replace(keys=keys)
    return shapes, places


def _adapter(leaves: Mapping[str, jax.Array]) -> Adapter:
    by = lambda start: {n.removeprefix(start): leaf for n, leaf in leaves.items() if n.startswith(start)}
    keys, values = by("k/"), by("v/")
    return Adapter(nested(by("image_proj/")), {name: Keys(keys[name], values[name]) for name in keys})


def save_ip_adapter(adapter: Adapter, model: Model, path: str | os.PathLike) -> None:
    """Writes an adapter as `load_ip_adapter` of diffusers' pipelines reads it.

    Raises:
      WeightsError: for an adapter of another network.
      OSError: disk full, folder read-only.
    """
    leaves = {f"image_proj/{name}": leaf for name, leaf in names_of(adapter.projection).items()}
    for name, keys in adapter.attention.items():
        leaves |= {f"k/{name}": keys.k, f"v/{name}": keys.v}
    shapes, places = _places(adapter.projection, attentions(jax.eval_shape(model.init, jax.random.key(0))))
    if {name: tuple(leaf.shape) for name, leaf in leaves.items()} != {n: tuple(s.shape) for n, s in shapes.items()}:
        wrong = sorted(set(leaves) ^ set(shapes)) or [n for n in shapes if shapes[n].shape != leaves[n].shape]
        raise WeightsError(f"{path}: the adapter is for another network: {some(wrong)}")
    tensors = {}
    for name, where in places.items():
        for key, array in split(where, np.asarray(leaves[name])).items():
            tensors[key] = Source.of(array)
    write(path, tensors, {"format": "pt"})
