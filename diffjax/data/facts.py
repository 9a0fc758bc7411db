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
    return {
        "shape": list(dataset.shape), "num_classes": dataset.num_classes,
        "buckets": [list(shape) for shape in dataset.buckets], "pixels": pixels,
    }  # fmt: skip


def without_items(facts: Mapping[str, Any]) -> Dataset:
    """The data set that `facts_of` described, with None for both of its sources.

    Raises:
      ValueError: for facts of another form, or a decoder of latents that cannot be imported.
    """
    try:
        buckets = tuple(tuple(shape) for shape in facts["buckets"])
        pixels = dict(facts["pixels"])
        if pixels.keys() == {"high"}:
            to_pixels = Pixels(int(pixels["high"]))
        else:
            mean, scale = (np.asarray(pixels[name], np.float32) for name in ("mean", "scale"))
            to_pixels = LatentPixels(pixels["decode"], mean, scale, float(pixels["span"]))
        return Dataset(None, None, tuple(facts["shape"]), int(facts["num_classes"]), to_pixels, buckets)
    except (KeyError, TypeError) as error:
        raise ValueError(f"facts of a data set of another form: {type(error).__name__}: {error}") from error


def _describe(to_pixels) -> dict[str, Any] | None:
    if type(to_pixels) is Pixels:
        return {"high": to_pixels.high}
    if type(to_pixels) is LatentPixels:
        floats = {name: getattr(to_pixels, name).tolist() for name in ("mean", "scale")}
        return floats | {"decode": to_pixels.decode, "span": to_pixels.span}
    return None
