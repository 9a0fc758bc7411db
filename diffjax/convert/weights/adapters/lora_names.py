"""Which modules of a network a file of LoRA means.

Every form names modules, with dots or with underscores for them, by diffusers' names or those of the network's authors.
They are looked up among the modules that the network has, spelled in each of these ways, so nothing is guessed: a name
has one meaning or is an error.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffjax.adapters.lora import layers_of, stacked
from diffjax.convert.weights.errors import WeightsError, some
from diffjax.convert.weights.originals.load import MODULES
from diffjax.convert.weights.places.layout import place
from diffjax.convert.weights.tensors.strict import shown
from diffjax.core.types import Model
from diffjax.nn.functional import names_of

# What stands before a module's name, and the part of a pipeline that it means.
COMPONENTS = {
    **{f"{name}.": name for name in ("unet", "transformer", "transformer_2", "prior")},
    **{f"{name}.": name for name in ("text_encoder", "text_encoder_2", "text_encoder_3")},
    "diffusion_model.": "unet", "lora_unet_": "unet", "lora_transformer_": "transformer",
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}  # fmt: skip
# A pipeline has one of them, which ComfyUI and kohya's scripts call by one name.
DENOISERS = ("unet", "transformer", "prior")
PEFT = "base_model.model."
SLOTS = {"A": "a", "down": "a", "B": "b", "up": "b", "alpha": "alpha"}
FORMS = (
    re.compile(r"(?P<module>.+)\.lora_(?P<slot>A|B|down|up)(\.\w+)?\.weight"),
    re.compile(r"(?P<module>.+)\.lora(_linear_layer)?\.(?P<slot>down|up)\.weight"),
    re.compile(r"(?P<module>.+?)(\.processor)?\.(?P<last>to_(q|k|v|out))_lora\.(?P<slot>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.(?P<slot>alpha)"),
)
# The names of attention's projections in the oldest form, in networks and in text encoders.
LAST = {"to_q": ("to_q", "q_proj"), "to_k": ("to_k", "k_proj"), "to_v": ("to_v", "v_proj"),
        "to_out": ("to_out.0", "out_proj")}  # fmt: skip
NOT_LORA = (
    (r"lora_magnitude_vector|\.dora_scale$", "DoRA"),
    (r"\.lora_B(\.\w+)?\.bias$", "a bias of LoRA (lora_bias)"),
    (r"\.lora_mid\.", "LoCon with a core (Tucker)"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.b?oft_", "OFT"),
    (r"lora_embedding_[AB]", "LoRA of an embedding"),
    (r"\.(diff|diff_b|set_weight)$", "differences of whole weights"),
)


class Target(NamedTuple):
    """A module with a kernel: the parameter, its layer in the stack, and the shape of the weight in PyTorch."""

    parameter: str
    layer: int
    shape: tuple[int, ...]


class Meaning(NamedTuple):
    """What a name in a file stands for.

    Attributes:
      modules: one, or several whose weights lie below one another there.
      swapped: whether the upper and the lower half of the rows are exchanged there.
    """

    modules: tuple[str, ...]
    swapped: bool = False


class Named(NamedTuple):
    """The key of a tensor in an adapter's file, taken apart.

    Attributes:
      key: the whole.
      component: the part of the pipeline; None if it is not said.
      names: of the module, as it may be spelled.
      slot: "a", "b" or "alpha"; "" for what is none of them.
      peft: whether it is named as peft does, whose alpha is in a config beside the file.
    """

    key: str
    component: str | None
    names: tuple[str, ...]
    slot: str
    peft: bool


def targets_of(model: Model) -> dict[str, Target]:
    """The modules with a kernel by their names in a checkpoint, such as "transformer_blocks.3.attn1.to_q"."""
    out = {}
    for name, leaf in names_of(jax.eval_shape(model.init, jax.random.key(0))).items():
        if name.rpartition("/")[2] == "kernel":
            for i, layer in enumerate(layers_of(name, leaf.shape)):
                one = place(layer, tuple(leaf.shape[1:] if stacked(name) else leaf.shape))
                out[one.keys[0].removesuffix(".weight")] = Target(name, i, one.shape)
    return out


def spellings(targets: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, set[Meaning]]:
    """What a name may mean: with dots or underscores, and under names of other times and places."""
    known = [*_authors(targets, config)]
    for module in targets:
        own = {module, f"text_model.{module}", module.removeprefix("text_model.")}
        known += [(name, Meaning((module,))) for name in own]
    out: dict[str, set[Meaning]] = collections.defaultdict(set)
    for name, meaning in known:
        out[name].add(meaning)
        out[name.replace(".", "_")].add(meaning)
    # A module's own name means nothing else.
    return out | {module: {Meaning((module,))} for module in targets}


def _authors(targets: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Meaning]]:
    """The names in the code of the network's authors, by which kohya's scripts train SDXL, SD3 and FLUX.1."""
    kind = config.get("_class_name")
    naming = MODULES[kind].naming(config) if kind in MODULES else lambda name: None
    found: dict[str, dict[int, tuple[str, str]]] = collections.defaultdict(dict)
    for module in targets:
        if (cut := naming(f"{module}.weight")) is not None:
            found[cut.name.removesuffix(".weight")][cut.part] = module, cut.way
    for name, parts in found.items():
        if sorted(parts) == [*range(len(parts))]:
            yield name, Meaning(tuple(parts[i][0] for i in range(len(parts))), parts[0][1] == "swap")


def fits(key: str) -> bool:
    """Whether a tensor of this name is a factor of a LoRA, or of an adapter that is refused by name; networks have
    parameters that are called alpha as well."""
    match = _match(key)
    return match["slot"] != "alpha" if match else any(re.search(regex, key) for regex, _ in NOT_LORA)


def _match(key: str) -> re.Match | None:
    return next((match for regex in FORMS if (match := regex.fullmatch(key))), None)


def taken_apart(file: Path, key: str, spelled: Mapping[str, Any]) -> Named:
    """The parts of a key; raises `WeightsError` for what is known to be no LoRA."""
    for regex, what in NOT_LORA:
        if re.search(regex, key):
            raise WeightsError(f"{file}: {shown(key)} is {what}, which is not supported; supported: LoRA")
    match = _match(key)
    if match is None:
        return Named(key, None, (), "", False)
    module = match["module"].removeprefix(PEFT)
    component = None
    if module not in spelled:
        prefix = next((prefix for prefix in COMPONENTS if module.startswith(prefix)), None)
        component, module = COMPONENTS.get(prefix), module.removeprefix(prefix or "")
    last = match.groupdict().get("last")
    names = tuple(f"{module}.{name}" for name in LAST[last]) if last else (module,)
    return Named(key, component, names, SLOTS[match["slot"]], match["module"].startswith(PEFT))


def group(component: str | None) -> str | None:
    """The component, or "unet" for whatever denoises."""
    return DENOISERS[0] if component in DENOISERS else component


def chosen(file: Path, keys: list[Named], component: str | None) -> list[Named]:
    """The keys of one part of the pipeline."""
    known = sorted({key.component for key in keys if key.component})
    if component is None:
        if len({group(name) for name in known}) > 1:
            raise WeightsError(f"{file}: adapters of {', '.join(known)}: name one of them, component={known[0]!r}")
        if not keys:
            raise WeightsError(f"{file}: no tensors")
        return keys
    if component not in COMPONENTS.values():
        allowed = ", ".join(dict.fromkeys(COMPONENTS.values()))
        raise WeightsError(f"{file}: unknown component {component!r}; known: {allowed}")
    # What says nothing is taken for the one that was asked for, if nothing else is.
    kept = [key for key in keys if key.component is None or _is_of(key, component)]
    if not kept:
        raise WeightsError(f"{file}: no adapter of {component!r}; it has those of {', '.join(known)}")
    return kept


def _is_of(key: Named, component: str) -> bool:
    """Whether a key is of this part: diffusers' prefix is its name, another one may stand for whatever denoises."""
    plain = key.key.removeprefix(PEFT).startswith(f"{key.component}.")
    return key.component == component or (not plain and group(key.component) == group(component))


def matched(file: Path, keys: list[Named], spelled: Mapping[str, set[Meaning]]) -> dict[Meaning, dict[str, Named]]:
    """The keys by what they mean and by their slot.

    Raises:
      WeightsError: for keys of no module, or of several; two for one slot; a factor without the other.
    """
    out: dict[Meaning, dict[str, Named]] = collections.defaultdict(dict)
    strange = []
    for key in keys:
        meanings = {meaning for name in key.names for meaning in spelled.get(name, ())}
        if len(meanings) != 1:
            strange.append(key.key)
            continue
        slots = out[meanings.pop()]
        if key.slot in slots:
            raise WeightsError(f"{file}: two tensors are the {key.slot} of {key.names[-1]}, one of them {key.key}")
        slots[key.slot] = key
    if strange:
        raise WeightsError(f"{file}: {len(strange)} tensors are of no module of this network: {some(strange)}")
    halves = [next(iter(slots.values())).names[-1] for slots in out.values() if not {"a", "b"} <= slots.keys()]
    if halves:
        raise WeightsError(f"{file}: modules with one factor of two: {some(halves)}")
    counts = collections.Counter(module for meaning in out for module in meaning.modules)
    twice = [module for module, count in counts.items() if count > 1]
    if twice:
        raise WeightsError(f"{file}: factors of their own, and within those of several modules: {some(twice)}")
    return out
