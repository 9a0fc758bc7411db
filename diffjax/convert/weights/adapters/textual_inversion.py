"""Learned tokens (textual inversion) in safetensors files, as diffusers, A1111 and SDXL's trainers write them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.tensors import Source, Tensor, write

UNNAMED = "emb_params"  # A1111: the token is the file's name
ENCODERS = ("clip_l", "clip_g", "t5")  # of files for several encoders: SD 3's, or SDXL's first two
FILE = "learned_embeds.safetensors"


def load_textual_inversion(
    path: str | os.PathLike, token: str | Sequence[str] | None = None, *, encoder: str | None = None
) -> dict[str, np.ndarray]:
    """The learned rows in a file, for `diffjax.adapters.textual_inversion.add`.

    Args:
      path: a safetensors file, or a folder with `learned_embeds.safetensors`.
      token: what it is to be called; None for the name in the file, or of the file. Several names for as many vectors
        make each of them a token by itself.
      encoder: "clip_l", "clip_g" or "t5", of a file that has rows for several encoders.

    Returns:
      `{token: [n, width]}`, of the file's dtype; several tokens only if several names were given.

    Raises:
      WeightsError: for a file of another form, several encoders and none named, or names that are not as many as the
        vectors.
      OSError: if the file cannot be read.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    name, tensor = _chosen(path, find(path), encoder)
    rows = np.atleast_2d(tensor.part())
    if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating) or not rows.size:
        raise WeightsError(f"{path}: {name!r} is {rows.dtype} of shape {list(tensor.shape)}; expected rows of a table")
    if token is None or isinstance(token, str):
        return {token or name: rows}
    if len(token) != len(rows) or len(set(token)) != len(token):
        raise WeightsError(f"{path}: {len(rows)} vectors and the names {', '.join(token)}: expected one name for each")
    return {one: row[None] for one, row in zip(token, rows, strict=True)}


def _chosen(path: Path, tensors: Mapping[str, Tensor], encoder: str | None) -> tuple[str, Tensor]:
    """The token's name and its tensor."""
    several = [name for name in ENCODERS if name in tensors]
    if several:
        if encoder is None and len(several) > 1:
            raise WeightsError(f"{path}: rows for {', '.join(several)}: name one of them, encoder={several[0]!r}")
        encoder = several[0] if encoder is None else encoder
        if encoder not in several:
            raise WeightsError(f"{path}: no rows for the encoder {encoder!r}; it has those for {', '.join(several)}")
        return path.stem, tensors[encoder]
    if encoder is not None:
        raise WeightsError(f"{path}: its rows are for one encoder, which it does not name; leave out encoder=")
    if UNNAMED in tensors:
        return path.stem, tensors[UNNAMED]
    if len(tensors) != 1:
        raise WeightsError(
            f"{path}: {len(tensors)} tensors; expected one by the name of its token, {UNNAMED!r}, or those of "
            f"{', '.join(ENCODERS)}"
        )
    return next(iter(tensors.items()))


def save_textual_inversion(rows: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes one learned token, `{token: [n, width]}`, as diffusers' `load_textual_inversion` reads it.

    Raises:
      WeightsError: for several tokens: each has a file of its own there.
      OSError: disk full, folder read-only.
    """
    if len(rows) != 1:
        raise WeightsError(f"{path}: {len(rows)} tokens; a file holds one")
    arrays = {token: np.asarray(leaf) for token, leaf in rows.items()}
    write(path, {token: Source.of(a) for token, a in arrays.items()}, {"format": "pt"})
