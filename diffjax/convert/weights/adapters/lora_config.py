"""The config of a LoRA, as peft writes it beside a file or diffusers into its metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.convert.weights.adapters.lora_names import COMPONENTS, group
from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folders.find import PICKLES
from diffjax.convert.weights.tensors import read_header
from diffjax.convert.weights.tensors.strict import parse_object, read_json, shown

METADATA = "lora_adapter_metadata"
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# What else changes the result, and the values that do not.
PLAIN = {
    "peft_type": ("LORA",), "use_dora": (False,), "lora_bias": (False,), "bias": ("none",), "use_qalora": (False,),
    "alora_invocation_tokens": (None,), "layer_replication": (None,), "modules_to_save": (None, []),
    "target_parameters": (None, []), "trainable_token_indices": (None, []), "arrow_config": (None,),
    "kasa_config": (None,), "monteclora_config": (None,), "velora_config": (None,), "use_bdlora": (None, False),
    # Others (PiSSA, OLoRA, CorDA, LoftQ, ...) start from changed weights of the network itself.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"), "use_rslora": (False, True),
}  # fmt: skip
# peft takes any regex for the end of a module's name; those that it and diffusers write are names.
PATTERN = re.compile(r"(\^?)((?:\w|\.|\\\.)+)\$?")
MOST_LOOSE = 1000  # names of other modules than those of the file


class Config(NamedTuple):
    """What a config says of the factors.

    Attributes:
      alpha: of all modules; None without a config.
      alphas: those of some, by `(whether it is the module's whole name, the end of its name)`, behind their number:
        the first counts.
      use_rslora: see `diffjax.adapters.lora.Adapter`.
    """

    alpha: float | None
    alphas: Mapping[tuple[bool, str], tuple[int, float]]
    use_rslora: bool

    def alpha_of(self, module: str) -> float | None:
        """That of a module, by its name in the file; None if nothing is said of it."""
        return min((self.alphas[end] for end in _ends(module) if end in self.alphas), default=(0, self.alpha))[1]

    def check_names(self, file: Path, modules: Collection[str]) -> None:
        """Raises `WeightsError` for a name that fits none of these modules but as a regex, whose dots are any sign."""
        used = {end for module in modules for end in _ends(module)}
        loose = [(whole, name) for whole, name in self.alphas if "." in name and (whole, name) not in used]
        if len(loose) > MOST_LOOSE:
            raise WeightsError(f"{file}: alpha_pattern has {len(loose)} names that are of none of its modules")
        for whole, name in loose:
            regex = re.compile(("" if whole else r"(?:.*\.)?") + name)
            if fits := next(filter(regex.fullmatch, modules), None):
                told = f"{shown(name)}, which as a regex fits {shown(fits)}; write the name of the module"
                raise WeightsError(f"{file}: alpha_pattern has {told}")


def _ends(module: str) -> list[tuple[bool, str]]:
    """What may stand for a module: its whole name, and the ends of it."""
    parts = module.split(".")
    return [(True, module), *((False, ".".join(parts[i:])) for i in range(len(parts)))]


def opened(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of tensors, and the settings beside it or in its metadata."""
    if path.is_dir():
        here = [path / name for name in FILES if (path / name).is_file()]
        if not here:
            raise WeightsError(f"{path}: no adapter; looked for {' and '.join(FILES)}")
        path = here[0]
    if path.name == FILES[1] and (path.parent / "adapter_config.json").is_file():
        return path, read_json(path.parent / "adapter_config.json")
    readable = path.is_file() and not path.name.endswith(PICKLES)  # `find` tells what else there is
    if readable and (text := read_header(path)[1].get(METADATA)) is not None:
        return path, parse_object(text.encode(), f"{path}: its {METADATA}")
    return path, {}


def config_of(file: Path, settings: Mapping[str, Any], component: str | None) -> Config:
    """The config of one part of the pipeline.

    Raises:
      WeightsError: for what is not plain LoRA, or not of its type; settings for other parts alone.
    """
    settings = _own(file, settings, component)
    if not settings:
        return Config(None, {}, False)
    for name, plain in PLAIN.items():
        value = settings.get(name, plain[0])
        if not any(type(value) is type(v) and value == v for v in plain):
            told = f"{name}={shown(value)} is not supported; supported: {', '.join(map(repr, plain))}"
            raise WeightsError(f"{file}: {told}")
    if type(rank := settings.get("r", 1)) is not int or rank < 1:
        raise WeightsError(f"{file}: r={shown(rank)}: expected a whole number above zero")
    if "lora_alpha" not in settings:
        raise WeightsError(f"{file}: its config has no lora_alpha, without which the size of the change is not known")
    alpha = _number(file, "lora_alpha", settings["lora_alpha"])
    _patterns(file, "rank_pattern", settings.get("rank_pattern"))  # ranks are those of the tensors
    alphas = _patterns(file, "alpha_pattern", settings.get("alpha_pattern"))
    return Config(alpha, alphas, settings.get("use_rslora", False))


def _own(file, settings, component):
    """The settings without the prefix of the component, where they have one."""
    prefixes = [prefix for prefix in COMPONENTS if prefix.endswith(".")]
    found = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in settings)]
    fits = [prefix for prefix in found if component is None or group(COMPONENTS[prefix]) == group(component)]
    fits = [prefix for prefix in fits if COMPONENTS[prefix] == component] or fits
    if not found:
        return settings
    if len(fits) != 1:
        told = f"its config is for {', '.join(prefix.rstrip('.') for prefix in found)}"
        raise WeightsError(f"{file}: {told}, and its tensors are of {component or 'a part that they do not name'}")
    return {name.removeprefix(fits[0]): value for name, value in settings.items() if name.startswith(fits[0])}


def _number(file, name, value):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise WeightsError(f"{file}: {name}={shown(value)}: expected a number")
    return float(value)


def _patterns(file, name, values):
    if not isinstance(values, dict | None):
        raise WeightsError(f"{file}: {name}={shown(values)}: expected a map from modules to numbers")
    out: dict[tuple[bool, str], tuple[int, float]] = {}
    for i, (pattern, value) in enumerate((values or {}).items()):
        match = PATTERN.fullmatch(pattern)
        if match is None:
            told = "expected names of modules, such as '^transformer_blocks.0.attn1.to_q'"
            raise WeightsError(f"{file}: {name} has {shown(pattern)}; {told}")
        key = bool(match[1]), match[2].replace("\\.", ".")
        out.setdefault(key, (i, _number(file, f"{name}[{shown(pattern)}]", value)))
    return out
