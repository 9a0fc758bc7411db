"""What a folder of weights holds: its network, its tensors and whether they fit, without reading them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folder import PICKLES, Survey, find, opened, read_config, read_json, told_of
from diffjax.convert.weights.names import is_index
from diffjax.convert.weights.tensors import Tensor
from diffjax.models import NETWORKS, kind_of

PIPELINE = "model_index.json"
PIECE = 1 << 22


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
    """The parts of a pipeline with a `model_index.json`, and their classes; those without a folder are left out.

    Raises:
      WeightsError: if the file is none of a pipeline.
      OSError: if it cannot be read.
    """
    folder = Path(folder)
    parts = {}
    for name, value in read_json(folder / PIPELINE).items():
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if pair and not name.startswith("_"):
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise WeightsError(f"{folder / PIPELINE}: {name[:200]!r} is no name of a folder inside")
            if (folder / name).is_dir():
                parts[name] = value[1]
    return parts


def unusual(tensor: Tensor) -> int:
    """How many numbers of a tensor are NaN or infinite; all of it is read, a piece at a time."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return 0
    size = math.prod(tensor.shape)
    flat = tensor._replace(shape=(size,))
    pieces = (flat.part((slice(i, i + PIECE),)) for i in range(0, size, PIECE))
    return sum(int(np.count_nonzero(~np.isfinite(piece))) for piece in pieces)
