"""What a model must know of the data that it was trained on, as JSON: samples can be drawn where the data are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffjax.data.latents import LatentPixels
from diffjax.data.sources import Dataset, Pixels


def facts_of(dataset: Dataset) -> dict[str, Any] | None:
    """`shape`, `num_classes`, `buckets` and `pixels` of a data set, for `without_items`.

    None where `to_pixels` is a function of the user's own, which has no such form.
    """
    pixels = _describe(dataset.to_pixels)
    if pixels is None:
        return None
    # A user's own data set may have integers of numpy, which JSON has not.
    ints = lambda shape: [int(size) for size in shape]
    return {
        "shape": ints(dataset.shape), "num_classes": int(dataset.num_classes),
        "buckets": [ints(shape) for shape in dataset.buckets], "pixels": pixels,
    }  # fmt: skip


def without_items(facts: Mapping[str, Any]) -> Dataset:
    """The data set that `facts_of` described, with None for both of its sources.

    Raises:
      ValueError: for facts of another form. What a decoder of latents raises when it is imported is raised as it is.
    """
    try:
        shape, buckets = tuple(facts["shape"]), tuple(tuple(shape) for shape in facts["buckets"])
        num_classes, pixels = int(facts["num_classes"]), facts["pixels"]
        if latent := "decode" in pixels:
            mean, scale = (np.asarray(pixels[name], np.float32) for name in ("mean", "scale"))
            given = str(pixels["decode"]), mean, scale, float(pixels["span"])
        else:
            given = (int(pixels["high"]),)
    except (KeyError, TypeError) as error:
        raise ValueError(f"facts of a data set of another form: {type(error).__name__}: {error}") from error
    return Dataset(None, None, shape, num_classes, (LatentPixels if latent else Pixels)(*given), buckets)


def _describe(to_pixels) -> dict[str, Any] | None:
    if type(to_pixels) is Pixels:
        return {"high": int(to_pixels.high)}
    if type(to_pixels) is LatentPixels:
        floats = {name: getattr(to_pixels, name).tolist() for name in ("mean", "scale")}
        return floats | {"decode": to_pixels.decode, "span": to_pixels.span}
    return None
