"""Networks in folders: what they hold and whether it fits, without reading the weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError, told_of
from diffjax.convert.weights.folders.find import PICKLES, find, read_config
from diffjax.convert.weights.folders.names import is_index
from diffjax.convert.weights.places.layout import MOST_LAYERS, Place, type_of
from diffjax.convert.weights.places.match import Report, compare, match
from diffjax.convert.weights.tensors.read import Tensor
from diffjax.convert.weights.tensors.strict import read_json, shown
from diffjax.core.types import Model
from diffjax.models import NETWORKS, from_config, kind_of
from diffjax.nn.functional import names_of

# Settings that count what is built one by one.
COUNTS = re.compile("layers|blocks|depth")
PIPELINE = "model_index.json"
BESIDE = re.compile("Tokenizer|Scheduler|Processor|FeatureExtractor")  # classes of what is no network
PIECE = 1 << 22
LONGEST_NAME = 200  # of a part of a pipeline


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


def check_fits(found: Survey, what: str = "") -> None:
    """Raises `WeightsError` if tensors and parameters differ; `what` is the part of the file that is meant."""
    if found.report and any(found.report):
        where = f"{found.path}: {what}: " if what else f"{found.path}: "
        raise WeightsError(f"{where}not the parameters of its {found.kind}: {found.report}")


def of_8_bits(found: Survey) -> str:
    """What to do about parameters whose type in the file is for storage alone; "" if there are none."""
    types = {type_of(place, found.tensors, None) for place in found.places.values()}
    names = sorted(kind.name for kind in types if jnp.issubdtype(kind, jnp.floating) and kind.itemsize == 1)
    return f"nothing computes in {' and '.join(names)}: load with param_dtype='bfloat16'" if names else ""


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


def survey(path: str | os.PathLike, variant: str | None = None) -> Survey:
    """What lies in a folder with a `config.json`, weights, or both, or in one file; nothing but headers is read.

    Raises:
      WeightsError: for damaged files and pickles.
      ValueError: for a config of a class of `NETWORKS` that it does not take.
      OSError: if something cannot be read.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    config = read_config(path) if not path.is_file() or (folder / "config.json").is_file() else None
    with told_of(path):
        kind = "" if config is None else kind_of(config)
    held = path.is_file() or bool(variant) or holds_weights(path)
    if kind not in NETWORKS:
        return Survey(path, kind, find(path, variant) if held else {}, None, {}, {}, None)
    return opened(path, config=config, variant=variant, weights=held)


def holds_weights(folder: Path) -> bool:
    """Whether a folder has a file of weights, a pickle as well."""
    return any(p.name.endswith((".safetensors", *PICKLES)) or is_index(p.name) for p in folder.iterdir())


def components(folder: str | os.PathLike) -> dict[str, str]:
    """The parts of a pipeline with a `model_index.json`, and their classes; an entry of nulls is none.

    Raises:
      WeightsError: if the file is none of a pipeline.
      OSError: if it cannot be read.
    """
    folder = Path(folder)
    parts = {}
    for name, value in read_json(folder / PIPELINE).items():
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if pair and not name.startswith("_"):
            if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name or len(name) > LONGEST_NAME:
                raise WeightsError(f"{folder / PIPELINE}: {name[:200]!r} is no name of a folder inside")
            parts[name] = value[1]
    return parts


def missing(folder: Path, kind: str) -> str:
    """What the folder of a pipeline's part of this class lacks; "" for one that is there."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return "there is no such folder, or nothing in it"
    has_config = (folder / "config.json").is_file()
    if kind in NETWORKS and not has_config:
        return "it has no config.json"
    # Some tokenizers lie beside the config of a network.
    return "a config without weights" if has_config and not BESIDE.search(kind) and not holds_weights(folder) else ""


def unusual(tensor: Tensor) -> int:
    """How many numbers of a tensor are NaN or infinite; all of it is read, a piece at a time."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return 0
    size = math.prod(tensor.shape)
    flat = tensor._replace(shape=(size,))
    pieces = (flat.part((slice(i, i + PIECE),)) for i in range(0, size, PIECE))
    return sum(int(np.count_nonzero(~np.isfinite(piece))) for piece in pieces)
