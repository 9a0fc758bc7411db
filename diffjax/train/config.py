"""Configs: defaults, loading, overrides, and the checks that stop a wrong run before anything is allocated.

A config is data: numbers, strings, tuples and `"name(arg=1)"` specs in an `ml_collections.ConfigDict`. Everything that
is wrong with it is reported as one `ConfigError`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffjax import registry
from diffjax.train.errors import ConfigError

# What a stored run and the config of a resumed run may differ in: nothing that the next update depends on, apart from
# the learning rate schedule, which is laid out over `num_steps`, the order of sums over devices, and, as
# docs/parallel.md tells, which masks of dropout they draw.
RESUMABLE = (
    "num_steps", "stop_at", "log_every", "checkpoint_every", "keep", "tensorboard", "sample_every", "profile",
    "ema_snapshots", "sample", "eval", "input", "guard", "on_save_error", "mesh", "sharding", "accumulate_loop",
)

FIX = "; edit the config file or pass --{path}=VALUE"


def defaults() -> ConfigDict:
    """Every key of a config with the value that it takes when a config file does not set it."""
    from diffjax.train import optim
    from diffjax.train.survival import guard

    return ConfigDict(
        dict(
            seed=0,
            data="digits()",
            augment=(),
            input=dict(workers=0, threads=0, prefetch=2, max_bad=16),
            batch_size=128,
            microbatch=0,
            accumulate_loop="auto",
            num_steps=1000,
            init_from="",
            init_ema="",
            init_missing=(),
            init_ignore=(),
            schedule="edm()",
            head="edm(sigma_data=0.5)",
            time="lognormal(mean=-1.2, std=1.2)",
            weight="",
            loss=dict(space="", pairing="", self_condition=0.0, uncertainty=0, variance=""),
            model=dict(name="mlp"),
            label_dropout=0.1,
            optim=dict(optim.DEFAULTS, clip=1.0),
            ema=("power(std=0.1)",),
            ema_snapshots=0,
            log_every=50,
            checkpoint_every=500,
            keep=2,
            stop_at=0,
            sample_every=0,
            profile=(),
            sharding="data",
            mesh="",
            tensorboard=False,
            guard=dict(guard.DEFAULTS),
            on_save_error="stop",
            sample=dict(
                solver="dpmpp_2m()", steps=20, spacing="karras(s_max=40.0)", guidance=1.0, interval=(0.0, math.inf)
            ),
            eval=dict(num_samples=0, seeds=1, batch_size=128),
        )
    )


def fill(config: ConfigDict) -> ConfigDict:
    """The config with defaults, after the checks of keys, types and ranges; builds nothing.

    Raises:
      ConfigError: for an unknown key, a wrong type or an impossible value.
    """
    if isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references()
    filled = ConfigDict(_merge(dict(config), defaults(), "config"))
    for key, (holds, allowed) in _RANGES.items():
        value = _get(filled, key)
        if not holds(value):
            path = f"config.{key}"
            raise ConfigError(f"{path} is {value!r}; it must be {allowed}" + FIX.format(path=path))
    if len(set(filled.ema)) != len(filled.ema):
        raise ConfigError(f"config.ema is {filled.ema!r}; it must not name an average twice: remove one")
    return filled


def load(path: str) -> ConfigDict:
    """The config that `"configs/digits.py:smoke"` (the part after `:` goes to `get_config`) or a `config.json` names.

    Raises:
      ConfigError: if there is no such file, it has no `get_config`, `get_config` fails, or what comes is no mapping.
    """
    file, _, arg = (path + ":").replace(".py:", ".py\n", 1).partition("\n")
    arg, file = arg.rstrip(":"), file.rstrip(":")
    if not os.path.isfile(file):
        raise ConfigError(f"--config={path}: no file {file!r} in {os.getcwd()}; give a config like configs/digits.py")
    if file.endswith(".json"):
        with open(file, encoding="utf-8") as stream:
            try:
                return _mapping(json.load(stream), file)
            except ValueError as error:
                raise ConfigError(f"--config={path}: {error}; expected a JSON object of config keys") from error
    if not file.endswith(".py"):
        raise ConfigError(f"--config={path}: expected a config program (.py) or the config.json of a run")
    # A config says `from configs import common`, and names its user's own modules relative to where the user stands.
    for folder in (os.path.dirname(os.path.dirname(os.path.abspath(file))), os.getcwd()):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("diffjax_config", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ValueError("it defines no function get_config(arg=None) that returns the config")
        takes_arg = bool(inspect.signature(module.get_config).parameters)
        if arg and not takes_arg:
            raise ValueError(f"get_config() takes no argument, but {arg!r} was given after the colon")
        return _mapping(module.get_config(arg) if takes_arg else module.get_config(), "get_config")
    except Exception as error:
        if isinstance(error, ValueError):
            raise ConfigError(f"--config={path}: {error}") from error
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"line {at.lineno} of {at.filename}"
        raise ConfigError(f"--config={path}: {type(error).__name__}: {error} ({where})") from error


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets `config.key` (dotted) from the text of a `--config.key=text` flag, in place.

    A key whose value is a string takes the text as it is; any other takes a Python literal, or comma-separated items
    for a tuple. Whether the key exists and the type fits is `fill`'s to say.

    Raises:
      ConfigError: if a part of the key is not a group of keys.
    """
    *groups, last = key.split(".")
    node, known = config, defaults()
    for group in groups:
        if group not in node:
            node[group] = ConfigDict()
        node = node[group]
        known = known.get(group, {}) if isinstance(known, Mapping | ConfigDict) else {}
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"--config.{key}: {group!r} holds {node!r} and has no keys below it; set it as a whole")
    current = node.get(last, known.get(last) if isinstance(known, Mapping | ConfigDict) else None)
    # Unlocked and type-free: the file may leave out what the defaults have.
    with node.unlocked(), node.ignore_type():
        node[last] = text if isinstance(current, str) else _literal(text, isinstance(current, tuple | list))


def to_json(config: ConfigDict) -> str:
    """The config as strict JSON text: tuples become lists, infinities the string `"inf"`, both undone by `fill`."""
    return json.dumps(_plain(config), indent=2, sort_keys=True, allow_nan=False)


def differences(stored: ConfigDict, given: ConfigDict, *, without: tuple[str, ...] = RESUMABLE) -> list[str]:
    """`key: stored -> given` for every leaf in which two filled configs differ, `without` some top-level keys."""
    old, new = flat(stored), flat(given)
    keys = [k for k in sorted({**old, **new}) if k.split(".")[0] not in without]
    absent = "(not set)"
    changed = [k for k in keys if old.get(k, absent) != new.get(k, absent)]
    return [f"{k}: {old.get(k, absent)!r} -> {new.get(k, absent)!r}" for k in changed]


def _mapping(value, source: str) -> ConfigDict:
    if not isinstance(value, Mapping | ConfigDict):
        raise ValueError(f"{source} gives {type(value).__name__} {value!r:.40}, not a ConfigDict or dict")
    return value if isinstance(value, ConfigDict) else ConfigDict(dict(value))


@contextlib.contextmanager
def naming(path: str):
    """Turns whatever a piece of the config raises into a `ConfigError` that names the key."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        text = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        key = f"{path}.KEY" if isinstance(_get(defaults(), path.removeprefix("config.")), ConfigDict) else path
        # A message that names another key or a page knows better what to do.
        cured = "--config." in text or "docs/" in text
        raise ConfigError(f"{path}: {text}" + ("" if cured else FIX.format(path=key))) from error


def _merge(given: Mapping, default: ConfigDict, path: str) -> dict:
    unknown = [k for k in given if k not in default]
    if unknown:
        known = ", ".join(sorted(default))
        # A key that was written without its group is found too: lr is optim.lr.
        inside = [key for key in flat(default) if registry.nearest(unknown[0], [key.split(".")[-1]])]
        hint = registry.nearest(unknown[0], default) or (f"; did you mean {inside[0]!r}?" if inside else "")
        raise ConfigError(f"unknown key {path}.{unknown[0]}; known keys of {path}: {known}{hint}")
    merged = {}
    for key, value in default.items():
        where = f"{path}.{key}"
        if key not in given:
            merged[key] = value.to_dict() if isinstance(value, ConfigDict) else value
        elif where == "config.model":
            merged[key] = _check_model_spec(given[key])
        elif isinstance(value, ConfigDict):
            if not isinstance(given[key], Mapping | ConfigDict):
                raise ConfigError(f"{where} is {given[key]!r}; it is a group of keys: {', '.join(sorted(value))}")
            merged[key] = _merge(dict(given[key]), value, where)
        else:
            merged[key] = _coerce(given[key], value, where)
    return merged


def _check_model_spec(spec) -> dict:
    """A network's settings are checked by its own factory; here only their form is."""
    if isinstance(spec, str):
        spec = {"name": spec}
    name = spec.get("name") if isinstance(spec, Mapping | ConfigDict) else None
    if not isinstance(name, str):
        raise ConfigError(f"config.model is {spec!r}; it needs a name, as in dict(name='unet', ...)")
    return _tuples(spec.to_dict() if isinstance(spec, ConfigDict) else dict(spec))


def _coerce(value, default, path):
    """`value` in the type of `default`; lossless conversions only."""
    kind = type(default)
    if kind is float and isinstance(value, str) and value.lstrip("+-") in ("inf", "infinity"):
        value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is tuple and isinstance(value, list):
        value = _tuples(value)
    if kind is tuple and isinstance(value, str):
        value = (value,) if value else ()
    if type(value) is not kind:
        raise ConfigError(
            f"{path} is {value!r} ({type(value).__name__}); it must be {_KINDS[kind]}, such as {default!r}"
            + FIX.format(path=path)
        )
    if kind is tuple and default and isinstance(default[0], float):
        return tuple(_coerce(v, default[0], path) for v in value)
    if kind is tuple and path in ("config.ema", "config.augment", "config.init_missing", "config.init_ignore"):
        return tuple(_coerce(v, "", path) for v in value)
    return value


def _tuples(value):
    """Lists to tuples, all the way down: a config that went through JSON equals the one that did not."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
    return value


def _plain(value):
    if isinstance(value, ConfigDict | Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def flat(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """The leaves of a config by dotted key."""
    found = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict | Mapping)
        found.update(flat(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return found


def _get(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def _literal(text: str, many: bool):
    lowered = {"true": True, "false": False, "none": None, "inf": math.inf, "-inf": -math.inf}
    if text.lower() in lowered and not many:
        return lowered[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if not many:
            return text
        inner = text.strip()
        if inner[:1] in "([" and inner[-1:] in ")]":
            inner = inner[1:-1]
        return tuple(_literal(item.strip(), False) for item in _split(inner) if item.strip())
    if many and not isinstance(value, tuple | list):
        return (value,)
    return _tuples(value)


def _split(text: str) -> list[str]:
    """`text` cut at the commas that are outside parentheses: `"power(std=0.1),decay(0.9)"` has two items."""
    items, depth = [""], 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "," and not depth:
            items.append("")
        else:
            items[-1] += char
    return items


def _at_least(low):
    return (lambda v: v >= low), f"at least {low}"


_KINDS = {bool: "a bool", int: "an int", float: "a float", str: "a string", tuple: "a tuple"}
_UNIT = (lambda v: 0.0 <= v <= 1.0), "in [0, 1]"
_RANGES = {
    "seed": ((lambda v: 0 <= v < 2**31), "in 0 ... 2**31 - 1"),
    "batch_size": _at_least(1),
    "input.workers": _at_least(0),
    "input.threads": _at_least(0),
    "input.prefetch": _at_least(1),
    "input.max_bad": _at_least(0),
    "num_steps": _at_least(1),
    "label_dropout": _UNIT,
    "loss.self_condition": _UNIT,
    "loss.uncertainty": ((lambda v: v >= 0), "a number of Fourier features, or 0 for none"),
    "guard.on_bad": ((lambda v: v in ("stop", "skip", "rollback")), "'stop', 'skip' or 'rollback'"),
    "guard.spike": ((lambda v: v == 0 or v > 1), "a factor above 1 over the median of the loss, or 0 for no limit"),
    "guard.patience": _at_least(0),
    "guard.max_events": _at_least(0),
    "on_save_error": ((lambda v: v in ("stop", "continue")), "'stop' or 'continue'"),
    "ema_snapshots": ((lambda v: v >= 0), "a number of steps between snapshots, or 0 for none"),
    "log_every": _at_least(1),
    "checkpoint_every": _at_least(1),
    "keep": _at_least(2),
    "sample_every": _at_least(0),
    "profile": (
        (lambda v: not v or (len(v) == 2 and all(isinstance(n, int) for n in v) and 0 <= v[0] < v[1])),
        "() or (first, last): trace the updates after the first to the last of these steps",
    ),
    "stop_at": ((lambda v: v >= 0), "a step, or 0 to run to num_steps"),
    "sharding": ((lambda v: v in ("data", "fsdp", "rules", "pmap")), "'data', 'fsdp', 'rules' or 'pmap'"),
    "microbatch": ((lambda v: v >= 0), "a number of rows, or 0 for all rows of a device at once"),
    "accumulate_loop": ((lambda v: v in ("auto", "scan", "unroll")), "'auto', 'scan' or 'unroll'"),
    "sample.steps": _at_least(1),
    "sample.guidance": (math.isfinite, "finite (1 turns guidance off)"),
    "sample.interval": ((lambda v: len(v) == 2 and 0.0 <= v[0] < v[1]), "(low, high) of sigma/alpha, 0 <= low < high"),
    "eval.num_samples": ((lambda v: v == 0 or v >= 6), "at least 6, or 0 for as many as are held out (to 5000)"),
    "eval.seeds": _at_least(1),
    "eval.batch_size": _at_least(1),
}
