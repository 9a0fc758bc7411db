"""Networks written under the names of their authors, for programs that read these."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folders.save import tensors_of
from diffjax.convert.weights.originals.contents import UNET
from diffjax.convert.weights.originals.load import MODULES
from diffjax.convert.weights.originals.tables.naming import Slot, arrange
from diffjax.convert.weights.tensors import Source, write
from diffjax.convert.weights.tensors.dtypes import check_dtype
from diffjax.core.types import Model
from diffjax.models import kind_of

PREFIXES = {"AutoencoderKL": "first_stage_model.", "FluxTransformer2DModel": ""}


def save_original(
    model: Model, params: dict, path: str | os.PathLike, *, prefix: str | None = None, dtype: str | None = None
) -> None:  # fmt: skip
    """Writes a U-Net, a VAE or a transformer as `load_original` reads it, one tensor at a time.

    What was read from such a file has the same bytes in the one that is written.

    Args:
      model, params: of a `UNet2DConditionModel`, `AutoencoderKL`, `SD3Transformer2DModel` or `FluxTransformer2DModel`.
      path: a safetensors file.
      prefix: of all names; None for that of the published files.
      dtype: of the parameters of floating point in the file; None for their own.

    Raises:
      WeightsError: for another class, options that the authors' networks do not have, or parameters of another network.
      ValueError: for a `dtype` that is not of floating point.
      OSError: disk full, folder read-only; what was there is whole.
    """
    check_dtype("dtype", dtype)
    check_kind(kind_of(model.config), path)
    write_original(model.config, tensors_of(model, params, path, dtype), path, prefix)


def check_kind(kind: str, path: str | os.PathLike) -> None:
    """Raises `WeightsError` for a class whose authors had no other names."""
    if kind not in MODULES:
        raise WeightsError(f"{path}: a {kind} has no other names; known: {', '.join(MODULES)}")


def write_original(
    config: Mapping[str, Any], ours: Mapping[str, Source], path: str | os.PathLike, prefix: str | None = None
) -> None:  # fmt: skip
    """`save_original` of tensors by their names in a folder; raises as it does."""
    kind = kind_of(config)
    slots = arrange(MODULES[kind].naming(config), {name: source.shape for name, source in ours.items()})
    prefix = PREFIXES.get(kind, UNET) if prefix is None else prefix
    write(path, {prefix + name: source_of(slot, ours) for name, slot in slots.items()}, {"format": "pt"})


def source_of(slot: Slot, ours: Mapping[str, Source]) -> Source:
    """An original tensor, made of a network's own when its turn comes."""
    parts = [ours[name] for name in slot.names]
    return Source(np.result_type(*(part.dtype for part in parts)), slot.shape, _reader(slot, parts))


def _reader(slot: Slot, parts) -> Callable[[], np.ndarray]:
    def read():
        array = parts[0].read() if len(parts) == 1 else np.concatenate([part.read() for part in parts])
        if slot.way == "swap":
            array = np.concatenate(np.split(array, 2)[::-1])
        return array.T if slot.way == "turn" else array.reshape(slot.shape)

    return read
