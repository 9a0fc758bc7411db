"""Networks in folders: `config.json`, and safetensors files beside it, one or many with an index; written here."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError, some, told_of
from diffjax.convert.weights.folders.names import PARAMS, STEMS, index_of, is_index, is_of, weights_of
from diffjax.convert.weights.places.layout import Place, layout, split
from diffjax.convert.weights.tensors.dtypes import cast, check_dtype, fitted
from diffjax.convert.weights.tensors.strict import read_json
from diffjax.convert.weights.tensors.write import Source, writing
from diffjax.core.types import Model
from diffjax.files import replacing, write_text
from diffjax.models import kind_of
from diffjax.nn.functional import check_params, names_of

SHARD_BYTES = 10 * 10**9
CONFIG = "config.json"
FORMAT = MappingProxyType({"format": "pt"})  # whose order of axes it is


def save(
    model: Model, params: dict, folder: str | os.PathLike, *, dtype: str | None = None, variant: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Writes a network and its parameters as a folder that `load`, diffusers and transformers read.

    One tensor at a time is brought to the host.

    Args:
      model: as `load` and `from_config` return it.
      params: as from `model.init`.
      folder: made if absent; the weights of this variant and the config that it has are replaced, after the new ones
        are on the disk: a reader finds the one or the other.
      dtype: of the parameters of floating point in the files; None for their own.
      variant: of the names of the files, such as "fp16".
      shard_bytes: most bytes of tensors in one file; with more there are several and an index.

    Raises:
      ValueError: for a `dtype` that is not of floating point.
      WeightsError: for a network that is of no class of checkpoints, or one with adapters in it; for parameters of
        another network, of a type that safetensors does not have, too large for `dtype`, or spread over devices of
        other processes.
      OSError: disk full, folder read-only; what was there is whole.
    """
    check_dtype("dtype", dtype)
    _check_class(model, folder)
    tensors = tensors_of(model, params, folder, dtype)
    if adapters := [key for key in tensors if ".processor." in key]:
        told = "parameters of IP-Adapters, which have files of their own (save_ip_adapter); save the U-Net without them"
        raise WeightsError(f"{folder}: {told}: {some(adapters)}")
    write_folder(folder, model.config, tensors, variant=variant, shard_bytes=shard_bytes)


def _check_class(model: Model, folder: str | os.PathLike) -> None:
    """Raises `WeightsError` for a network such as `diffjax.models.dit`, whose names no checkpoint has."""
    try:
        kind_of(model.config)
    except ValueError as error:
        raise WeightsError(
            f"{folder}: {error}; save_official_dit writes a dit of this library, `diffjax convert` the network of a "
            "run, and save_params of diffjax.train.checkpoint.init_from the parameters of any network"
        ) from None


def tensors_of(model: Model, params: dict, target: str | os.PathLike, dtype: str | None) -> dict[str, Source]:
    """The tensors of a network's parameters under the names of its class, to be written to `target`; see `save`."""
    tree = jax.eval_shape(model.init, jax.random.key(0))
    with told_of(Path(target)):
        check_params(params, tree)
    shapes, given = names_of(tree), names_of(params)
    far = [name for name, leaf in given.items() if not getattr(leaf, "is_fully_addressable", True)]
    if far:
        raise WeightsError(f"{target}: gather what lies on devices of other processes first: {some(far)}")
    tensors: dict[str, Source] = {}
    for name, place in layout(shapes).items():
        kept = cast(given[name].dtype, dtype)
        for i, key in enumerate(place.keys):
            tensors[key] = Source(kept, place.shape, _reader(place, given[name], i, kept))
    return tensors


def _reader(place: Place, leaf, i: int, dtype) -> Callable[[], np.ndarray]:
    one = place._replace(keys=place.keys[i : i + 1])

    def read():
        # One layer of a stack; a copy, as JAX keeps what it has brought to the host as long as the array lives.
        part = leaf[i] if place.stacked else jnp.array(leaf, copy=True) if isinstance(leaf, jax.Array) else leaf
        part = np.asarray(part)[None] if place.stacked else np.asarray(part)
        return fitted(next(iter(split(one, part).values())), dtype)

    return read


def write_folder(
    folder: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Source], *, variant: str | None = None,
    shard_bytes: int = SHARD_BYTES, params: bool = False, metadata: Mapping[str, str] = FORMAT,
) -> None:  # fmt: skip
    """Writes tensors, one in memory at a time, and the config of their network; see `save`.

    What a reader finds is replaced by one move, that of the index or of the only file. Several files lie there before,
    under names that nothing knows; the old ones go afterwards. A config that changes is away while the weights are
    moved: one that is killed then leaves a folder without a config, and not that of other weights.

    Args:
      params: whether they are under the names of the parameters, `a/b/kernel`.
      metadata: of each file.

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
    parts = _named(folder, stem, variant, shards) if len(shards) > 1 else {}
    head = index_of(stem, variant) if parts else weights_of(stem, variant)
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    before = _held(folder / CONFIG)
    changed = before is None or before != json.loads(text)
    with contextlib.ExitStack() as moves:
        # The first to be entered are the last to be moved, and no move comes before all is written.
        if changed:
            _prepare(moves, folder / CONFIG, text)
        moves.push(lambda error, *_: None if error else _clean(folder, variant, {head, *parts}))
        moves.enter_context(_undoing(folder, parts))
        if parts:
            _prepare(moves, folder / head, _index(parts))
        else:
            moves.enter_context(writing(folder / head, tensors, metadata))
        moves.push(lambda error, *_: None if error or not changed else (folder / CONFIG).unlink(missing_ok=True))
        for name, shard in parts.items():
            moves.enter_context(writing(folder / name, shard, metadata))
    _rename(folder, head, parts, {name: weights_of(stem, variant, i, len(parts)) for i, name in enumerate(parts)})


def _held(config: Path) -> dict[str, Any] | None:
    """The settings in a config, if it is one."""
    try:
        return read_json(config)
    except (WeightsError, OSError):
        return None


def _prepare(moves: contextlib.ExitStack, path: Path, text: str) -> None:
    file = moves.enter_context(replacing(path))
    file.write(text)
    file.flush()


@contextlib.contextmanager
def _undoing(folder: Path, parts: Iterable[str]) -> Iterator[None]:
    """After an error takes away the files of these names, and puts back the config that was there."""
    config = folder / CONFIG
    before = config.read_bytes() if config.is_file() else None
    try:
        yield
    except BaseException:
        for name in parts:
            (folder / name).unlink(missing_ok=True)
        if before is not None and not config.exists():
            config.write_bytes(before)
        raise


def _index(parts: Mapping[str, Mapping[str, Source]]) -> str:
    """The text of an index of files with these tensors."""
    where = {key: name for name, shard in parts.items() for key in shard}
    size = sum(source.nbytes for shard in parts.values() for source in shard.values())
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


def _named(folder: Path, stem: str, variant: str | None, shards: list) -> dict[str, Any]:
    """The shards by names that no file of the folder has."""
    for n in itertools.count(1):
        tag = f"-{n}" if n > 1 else ""
        names = [weights_of(stem, variant, i, len(shards), tag) for i in range(len(shards))]
        if not any(os.path.lexists(folder / name) for name in names):
            return dict(zip(names, shards, strict=True))


def _clean(folder: Path, variant: str | None, kept: set[str]) -> None:
    """Takes away other weights of the variant, which a reader would take for those that are kept."""
    old = [path for path in folder.iterdir() if is_of(path.name, variant) and path.name not in kept]
    # An index before its files.
    for path in sorted(old, key=lambda path: (not is_index(path.name), path.name)):
        path.unlink()


def _rename(folder: Path, head: str, parts: Mapping[str, Mapping[str, Source]], plain: Mapping[str, str]) -> None:
    """Gives parts their usual names, once nothing else has these: both for a while, so that no index is ever wrong."""
    linked = []
    try:
        for name in parts:
            if name != plain[name]:
                os.link(folder / name, folder / plain[name])
                linked.append(name)
        if linked:
            write_text(folder / head, _index({plain[name]: shard for name, shard in parts.items()}))
    except OSError:
        # File systems without such links: the names stay, and the index has them.
        linked = [plain[name] for name in linked]
    for name in linked:
        (folder / name).unlink()


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
