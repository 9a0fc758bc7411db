"""LoRA adapters in files: as peft and diffusers write them, as diffusers once wrote them, and as kohya's scripts do."""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.adapters.lora import Adapter, Layer, Pair, stacked
from diffjax.convert.weights.adapters.lora_config import FILES, METADATA, Config, config_of, opened
from diffjax.convert.weights.adapters.lora_names import (
    Meaning,
    Named,
    Target,
    chosen,
    fits,
    matched,
    spellings,
    taken_apart,
    targets_of,
)
from diffjax.convert.weights.errors import WeightsError, some
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.places.layout import AXES, Place, type_of
from diffjax.convert.weights.tensors import Source, Tensor, write
from diffjax.convert.weights.tensors.dtypes import check_dtype
from diffjax.core.types import Model


class Factors(NamedTuple):
    """The change of one module: A `[*window, C_in, rank]`, B `[rank, C_out]`, and alpha."""

    a: np.ndarray
    b: np.ndarray
    alpha: float


def load_lora(
    path: str | os.PathLike, model: Model, *, component: str | None = None, param_dtype: str | None = None
) -> Adapter:
    """The adapter in a file, for the network that it is meant for.

    Modules have the names of diffusers, or for the networks of `load_original` those of their authors; factors of
    several modules in one (`qkv`) become those of each, which have A in common.

    Args:
      path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`, or with
        `adapter_model.safetensors` and `adapter_config.json` (peft).
      model: the network, as `load` returns it.
      component: the part of the pipeline whose adapter it is, such as "unet", "transformer" or "text_encoder_2"; only
        for files that hold those of several (`lora_components`).
      param_dtype: of the factors; None for that of the file.

    Returns:
      An `Adapter`. Alpha is that of the tensor `alpha`, or of the config in the metadata; without both it is the rank,
      as in diffusers and kohya's scripts. The dropout of the config is that of training and left out.

    Raises:
      WeightsError: for tensors that are of no module of the network, without their other half, of another shape or not
        of floating point; for several components and none named; for peft's names without its config; for DoRA and
        whatever else is not LoRA.
      ValueError: for a `param_dtype` that is not of floating point.
      OSError: if the file cannot be read.
    """
    check_dtype("param_dtype", param_dtype)
    file, settings = opened(Path(path))
    tensors, targets = find(file), targets_of(model)
    spelled = spellings(targets, model.config)
    keys = chosen(file, [taken_apart(file, key, spelled) for key in tensors], component)
    config = config_of(file, settings, next((key.component for key in keys if key.component), component))
    found = matched(file, keys, spelled)
    config.check_names(file, [slots["a"].names[-1] for slots in found.values()])
    factors: dict[str, Factors] = {}
    for meaning, slots in found.items():
        factors |= _factors(file, meaning, slots, tensors, targets, config)
    return _adapter(factors, targets, config.use_rslora, param_dtype)


def lora_components(path: str | os.PathLike) -> tuple[str, ...]:
    """The parts of a pipeline that a file has adapters for, by its own words; none if it does not tell."""
    return tuple(name for name in sorted(lora_ranks(path)) if name)


def lora_file(path: str | os.PathLike) -> Path | None:
    """The file of an adapter, in a folder or itself; None for what is none.

    Raises as `find`.
    """
    path = Path(path)
    if path.is_dir():
        return next((path / name for name in FILES if (path / name).is_file()), None)
    is_lora = path.is_file() and any(fits(key) for key in find(path))
    return path if is_lora else None


def lora_ranks(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """The ranks in a file, for each part of the pipeline; "" where it does not tell which, and no part for other files.

    Raises:
      WeightsError: for a folder without an adapter, a damaged file, and adapters of other kinds.
      OSError: if it cannot be read.
    """
    file, _ = opened(Path(path))
    found: dict[str, set[int]] = {}
    for key, tensor in find(file).items():
        named = taken_apart(file, key, {})
        if named.slot == "a" and tensor.shape:
            found.setdefault(named.component or "", set()).add(tensor.shape[0])
    return {component: tuple(sorted(ranks)) for component, ranks in found.items()}


def _factors(
    file: Path, meaning: Meaning, slots: Mapping[str, Named], tensors: Mapping[str, Tensor],
    targets: Mapping[str, Target], config: Config,
) -> dict[str, Factors]:  # fmt: skip
    """The factors of each of the modules; a window of one may be left out or written out."""
    a, b = (tensors[slots[slot].key] for slot in "ab")
    shapes = [targets[module].shape for module in meaning.modules]
    rows, shape = sum(shape[0] for shape in shapes), shapes[0]
    window = lambda sides: () if all(n == 1 for n in sides) else tuple(sides)
    right = len(a.shape) >= 2 and b.shape[:2] == (rows, a.shape[0]) and a.shape[1] == shape[1]
    if not (right and window(a.shape[2:]) == window(shape[2:]) and window(b.shape[2:]) == () and a.shape[0]):
        told = f"{list(a.shape)} and {list(b.shape)} for a weight {[rows, *shape[1:]]}"
        raise WeightsError(f"{file}: {slots['a'].names[-1]}: factors of shape {told}")
    if not all(jnp.issubdtype(factor.dtype, jnp.floating) for factor in (a, b)):
        told = f"factors of {a.dtype} and {b.dtype}; expected floating point"
        raise WeightsError(f"{file}: {slots['a'].names[-1]}: {told}")
    a = a.part().reshape(a.shape[0], *shape[1:]).transpose(AXES[len(shape)])
    b = b.part().reshape(b.shape[:2])
    b = np.concatenate([b[rows // 2 :], b[: rows // 2]]) if meaning.swapped else b
    alpha = _alpha(file, slots, tensors, config, a.shape[-1])
    ends = np.cumsum([shape[0] for shape in shapes])
    parts = [b[end - shape[0] : end].T for end, shape in zip(ends, shapes, strict=True)]
    return {module: Factors(a, part, alpha) for module, part in zip(meaning.modules, parts, strict=True)}


def _alpha(file, slots, tensors, config, rank) -> float:
    if "alpha" in slots:
        name, tensor = slots["alpha"].key, tensors[slots["alpha"].key]
        alpha = float(tensor.part().reshape(-1)[0]) if math.prod(tensor.shape) == 1 else math.nan
        if not math.isfinite(alpha):
            raise WeightsError(f"{file}: {name} of shape {list(tensor.shape)}: expected one finite number")
        return alpha
    alpha = config.alpha_of(slots["a"].names[-1])
    if alpha is None and slots["a"].peft:
        raise WeightsError(
            f"{file}: its names are those of peft, which has alpha in adapter_config.json; put both files into one "
            f"folder, this one as {FILES[1]}"
        )
    return float(rank) if alpha is None else alpha


def _adapter(
    factors: Mapping[str, Factors], targets: Mapping[str, Target], use_rslora: bool, param_dtype: str | None
) -> Adapter:
    by_parameter: dict[str, dict[int, Factors]] = collections.defaultdict(dict)
    counts = collections.Counter(target.parameter for target in targets.values())
    for module, target in targets.items():  # in the order of the network
        if module in factors:
            by_parameter[target.parameter][target.layer] = factors[module]
    pairs, layers = {}, []
    for name, found in by_parameter.items():
        pairs[name] = _stack(name, found, counts[name], param_dtype)
        given = {i: Layer(one.b.shape[0], one.alpha) for i, one in found.items()}
        layers.append((name, tuple(given.get(i, Layer(0, 0.0)) for i in range(counts[name]))))
    return Adapter(pairs, tuple(layers), use_rslora)


def _stack(name, found, count, param_dtype) -> Pair:
    most = max(a.shape[-1] for a, _, _ in found.values())
    arrays = {str(i): array for i, array in enumerate(array for one in found.values() for array in one[:2])}
    dtype = type_of(Place(tuple(arrays), (), True, ()), arrays, param_dtype)
    a, b, _ = next(iter(found.values()))
    whole = Pair(np.zeros((count, *a.shape[:-1], most), dtype), np.zeros((count, most, b.shape[-1]), dtype))
    for i, (a, b, _) in found.items():
        rank = a.shape[-1]
        whole.a[i, ..., :rank], whole.b[i, :rank] = a, b
    return Pair(*(jnp.asarray(array if stacked(name) else array[0]) for array in whole))


def save_lora(adapter: Adapter, model: Model, path: str | os.PathLike, *, component: str | None = None) -> None:
    """Writes an adapter as diffusers' `save_lora_adapter` does.

    Its `load_lora_adapter(path, prefix=component, use_safetensors=True)` reads it; without that flag diffusers 0.42
    takes the tensors of a local file and leaves its metadata, in which alpha is, so that alpha is the rank.

    Args:
      adapter: of this network.
      model: the network, as `load` returns it.
      path: a file `*.safetensors`, or a folder (made if absent) for `pytorch_lora_weights.safetensors`.
      component: of a pipeline, such as "unet" or "transformer", which is put before the names; a file without it is
        passed over by `pipe.load_lora_weights`. None for the network alone.

    Raises:
      WeightsError: for an adapter of another network, or without layers.
      OSError: disk full, folder read-only.
    """
    path, targets = Path(path), targets_of(model)
    layers, tensors, held = dict(adapter.layers), {}, {}
    strange = layers.keys() - {target.parameter for target in targets.values()}
    if strange:
        raise WeightsError(f"{path}: the adapter has kernels that this network lacks: {some(sorted(strange))}")
    prefix = f"{component}." if component else ""
    for module, target in targets.items():
        layer = layers[target.parameter][target.layer] if target.parameter in layers else Layer(0, 0.0)
        if not layer.rank:
            continue
        held[module] = layer
        for slot, array in zip("AB", _tensors(adapter, target, layer.rank), strict=True):
            tensors[f"{prefix}{module}.lora_{slot}.weight"] = Source.of(array)
    if not held:
        raise WeightsError(f"{path}: the adapter has no layers")
    config = {f"{prefix}{name}": value for name, value in _peft_config(held, adapter.use_rslora).items()}
    path = path if path.suffix == ".safetensors" else path / FILES[0]
    write(path, tensors, {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)})


def _tensors(adapter, target, rank) -> Iterator[np.ndarray]:
    a, b = (np.asarray(leaf) for leaf in adapter.pairs[target.parameter])
    if stacked(target.parameter):
        a, b = a[target.layer], b[target.layer]
    yield a[..., :rank].transpose(np.argsort(AXES[len(target.shape)]))
    yield b[:rank].T.reshape(target.shape[0], rank, *(1,) * (len(target.shape) - 2))


def _peft_config(held: Mapping[str, Layer], use_rslora: bool) -> dict[str, Any]:
    whole = lambda alpha: int(alpha) if float(alpha).is_integer() else alpha
    ranks = {module: layer.rank for module, layer in held.items()}
    alphas = {module: whole(layer.alpha) for module, layer in held.items()}
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": use_rslora, "target_modules": sorted(held),
        # The caret: a name is that of the module itself, and not the end of another's.
        "rank_pattern": {f"^{module}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{module}": value for module, value in alphas.items() if value != alpha},
        "bias": "none", "lora_bias": False, "lora_dropout": 0.0, "use_dora": False,
    }  # fmt: skip
