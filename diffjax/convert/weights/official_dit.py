"""DiT and SiT as their authors published them, read into `diffjax.models.dit` and written back, bit for bit.

Peebles & Xie 2023, arXiv:2212.09748 (github.com/facebookresearch/DiT), and Ma et al. 2024, arXiv:2401.08740
(github.com/willisma/SiT), have one network and one set of names. The network here is the same with the six vectors of a
block's modulation made by two maps, three each, and with the layers stacked.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.folders.load import parameters
from diffjax.convert.weights.folders.save import tensors_of
from diffjax.convert.weights.folders.survey import Survey, check_fits
from diffjax.convert.weights.originals.save import source_of
from diffjax.convert.weights.originals.tables.naming import Slot, arrange, cut, fit, table
from diffjax.convert.weights.places.layout import Place, place
from diffjax.convert.weights.places.match import compare
from diffjax.convert.weights.tensors import Source, Tensor, bounds, write
from diffjax.convert.weights.tensors.dtypes import cast, check_dtype
from diffjax.convert.weights.tensors.strict import shown
from diffjax.core.types import Model
from diffjax.models import dit
from diffjax.nn.functional import names_of

# By the width of the paper's networks: S, B, L, XL.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
PATCHES, POSITIONS = "x_embedder.proj.weight", "pos_embed"
# Of a block there: shift, scale and gate of attention, then those of the perceptron.
NAMING = table((
    (PATCHES, "inp.weight"),
    ("x_embedder.proj.bias", "inp.bias"),
    ("t_embedder.mlp.0.*", "cond.hidden.*"),
    ("t_embedder.mlp.2.*", "cond.out.*"),
    ("y_embedder.embedding_table.weight", "cond.label.weight"),
    ("blocks.#.attn.qkv.*", "blocks.#.attention.qkv.*"),
    ("blocks.#.attn.proj.*", "blocks.#.attention.out.*"),
    ("blocks.#.mlp.fc1.*", "blocks.#.mlp.up.*"),
    ("blocks.#.mlp.fc2.*", "blocks.#.mlp.down.*"),
    ("blocks.#.adaLN_modulation.1.*", "blocks.#.modulation.* blocks.#.mlp.modulation.*"),
    ("final_layer.adaLN_modulation.1.*", "modulation.*"),
    ("final_layer.linear.*", "out.*"),
))  # fmt: skip


class Patches(NamedTuple):
    """The convolution of patches `[width, C, side, side]` as a matrix `[width, side * side * C]`, channels last."""

    tensor: Tensor

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], math.prod(self.tensor.shape[1:])

    def fill(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """As `Tensor.fill`."""
        rows, columns = bounds(index, self.shape)
        part = self.tensor.part((rows,)).transpose(0, 2, 3, 1)
        out[...] = part.reshape(len(part), -1)[:, columns]


def load_official_dit(
    path: str | os.PathLike, *, heads: int | None = None, param_dtype: str | None = None,
    sharding: Callable[[Model, dict], Any] | None = None, **how,
) -> tuple[Model, dict]:  # fmt: skip
    """The network of an official checkpoint of DiT or SiT, and its parameters.

    Args:
      path: a safetensors file with the state dict. The published files are pickles: convert them where you trust them,
        `safetensors.torch.save_file(torch.load(PATH, weights_only=True), "dit.safetensors")` (SiT: of its `"ema"`).
      heads: of attention, which the file does not tell; None for those of the paper's network of this width.
      param_dtype, sharding: as for `load`.
      how: how the network is computed, settings of `diffjax.models.dit` such as `dtype`, `scan`, `remat`.

    Returns:
      The `Model` and its parameters. Times are those of the checkpoint: 0 to 999 for DiT, 0 to 1 for SiT. The last row
      of labels is that of no class. With a learned variance the output has twice the channels of the input: DiT's
      second half interpolates between the bounds of log variance, SiT's is never used.

    Raises:
      WeightsError: for a file that does not hold such a network, or has positions of its own.
      ValueError: for settings that make no network.
      OSError: if the file cannot be read.
    """
    check_dtype("param_dtype", param_dtype)
    found = _surveyed(Path(path), heads, how)
    check_fits(found)
    return found.model, parameters(found, param_dtype, sharding)


def _surveyed(path: Path, heads: int | None, how: Mapping[str, Any]) -> Survey:
    tensors = find(path)
    settings = _settings(path, {name: tensor.shape for name, tensor in tensors.items()}, heads)
    try:
        model = dit(**settings, **how)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    shapes = names_of(jax.eval_shape(model.init, jax.random.key(0)))
    places = _places(shapes)
    slots = _slots(model, {key: place.shape for place in places.values() for key in place.keys})
    if POSITIONS not in tensors:
        del slots[POSITIONS]
    report = fit(slots, tensors)
    if any(report):
        return Survey(path, "DiT", {}, model, shapes, places, report)
    if POSITIONS in tensors:
        _check_positions(model, tensors[POSITIONS])
    plain = {name: slot for name, slot in slots.items() if name not in (PATCHES, POSITIONS)}
    ours = cut(plain, tensors) | {"inp.weight": Patches(tensors[PATCHES])}
    return Survey(path, "DiT", ours, model, shapes, places, compare(places, ours, shapes))


def _numbered(name: str, depth: int) -> str:
    """The name of a parameter as those of checkpoints' networks are, with the numbers of the layers that it stacks."""
    return re.sub("^blocks/", f"blocks/0:{depth}/", name)


def _places(shapes: Mapping[str, Any]) -> dict[str, Place]:
    return {name: place(_numbered(name, leaf.shape[0]), tuple(leaf.shape)) for name, leaf in shapes.items()}


def _slots(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """The official tensors of a network whose own, one for each layer, have these shapes."""
    side, _, channels = model.config["shape"]
    patch, width = model.config["patch"], model.config["width"]
    slots = arrange(NAMING, shapes)
    slots[PATCHES] = slots[PATCHES]._replace(shape=(width, channels, patch, patch))
    slots[POSITIONS] = Slot((1, (side // patch) ** 2, width), (), (), "")
    return slots


def _check_positions(model: Model, tensor: Tensor) -> None:
    ours = positions(model.config["shape"][0] // model.config["patch"], model.config["width"])
    # A file of 16 bits has them rounded.
    if not np.allclose(np.float32(tensor.part()[0]), ours, atol=2e-2 * (tensor.dtype.itemsize < 4) + 1e-5):
        told = f"{POSITIONS} is not that of sines and cosines, which this network has built in"
        raise WeightsError(f"{tensor.path}: {told}")


def save_official_dit(model: Model, params: dict, path: str | os.PathLike, *, dtype: str | None = None) -> None:
    """Writes a `diffjax.models.dit` as the official state dict, for PyTorch's DiT and SiT, one tensor at a time.

    Args:
      model: a `dit` with a square `shape` and labels; trained here, its times must be those of the other side
        (`time_embed="sinusoidal", time_scale=1.0`).
      params: of that model.
      path: a safetensors file.
      dtype: of the parameters of floating point in the file; None for their own.

    Raises:
      WeightsError: for a network that PyTorch's class does not have, or parameters of another one.
      ValueError: for a `dtype` that is not of floating point.
      OSError: disk full, folder read-only; what was there is whole.
    """
    check_dtype("dtype", dtype)
    path, config = Path(path), model.config
    if wrong := _unlike(config):
        raise WeightsError(f"{path}: the official DiT has no {wrong}")
    shapes, given = names_of(jax.eval_shape(model.init, jax.random.key(0))), names_of(params)
    if {name: leaf.shape for name, leaf in given.items()} != {name: leaf.shape for name, leaf in shapes.items()}:
        raise WeightsError(f"{path}: params are not those of this dit")
    numbered = lambda params: {**params, "blocks": {f"0:{config['depth']}": params["blocks"]}}
    like_checkpoints = model._replace(init=lambda key: numbered(model.init(key)))
    ours = tensors_of(like_checkpoints, numbered(params), path, dtype)
    slots = _slots(model, {name: source.shape for name, source in ours.items()})
    sources = {name: source_of(slot, ours) for name, slot in slots.items() if name not in (PATCHES, POSITIONS)}
    sources[PATCHES] = _patches(slots[PATCHES].shape, ours["inp.weight"])
    kept = cast(given["inp/kernel"].dtype, dtype)
    waves = positions(config["shape"][0] // config["patch"], config["width"])[None].astype(kept)
    sources[POSITIONS] = Source(kept, waves.shape, lambda: waves)
    write(path, sources, {"format": "pt"})


def _patches(shape: tuple[int, ...], source: Source) -> Source:
    """The convolution of a matrix, the inverse of `Patches`."""
    width, channels, *sides = shape
    return Source(source.dtype, shape, lambda: source.read().reshape(width, *sides, channels).transpose(0, 3, 1, 2))


def _unlike(config: Mapping[str, Any]) -> str | None:
    """What of a native DiT's config the official network lacks."""
    if config.get("name") != "dit":
        return f"class {config.get('name') or config.get('_class_name')!r}"
    height, width, channels = config["shape"]
    facts = {
        f"shape of {height}x{width}": height == width, "network without labels": config["num_classes"] > 0,
        f"time_embed={config['time_embed']!r}": config["time_embed"] == "sinusoidal",
        f"time_scale={config['time_scale']!r}": config["time_scale"] == 1.0,
        f"attention_scale={config['attention_scale']!r}": config["attention_scale"] == "sqrt",
        f"extra_in={config['extra_in']}": config["extra_in"] == 0,
        f"extra_out={config['extra_out']}": config["extra_out"] in (0, channels),
        "further shapes": not config["shapes"],
    }  # fmt: skip
    return next((what for what, fine in facts.items() if not fine), None)


def _settings(path: Path, shapes: Mapping[str, tuple[int, ...]], heads: int | None) -> dict[str, Any]:
    """The settings of the native network, from the shapes of the official tensors."""
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty is not None:
        raise WeightsError(f"{path}: {shown(empty)} has the shape {list(shapes[empty])}, of no numbers")
    try:
        width, channels, patch, _ = shapes[PATCHES]
        (outputs, _), (hidden, _) = shapes["final_layer.linear.weight"], shapes["blocks.0.mlp.fc1.weight"]
        rows, _ = shapes["y_embedder.embedding_table.weight"]
        _, tokens, _ = shapes.get(POSITIONS, (1, 256, width))  # the paper's, of 32 x 32 latents in patches of 2
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: not an official DiT: {error}") from None
    heads = HEADS.get(width) if heads is None else heads
    if heads is None:
        raise WeightsError(f"{path}: width {width} is none of the paper's ({', '.join(map(str, HEADS))}): give heads=")
    if math.isqrt(tokens) ** 2 != tokens:
        raise WeightsError(f"{path}: {POSITIONS} has {tokens} rows; expected those of a square")
    side, out = math.isqrt(tokens) * patch, outputs // patch**2
    ratio = hidden / width
    return dict(
        shape=(side, side, channels), num_classes=rows - 1, patch=patch, width=width, heads=heads, time_scale=1.0,
        depth=sum(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name) is not None for name in shapes),
        # `dit` rounds the product with the width down.
        mlp_ratio=ratio if math.floor(ratio * width) == hidden else math.nextafter(ratio, math.inf),
        extra_out=out - channels,
    )  # fmt: skip


def positions(side: int, width: int) -> np.ndarray:
    """The fixed positions `[side * side, width] float32`, by the steps of the official code, so with its bits."""
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    columns, rows = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    phases = [np.outer(axis.reshape(-1), omega) for axis in (columns, rows)]
    return np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=1).astype(np.float32)
