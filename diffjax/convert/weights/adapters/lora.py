"""LoRA adapters in files: as peft and diffusers write them, as diffusers once wrote them, and as kohya's scripts do.

Every form names modules of the network, with dots or with underscores for them. They are looked up among the modules
that the network has, spelled in each of these ways, so nothing is guessed: a name is of one module or an error.
"""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.adapters.lora import Adapter, Layer, Pair, stacked
from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folder import find, read_json
from diffjax.convert.weights.layout import AXES, layout
from diffjax.convert.weights.sgm import sgm_name
from diffjax.convert.weights.tensors import Source, Tensor, read_header, write
from diffjax.core.types import Model
from diffjax.nn.functional import names_of

METADATA = "lora_adapter_metadata"
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# What stands before a module's name, and the part of a pipeline that it means.
COMPONENTS = {
    **{f"{name}.": name for name in ("unet", "transformer", "transformer_2", "prior")},
    **{f"{name}.": name for name in ("text_encoder", "text_encoder_2", "text_encoder_3")},
    "diffusion_model.": "unet", "lora_unet_": "unet", "lora_transformer_": "transformer",
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}  # fmt: skip
# A pipeline has one of them, and files call it by another's name.
DENOISERS = ("unet", "transformer", "prior")
SLOTS = {"A": "a", "down": "a", "B": "b", "up": "b"}
KEYS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<slot>A|B|down|up)(\.\w+)?\.weight"),
    re.compile(r"(?P<module>.+)\.lora(_linear_layer)?\.(?P<slot>down|up)\.weight"),
    re.compile(r"(?P<module>.+?)(\.processor)?\.(?P<last>to_(q|k|v|out))_lora\.(?P<slot>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.(?P<slot>alpha)"),
)
# The names of attention's projections in the oldest form, in networks and in text encoders.
LAST = {"to_q": ("to_q", "q_proj"), "to_k": ("to_k", "k_proj"), "to_v": ("to_v", "v_proj"),
        "to_out": ("to_out.0", "out_proj")}  # fmt: skip
OTHERS = (
    (r"lora_magnitude_vector|\.dora_scale$", "DoRA"),
    (r"\.lora_B(\.\w+)?\.bias$", "a bias of LoRA (lora_bias)"),
    (r"\.lora_mid\.", "LoCon with a core (Tucker)"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.b?oft_", "OFT"),
    (r"lora_embedding_[AB]", "LoRA of an embedding"),
    (r"\.(diff|diff_b|set_weight)$", "differences of whole weights"),
)
# Of a config of peft: what else changes the result, and the values that do not.
PLAIN = {
    "peft_type": ("LORA",), "use_dora": (False,), "lora_bias": (False,), "bias": ("none",), "use_qalora": (False,),
    "alora_invocation_tokens": (None,), "layer_replication": (None,), "modules_to_save": (None, []),
    "target_parameters": (None, []), "trainable_token_indices": (None, []), "arrow_config": (None,),
    "kasa_config": (None,), "monteclora_config": (None,), "velora_config": (None,), "use_bdlora": (None, False),
    # Others (PiSSA, OLoRA, CorDA, LoftQ, ...) start from changed weights of the network itself.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


class Target(NamedTuple):
    """A module with a kernel: the parameter, its layer in the stack, and the shape of the weight in PyTorch."""

    parameter: str
    layer: int
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """A tensor of an adapter's file: its key, the part of the pipeline (None: not said), and the module's spellings."""

    key: str
    component: str | None
    modules: tuple[str, ...]
    slot: str


def load_lora(
    path: str | os.PathLike, model: Model, *, component: str | None = None, param_dtype: str | None = None
) -> Adapter:
    """The adapter in a file, for the network that it is meant for.

    Args:
      path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`, or with
        `adapter_model.safetensors` and `adapter_config.json` (peft).
      model: the network, as `load` returns it.
      component: the part of the pipeline whose adapter it is, such as "unet", "transformer" or "text_encoder_2"; only
        for files that hold those of several (`lora_components`).
      param_dtype: of the factors; None for that of the file.

    Returns:
      An `Adapter`. Alpha is that of the tensor `alpha`, of the config in the metadata, or the rank. The dropout of the
      config is that of training and left out.

    Raises:
      WeightsError: for tensors that are of no module of the network (all are listed), without their other half, or of
        another shape; for several components and none named; for DoRA and whatever else is not LoRA.
      OSError: if the file cannot be read.
    """
    file, config = _open(Path(path))
    tensors = find(file)
    targets = targets_of(model)
    spelled = spellings(targets, model.config)
    entries = _chosen(file, [_entry(file, key, spelled) for key in tensors], component)
    config = _config(file, config, next((entry.component for entry in entries if entry.component), None))
    modules: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
    names, unmatched = {}, []
    for entry in entries:
        found = {module for name in entry.modules for module in spelled.get(name, ())}
        if len(found) != 1:
            unmatched.append(entry.key)
            continue
        module = found.pop()
        if entry.slot in modules[module]:
            raise WeightsError(f"{file}: two tensors are the {entry.slot} of {module}, one of them {entry.key}")
        modules[module][entry.slot] = tensors[entry.key]
        names[module] = entry.modules[-1]
    if unmatched:
        raise WeightsError(f"{file}: {len(unmatched)} tensors are of no module of this network: {', '.join(unmatched)}")
    halves = [module for module, parts in modules.items() if not {"a", "b"} <= parts.keys()]
    if halves:
        raise WeightsError(f"{file}: modules with one factor of two: {', '.join(halves)}")
    return _adapter(file, modules, targets, names, config, param_dtype)


def lora_components(path: str | os.PathLike) -> tuple[str, ...]:
    """The parts of a pipeline that a file has adapters for, by its own words; none if it does not tell."""
    file, _ = _open(Path(path))
    found = {_entry(file, key, {}).component for key in find(file)}
    return tuple(sorted(name for name in found if name))


def _open(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of tensors, and the config beside it or in its metadata."""
    if path.is_dir():
        here = [path / name for name in FILES if (path / name).is_file()]
        if not here:
            raise WeightsError(f"{path}: no adapter; looked for {' and '.join(FILES)}")
        path = here[0]
    config: Any = {}
    if path.name == FILES[1] and (path.parent / "adapter_config.json").is_file():
        config = read_json(path.parent / "adapter_config.json")
    elif path.suffix == ".safetensors" and (text := read_header(path)[1].get(METADATA)) is not None:
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: its {METADATA} is no JSON: {str(error)[:80]}") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: its {METADATA} is no JSON object")
    return path, config


def targets_of(model: Model) -> dict[str, Target]:
    """The modules with a kernel by their names in a checkpoint, such as "transformer_blocks.3.attn1.to_q"."""
    shapes = names_of(jax.eval_shape(model.init, jax.random.key(0)))
    places = {name: place for name, place in layout(shapes).items() if name.rpartition("/")[2] == "kernel"}
    return {
        key.removesuffix(".weight"): Target(name, i, place.shape)
        for name, place in places.items()
        for i, key in enumerate(place.keys)
    }


def spellings(targets: Mapping[str, Target], config: Mapping[str, Any]) -> dict[str, set[str]]:
    """The modules that a name may mean: with dots or underscores, and under names of other times and places."""
    out: dict[str, set[str]] = collections.defaultdict(set)
    for module in targets:
        old = {f"text_model.{module}", module.removeprefix("text_model.")}
        other = sgm_name(module, config.get("layers_per_block", 2))
        for name in {module} | old | ({other} if other else set()):
            out[name].add(module)
            out[name.replace(".", "_")].add(module)
    # A module's own name means nothing else.
    return out | {module: {module} for module in targets}


def _entry(file: Path, key: str, spelled: Mapping[str, Any]) -> Entry:
    for regex, what in OTHERS:
        if re.search(regex, key):
            raise WeightsError(f"{file}: {key} is {what}, which is not supported; supported: LoRA")
    match = next((match for regex in KEYS if (match := regex.fullmatch(key))), None)
    if match is None:
        return Entry(key, None, (), "")
    module = match["module"].removeprefix("base_model.model.")
    component = None
    if module not in spelled:
        prefix = next((prefix for prefix in COMPONENTS if module.startswith(prefix)), None)
        component, module = COMPONENTS.get(prefix), module.removeprefix(prefix or "")
    last = match.groupdict().get("last")
    modules = tuple(f"{module}.{name}" for name in LAST[last]) if last else (module,)
    return Entry(key, component, modules, SLOTS.get(match["slot"], match["slot"]))


def _chosen(file: Path, entries: list[Entry], component: str | None) -> list[Entry]:
    """The entries of one part of the pipeline."""
    group = lambda name: DENOISERS[0] if name in DENOISERS else name
    known = sorted({entry.component for entry in entries if entry.component})
    if component is None:
        if len({group(name) for name in known}) > 1:
            raise WeightsError(f"{file}: adapters of {', '.join(known)}: name one of them, component={known[0]!r}")
        if not entries:
            raise WeightsError(f"{file}: no tensors")
        return entries
    if component not in COMPONENTS.values():
        allowed = ", ".join(dict.fromkeys(COMPONENTS.values()))
        raise WeightsError(f"{file}: unknown component {component!r}; known: {allowed}")
    # What says nothing is taken for the one that was asked for, if nothing else is.
    kept = [entry for entry in entries if entry.component is None or group(entry.component) == group(component)]
    if not kept:
        raise WeightsError(f"{file}: no adapter of {component!r}; it has those of {', '.join(known)}")
    return kept


def _config(file: Path, config: dict[str, Any], component: str | None) -> dict[str, Any]:
    """The config of one part of the pipeline; raises `WeightsError` for what is not plain LoRA."""
    prefixes = [prefix for prefix in COMPONENTS if prefix.endswith(".")]
    if any(name.startswith(prefix) for name in config for prefix in prefixes):
        of = f"{component}."
        config = {name.removeprefix(of): value for name, value in config.items() if name.startswith(of)}
    for name, plain in PLAIN.items():
        value = config.get(name, plain[0])
        if not any(type(value) is type(v) and value == v for v in plain):
            raise WeightsError(f"{file}: {name}={value!r} is not supported; supported: {', '.join(map(repr, plain))}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise WeightsError(f"{file}: {name}={config[name]!r}: expected a map from modules to numbers")
    return config


def _alpha(module: str, rank: int, given: Tensor | None, config: Mapping[str, Any]) -> float:
    if given is not None:
        return float(np.asarray(given.part(), np.float64).reshape(-1)[0])
    fits = (v for k, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", module))
    return float(next(fits, config.get("lora_alpha", rank)))


def _adapter(file, modules, targets, names, config, param_dtype) -> Adapter:
    by_parameter: dict[str, dict[int, str]] = collections.defaultdict(dict)
    layers = collections.Counter(target.parameter for target in targets.values())
    for module, target in targets.items():  # in the order of the network
        if module in modules:
            by_parameter[target.parameter][target.layer] = module
    pairs, parts = {}, []
    for name, chosen in by_parameter.items():
        factors, ranks = {}, [Layer(0, 0.0)] * layers[name]
        for layer, module in chosen.items():
            a, b = factors[layer] = _factors(file, module, modules[module], targets[module].shape)
            alpha = _alpha(names[module], b.shape[0], modules[module].get("alpha"), config)
            ranks[layer] = Layer(b.shape[0], alpha)
        pairs[name] = _stack(name, factors, layers[name], param_dtype)
        parts.append((name, tuple(ranks)))
    return Adapter(pairs, tuple(parts), bool(config.get("use_rslora")))


def _factors(file, module, tensors, shape) -> tuple[np.ndarray, np.ndarray]:
    """A `[*window, C_in, rank]` and B `[rank, C_out]`; a window of one may be left out or written out."""
    a, b = tensors["a"].part(), tensors["b"].part()
    window = lambda some: () if all(n == 1 for n in some) else tuple(some)
    fits = a.ndim >= 2 and b.ndim >= 2 and b.shape[:2] == (shape[0], a.shape[0]) and a.shape[1] == shape[1]
    if not (fits and window(a.shape[2:]) == window(shape[2:]) and window(b.shape[2:]) == () and a.shape[0]):
        raise WeightsError(
            f"{file}: {module}: factors of shape {list(a.shape)} and {list(b.shape)} for a weight {list(shape)}"
        )
    return a.reshape(a.shape[0], *shape[1:]).transpose(AXES[len(shape)]), b.reshape(b.shape[:2]).T


def _stack(name, factors, layers, param_dtype) -> Pair:
    most = max(a.shape[-1] for a, _ in factors.values())
    a, b = next(iter(factors.values()))
    dtype = jnp.result_type(*{array.dtype for pair in factors.values() for array in pair})
    dtype = dtype if param_dtype is None else jnp.dtype(param_dtype)
    whole = Pair(np.zeros((layers, *a.shape[:-1], most), dtype), np.zeros((layers, most, b.shape[-1]), dtype))
    for layer, (a, b) in factors.items():
        rank = a.shape[-1]
        whole.a[layer, ..., :rank], whole.b[layer, :rank] = a, b
    return Pair(*(jnp.asarray(array if stacked(name) else array[0]) for array in whole))


def save_lora(adapter: Adapter, model: Model, path: str | os.PathLike, *, component: str | None = None) -> None:
    """Writes an adapter as diffusers' `save_lora_adapter` does, for its `load_lora_adapter(path, prefix=component)`.

    Args:
      adapter: of this network.
      model: the network, as `load` returns it.
      path: a file `*.safetensors`, or a folder (made if absent) for `pytorch_lora_weights.safetensors`.
      component: of a pipeline, such as "unet" or "transformer", which is put before the names as `load_lora_weights`
        expects it; None for the network alone.

    Raises:
      WeightsError: for an adapter of another network.
      OSError: disk full, folder read-only.
    """
    path = Path(path)
    parts, tensors, held = dict(adapter.layers), {}, {}
    prefix = f"{component}." if component else ""
    for module, target in targets_of(model).items():
        part = parts[target.parameter][target.layer] if target.parameter in parts else Layer(0, 0.0)
        if not part.rank:
            continue
        held[module] = part
        for slot, array in zip("AB", _tensors(adapter, target, part.rank), strict=True):
            read = lambda array=array: array
            tensors[f"{prefix}{module}.lora_{slot}.weight"] = Source(array.dtype, array.shape, read)
    strange = parts.keys() - {target.parameter for target in targets_of(model).values()}
    if strange:
        raise WeightsError(f"{path}: the adapter has kernels that this network lacks: {', '.join(sorted(strange))}")
    config = {f"{prefix}{name}": value for name, value in _peft_config(held, adapter.use_rslora).items()}
    if path.suffix != ".safetensors":
        path.mkdir(parents=True, exist_ok=True)
        path = path / FILES[0]
    write(path, tensors, {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)})


def _tensors(adapter, target, rank) -> Iterator[np.ndarray]:
    a, b = (np.asarray(leaf) for leaf in adapter.pairs[target.parameter])
    if stacked(target.parameter):
        a, b = a[target.layer], b[target.layer]
    yield a[..., :rank].transpose(np.argsort(AXES[len(target.shape)]))
    yield b[:rank].T.reshape(target.shape[0], rank, *(1,) * (len(target.shape) - 2))


def _peft_config(held: Mapping[str, Layer], use_rslora: bool) -> dict[str, Any]:
    whole = lambda alpha: int(alpha) if float(alpha).is_integer() else alpha
    ranks = {module: part.rank for module, part in held.items()}
    alphas = {module: whole(part.alpha) for module, part in held.items()}
    rank, alpha = (collections.Counter(some.values()).most_common(1)[0][0] for some in (ranks, alphas))
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": use_rslora, "target_modules": sorted(held),
        # The caret: a name is that of the module itself, and not the end of another's.
        "rank_pattern": {f"^{module}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{module}": value for module, value in alphas.items() if value != alpha},
        "bias": "none", "lora_bias": False, "lora_dropout": 0.0, "use_dora": False,
    }  # fmt: skip
