"""Latents that an encoder has computed once, in shards on disk; `diffjax latents` writes them.

A folder of latents holds, for each split, shards `train-00000-of-00004.npy`: numpy structured arrays with the fields
`latent [h, w, c] float32` and `label int32`, each with a `.json` of its facts beside it; and `index.json`, which is
there once every shard is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffjax import registry
from diffjax.data.sources import Dataset, Pixels

INDEX = "index.json"
FORMAT = 1


class LatentSource:
    """The normalised latents of one split, `(latent - mean) * scale`, read from the disk when they are asked for.

    Attributes:
      files: the shards.
      mean, scale: `[c] float32`.
      captions: one text per item, or None.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int], mean, scale, captions=None):
        self.files, self.mean, self.scale, self.captions = list(files), mean, scale, captions
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        items = self.take(np.array([int(index)]))
        return {name: array[0] for name, array in items.items()}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The items at `indices [n]`, stacked."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = [self._map(int(k))[int(i - self._starts[k])] for k, i in zip(shards, indices, strict=True)]
        latent = np.stack([row["latent"] for row in rows])
        return {"image": (latent - self.mean) * self.scale, "label": np.array([row["label"] for row in rows], np.int32)}

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.load(self.files[shard], mmap_mode="r", allow_pickle=False)
        return self._maps[shard]


class LatentPixels:
    """From normalised latents to 8-bit images: through a decoder, or the first channels as they are.

    Attributes:
      decode: spec of a function of latents `[N, h, w, c]`, to images `[N, H, W, C]` in `[-1, 1]`; or "".
      mean, scale: see `LatentSource`.
      span: the latents that are shown as white, and minus it as black, where there is no decoder.
      high: 255.
    """

    def __init__(self, decode: str, mean, scale, span: float):
        self.decode, self.mean, self.scale, self.span, self.high = decode, mean, scale, span, 255
        self._fn = callable_of(decode, "decode") if decode else None

    def __call__(self, x) -> np.ndarray:
        """`uint8 [..., H, W, C]` of normalised latents `[..., h, w, c]`; without a decoder C is 3 or 1."""
        x = np.asarray(x, np.float32)
        if self._fn is None:
            shown = 3 if x.shape[-1] >= 3 else 1
            return Pixels(255)((x / self.span)[..., :shown])
        flat = x.reshape(-1, *x.shape[-3:]) / self.scale + self.mean
        images = np.asarray(self._fn(flat), np.float32)
        return Pixels(255)(images.reshape(*x.shape[:-3], *images.shape[1:]))


def latents(path: str, *, std: float = 0.5, decode: str = "") -> Dataset:
    """A `Dataset` of latents that `diffjax latents` wrote to a folder.

    Args:
      path: the folder; `~` is expanded.
      std: the standard deviation that each channel gets, its mean being 0; 0.5 is what `edm(sigma_data=0.5)` expects.
        0 leaves the latents as they are.
      decode: `"package.module:fn"`, from latents `[N, h, w, c]` to images `[N, H, W, C]` in `[-1, 1]`; without it the
        first channels of the latents are what is shown as an image.

    Raises:
      FileNotFoundError: if the folder has no index, so that the latents are not there or not all written.
      ValueError: for a damaged or foreign index, a shard of another length, or a decoder that cannot be imported.
    """
    root = Path(path).expanduser()
    index = read_index(root)
    if not std >= 0:
        raise ValueError(f"std={std}: expected a positive number, or 0 to leave latents as they are")
    mean, spread = (np.asarray(index[name], np.float32) for name in ("mean", "std"))
    if std == 0:
        mean, scale = np.zeros_like(mean), np.ones_like(spread)
    else:
        scale = np.float32(std) / np.where(spread > 0, spread, 1)
    source = lambda split: _source(root, index["splits"][split], mean, scale)
    # Three standard deviations reach from grey to white.
    pixels = LatentPixels(decode, mean, scale, float(3 * (std or spread.max())))
    return Dataset(source("train"), source("heldout"), tuple(index["shape"]), index["num_classes"], pixels)


def read_index(root: Path) -> dict[str, Any]:
    """The index of a folder of latents.

    Raises:
      FileNotFoundError, ValueError: as `latents`.
    """
    file = root / INDEX
    if not file.is_file():
        parts = len(list(root.glob("*.npy")))
        state = (
            f"{parts} shards are there; run the same diffjax latents command again" if parts else "no shard is there"
        )
        raise FileNotFoundError(f"no {INDEX} in {str(root)!r} ({state}); write latents with diffjax latents --out=...")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        found = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}); run diffjax latents again") from None
    if found != FORMAT:
        raise ValueError(f"{str(file)!r} has format {found}; this version reads {FORMAT}")
    return index


def callable_of(spec: str, kind: str) -> Callable:
    """The function that `"package.module:fn"` is, or that `"package.module:make(arg=1)"` returns.

    Raises:
      ValueError: if it cannot be imported or is no function.
    """
    name, _, _ = registry.parse(spec)
    fn = registry.build(spec, {}, kind) if "(" in spec else registry.lookup(name, {}, kind)
    if not callable(fn):
        raise ValueError(f"{kind} {spec!r} gives {type(fn).__name__}; expected a function of a batch of arrays")
    return fn


def _source(root: Path, shards: Sequence[dict], mean, scale) -> LatentSource:
    for shard in shards:
        file = root / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            raise ValueError(
                f"{str(file)!r} has {size} bytes, and {INDEX} says {shard['bytes']}; run diffjax latents again"
            )
    texts = [shard.get("captions") for shard in shards]
    captions = None if any(t is None for t in texts) else [text for part in texts for text in part]
    files, counts = [root / shard["file"] for shard in shards], [shard["count"] for shard in shards]
    return LatentSource(files, counts, mean, scale, captions)
