"""Networks in folders: `config.json`, and safetensors files beside it, one or many with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.aliases import TIED, modern, without_pixels
from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.layout import Place, layout, read, split
from diffjax.convert.weights.tensors import Source, Tensor, read_header, write
from diffjax.core.types import Model
from diffjax.files import write_text
from diffjax.models import from_config, kind_of
from diffjax.nn.functional import names_of

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SHARD_BYTES = 10 * 10**9
LONGEST_JSON = 100_000_000


class Report(NamedTuple):
    """How the tensors of a file and the parameters of a network differ; names are those of the file.

    Attributes:
      missing: tensors of parameters that the file lacks.
      unexpected: tensors that are of no parameter.
      misshapen: `(name, shape in the file, shape of the network)`.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def __str__(self) -> str:
        wrong = [f"{name} {list(given)} instead of {list(wanted)}" for name, given, wanted in self.misshapen]
        rows = ("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", wrong)
        return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in rows if names) or "no difference"


def load(
    path: str | os.PathLike, *, config: Mapping[str, Any] | None = None, variant: str | None = None,
    param_dtype: str | None = None, sharding: Callable[[Model, dict], Any] | None = None, **how,
) -> tuple[Model, dict]:  # fmt: skip
    """The network of a folder, and its parameters.

    Args:
      path: a folder with `config.json` and safetensors files, such as `stable-diffusion/unet`.
      config: settings instead of those of `config.json`.
      variant: of the files, such as "fp16" for `model.fp16.safetensors`; None for those without one.
      param_dtype: of the parameters of floating point; None for those of the file.
      sharding: `(model, shapes) -> tree of jax.sharding.Sharding`, where the parameters are to lie; each device's part
        is read from the disk for it. None for the default device.
      how: how the network is computed, see `diffjax.models.settings.how`.

    Raises:
      WeightsError: for files that are damaged, pickled, or do not hold the network's parameters, each exactly once.
      ValueError: for a config that describes no network that is known here.
      OSError: if something cannot be read.
    """
    path = Path(path)
    config = read_config(path) if config is None else config
    # Before a network is built: a folder without weights says so at once.
    files = find(path, variant)
    model = from_config(config, **how)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    places = layout(names_of(shapes))
    wanted = {key for place in places.values() for key in place.keys}
    tensors = untie(kind_of(config), rename(kind_of(config), files), wanted)
    difference = compare(places, tensors)
    if any(difference):
        raise WeightsError(f"{path}: not the parameters of its {kind_of(config)}: {difference}")
    shardings = names_of(sharding(model, shapes)) if sharding else dict.fromkeys(places)
    leaves = {
        name: _array(place, tensors, tuple(shape.shape), param_dtype, shardings[name])
        for (name, place), shape in zip(places.items(), jax.tree.leaves(shapes), strict=True)
    }
    return model, jax.tree.unflatten(jax.tree.structure(shapes), leaves.values())


def _array(place: Place, tensors, shape, dtype, sharding):
    found = {tensors[key].dtype for key in place.keys}
    given = np.result_type(*found) if len(found) > 1 else found.pop()
    floating = dtype is not None and jnp.issubdtype(given, jnp.floating)
    dtype = jnp.dtype(dtype) if floating else given
    part = lambda index: read(place, tensors, index, dtype)
    return jnp.asarray(part(())) if sharding is None else jax.make_array_from_callback(shape, sharding, part)


def save(
    model: Model, params: dict, folder: str | os.PathLike, *, dtype: str | None = None, variant: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Writes a network and its parameters as a folder that `load`, diffusers and transformers read.

    Args:
      model: as `load` and `from_config` return it.
      params: as from `model.init`; each is brought to the host when its turn comes.
      folder: made if absent; files of the same names are replaced.
      dtype: of the parameters of floating point in the files; None for their own.
      variant: of the names of the files, such as "fp16".
      shard_bytes: most bytes of tensors in one file; with more there are several and an index.

    Raises:
      WeightsError: for parameters of another network, or of a type that safetensors does not have.
      OSError: disk full, folder read-only; files that were there are whole.
    """
    folder = Path(folder)
    shapes = names_of(jax.eval_shape(model.init, jax.random.key(0)))
    given = names_of(params)
    if {name: tuple(leaf.shape) for name, leaf in given.items()} != {n: tuple(s.shape) for n, s in shapes.items()}:
        wrong = sorted(set(given) ^ set(shapes)) or [n for n in shapes if shapes[n].shape != given[n].shape]
        raise WeightsError(f"{folder}: params are not those of this {kind_of(model.config)}: {_some(wrong)}")
    tensors: dict[str, Source] = {}
    for name, place in layout(shapes).items():
        floating = dtype is not None and jnp.issubdtype(given[name].dtype, jnp.floating)
        kept = jnp.dtype(dtype) if floating else np.dtype(given[name].dtype)
        for i, key in enumerate(place.keys):
            tensors[key] = Source(kept, place.shape, _source(place, given[name], i, kept))
    folder.mkdir(parents=True, exist_ok=True)
    stem = STEMS[1] if "architectures" in model.config else STEMS[0]
    shards = _shards(tensors, shard_bytes)
    names = [_file(stem, variant, i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write(folder / name, shard, {"format": "pt"})
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = {"total_size": sum(source.nbytes for source in tensors.values())}
        text = json.dumps({"metadata": total, "weight_map": dict(sorted(where.items()))}, indent=2)
        write_text(folder / _index(stem, variant), text + "\n")
    write_text(folder / "config.json", json.dumps(dict(model.config), indent=2, sort_keys=True) + "\n")


def _source(place, leaf, i, dtype):
    def read():
        # One layer of a stack at a time.
        part = np.asarray(leaf[i])[None] if place.stacked else np.asarray(leaf)
        one = place._replace(keys=place.keys[i : i + 1])
        return next(iter(split(one, part).values())).astype(dtype)

    return read


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


def _file(stem, variant, i, count):
    part = f"-{i + 1:05d}-of-{count:05d}" if count > 1 else ""
    return f"{stem}{f'.{variant}' if variant else ''}{part}.safetensors"


def _index(stem, variant):
    return f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
      WeightsError: if it is no JSON object.
      OSError: if it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f"; it has those of {', '.join(parts)}: name one of these folders" if parts else ""
        raise FileNotFoundError(f"{folder}: no config.json, which says what network this is{hint}")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raises `WeightsError` for anything else."""
    if path.stat().st_size > LONGEST_JSON:
        raise WeightsError(f"{path}: {path.stat().st_size} bytes are too many for a file of settings")
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: no JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def find(path: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of the weights in a folder, by name.

    Raises:
      WeightsError: for damaged files, pickles, an index that leaves its folder or does not fit its files, or a folder
        without weights.
    """
    if path.is_file():
        _refuse_pickle(path)
        return read_header(path)[0]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder or file")
    for stem in STEMS:
        if (path / _index(stem, variant)).is_file():
            return _sharded(path, path / _index(stem, variant))
        if (path / _file(stem, variant, 0, 1)).is_file():
            return read_header(path / _file(stem, variant, 0, 1))[0]
    here = sorted(p.name for p in path.iterdir() if p.is_file())
    pickles = [path / name for name in here if name.endswith(PICKLES)]
    weights = [name for name in here if name.endswith(".safetensors")]
    if pickles and not weights:
        _refuse_pickle(pickles[0])
    variants = f" with variant {variant!r}" if variant else " without a variant"
    found = f"it has {_some(weights)}" if weights else "it has no .safetensors file"
    raise WeightsError(
        f"{path}: no weights{variants}; looked for {' and '.join(_file(s, variant, 0, 1) for s in STEMS)}, or an index "
        f"of these; {found}"
    )


def _refuse_pickle(path: Path) -> None:
    if path.name.endswith(PICKLES):
        raise WeightsError(
            f"{path}: a pickle, which runs code of its own when it is read; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'model.safetensors')"
        )


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not (isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())):
        raise WeightsError(f"{index}: expected a 'weight_map' from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(where.values()):
        # A name and no path: whatever is read lies in this folder.
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise WeightsError(f"{index}: {name[:200]!r} is no name of a file in its folder")
        _refuse_pickle(folder / name)
        if not (folder / name).is_file():
            raise WeightsError(f"{index}: it names {name}, which is not there; copy the folder again")
        held = read_header(folder / name)[0]
        for key in held:
            if where.get(key) != name:
                told = f"it says {where[key]}" if key in where else "it does not have it"
                raise WeightsError(f"{index}: tensor {key!r} lies in {name}, but {told}")
        tensors |= held
    gone = sorted(where.keys() - tensors.keys())
    if gone:
        raise WeightsError(f"{index}: tensors that its files lack: {_some(gone)}")
    return tensors


def rename(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network of class `kind` under today's names, without those that are no parameters."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        today = modern(kind, name)
        if today in out:
            raise WeightsError(f"{tensor.path}: two tensors are {today!r}, one of them {name!r}")
        if today is not None:
            out[today] = tensor._replace(shape=without_pixels(kind, today, tensor.shape))
    return out


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
    bits = lambda tensor: tensor.open().reshape(-1).view(np.uint8)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(bits(a), bits(b))


def compare(places: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> Report:
    """What is missing, unexpected or misshapen among the tensors of a file."""
    wanted = {key: place.shape for place in places.values() for key in place.keys}
    missing = tuple(sorted(wanted.keys() - tensors.keys()))
    unexpected = tuple(sorted(tensors.keys() - wanted.keys()))
    both = sorted(wanted.keys() & tensors.keys())
    wrong = tuple((k, tensors[k].shape, wanted[k]) for k in both if tensors[k].shape != wanted[k])
    return Report(missing, unexpected, wrong)


def _some(names, most: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
