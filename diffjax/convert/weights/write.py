"""Networks in folders: `config.json`, and safetensors files beside it, one or many with an index; written here."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folder import check_dtype, some
from diffjax.convert.weights.layout import Place, layout, split
from diffjax.convert.weights.names import PARAMS, STEMS, index_of, is_of, weights_of
from diffjax.convert.weights.tensors import Source, writing
from diffjax.core.types import Model
from diffjax.files import replacing
from diffjax.models import kind_of
from diffjax.nn.functional import names_of

SHARD_BYTES = 10 * 10**9


def save(
    model: Model, params: dict, folder: str | os.PathLike, *, dtype: str | None = None, variant: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Writes a network and its parameters as a folder that `load`, diffusers and transformers read.

    One tensor at a time is brought to the host.

    Args:
      model: as `load` and `from_config` return it.
      params: as from `model.init`.
      folder: made if absent; the weights of this variant and the config that it has are replaced, in one move for
        each file after all of them are on the disk.
      dtype: of the parameters of floating point in the files; None for their own.
      variant: of the names of the files, such as "fp16".
      shard_bytes: most bytes of tensors in one file; with more there are several and an index.

    Raises:
      ValueError: for a `dtype` that is not of floating point.
      WeightsError: for parameters of another network, of a type that safetensors does not have, or spread over devices
        of other processes.
      OSError: disk full, folder read-only; what was there is whole.
    """
    check_dtype("dtype", dtype)
    tensors = tensors_of(model, params, folder, dtype)
    write_folder(folder, model.config, tensors, variant=variant, shard_bytes=shard_bytes)


def tensors_of(model: Model, params: dict, target: str | os.PathLike, dtype: str | None) -> dict[str, Source]:
    """The tensors of a network's parameters under the names of its class, to be written to `target`; see `save`."""
    shapes = names_of(jax.eval_shape(model.init, jax.random.key(0)))
    given = names_of(params)
    if {name: tuple(leaf.shape) for name, leaf in given.items()} != {n: tuple(s.shape) for n, s in shapes.items()}:
        wrong = sorted(set(given) ^ set(shapes)) or [n for n in shapes if shapes[n].shape != given[n].shape]
        raise WeightsError(f"{target}: params are not those of this {kind_of(model.config)}: {some(wrong)}")
    far = [name for name, leaf in given.items() if not getattr(leaf, "is_fully_addressable", True)]
    if far:
        raise WeightsError(f"{target}: gather what lies on devices of other processes first: {some(far)}")
    tensors: dict[str, Source] = {}
    for name, place in layout(shapes).items():
        kept = cast(given[name].dtype, dtype)
        for i, key in enumerate(place.keys):
            tensors[key] = Source(kept, place.shape, _reader(place, given[name], i, kept))
    return tensors


def cast(given: Any, dtype: str | None) -> np.dtype:
    """`dtype` for a type of floating point, where it is given; else the type itself."""
    floating = dtype is not None and jnp.issubdtype(given, jnp.floating)
    return jnp.dtype(dtype) if floating else np.dtype(given)


def _reader(place: Place, leaf, i: int, dtype) -> Callable[[], np.ndarray]:
    one = place._replace(keys=place.keys[i : i + 1])

    def read():
        # One layer of a stack; a copy, as JAX keeps what it has brought to the host as long as the array lives.
        part = leaf[i] if place.stacked else jnp.array(leaf, copy=True) if isinstance(leaf, jax.Array) else leaf
        part = np.asarray(part)[None] if place.stacked else np.asarray(part)
        return next(iter(split(one, part).values())).astype(dtype, copy=False)

    return read


def write_folder(
    folder: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Source], *, variant: str | None = None,
    shard_bytes: int = SHARD_BYTES, params: bool = False,
) -> None:  # fmt: skip
    """Writes tensors, one in memory at a time, and the config of their network; see `save`.

    Args:
      params: whether they are under the names of the parameters, `a/b/kernel`.

    Raises:
      ValueError: for a file size below 1.
      WeightsError: for a type that safetensors does not have.
      OSError: as `save`.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes}: expected at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = PARAMS if params else STEMS["architectures" in config]
    shards = _shards(tensors, shard_bytes)
    files = {weights_of(stem, variant, i, len(shards)): shard for i, shard in enumerate(shards)}
    texts = {"config.json": json.dumps(dict(config), indent=2, sort_keys=True)}
    if len(shards) > 1:
        where = {key: name for name, shard in files.items() for key in shard}
        total = {"total_size": sum(source.nbytes for source in tensors.values())}
        index = {"metadata": total, "weight_map": dict(sorted(where.items()))}
        texts[index_of(stem, variant)] = json.dumps(index, indent=2)
    with contextlib.ExitStack() as moves:
        # The first to be entered are the last to be moved: the index and the config follow the weights.
        for name, text in texts.items():
            file = moves.enter_context(replacing(folder / name))
            file.write(text + "\n")
            file.flush()
        for name, shard in files.items():
            moves.enter_context(writing(folder / name, shard, {"format": "pt"}))
    # A reader would take an older index, or weights of an older config, for those of this one.
    for path in list(folder.iterdir()):
        if is_of(path.name, variant) and path.name not in (*files, *texts):
            path.unlink()


def _shards(tensors, most):
    shards: list[dict[str, Source]] = [{}]
    size = 0
    for key, source in tensors.items():
        if shards[-1] and size + source.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][key] = source
        size += source.nbytes
    return shards
