"""Networks in folders: `config.json`, and safetensors files beside it, one or many with an index; read here."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.aliases import TIED, modern, without_pixels
from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.layout import MOST_LAYERS, Place, places_of, read
from diffjax.convert.weights.names import STEMS, indices_of, weights_of
from diffjax.convert.weights.strict import parse, shown
from diffjax.convert.weights.tensors import Tensor, read_header, stamp_of
from diffjax.core.types import Model
from diffjax.models import from_config, kind_of
from diffjax.nn.functional import names_of, nested

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
LONGEST_JSON = 20_000_000
# Settings that count what is built one by one.
COUNTS = re.compile("layers|blocks|depth")
PIECE = 1 << 24  # bytes that are compared at a time


class Report(NamedTuple):
    """How the tensors of a file and the parameters of a network differ; names are those of the file.

    Attributes:
      missing: tensors of parameters that the file lacks.
      unexpected: tensors that are of no parameter.
      misshapen: `(name, shape in the file, shape of the network)`.
      mistyped: `(name, type in the file, type of the network)`, where one is of floating point and the other is not.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    mistyped: tuple[tuple[str, str, str], ...] = ()

    @classmethod
    def of(cls, wanted: Mapping[str, tuple[tuple[int, ...], Any]], tensors: Mapping[str, Tensor]) -> Report:
        """How `tensors` differ from the `(shape, type)` that are wanted; no type is compared where None is."""
        both = [(name, tensors[name], *wanted[name]) for name in sorted(wanted.keys() & tensors.keys())]
        floating = lambda dtype: jnp.issubdtype(dtype, jnp.floating)
        return cls(
            tuple(sorted(wanted.keys() - tensors.keys())),
            tuple(sorted(tensors.keys() - wanted.keys())),
            tuple((name, held.shape, shape) for name, held, shape, _ in both if held.shape != shape),
            tuple(
                (name, str(held.dtype), str(dtype)) for name, held, _, dtype in both
                if dtype is not None and floating(held.dtype) != floating(dtype)
            ),
        )  # fmt: skip

    def __str__(self) -> str:
        shapes = [f"{name} {list(given)} instead of {list(wanted)}" for name, given, wanted in self.misshapen]
        types = [f"{name} {given} instead of {wanted}" for name, given, wanted in self.mistyped]
        rows = {
            "missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes, "of another type": types
        }  # fmt: skip
        told = [f"{len(names)} {what}: {some(names)}" for what, names in rows.items() if names]
        return "; ".join(told) or "no difference"


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
        stack. Without x64 mode float64 becomes float32, as everywhere in JAX.
      sharding: `(model, shapes) -> tree of jax.sharding.Sharding`, where the parameters are to lie; each device's part
        is read from the disk for it. None for the default device.
      how: how the network is computed, see `diffjax.models.settings.how`.

    Raises:
      WeightsError: for files that are damaged, pickled, or do not hold the network's parameters, each exactly once.
      ValueError: for a config that describes no network that is known here.
      OSError: if something cannot be read.
    """
    check_dtype("param_dtype", param_dtype)
    found = opened(path, config=config, variant=variant, **how)
    check_fits(found)
    return found.model, parameters(found, param_dtype, sharding)


class Survey(NamedTuple):
    """A network in a folder.

    Attributes:
      path: the folder, or file.
      kind: its class; "" for a file without a config.
      tensors: of the file by today's names; empty for a config alone.
      model: the network; None if its class is not known here.
      shapes: of its parameters by name; empty if its class is not known here.
      places: where these lie among the tensors.
      report: how tensors and parameters differ; None if there are none of either.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    model: Model | None
    shapes: Mapping[str, Any]
    places: Mapping[str, Place]
    report: Report | None


def opened(
    path: str | os.PathLike, *, config: Mapping[str, Any] | None = None, variant: str | None = None,
    weights: bool = True, **how,
) -> Survey:  # fmt: skip
    """The network of a folder, and how its weights fit it; nothing but headers is read.

    Args:
      path, config, variant, how: as for `load`.
      weights: whether there are any; without them the network alone is told of.

    Raises:
      As `load`, but not for weights that do not fit.
    """
    path = Path(path)
    config = read_config(path) if config is None else config
    with told_of(path):
        kind = kind_of(config)
        # Before a network is built: a folder without weights says so at once.
        files = find(path, variant) if weights else {}
        model, tree = build(config, path, **how)
        shapes = names_of(tree)
        places, tensors = match(kind, files, shapes)
        report = compare(places, tensors, shapes) if weights else None
    return Survey(path, kind, tensors, model, shapes, places, report)


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Puts the path before what is wrong with what it holds."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise WeightsError(f"{path}: {error}") from error


def check_fits(found: Survey, what: str = "") -> None:
    """Raises `WeightsError` if tensors and parameters differ; `what` is the part of the file that is meant."""
    if found.report and any(found.report):
        where = f"{found.path}: {what}: " if what else f"{found.path}: "
        raise WeightsError(f"{where}not the parameters of its {found.kind}: {found.report}")


def parameters(
    found: Survey, param_dtype: str | None = None, sharding: Callable[[Model, dict], Any] | None = None
) -> dict:  # fmt: skip
    """The parameters of a network whose weights fit; the rest as for `load`."""
    shapes = nested(found.shapes)
    where = dict.fromkeys(found.places) if sharding is None else names_of(sharding(found.model, shapes))
    return nested({
        name: _leaf(place, found.tensors, tuple(found.shapes[name].shape), param_dtype, where[name])
        for name, place in found.places.items()
    })  # fmt: skip


def build(config: Mapping[str, Any], path: Path, **how) -> tuple[Model, dict]:
    """The network of a config, and the shapes of its parameters; nothing is allocated.

    Raises:
      ValueError: for a config that describes no network that is known here, or that can be.
    """
    _check_counts(path, config)
    try:
        model = from_config(config, **how)
        return model, jax.eval_shape(model.init, jax.random.key(0))
    except (ArithmeticError, LookupError, MemoryError, TypeError) as error:
        # Lengths of zero or of 10**30, or text among numbers: nothing in a config is trusted.
        told = f"{type(error).__name__}: {error}"[:200]
        raise WeightsError(f"{path}: its config describes no {kind_of(config)} that can be built ({told})") from error


def _check_counts(path: Path, config: Mapping[str, Any]) -> None:
    """Raises `WeightsError` for more layers or blocks than any network has: each is built before the next check."""
    for key, given in config.items():
        values = [given]
        while values:
            value = values.pop()
            values += value if isinstance(value, list | tuple) else ()
            many = isinstance(value, int) and COUNTS.search(key) and value > MOST_LAYERS
            if many or len(values) > MOST_LAYERS:
                told = f"its config has {shown(key)}={shown(given)}; at most {MOST_LAYERS} are built"
                raise WeightsError(f"{path}: {told}")


def check_dtype(setting: str, dtype: Any) -> None:
    """Raises `ValueError` for what is no type of floating point, nor None."""
    try:
        fits = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"{setting}={dtype!r}: expected a type of floating point, such as 'bfloat16' or 'float16'")


def type_of(place: Place, tensors: Mapping[str, Tensor], dtype: str | None) -> np.dtype:
    """The type of a parameter that is read: `dtype` if it is given and both are of floating point."""
    found = sorted({tensors[key].dtype for key in place.keys}, key=str)
    if len(found) > 1:
        # Of the types of floating point with 8 bits none holds the values of the other.
        wide = [jnp.dtype("bfloat16") if jnp.issubdtype(d, jnp.floating) and d.itemsize == 1 else d for d in found]
        found = [functools.reduce(jnp.promote_types, wide)]
    given = np.dtype(found[0])
    floating = dtype is not None and jnp.issubdtype(given, jnp.floating)
    return jnp.dtype(dtype) if floating else given


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


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
      WeightsError: if it is no JSON object.
      OSError: if it cannot be read.
    """
    path = (folder.parent if folder.is_file() else folder) / "config.json"
    if not path.is_file():
        parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f"; it has those of {some(parts)}: name one of these folders" if parts else ""
        raise FileNotFoundError(f"{folder}: no config.json, which says what network this is{hint}")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raises `WeightsError` for anything else."""
    if path.stat().st_size > LONGEST_JSON:
        raise WeightsError(f"{path}: {path.stat().st_size} bytes are too many for a file of settings")
    try:
        value = parse(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path}: no JSON: {str(error)[:200]}") from None
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
        if variant:
            raise ValueError(f"{path} is a file; variant={variant!r} chooses among those of a folder")
        _refuse_pickle(path)
        return read_header(path)[0]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder or file")
    for stem in STEMS:
        for index in indices_of(stem, variant):
            if (path / index).is_file():
                return _sharded(path, path / index)
        if (path / weights_of(stem, variant)).is_file():
            return read_header(path / weights_of(stem, variant))[0]
    here = sorted(p.name for p in path.iterdir() if p.is_file())
    pickles = [path / name for name in here if name.endswith(PICKLES)]
    weights = [name for name in here if name.endswith(".safetensors")]
    if pickles and not weights:
        _refuse_pickle(pickles[0])
    variants = f" with variant {variant!r}" if variant else " without a variant"
    found = f"it has {some(weights)}" if weights else "it has no .safetensors file"
    raise WeightsError(
        f"{path}: no weights{variants}; looked for {' and '.join(weights_of(s, variant) for s in STEMS)}, or an index "
        f"of these; {found}"
    )


def _refuse_pickle(path: Path) -> None:
    if path.name.endswith(PICKLES):
        raise WeightsError(
            f"{path}: a pickle, which runs code of its own when it is read; convert it where you trust it: "
            "d = torch.load(PATH, weights_only=True, map_location='cpu'); d = d.get('state_dict', d); "
            "safetensors.torch.save_file({k: v.clone().contiguous() for k, v in d.items()}, 'model.safetensors')"
        )


def _sharded(folder: Path, index: Path) -> dict[str, Tensor]:
    before = stamp_of(index.stat())
    where = read_json(index).get("weight_map")
    if not (isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())):
        raise WeightsError(f"{index}: expected a 'weight_map' from tensors to files")
    names = tuple(dict.fromkeys(where.values()))
    for name in names:
        # A name and no path: whatever is read lies in this folder.
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise WeightsError(f"{index}: {shown(name)} is no name of a file in its folder")
        _refuse_pickle(folder / name)
        if not (folder / name).is_file():
            raise WeightsError(f"{index}: it names {shown(name)}, which is not there; copy the folder again")
    tensors: dict[str, Tensor] = {}
    for name in names:
        held = read_header(folder / name)[0]
        for key in held:
            if where.get(key) != name:
                told = f"it says {shown(where[key])}" if key in where else "it does not have it"
                raise WeightsError(f"{index}: tensor {shown(key)} lies in {shown(name)}, but {told}")
        tensors |= held
    # Files of two checkpoints, one saved while the other was read.
    if not index.is_file() or stamp_of(index.stat()) != before:
        raise WeightsError(f"{index}: was replaced while it was read; load it again")
    gone = sorted(where.keys() - tensors.keys())
    if gone:
        raise WeightsError(f"{index}: tensors that its files lack: {some(gone)}")
    return tensors


def rename(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network of class `kind` under today's names, without those that are no parameters."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        today = modern(kind, name)
        if today in out:
            raise WeightsError(f"{tensor.path}: two tensors are {shown(today)}, one of them {shown(name)}")
        if today is not None:
            shape = without_pixels(kind, today, tensor.shape)
            out[today] = tensor if shape == tensor.shape else tensor._replace(shape=shape)
    return out


def match(
    kind: str, files: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> tuple[dict[str, Place], dict[str, Tensor]]:
    """The places of a network's parameters, and the tensors of its files under today's names, each once."""
    tensors = rename(kind, files)
    places = places_of(shapes, tensors)
    return places, untie(kind, tensors, {key for place in places.values() for key in place.keys})


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
    """Whether two tensors have the same bytes, of which some rows are in memory at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows = a.shape[0] if a.shape else 1
    many = max(1, PIECE // max(1, math.prod(a.shape[1:]) * a.dtype.itemsize))
    pieces = ((slice(i, i + many),) if a.shape else () for i in range(0, rows, many))
    return all(a.part(piece).tobytes() == b.part(piece).tobytes() for piece in pieces)


def compare(places: Mapping[str, Place], tensors: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> Report:
    """What is missing, unexpected, misshapen or mistyped among the tensors of a file.

    Args:
      places: of the network's parameters.
      tensors: of the file, under today's names.
      shapes: of the network's parameters, by name; their types.
    """
    wanted = {key: (place.shape, shapes[name].dtype) for name, place in places.items() for key in place.keys}
    return Report.of(wanted, tensors)


def some(names: Iterable, most: int = 5) -> str:
    """The first of the names, for a message, on one line."""
    names = [printable(str(name)) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) <= 200 else name[:200] + "..." for name in names[:most]) + rest


def printable(text: str) -> str:
    """A text with what a terminal would act upon, or not show, as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
