"""Folders of weights written again: in another type, in other files, or under the names of this library."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.convert.weights.errors import WeightsError, some
from diffjax.convert.weights.folders.find import read_config
from diffjax.convert.weights.folders.save import SHARD_BYTES, write_folder
from diffjax.convert.weights.folders.survey import Survey, check_fits, survey
from diffjax.convert.weights.originals import survey_original
from diffjax.convert.weights.originals.save import check_kind, write_original
from diffjax.convert.weights.places.layout import Place, layout, read, split, type_of
from diffjax.convert.weights.tensors import Source, Tensor, read_header
from diffjax.convert.weights.tensors.dtypes import cast, check_dtype, fitted
from diffjax.models import NETWORKS

# Whose names the tensors get: those of the checkpoint's class, `a/b/kernel` as in `params.safetensors`, or those of the
# network's authors, in one file.
KEYS = ("diffusers", "params", "original")


def rewrite(
    source: str | os.PathLike, target: str | os.PathLike, *, dtype: str | None = None, variant: str | None = None,
    shard_bytes: int = SHARD_BYTES, keys: str | None = None, component: str | None = None, family: str | None = None,
    network: Mapping[str, Any] | None = None, overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Writes the network of the folder `source` into the folder `target`; one tensor is in memory at a time.

    Networks of a class that is not known here keep their tensors' names, and are not checked.

    Args:
      source: with `config.json` and weights, as `load` reads them.
      target: a folder, made if absent; a safetensors file for the keys "original".
      dtype: of the tensors of floating point; None for their own.
      variant: of the files of `source`; those of `target` have none.
      shard_bytes: most bytes of tensors in one file.
      keys: one of `KEYS`; None for those that the source has.
      component, family, network: of an original checkpoint, which network of it, whose where it does not tell, and its
        config where no published one has these shapes; see `load_original`.
      overwrite: whether `target` may hold files; its config and weights are replaced.
      progress: called with the bytes written so far, and of all.

    Raises:
      WeightsError: as `load`; for a target with files in it; or for numbers that are too large for `dtype`.
      ValueError: for an unknown name, names that this class does not have, an argument that says nothing of this
        source, or the folder of an original checkpoint as target.
      OSError: disk full, folder read-only; what was in `target` is whole.
    """
    check_target(target, overwrite, keys)
    check_dtype("dtype", dtype)
    check_keys(keys)
    for name, value in (("family", family), ("network", network)):
        if component is None and value is not None:
            raise ValueError(f"{name}={value!r} is of a component of an original checkpoint: name it, component='vae'")
    if component is not None and variant is not None:
        raise ValueError(f"{source} is one file; variant={variant!r} chooses among those of a folder")
    held = Path(source).parent if os.path.isfile(source) and keys != "original" else source
    if component is not None and os.path.exists(target) and os.path.samefile(held, target):
        # What is written there would take the place of all networks of the source, with one of them.
        itself = "the source" if keys == "original" else f"the folder of {source}"
        raise ValueError(f"{target}: {itself} itself; name another one")
    if component is None:
        found = survey(source, variant)
    else:
        found = survey_original(source, component, config=network, family=family)
    check_fits(found, component or "")
    if not found.tensors:
        raise WeightsError(f"{source}: a config without weights")
    sources = _renamed(found, keys, dtype) if found.model else _kept(found, keys, dtype)
    if keys == "original":
        write_original(found.model.config, watched(sources, progress), target)
        return
    params = keys == "params" if keys else _is_own(found.tensors)
    config = read_config(Path(source)) if component is None else found.model.config
    metadata = {"format": "pt"} if component else _metadata(found)
    sources = watched(sources, progress)
    write_folder(target, config, sources, shard_bytes=shard_bytes, params=params, metadata=metadata)


def _metadata(found: Survey) -> dict[str, str]:
    """What the source's files say of themselves, the first of them where they differ."""
    out: dict[str, str] = {}
    for path in sorted({tensor.path for tensor in found.tensors.values()}, reverse=True):
        out |= read_header(path)[1]
    return {"format": "pt"} | out


def check_keys(keys: str | None) -> None:
    """Raises `ValueError` for what is none of `KEYS`, nor None."""
    if keys not in (None, *KEYS):
        raise ValueError(f"unknown keys {keys!r}; known: {', '.join(KEYS)}")


def check_target(target: str | os.PathLike, overwrite: bool, keys: str | None = None) -> None:
    """Raises `WeightsError` for a target that cannot be written, or that holds what may not be replaced."""
    file, there = keys == "original", os.path.exists(target)
    if file and Path(target).suffix != ".safetensors":
        raise WeightsError(f"{target}: the authors' names are written to one file, such as model.safetensors")
    if not file and not there and Path(target).suffix == ".safetensors":
        raise WeightsError(
            f"{target}: a folder is to be written, and this is the name of a file; name a folder, or ask for one file "
            "under the authors' names by keys='original', --keys=original"
        )
    if there and os.path.isdir(target) == file:
        is_there, wanted = ("folder", "file") if file else ("file", "folder")
        raise WeightsError(f"{target}: it is a {is_there}; a {wanted} is to be written")
    held = "weights" if file and there else some(sorted(os.listdir(target)), 3) if there else ""
    if held and not overwrite:
        raise WeightsError(f"{target}: it holds {held}; name another one, or allow it by overwrite=True, --overwrite")


def watched(sources: Mapping[str, Source], progress: Callable[[int, int], None]) -> dict[str, Source]:
    """The same tensors, that tell `progress(done, total)` when one was read."""
    total, done = sum(source.nbytes for source in sources.values()), [0]

    def reader(source):
        def read():
            array = source.read()
            done[0] += source.nbytes
            progress(done[0], total)
            return array

        return read

    return {name: source._replace(read=reader(source)) for name, source in sources.items()}


def _is_own(tensors):
    return any("/" in name for name in tensors)


def _kept(found: Survey, keys, dtype):
    if keys and (keys == "original" or (keys == "params") != _is_own(found.tensors)):
        raise ValueError(
            f"{found.path}: keys={keys!r} needs a class that is known here, not {found.kind!r}; known: "
            f"{', '.join(NETWORKS)}"
        )
    return {name: _as_it_is(tensor, cast(tensor.dtype, dtype)) for name, tensor in found.tensors.items()}


def _as_it_is(tensor: Tensor, dtype) -> Source:
    return Source(dtype, tensor.shape, lambda: fitted(tensor.part(), dtype))


def _renamed(found: Survey, keys, dtype) -> dict[str, Source]:
    """The tensors of a network that is known, under the names that are asked for."""
    if keys == "original":
        check_kind(found.kind, found.path)
    from_own = _is_own(found.tensors)
    if keys is None or (keys == "params") == from_own:
        return {key: _as_it_is(found.tensors[key], cast(found.tensors[key].dtype, dtype)) for key in found.tensors}
    sources: dict[str, Source] = {}
    for name, shape in found.shapes.items():
        if from_own:
            place, tensor = layout({name: shape})[name], found.tensors[name]
            for i, key in enumerate(place.keys):
                kept = cast(tensor.dtype, dtype)
                sources[key] = Source(kept, place.shape, _layer(place, tensor, i, kept))
        else:
            place = found.places[name]
            kept = type_of(place, found.tensors, dtype)
            sources[name] = Source(kept, tuple(shape.shape), _whole(place, found.tensors, kept))
    return sources


def _layer(place: Place, tensor: Tensor, i: int, dtype) -> Callable[[], np.ndarray]:
    one = place._replace(keys=place.keys[i : i + 1])

    def read():
        part = tensor.part((slice(i, i + 1),)) if place.stacked else tensor.part()
        return fitted(next(iter(split(one, part).values())), dtype)

    return read


def _whole(place: Place, tensors: Mapping[str, Tensor], dtype) -> Callable[[], np.ndarray]:
    return lambda: fitted(read(place, tensors, (), type_of(place, tensors, None)), dtype)
