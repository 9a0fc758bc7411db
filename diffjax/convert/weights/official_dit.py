"""DiT and SiT as their authors published them, read into `diffjax.models.dit` and written back, bit for bit.

Peebles & Xie 2023, arXiv:2212.09748 (github.com/facebookresearch/DiT), and Ma et al. 2024, arXiv:2401.08740
(github.com/willisma/SiT), have one network and one set of names. The network here is the same with the six vectors of a
block's modulation made by two maps, three each, and with the layers stacked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folder import Report, find
from diffjax.convert.weights.tensors import Source, write
from diffjax.core.types import Model
from diffjax.models import dit
from diffjax.nn.functional import names_of

# By the width of the paper's networks: S, B, L, XL.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
ENDS = {
    "cond/hidden": "t_embedder.mlp.0", "cond/out": "t_embedder.mlp.2",
    "modulation": "final_layer.adaLN_modulation.1", "out": "final_layer.linear",
}  # fmt: skip
LAYERS = {
    "attention/qkv": "attn.qkv", "attention/out": "attn.proj", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
}  # fmt: skip
# Shift, scale and gate of attention, then those of the perceptron.
HALVES = ("modulation", "mlp/modulation")
POSITIONS = "pos_embed"


def load_official_dit(
    path: str | os.PathLike, *, heads: int | None = None, param_dtype: str | None = None, **how
) -> tuple[Model, dict]:
    """The network of an official checkpoint of DiT or SiT, and its parameters.

    Args:
      path: a safetensors file with the state dict. The published files are pickles: convert them where you trust them,
        `safetensors.torch.save_file(torch.load(PATH, weights_only=True), "dit.safetensors")` (SiT: of its `"ema"`).
      heads: of attention, which the file does not tell; None for those of the paper's network of this width.
      param_dtype: of the parameters; None for that of the file.
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
    path = Path(path)
    tensors = find(path)
    model = dit(**_settings(path, {name: tensor.shape for name, tensor in tensors.items()}, heads), **how)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    wanted = {name: tuple(leaf.shape) for name, leaf in _official_shapes(model, shapes).items()}
    if POSITIONS not in tensors:
        del wanted[POSITIONS]
    both = sorted(wanted.keys() & tensors.keys())
    difference = Report(
        tuple(sorted(wanted.keys() - tensors.keys())),
        tuple(sorted(tensors.keys() - wanted.keys())),
        tuple((name, tensors[name].shape, wanted[name]) for name in both if tensors[name].shape != wanted[name]),
    )
    if any(difference):
        raise WeightsError(f"{path}: not the parameters of a DiT: {difference}")
    arrays = {name: tensor.part() for name, tensor in tensors.items()}
    if POSITIONS in arrays:
        ours = positions(model.config["shape"][0] // model.config["patch"], model.config["width"])
        # A file of 16 bits has them rounded.
        if not np.allclose(np.float32(arrays[POSITIONS][0]), ours, atol=2e-2 * (arrays[POSITIONS].itemsize < 4) + 1e-5):
            raise WeightsError(f"{path}: {POSITIONS} is not that of sines and cosines, which this network has built in")
    leaves = {name: np.array(leaf, order="C") for name, leaf in names_of(from_official(arrays)).items()}
    dtype = None if param_dtype is None else jnp.dtype(param_dtype)
    given = [jnp.asarray(leaves[name], dtype) for name in names_of(shapes)]
    return model, jax.tree.unflatten(jax.tree.structure(shapes), given)


def save_official_dit(model: Model, params: dict, path: str | os.PathLike) -> None:
    """Writes the parameters of a `diffjax.models.dit` as the official state dict, for PyTorch's DiT and SiT.

    Args:
      model: a `dit` with a square `shape` and labels; trained here, its times must be those of the other side
        (`time_embed="sinusoidal", time_scale=1.0`).
      params: of that model.
      path: a safetensors file.

    Raises:
      WeightsError: for a network that PyTorch's class does not have, or parameters of another one.
      OSError: disk full, folder read-only.
    """
    config, path = model.config, Path(path)
    wrong = _unlike(config)
    if wrong:
        raise WeightsError(f"{path}: the official DiT has no {wrong}")
    wanted = {name: tuple(leaf.shape) for name, leaf in names_of(jax.eval_shape(model.init, jax.random.key(0))).items()}
    if {name: tuple(leaf.shape) for name, leaf in names_of(params).items()} != wanted:
        raise WeightsError(f"{path}: params are not those of this dit")
    arrays = to_official(jax.tree.map(np.asarray, params), config["shape"][0], config["shape"][2], config["patch"])
    sources = {name: Source.of(a) for name, a in arrays.items()}
    write(path, sources, {"format": "pt"})


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
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        outputs, hidden = shapes["final_layer.linear.weight"][0], shapes["blocks.0.mlp.fc1.weight"][0]
        rows = shapes["y_embedder.embedding_table.weight"][0]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: not an official DiT: {error}") from None
    tokens = shapes[POSITIONS][1] if POSITIONS in shapes else 256  # the paper's, of 32 x 32 latents in patches of 2
    heads = HEADS.get(width) if heads is None else heads
    if heads is None:
        raise WeightsError(f"{path}: width {width} is none of the paper's ({', '.join(map(str, HEADS))}): give heads=")
    if math.isqrt(tokens) ** 2 != tokens:
        raise WeightsError(f"{path}: {POSITIONS} has {tokens} rows; expected those of a square")
    side, out = math.isqrt(tokens) * patch, outputs // patch**2
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.") and _number(name))
    return dict(
        shape=(side, side, channels), num_classes=rows - 1, patch=patch, width=width, depth=depth, heads=heads,
        mlp_ratio=hidden / width, time_scale=1.0, extra_out=out - channels,
    )  # fmt: skip


def _number(name):
    return name.split(".")[1].isdigit()


def _official_shapes(model, shapes):
    config = model.config
    return jax.eval_shape(
        lambda params: to_official(params, config["shape"][0], config["shape"][2], config["patch"], jnp), shapes
    )


def from_official(tensors: Mapping[str, np.ndarray]) -> dict:
    """The native parameters of an official state dict of arrays: transposed, split and stacked."""
    depth = sum(name.endswith("attn.qkv.weight") for name in tensors)
    linear = lambda name: {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}
    params: dict[str, Any] = {}
    for ours, theirs in ENDS.items():
        _put(params, ours, linear(theirs))
    params["cond"]["label"] = {"embedding": tensors["y_embedder.embedding_table.weight"]}
    patches = tensors["x_embedder.proj.weight"]
    # Pixels of a patch row by row, channels last.
    kernel = patches.transpose(2, 3, 1, 0).reshape(-1, len(patches))
    params["inp"] = {"kernel": kernel, "bias": tensors["x_embedder.proj.bias"]}
    stack = lambda parts: {name: np.stack([part[name] for part in parts]) for name in ("kernel", "bias")}
    blocks = params["blocks"] = {}
    for ours, theirs in LAYERS.items():
        _put(blocks, ours, stack([linear(f"blocks.{i}.{theirs}") for i in range(depth)]))
    whole = stack([linear(f"blocks.{i}.adaLN_modulation.1") for i in range(depth)])
    for i, ours in enumerate(HALVES):
        _put(blocks, ours, {name: np.split(leaf, 2, axis=-1)[i] for name, leaf in whole.items()})
    return params


def _put(tree, name, value):
    *parts, last = name.split("/")
    for part in parts:
        tree = tree.setdefault(part, {})
    tree[last] = tree.get(last, {}) | value


def to_official(params: dict, side: int, channels: int, patch: int, xp=np) -> dict[str, Any]:
    """The official state dict of native parameters, the inverse of `from_official`, and the positions.

    Args:
      side, channels, patch: of the images, and of a patch.
      xp: numpy, or jax.numpy for parameters that are traced.
    """
    leaves = names_of(params)
    out: dict[str, Any] = {"y_embedder.embedding_table.weight": leaves["cond/label/embedding"]}

    def linear(theirs, kernel, bias):
        out[f"{theirs}.weight"], out[f"{theirs}.bias"] = kernel.T, bias

    for ours, theirs in ENDS.items():
        linear(theirs, leaves[f"{ours}/kernel"], leaves[f"{ours}/bias"])
    kernel = leaves["inp/kernel"]
    out["x_embedder.proj.weight"] = kernel.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)
    out["x_embedder.proj.bias"] = leaves["inp/bias"]
    for i in range(len(leaves["blocks/attention/qkv/bias"])):
        for ours, theirs in LAYERS.items():
            linear(f"blocks.{i}.{theirs}", *(leaves[f"blocks/{ours}/{leaf}"][i] for leaf in ("kernel", "bias")))
        whole = (
            xp.concatenate([leaves[f"blocks/{ours}/{leaf}"][i] for ours in HALVES], axis=-1)
            for leaf in ("kernel", "bias")
        )
        linear(f"blocks.{i}.adaLN_modulation.1", *whole)
    out[POSITIONS] = xp.asarray(positions(side // patch, kernel.shape[-1])[None], kernel.dtype)
    return out


def positions(side: int, width: int) -> np.ndarray:
    """The fixed positions `[side * side, width] float32`, by the steps of the official code, so with its bits."""
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    columns, rows = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    phases = [np.outer(axis.reshape(-1), omega) for axis in (columns, rows)]
    return np.concatenate([wave(phase) for phase in phases for wave in (np.sin, np.cos)], axis=1).astype(np.float32)
